"""Prints the table of what works with distillation, from the tests' `works` markers.

python tests/what_works.py > nbs/what_works.md
"""

import contextlib
import io
import sys
from pathlib import Path

import pytest

HEAD = """# What works with what

Each row is held by the tests beside it, which train real fastai Learners. Made from the tests' markers by
`python tests/what_works.py > nbs/what_works.md`.
"""


class Collector:
    def __init__(self):
        self.rows = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("works"):
                name = f"{item.path.stem}::{item.originalname}"
                self.rows.setdefault(mark.args[0], {}).setdefault(mark.args[1], set()).add(name)


def table() -> str:
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["--collect-only", "-q", str(Path(__file__).parent)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        sys.exit(f"collecting the tests failed: {code}")
    lines = [HEAD]
    for area, rows in collector.rows.items():
        lines += [f"## {area.capitalize()}", "", "| what | held by |", "|---|---|"]
        lines += [f"| {row} | {', '.join(f'`{name}`' for name in sorted(names))} |" for row, names in rows.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(table())
