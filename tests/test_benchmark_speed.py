"examples/benchmark_speed.py, unmodified, with tiny models and few steps: what it shows, not how fast."

import json
import re

import pytest
import torch
from conftest import example

TINY = ["--student-arch=squeezenet1_1", "--teacher-arch=squeezenet1_1", "--px=32", "--bs=2", "--steps=1", "--rounds=1"]
STEPS = ["student alone", "limit", "ours", "ours, cache", "fasterai", "torchdistill"]
OUTPUT = ("SoftTarget", "DecoupledKD", "Logits", "Mutual")
ABSENT = r"not installed|no `\w+` here"


@pytest.fixture(scope="module")
def main():
    with example("benchmark_speed") as names:
        yield names["main"]


def table(out):
    "Header and rows of the Markdown table."
    rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in out.splitlines() if line.startswith("| ")]
    assert all(len(row) == len(rows[0]) for row in rows)
    return rows[0], rows[1:]


def numbers(cells):
    "All numbers in the cells, each positive."
    found = [float(n) for cell in cells for n in re.findall(r"[\d.]+(?:e[+-]?\d+)?", cell)]
    assert all(0 < n < float("inf") for n in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "losses"),
    [
        ("frozen", ["SoftTarget", "DecoupledKD", "Attention", "FitNet"]),
        ("trainable", ["Logits", "Similarity"]),
        ("vision_learner", ["Mutual", "ActivationBoundaries"]),
    ],
)
def test_steps_has_a_row_for_each_loss_and_variant(main, tmp_path, capsys, teacher, losses):
    files = [f"--markdown={tmp_path / 't.md'}", f"--out={tmp_path / 't.json'}"]
    main([*TINY, f"--teacher={teacher}", f"--losses={','.join(losses)}", "--pairs=2", *files])
    out = capsys.readouterr().out
    header, rows = table(out)
    assert header[:5] == ["loss", "step", "ms (fastest)", "/ student alone", "/ limit"]
    assert [row[:2] for row in rows] == [[loss, step] for loss in losses for step in STEPS]
    saved, left = {}, {}
    for loss, step, *cells, grads in rows:
        if not re.fullmatch(ABSENT, cells[0]):
            assert len(numbers(cells)) == 9  # ms and fastest, two ratios with their ranges, MB saved
            saved[loss, step], left[loss, step] = cells[3], float(grads)
    assert {step for _, step in left} >= {"student alone", "limit", "ours"}
    assert all(saved[loss, "ours"] == saved[loss, "limit"] for loss in losses if loss in OUTPUT)
    trained = {step for (_, step), grads in left.items() if grads}
    assert trained <= ({"fasterai"} if teacher != "frozen" else set())
    assert (tmp_path / "t.md").read_text() == out
    results = json.loads((tmp_path / "t.json").read_text())
    assert results["settings"]["teacher"] == teacher
    assert [list(row.values()) for row in results["rows"]] == rows


def test_losses_only_has_a_row_for_each_loss_and_size(main, capsys):
    sizes = ["--batches", "2", "--classes", "10", "100", "--n-pairs", "1", "2"]
    main(["--losses-only", "--losses=DecoupledKD,Attention", "--rounds=1", "--seconds=0.001", *sizes])
    _, rows = table(capsys.readouterr().out)
    expected = [["DecoupledKD", s] for s in ("B=64, C=1000", "B=2, C=1000", "B=64, C=10", "B=64, C=100")]
    layers = ("B=8, ResNet-18's maps", "B=2, 512x7x7", "B=8, 1 x 128x28x28", "B=8, 2 x 128x28x28")
    expected += [["Attention", s] for s in layers]
    assert [row[:2] for row in rows] == expected
    for _, _, ms, peer, *peaks in rows:
        assert numbers([ms])
        assert peer == "not installed" or len(numbers([peer])) == 3
        assert all(float(mb) >= 0 for mb in peaks if mb)


@pytest.mark.slow
def test_user_has_a_row_for_each_training(main, capsys):
    main([*TINY, "--user", "--losses=Attention", "--images=8", "--draws=100"])
    _, rows = table(capsys.readouterr().out)
    for training in ("guide, Attention", "quickstart, Attention"):
        shown = [row[1] for row in rows if row[0] == training]
        assert shown[:3] == ["student alone", "limit", "ours"]
        assert shown[3:] in ([], ["fasterai"])
    for _, _, *cells in rows:
        assert len(numbers(cells)) == 5


@pytest.mark.parametrize("wrong", [["--losses=Atention"], ["--dtype=float16"], ["--teacher=none"]])
def test_mistakes_are_refused(main, wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert "error" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_cuda_peak_memory_is_shown(main, capsys, dtype):
    main([*TINY, "--device=cuda", f"--dtype={dtype}", "--losses=Attention"])
    _, rows = table(capsys.readouterr().out)
    assert all(numbers([row[6]]) for row in rows if not re.fullmatch(ABSENT, row[2]))
