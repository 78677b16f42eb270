"examples/quickstart.py, unmodified, for a few steps."

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.torch_core import TensorImageBW

from fasterai_kd import KnowledgeDistillationCallback, SoftTarget

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
SMALL = ["--epochs=1", "--seeds=1", "--draws=320"]


@pytest.fixture(scope="module")
def quickstart():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="quickstart"))


def rows(out):
    "The final table: name → mean, std (None for one seed), gain (None for the first row)."
    table = out[out.index("accuracy in %") : out.index("parameters")]
    found = re.findall(
        r"^(student alone|distilled|with unlabeled images) +(\d+\.\d)(?: ± (\d+\.\d))?(?: +([+-]\d+\.\d))?$",
        table,
        re.M,
    )
    return {name: tuple(float(n) if n else None for n in numbers) for name, *numbers in found}


LOADED = """
import sys, numpy
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
print(*learn.predict(numpy.zeros((8, 8), "uint8"))[2].shape)
"""


@pytest.mark.slow
def test_it_shows_and_saves_the_results_and_exports_a_student(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quickstart.main([*SMALL, "--table=payoff.md"])
    out, err = capsys.readouterr()

    assert err == ""
    assert len(re.findall(r"^ +epoch +train_loss +valid_loss +accuracy +time$", out, re.M)) == 4  # teacher, 3 students
    table = rows(out)
    assert list(table) == ["student alone", "distilled", "with unlabeled images"]
    alone = table["student alone"][0]
    for name, (mean, std, gain) in table.items():
        assert 0 <= mean <= 100
        assert std is None
        assert gain is None if name == "student alone" else gain == pytest.approx(mean - alone, abs=0.11)  # rounded
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^student alone +3,628 +21 +[\d.]+ +[\d.]+ +103× +7\d× +[\d.,]+×$", out, re.M)
    assert (tmp_path / "payoff.md").read_text(encoding="utf-8").count("\n| ") == 6  # header, rule, four models

    load = [sys.executable, "-W", "ignore", "-c", LOADED, "student.pkl"]  # as another program would
    loaded = subprocess.run(load, cwd=tmp_path, capture_output=True, text=True)
    assert loaded.stdout.split()[-1] == "10", loaded.stderr


@pytest.mark.slow
def test_with_several_seeds_the_table_has_their_spread(quickstart, tmp_path, capsys):
    quickstart.main(
        [
            *SMALL,
            "--seeds=2",
            "--draws=100",
            f"--picture={tmp_path / 'digits.svg'}",
            f"--export={tmp_path / 'student.pkl'}",
        ]
    )
    assert all(std is not None for _, std, _ in rows(capsys.readouterr().out).values())
    assert "<svg" in (tmp_path / "digits.svg").read_text(encoding="utf-8")


def test_the_student_is_100_times_smaller_than_its_teacher(quickstart):
    big, small = (sum(p.numel() for p in quickstart.cnn(w).parameters()) for w in (64, 6))
    assert big > 100 * small


def keys(items):
    return [x.tobytes() for x, _ in items]


def test_students_share_100_images_of_the_teacher_and_are_judged_on_others(quickstart):
    few, full = quickstart.get_dls(100, draws=400), quickstart.get_dls(897, draws=897)
    assert len(few.train_ds) == 400
    assert len(set(keys(few.train.items))) == 100
    assert set(keys(few.train.items)) <= set(keys(full.train.items))
    assert keys(few.valid.items) == keys(full.valid.items)
    assert len(few.valid.items) == 900
    assert not set(keys(full.train.items)) & set(keys(full.valid.items))


def test_the_unlabeled_images_are_those_that_the_student_has_no_labels_of(quickstart):
    few, rest, valid = map(keys, quickstart.get_images(100))
    assert [len(few), len(rest), len(valid)] == [100, 797, 900]
    assert not set(few) & set(rest)
    assert not set(rest) & set(valid)


def test_training_images_move_by_at_most_one_pixel_and_others_stay(quickstart):
    x = torch.zeros(64, 1, 8, 8)
    x[:, 0, 4, 4] = torch.arange(1, 65)
    moved = quickstart.Shift()(TensorImageBW(x), split_idx=0)
    assert torch.equal(moved.amax((1, 2, 3)), torch.arange(1.0, 65))  # each image stays in its place in the batch
    where = {tuple(i[1:]) for i in moved.nonzero()[:, 1:].tolist()}
    assert where == {(row, col) for row in (3, 4, 5) for col in (3, 4, 5)}
    assert torch.equal(quickstart.Shift()(TensorImageBW(x), split_idx=1), x)


def test_a_seed_gives_the_same_student_again(quickstart):
    def train(seed):
        torch.manual_seed(0)
        kd = KnowledgeDistillationCallback(quickstart.cnn(8), SoftTarget)
        learn = quickstart.get_learner(6, 100, 320, seed)
        quickstart.fit(learn, 1, 2e-2, cbs=kd)
        return torch.cat([p.flatten() for p in learn.model.parameters()])

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))
