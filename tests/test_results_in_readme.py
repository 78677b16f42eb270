"The tables and pictures of README, guides and results are what the script makes of the stored results."

import shutil
from pathlib import Path

import pytest
from conftest import example

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "nbs/results/README.md"]
PAGES += [f"nbs/{name}.md" for name in ("unlabeled", "choosing_a_loss", "choosing_a_student", "training_length")]


@pytest.fixture(scope="module")
def script():
    with example("results_in_readme") as names:
        yield names


def test_tables_are_made_from_the_stored_results_and_the_rest_of_a_page_stays(script, tmp_path):
    for page in PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / page).read_text(encoding="utf-8")
        (tmp_path / page).write_text(text.replace("| student alone |", "| somebody else |"), encoding="utf-8")
    (tmp_path / "nbs" / "images").mkdir()
    script["main"](tmp_path)
    for page in PAGES:
        made, stored = ((root / page).read_text(encoding="utf-8") for root in (tmp_path, ROOT))
        assert made == stored, f"{page}: run python examples/results_in_readme.py"
    for picture in ("results.png", "payoff.png"):
        assert (tmp_path / "nbs" / "images" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_page_without_the_block_is_an_error(script, tmp_path):
    page = shutil.copy(ROOT / "LICENSE", tmp_path / "page.md")
    with pytest.raises(ValueError, match="no block <!-- payoff -->"):
        script["fill"](page, payoff="")


def test_a_cell_is_mean_spread_and_gain_over_the_seeds(script):
    accs = script["accuracies"]()
    column = accs["digits, 100 labels"]
    assert all(len(a) in (0, 5) for column in accs.values() for a in column.values())
    assert "–" in script["table"](accs)  # not run
    soft, alone = column["`SoftTarget`"], column["student alone"]
    row = next(line for line in script["table"](accs).splitlines() if line.startswith("| `SoftTarget` |"))
    cell = f"{soft.mean():.1f} ± {soft.std(ddof=1):.1f} ({(soft - alone).mean():+.1f})"
    assert row.split(" | ")[1] == cell
