"""Prints the table of what works with distillation, from the tests' `works` markers.

python tests/what_works.py > nbs/what_works.md
"""

import contextlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HEAD = """# What works with what

Each row is tested with real fastai Learners. The tick links to the file of the test; its title is the test's name. This
page is generated from the tests' markers: `python tests/what_works.py > nbs/what_works.md`.
"""


class Collector:
    "A pytest plugin that keeps what was collected."

    items: Iterable[pytest.Item] = ()

    def pytest_collection_finish(self, session):
        self.items = session.items


def table(items: Iterable[pytest.Item]) -> str:
    "Markdown, an area after the other."
    areas: dict[str, dict[str, set[str]]] = {}
    for item in items:
        for mark in item.iter_markers("works"):
            area, row = mark.args
            areas.setdefault(area, {}).setdefault(row, set()).add((item.path.stem, item.originalname))
    lines = [HEAD]
    for area, rows in areas.items():
        lines += [f"## {area.capitalize()}", "", "| what | test |", "|---|---|"]
        lines += [f"| {row} | {' '.join(tick(*test) for test in sorted(tests))} |" for row, tests in rows.items()]
        lines.append("")
    return "\n".join(lines)


def tick(file: str, test: str) -> str:
    return f'[✓](../tests/{file}.py "{test}")'


if __name__ == "__main__":
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["--collect-only", "-q", "-m", "", str(TESTS)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        sys.exit(f"collecting the tests failed: {code}")
    print(table(collector.items), end="")
