"examples/benchmark_transformers.py: its page is what the script makes of the committed runs."

import json
import shutil
from pathlib import Path

import pytest
from conftest import example

RESULTS = Path(__file__).parents[1] / "nbs" / "results"


@pytest.fixture(scope="module")
def script():
    with example("benchmark_transformers") as names:
        yield names


def test_the_stored_page_is_made_of_the_stored_rows(script, no_training, tmp_path):
    shutil.copy(RESULTS / "transformers.jsonl", tmp_path)
    no_training()
    script["main"](["--report", f"--out={tmp_path}"])
    assert (tmp_path / "transformers.md").read_text() == (RESULTS / "transformers.md").read_text()


def test_every_row_has_all_seeds(script):
    rows = [json.loads(line) for line in (RESULTS / "transformers.jsonl").read_text().splitlines()]
    for stage, names in (("losses", script["LOSSES"]), ("encoder", script["ENCODER"])):
        found = {(r["settings"]["how"], r["settings"]["seed"]) for r in rows if r["settings"]["stage"] == stage}
        assert found == {(name, seed) for name in names for seed in range(3)}
