"examples/benchmark_losses.py with tiny models, few images and generated stand-ins: that it counts right, not how well."

import gzip
import json
import re
import warnings
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import example
from fastai.data.external import fastai_cfg
from pets import make_pets_home

TINY = ["--epochs=1", "--teacher-epochs=1", "--seeds=2", "--losses=SoftTarget,Attention"]
CNN = [*TINY, "--teacher=4", "--student=2,3", "--images=20", "--draws=64", "--teacher-draws=64", "--no-tune"]


@pytest.fixture(scope="module")
def script():
    with example("benchmark_losses") as names:
        yield names


@pytest.fixture
def helper(script):
    return lambda name: import_module(f"benchmarks.{name}")


@pytest.fixture
def main(script, tmp_path):
    "The rows and the report after a run."

    def run(data, *args):
        script["main"]([f"--data={data}", *args, f"--out={tmp_path / 'out'}"])
        lines = (tmp_path / "out" / f"{data}.jsonl").read_text().splitlines()
        assert (tmp_path / "out" / f"{data}.png").read_bytes().startswith(b"\x89PNG")
        return [json.loads(line) for line in lines], (tmp_path / "out" / f"{data}.md").read_text()

    return run


def tables(markdown):
    "Of each student: heading of the group and name of the row → its cells."
    found = []
    for section in markdown.split("## ")[1:]:
        rows, group = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")][2:], ""
        found.append({})
        for heading, name, *cells in rows:
            group = heading or group
            found[-1][group, name.strip("`")] = cells
    return [table for table in found if table]


def of(rows, **settings):
    return [row for row in rows if settings.items() <= row["settings"].items()]


@pytest.mark.slow
def test_digits_are_reported_by_student_and_loss_and_no_run_is_repeated(main, no_training, helper, capsys):
    rows, report = main("digits", *CNN)
    assert "seed 1, default: Attention" in capsys.readouterr().out
    groups = helper("report").GROUPS
    names = [(groups[row["group"]], row["name"]) for row in of(rows, stage="report", student="2", seed=0)]
    assert [name for _, name in names[:3]] == ["student alone", "SoftTarget", "Attention"]
    assert len(rows) == 1 + 2 * 2 * len(names)

    for student, table in zip("23", tables(report), strict=True):
        assert sorted(table) == sorted(names)
        alone = [row["test"] for row in of(rows, stage="report", student=student, parts=[])]
        for (group, name), (accuracy, gain, better) in table.items():
            mine = [r for r in of(rows, student=student) if (groups[r["group"]], r["name"]) == (group, name)]
            tests = [row["test"] for row in mine]
            assert accuracy == f"{np.mean(tests):.1f} ± {np.std(tests, ddof=1):.1f}"
            if name == "student alone":
                assert gain == better == ""
            else:
                assert float(gain) == pytest.approx(np.mean(tests) - np.mean(alone), abs=0.06)
                assert better == f"{sum(t > a for t, a in zip(tests, alone, strict=True))} of 2"

    no_training()
    assert main("digits", *CNN) == (rows, report)
    assert main("digits", "--report") == (rows, report)


def test_the_report_says_how_it_was_made_and_what_was_compared(main):
    _, report = main("digits", *CNN, "--losses=SoftTarget,DecoupledKD,FitNet,Attention", "--student=2", "--seeds=1")
    command = re.search(r"```bash\npython (.*?)\n```", report)[1]
    assert command.startswith("examples/benchmark_losses.py --data digits --teacher 4 --student 2 --seeds 1")
    assert f"torch {torch.__version__}" in report
    assert "1 thread" in report
    assert "On two classes `DecoupledKD` equals `SoftTarget`" in report
    assert "Feature losses can lose" in report
    assert report.count("one seed") >= 4
    assert "Does anything beat the best single loss" in report


def test_fitnet_runs_with_an_adapter_and_fasterai_only_where_channels_are_equal(main, helper):
    rows, _ = main("digits", *CNN, "--losses=FitNet,ActivationBoundaries", "--student=2", "--seeds=1")
    assert [row["name"] for row in rows[2:]] == ["FitNet", "ActivationBoundaries", "FitNet", "FitNet"]
    assert all(row["settings"]["adapter"] == "auto" for row in rows[2:])

    of_peer = helper("variants").peer_has
    fitnet, soft = (
        next(v for v in helper("variants").get_variants(None) if v.name == name) for name in ("FitNet", "SoftTarget")
    )
    for fit, expected in (("all", True), ("Attention, PKT, RKD, Similarity", False)):
        pairs = SimpleNamespace(rows=[SimpleNamespace(fit=fit)])
        assert of_peer(soft, pairs)
        assert of_peer(fitnet, pairs) is expected


def test_choices_are_made_on_the_tune_split(main, capsys):
    args = [*CNN, "--tune", "--losses=Attention", "--student=2", "--seeds=1", "--images=10"]
    rows, report = main("digits", *args)
    assert "## Choices" in report
    grid = of(rows, stage="tune")
    assert {row["settings"]["seed"] for row in grid} == {1000, 1001}
    lrs = {row["settings"]["recipe"][4] for row in of(grid, parts=[])}
    means = {lr: np.mean([r["tune"] for r in of(grid, parts=[]) if r["settings"]["recipe"][4] == lr]) for lr in lrs}
    chosen = {row["settings"]["recipe"][4] for row in of(rows, stage="report")}
    assert [means[lr] for lr in chosen] == [max(means.values())]
    assert [row["name"] for row in rows if row["group"] == "tuned"]
    assert "chosen on the tune split: {'lr'" in capsys.readouterr().out


