"examples/benchmark_unlabeled.py with tiny models and few images: that it counts right, not how well."

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import example
from scipy.stats import t as student_t

RESULTS = Path(__file__).parents[1] / "nbs" / "results"
PAGES = ("unlabeled.md", "views.md")
TINY = ["--teacher=4", "--student=2", "--views-student=2", "--teacher-draws=64", "--views-data=digits", "--epochs=5"]
LABELS = ["--data=digits", "--labels=all,20", "--draws=64", "--seeds=1"]


@pytest.fixture(scope="module")
def script():
    with example("benchmark_unlabeled") as names:
        yield names


@pytest.fixture
def main(script, tmp_path):
    "The rows after a run."

    def run(*args):
        script["main"]([*args, f"--out={tmp_path}"])
        return [json.loads(line) for line in (tmp_path / "unlabeled.jsonl").read_text().splitlines()]

    return run


def of(rows, stage):
    return [row for row in rows if row["settings"]["stage"] == stage]


def table(markdown):
    "Its rows without the header."
    return [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("| ")][2:]


@pytest.mark.slow
def test_tables_and_picture_are_made_and_no_run_is_repeated(main, no_training, tmp_path):
    rows = main(*TINY, *LABELS)
    assert [len(of(rows, stage)) for stage in ("teacher", "labels", "views")] == [1, 5, 4]
    assert (tmp_path / "unlabeled.png").read_bytes().startswith(b"\x89PNG")
    pages = [(tmp_path / name).read_text() for name in PAGES]
    few, everything = table(pages[0])
    assert (few[0], everything[0]) == ("20", "all")
    accs = {(r["settings"]["recipe"][0], r["settings"]["how"]): f"{r['test']:.1f}" for r in of(rows, "labels")}
    assert few[1:4] == [accs[20, how] for how in ("alone", "labeled", "unlabeled")]
    assert everything[1:4] == [accs[None, "alone"], accs[None, "labeled"], ""]

    no_training()
    assert main(*TINY, *LABELS) == rows
    assert main("--report") == rows
    assert [(tmp_path / name).read_text() for name in PAGES] == pages


@pytest.mark.slow
def test_the_teacher_rests_when_views_repeat(main):
    found = {row["settings"]["k"]: row for row in of(main(*TINY, "--measure=views", "--seeds=1"), "views")}
    n = found[1]["batches"]
    assert n == 797 // 32
    assert {k: row["runs"] for k, row in found.items()} == {
        1: [n, 1, 0, 0, 0],
        2: [n, n, 1, 0, 0],
        4: [n, n, n, n, 1],
        None: [n] * 5,
    }
    assert all(len(row["epoch_seconds"]) == 5 for row in found.values())


def test_unlabeled_images_are_those_without_labels(script, main, monkeypatch):
    seen = []
    callback = script["KnowledgeDistillationCallback"]

    def spy(*args, unlabeled=None, **kwargs):
        seen.append(unlabeled)
        return callback(*args, unlabeled=unlabeled, **kwargs)

    measure = script["Measure"]
    monkeypatch.setitem(measure.label_run.__globals__, "KnowledgeDistillationCallback", spy)
    learners = []
    make = measure.learner
    monkeypatch.setattr(measure, "learner", lambda *args: learners.append(make(*args)) or learners[-1])
    main(*TINY, *LABELS, "--measure=labels", "--labels=20")
    (beside,) = [loader for loader in seen if loader is not None]
    labeled = set(learners[-1].dls.train.dataset)
    assert len(labeled) == 20
    assert len(set(beside.dataset)) == len(beside.dataset) == 797 - 20
    assert not labeled & set(beside.dataset)
    held_out = {i for dl in learners[-1].dls.loaders[1:] for i in dl.dataset}
    assert not held_out & set(beside.dataset)
    assert beside.bs == learners[-1].dls.train.bs


def test_images_are_rotated_at_random_and_stay_upright_on_average(script):
    x = script["torch"].rand(64, 1, 8, 8)
    turned, y = script["turn"]((x, None))
    assert turned.shape == x.shape
    assert y is None
    assert not script["torch"].equal(turned, script["turn"]((x, None))[0])
    unturned, _ = script["turn"]((x, None), degrees=0)
    np.testing.assert_allclose(unturned, x, atol=1e-5)


def test_differences_have_students_interval(script):
    d = np.array([1.0, 2.0, 4.5])
    half = student_t.ppf(0.975, 2) * d.std(ddof=1) / np.sqrt(3)
    assert script["gain"](d) == f"+2.5 ± {half:.1f}, better in 3 of 3"
    assert script["gain"](np.array([-1.0])) == "-1.0, better in 0 of 1"
    assert script["gain"](np.array([])) == ""


def test_runs_with_other_settings_are_not_mixed(main):
    main(*TINY, *LABELS, "--measure=labels", "--labels=20")
    with pytest.raises(ValueError, match="different settings"):
        main(*TINY, *LABELS, "--measure=labels", "--labels=20", "--draws=128")


@pytest.mark.parametrize("wrong", [["--measure=label"], ["--views-data=pets"], ["--data=mnist"], ["--labels=many"]])
def test_mistakes_are_refused(script, wrong, capsys):
    with pytest.raises(SystemExit):
        script["main"](wrong)
    assert "error" in capsys.readouterr().err


def test_an_empty_file_is_no_report(script, tmp_path):
    with pytest.raises(ValueError, match="no finished runs"):
        script["main"](["--report", f"--out={tmp_path}"])


def test_the_committed_pages_are_those_of_the_committed_rows(script, tmp_path):
    shutil.copy(RESULTS / "unlabeled.jsonl", tmp_path)
    script["main"](["--report", f"--out={tmp_path}"])
    for name in PAGES:
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_the_committed_command_names_its_own_settings(script):
    for name in PAGES:
        command = re.search(r"benchmark_unlabeled.py (.*)", (RESULTS / name).read_text())[1]
        args = script["parse_args"](command.split())
        rows = of(script["read_rows"](RESULTS / "unlabeled.jsonl"), *args.measure)
        assert {row["settings"]["seed"] for row in rows} == set(range(args.seeds))
        student = args.student if args.measure == ["labels"] else args.views_student
        assert {row["settings"]["student"] for row in rows} == {student}
        assert {row["settings"]["teacher"] for row in rows} == {args.teacher}
        if args.measure == ["labels"]:
            assert {tuple(row["settings"]["recipe"][:2]) for row in rows} == {(n, args.draws) for n in args.labels}
