"The README's table and picture of results are what the script makes of the stored results."

from pathlib import Path

import pytest
from conftest import example

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    with example("results_in_readme") as names:
        yield names


def test_the_table_is_made_from_the_stored_results_and_the_rest_of_the_page_stays(script, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = tmp_path / "README.md"
    made.write_text(readme.replace("| student alone |", "| somebody else |"), encoding="utf-8")
    script["main"](made, tmp_path / "results.png")
    assert made.read_text(encoding="utf-8") == readme, "run python examples/results_in_readme.py"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_mean_spread_and_gain_over_the_seeds(script):
    accs = script["accuracies"]()
    column = accs["digits, 100 labels"]
    assert all(len(a) in (0, 5) for column in accs.values() for a in column.values())
    assert "–" in script["table"](accs)  # not run
    soft, alone = column["`SoftTarget`"], column["student alone"]
    row = next(line for line in script["table"](accs).splitlines() if line.startswith("| `SoftTarget` |"))
    cell = f"{soft.mean():.1f} ± {soft.std(ddof=1):.1f} ({(soft - alone).mean():+.1f})"
    assert row.split(" | ")[1] == cell