def test_another_learning_rate_than_the_best_tried_is_reported(helper):
    def row(stage, lr, tune):
        return {"name": "student alone", "tune": tune, "settings": {"stage": stage, "recipe": [0, 0, 0, 0, lr]}}

    tried = [row("tune", 0.1, 70.0), row("tune", 0.2, 72.5), row("tune", 0.2, 73.5)]
    given_lr = helper("report").given_lr
    assert given_lr([*tried, row("report", 0.2, 0.0)]) == ("", "")
    option, text = given_lr([*tried, row("report", 0.1, 0.0)])
    assert option == " --lr 0.1"
    assert "0.2 is better for the student alone on the tune split: 73.0 instead of 70.0" in text


def test_fasterai_runs_on_the_same_seeds(main):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fasterai.distill.losses")
        pytest.importorskip("fasterai.distill.distillation_callback")
    rows, report = main("digits", *CNN, "--peer", "--student=2")
    theirs = of(rows, library="fasterai")
    assert [row["name"] for row in theirs] == ["student alone", "SoftTarget", "Attention"] * 2
    for row in of(theirs, parts=[]):  # nothing differs without distillation
        mine = of(rows, library="fasterai_kd", parts=[], seed=row["settings"]["seed"], stage="report")
        assert [r["test"] for r in mine] == [row["test"]]
    assert "| fasterai 0.4.1 |" in report


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for who, n in (("train", 240), ("t10k", 50)):
        write_idx(tmp_path / f"{who}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{who}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return f"--folder={tmp_path}"


def test_fashion_mnist_is_read_as_debian_packs_it(main, fashion, helper):
    rows, report = main("fashion-mnist", *CNN, fashion, "--student=2", "--teacher-images=50", "--seeds=1")
    assert of(rows, student="2", seed=0)
    assert "# Losses on Fashion-MNIST, few labels" in report
    x, y, n = helper("data").read_fashion_mnist(fashion.removeprefix("--folder="))
    assert x.shape == (290, 1, 28, 28)
    assert (y.tolist()[:11], n) == ([*range(10), 0], 240)
    assert 120 < x.float().mean() < 135


@pytest.mark.slow
def test_pets(main, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(make_pets_home(tmp_path)))
    fastai_cfg.cache_clear()
    small = ["--size=32", "--no-pretrained", "--workers=0", "--seeds=1", "--losses=SoftTarget", "--images=8"]
    rows, report = main("pets", *TINY, *small, "--teacher=resnet18")
    fastai_cfg.cache_clear()
    assert {row["settings"].get("size") for row in rows} == {32}
    assert "resnet18 teaches resnet18" in report


@pytest.mark.slow
def test_cifar100(main, monkeypatch, helper):
    x, y = torch.randint(256, (140, 3, 32, 32), dtype=torch.uint8), torch.arange(140) % 100
    monkeypatch.setattr(helper("data"), "read_cifar100", lambda folder: (x, y, 100))
    rows, report = main(
        "cifar100", *TINY, "--teacher=resnet8x4", "--student=resnet8", "--seeds=1", "--losses=SoftTarget"
    )
    assert all(row["tune"] is None for row in rows)
    assert "resnet8x4 teaches resnet8" in report
    assert "Does anything beat" not in report  # no tune split, no choice


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.28), ("resnet56", 0.86), ("resnet8x4", 1.23), ("resnet32x4", 7.43)]
)
def test_resnets_for_cifar_have_the_published_size(helper, name, millions):
    model = helper("data").cifar_resnet(name, 100)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_cifars_learning_rate_falls_as_in_the_papers(script):
    lrs = [script["drops"](0.05, epoch / 240) for epoch in (0, 149, 150, 180, 210, 239)]
    assert lrs == pytest.approx([0.05, 0.05, 5e-3, 5e-4, 5e-5, 5e-5])


def test_splits_do_not_overlap_and_students_see_what_their_teacher_saw(helper):
    class Args:
        data, folder = "digits", None

    task = helper("data").get_task(Args)

    def images(dl):
        return {x.numpy().tobytes() for xb, _ in dl for x in xb}

    dls = task.dls(task.student, 0)
    assert [len(dl.dataset) for dl in dls.loaders[1:]] == [300, 700]
    tune, test = map(images, dls.loaders[1:])
    assert not tune & test
    chosen = {seed: set(task.dls(task.student, seed).train.dataset) for seed in (0, 1)}
    everything = set(task.dls(task.teacher, 0).train.dataset)
    assert len(everything) == 797
    assert all(len(c) == 100 and c <= everything for c in chosen.values())
    assert chosen[0] != chosen[1]
    assert not everything & {i for dl in dls.loaders[1:] for i in dl.dataset}


@pytest.mark.parametrize("wrong", [["--losses=Atention"], ["--data=mnist"]])
def test_mistakes_are_refused(script, wrong, capsys):
    with pytest.raises(SystemExit):
        script["main"](wrong)
    assert "error" in capsys.readouterr().err


def test_runs_with_other_settings_are_not_mixed(main):
    main("digits", *CNN, "--student=2", "--losses=SoftTarget", "--seeds=1")
    with pytest.raises(ValueError, match="different settings"):
        main("digits", *CNN, "--student=2", "--losses=SoftTarget", "--seeds=1", "--draws=32")
