"examples/benchmark_students.py with tiny models and few images: that it counts right, not how well."

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import example

RESULTS = Path(__file__).parents[1] / "nbs" / "results"
TINY = ["--students=2,3", "--sizes-epochs=1", "--epochs-student=2", "--epochs=1,2", "--draws=1000", "--seeds=2"]
TINY += ["--lrs=0.01,0.02", "--teacher=3", "--teacher-draws=64", "--payoff-teacher=3", "--payoff-student=2"]


@pytest.fixture(scope="module")
def script():
    with example("benchmark_students") as names:
        yield names


@pytest.fixture
def fashion_mnist(tmp_path):
    "Generated images in its format: 1,200 to train, 100 to test, so that nothing is downloaded."
    rng = np.random.default_rng(0)
    for who, n in (("train", 1200), ("t10k", 100)):
        images, labels = rng.integers(256, size=(n, 28, 28)), np.arange(n) % 10
        for what, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(header + values.astype(np.uint8).tobytes())
            (tmp_path / f"{who}-{what}-ubyte.gz").write_bytes(content)
    return tmp_path


@pytest.mark.slow
def test_tables_and_picture_are_made_and_no_run_is_repeated(script, fashion_mnist, no_training, monkeypatch):
    monkeypatch.setitem(script["size"].__globals__, "ROUNDS", 1)
    out = fashion_mnist / "out"

    def rows():
        return [json.loads(line) for line in (out / "students.jsonl").read_text().splitlines()]

    script["main"]([*TINY, f"--folder={fashion_mnist}", f"--out={out}"])
    first, page = rows(), (out / "students.md").read_text()
    stages = [row["settings"]["stage"] for row in first]
    counts = {"teacher": 2, "size": 4, "payoff": 6, "tune": 8, "students": 12}
    assert {stage: stages.count(stage) for stage in stages} == counts
    assert (out / "students.png").read_bytes().startswith(b"\x89PNG")
    mean = np.mean([r["test"] for r in first if (r["settings"].get("student"), r["group"]) == ("3", "labeled")])
    assert re.search(rf"\| 3 \| .* \| {mean:.1f} ± [\d.]+ \| [+-]", page)

    no_training()
    script["main"]([*TINY, f"--folder={fashion_mnist}", f"--out={out}"])
    assert rows() == first
    assert (out / "students.md").read_text() == page


def test_an_empty_file_is_no_report(script, tmp_path):
    with pytest.raises(ValueError, match="no finished runs"):
        script["main"](["--report", f"--out={tmp_path}"])


def test_the_committed_page_is_that_of_the_committed_rows(script, tmp_path):
    shutil.copy(RESULTS / "students.jsonl", tmp_path)
    script["main"](["--report", f"--out={tmp_path}"])
    assert (tmp_path / "students.md").read_text() == (RESULTS / "students.md").read_text()


def test_the_committed_command_names_its_own_settings(script):
    command = re.search(r"benchmark_students.py (.*)", (RESULTS / "students.md").read_text())[1]
    args, rows = script["parse_args"](command.split()), script["read_rows"](RESULTS / "students.jsonl")
    runs = [row["settings"] for row in rows if row["settings"]["stage"] == "students"]
    assert {s["seed"] for s in runs} == set(range(args.seeds))
    widths = {(s["student"], s["recipe"][2]) for s in runs}
    assert widths == {(w, args.sizes_epochs) for w in args.students} | {(args.epochs_student, e) for e in args.epochs}


def test_each_width_has_the_learning_rate_that_is_best_for_the_student_alone(script):
    accs, used = {}, {}
    for row in script["read_rows"](RESULTS / "students.jsonl"):
        s = row["settings"]
        if s["stage"] == "tune":
            assert (s["how"], s["seed"] in script["TUNE_SEEDS"]) == ("alone", True)
            accs.setdefault(s["student"], {}).setdefault(s["recipe"][4], []).append(row["tune"])
        elif s["stage"] == "students":
            used.setdefault(s["student"], set()).add(s["recipe"][4])
    assert used == {w: {max(of, key=lambda lr, of=of: np.mean(of[lr]))} for w, of in accs.items()}
