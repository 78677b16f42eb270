"examples/losses_guide.py, unmodified, on generated pictures where fastai looks for Pets."

import re
import runpy
from pathlib import Path

import pytest
from fastai.data.external import fastai_cfg
from pets import make_pets_home

SCRIPT = Path(__file__).parents[1] / "examples" / "losses_guide.py"
SMALL = ["--size=64", "--images=40", "--epochs=1", "--teacher-epochs=1", "--bs=8", "--no-pretrained", "--workers=0"]
OUTPUT = ["SoftTarget", "DecoupledKD", "Logits", "Mutual"]
LOSSES = [*OUTPUT, "Attention", "Similarity", "FitNet", "ActivationBoundaries"]
PAIRS = """
Student          Teacher
conv1        <-> 0.0
layer1       <-> 0.4
layer2       <-> 0.5
layer3       <-> 0.6
layer4       <-> 0
"""


@pytest.fixture
def pets(tmp_path, monkeypatch):
    "A fastai home with 40 pictures."
    monkeypatch.setenv("FASTAI_HOME", str(make_pets_home(tmp_path)))
    fastai_cfg.cache_clear()
    yield
    fastai_cfg.cache_clear()


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.mark.slow
@pytest.mark.usefixtures("pets")
def test_guide(main, capsys):
    main(SMALL)
    out = capsys.readouterr().out

    assert PAIRS in out
    # teacher, baseline and eight losses: the header, then epoch, two losses and accuracy
    assert len(re.findall(r"epoch +train_loss +valid_loss +accuracy +time", out)) == 10
    assert len(re.findall(r"\b0 +\d+\.\d+ +\d+\.\d+ +[01]\.\d+ +\d\d:\d\d", out)) == 10

    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert table[0] == ["Loss", "Type", "Accuracy", "vs Baseline", "Needs layers?"]
    rows = {name: cells for name, *cells in table[2:]}
    assert list(rows) == ["No distillation", *LOSSES]
    accuracies = {name: float(cells[1].removesuffix("%")) for name, cells in rows.items()}
    assert all(0 <= acc <= 100 for acc in accuracies.values())  # false for nan
    for name in LOSSES:
        gain = float(rows[name][2].removesuffix("%"))
        assert gain == pytest.approx(accuracies[name] - accuracies["No distillation"], abs=0.11)  # rounded
    assert [rows[name][3] for name in LOSSES] == ["No"] * 4 + ["Yes"] * 2 + ["Yes (same channels)"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("pets")
def test_few_losses_in_the_order_asked(main, capsys):
    main([*SMALL, "--losses", "Attention", "SoftTarget", "--images", "10", "--bs", "64", "--size", "32"])
    out = capsys.readouterr().out
    assert re.findall(r"^\| (\w+) +\| (?:Output|Intermediate)", out, re.M) == ["Attention", "SoftTarget"]
    assert "nan" not in out


def test_wrong_loss(main, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--losses", "SoftTarget", "Magic"])
    err = capsys.readouterr().err
    assert "argument --losses: invalid choice: 'Magic'" in err
    assert all(name in err for name in LOSSES)
