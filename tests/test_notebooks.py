"Every tutorial runs from top to bottom, and is stored with the outputs of a clean run."

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pets import make_pets_home

NBS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
FAST = {  # set after the cell tagged "parameters"
    "01_quickstart": "epochs, seeds = 1, 1",
    "03_layers": "epochs, draws = 1, 900",
    "04_combining": "epochs, draws, seeds = 1, 900, 1",
    "05_your_own": "epochs, seeds, draws, n_texts = 1, 1, 240, 30",
    "06_faster": "epochs, n_images = 2, 200",
    "07_coming_from": "epochs, draws = 1, 200",
    "02_losses_guide": """
size, n_images, bs, num_workers = 64, 24, 8, 0
epochs = teacher_epochs = 1
pretrained = False
""",
}


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(nb):
    return [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    nb = read(path)
    at = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
    nb.cells.insert(at + 1, nbformat.v4.new_code_cell(FAST[path.stem]))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "examples"))  # they run in another folder here
    monkeypatch.setenv("FASTAI_HOME", str(make_pets_home(tmp_path)))
    NotebookClient(nb, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_the_stored_notebook_has_the_outputs_of_a_run_from_top_to_bottom(path):
    nb = read(path)
    cells = [c for c in nb.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs(nb) if o.output_type == "error" or o.get("name") == "stderr"]
    text = nbformat.writes(nb)
    assert "Traceback" not in text
    assert "site-packages" not in text
