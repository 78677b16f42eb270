"Every tutorial runs from top to bottom, and is stored with the outputs of a clean run."

import gzip
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

NBS = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
FAST = {  # set after the cell tagged "parameters"
    "01_quickstart": "epochs, draws = 1, 640",
    "02_losses_guide": "epochs, seeds, draws, n_teacher, n_student = 1, 1, 200, 200, 100",
    "03_layers": "epochs, n_crops = 1, 64",
    "04_combining": "epochs, draws, seeds = 1, 640, 1",
    "05_your_own": "epochs, seeds, draws, n_texts = 1, 1, 240, 30",
    "06_faster": "epochs, n_images = 3, 200",
    "07_coming_from": "epochs, draws = 1, 200",
    "08_your_own_photos": """
n_images, n_labeled, n_valid, teacher_epochs, epochs = 80, 40, 200, 1, 1
torch.set_num_threads(1)
""",
    "09_no_teacher": "epochs, draws = 1, 640",
}


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path):
    "A folder that stands in for Fashion-MNIST: 600 images of noise."
    folder, rng = tmp_path / "fashion", np.random.default_rng(0)
    folder.mkdir()
    for who, n in (("train", 400), ("t10k", 200)):
        write_idx(folder / f"{who}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{who}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return folder


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(nb):
    return [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]


@pytest.mark.slow
@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_the_notebook_runs(path, tmp_path, fashion, monkeypatch):
    nb = read(path)
    at = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
    nb.cells.insert(at + 1, nbformat.v4.new_code_cell(FAST[path.stem]))
    root = Path(__file__).parents[1]  # they run in another folder here
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (root / "examples", root))))
    monkeypatch.setenv("FASHION_MNIST", str(fashion))
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


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_every_picture_has_an_alternative_text(path):
    for cell in read(path).cells:
        drawn = cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt) > 20 or not drawn, cell.source


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_no_row_of_the_recorder_is_printed_as_a_list(path):
    printed = "".join(o.text for o in outputs(read(path)) if o.output_type == "stream")
    assert not re.search(r"^\[\d+, [\d.]+", printed, re.MULTILINE)
