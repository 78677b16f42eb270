"examples/quickstart.py, unmodified, for a few steps."

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasterai_kd import KnowledgeDistillationCallback, SoftTarget

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
SMALL = ["--epochs=1", "--seeds=1", "--draws=320"]


@pytest.fixture(scope="module")
def quickstart():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="quickstart"))


def rows(out):
    "The final table: name → mean, std (None for one seed), gain (None for the first row)."
    table = out[out.index("accuracy in %") :]
    found = re.findall(
        r"^(student alone|distilled|with unlabeled images) +(\d+\.\d)(?: ± (\d+\.\d))?(?: +([+-]\d+\.\d))?$",
        table,
        re.M,
    )
    return {name: tuple(float(n) if n else None for n in numbers) for name, *numbers in found}


def test_it_prints_a_table_of_all_students_and_saves_a_picture(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quickstart.main(SMALL)
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


def test_with_several_seeds_the_table_has_their_spread(quickstart, tmp_path, capsys):
    quickstart.main([*SMALL, "--seeds=2", "--draws=100", f"--picture={tmp_path / 'digits.svg'}"])
    assert all(std is not None for _, std, _ in rows(capsys.readouterr().out).values())
    assert "<svg" in (tmp_path / "digits.svg").read_text(encoding="utf-8")


def test_the_student_is_100_times_smaller_than_its_teacher(quickstart):
    big, small = (sum(p.numel() for p in quickstart.cnn(w).parameters()) for w in (64, 6))
    assert big > 100 * small


def test_students_share_100_images_of_the_teacher_and_are_judged_on_others(quickstart):
    few, full = quickstart.get_dls(100, draws=400), quickstart.get_dls(897, draws=897)

    def images(dl):
        return [x.numpy().tobytes() for x, _ in dl.dataset]

    assert len(few.train_ds) == 400
    assert len(set(images(few.train))) == 100
    assert set(images(few.train)) <= set(images(full.train))
    assert images(few.valid) == images(full.valid)
    assert len(images(few.valid)) == 900
    assert not set(images(full.train)) & set(images(full.valid))


def test_the_unlabeled_images_are_those_that_the_student_has_no_labels_of(quickstart):
    few, rest, valid = quickstart.get_images(100)
    assert [len(part) for part in (few, rest, valid)] == [100, 797, 900]
    keys = [{x.numpy().tobytes() for x, _ in part} for part in (few, rest, valid)]
    assert not keys[0] & keys[1]
    assert not keys[1] & keys[2]


def test_images_move_by_at_most_one_pixel(quickstart):
    x = torch.zeros(64, 1, 8, 8)
    x[:, 0, 4, 4] = torch.arange(1, 65)
    moved, y = quickstart.shift((x, torch.arange(64)))
    assert torch.equal(moved.amax((1, 2, 3)), torch.arange(1.0, 65))  # each image stays in its place in the batch
    assert torch.equal(y, torch.arange(64))
    where = {tuple(i[1:]) for i in moved.nonzero()[:, 1:].tolist()}
    assert where == {(row, col) for row in (3, 4, 5) for col in (3, 4, 5)}


def test_a_seed_gives_the_same_student_again(quickstart):
    def train(seed):
        torch.manual_seed(0)
        kd = KnowledgeDistillationCallback(quickstart.cnn(8), SoftTarget)
        learn = quickstart.get_learner(6, 100, 320, seed)
        quickstart.fit(learn, 1, 2e-2, cbs=kd)
        return torch.cat([p.flatten() for p in learn.model.parameters()])

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))
