"The table of what a smaller model gives, and its picture."

import io

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import Net, hooks, same, state
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from torch import nn

from fasterai_kd import KnowledgeDistillationCallback, SoftTarget
from fasterai_kd.payoff import ModelTable
from fasterai_kd.show import compare_models, plot_tradeoff

COLUMNS = ["parameters", "file (KB)", "latency (ms)", "accuracy", "fewer parameters", "smaller file", "faster"]


@pytest.fixture
def three(make_learner):
    return {"teacher": make_learner(Net(16)), "student alone": make_learner(Net(2)), "student": make_learner(Net(2))}


TABLE = ModelTable(
    {
        "parameters": [372682, 3628, 3628],
        "file (KB)": [1501.2, 21.3, 21.3],
        "latency (ms)": [0.52, 0.1, 0.11],
        "accuracy": [0.9956, 0.9167, 0.9578],
        "fewer parameters": [1, 102.72, 102.72],
        "smaller file": [1, 70.5, 70.5],
        "faster": [1, 5.2, 4.7],
    },
    index=["teacher", "student alone", "student"],
)


def test_a_row_for_each_model_and_ratios_to_the_first(three):
    table = compare_models(three, repeats=3)
    assert list(table.columns) == COLUMNS
    assert list(table.index) == list(three)
    for name, learn in three.items():
        assert table.parameters[name] == sum(p.numel() for p in learn.model.parameters())
        torch.save(learn.model.state_dict(), file := io.BytesIO())
        assert table["file (KB)"][name] == file.tell() / 1e3
        assert table.accuracy[name] == learn.validate()[1]
    assert (table["latency (ms)"] > 0).all()
    assert table.loc["teacher", COLUMNS[4:]].tolist() == [1, 1, 1]
    assert table["fewer parameters"]["student"] == table.parameters["teacher"] / table.parameters["student"]
    assert table["faster"]["student"] == table["latency (ms)"]["teacher"] / table["latency (ms)"]["student"]


def test_a_forward_pass_is_of_one_plain_sample_without_a_graph_in_evaluation_mode(make_learner, dls):
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = Net(), []

        def forward(self, x):
            self.calls.append((type(x), len(x), torch.is_grad_enabled(), self.training, self.net.bn1.training))
            return self.net(x)

    dls.valid.after_batch = lambda b: (TensorImage(b[0]), b[1])
    model = Seen().train()
    compare_models({"seen": make_learner(model, metrics=None)}, repeats=7)
    assert len(model.calls) == 7 + 5 * 3  # and a warm-up in each round
    assert set(model.calls) == {(torch.Tensor, 1, False, False, False)}
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_models_recorders_threads_and_random_numbers_are_left_as_they_were(three, training):
    three["student"].fit(1, cbs=KnowledgeDistillationCallback(three["teacher"], SoftTarget))
    models = [learn.model.train(training) for learn in three.values()]
    for m in models:
        m.bn1.train(not training)
    recorder = three["student"].recorder
    values, iters = list(recorder.values), list(recorder.iters)
    states, modes = [state(m) for m in models], [[x.training for x in m.modules()] for m in models]
    grads = [[p.grad is None for p in m.parameters()] for m in models]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    compare_models(three, repeats=1)
    assert [[x.training for x in m.modules()] for m in models] == modes
    assert all(same(state(m), s) for m, s in zip(models, states, strict=True))
    assert [[p.grad is None for p in m.parameters()] for m in models] == grads
    assert sum(map(hooks, models)) == 0
    assert (recorder.values, recorder.iters) == (values, iters)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_plain_models_take_the_data_and_metrics_given_or_those_of_the_first_learner(dls, make_learner, student):
    learn = make_learner(student)
    alone = compare_models({"student": student}, dls=dls, metrics=accuracy, repeats=1)
    beside = compare_models({"learner": learn, "student": student}, repeats=1)
    assert alone.accuracy["student"] == beside.accuracy["student"] == beside.accuracy["learner"]
    assert "accuracy" not in compare_models({"student": student}, dls=dls, repeats=1)


def test_a_learner_loaded_from_a_file_takes_the_data_of_the_first_that_has_some(make_learner, dls, tmp_path):
    teacher, student = make_learner(Net(16)), make_learner(Net(2))
    teacher.export(tmp_path / "teacher.pkl")
    loaded = load_learner(tmp_path / "teacher.pkl")
    expected = compare_models({"teacher": teacher}, repeats=1).accuracy["teacher"]
    for models in ({"teacher": loaded, "student": student}, {"student": student, "teacher": loaded}):
        assert compare_models(models, repeats=1).accuracy["teacher"] == expected
    assert compare_models({"teacher": loaded}, dls, accuracy, repeats=1).accuracy["teacher"] == expected
    with pytest.raises(ValueError, match=r"models\['teacher'\] is a Learner without data, .* give dls= and metrics="):
        compare_models({"teacher": loaded}, repeats=1)


def test_a_stream_of_data_is_data(make_learner, student):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(3, 16, 16), torch.tensor(0))] * 4)

    learn = make_learner(student, metrics=None)
    learn.dls = DataLoaders(torch.utils.data.DataLoader(Stream(), batch_size=2))
    assert compare_models({"student": learn}, repeats=1)["latency (ms)"]["student"] > 0


def test_a_metric_of_some_learners_is_missing_for_the_others(make_learner):
    kd = KnowledgeDistillationCallback(Net(), SoftTarget)
    table = compare_models(
        {"a": make_learner(Net()), "b": make_learner(Net(), metrics=[accuracy, kd.agreement], cbs=kd)}, repeats=1
    )
    assert pd.isna(table.agreement["a"])
    assert 0 <= table.agreement["b"] <= 1
    assert "–" in repr(table)


def test_dataloaders_of_torch_and_learners_without_validation_set_are_timed(make_learner, student):
    data = torch.utils.data.DataLoader([(torch.randn(3, 16, 16), torch.tensor(0))] * 4, batch_size=2)
    table = compare_models({"student": student}, dls=DataLoaders(data), metrics=accuracy, repeats=1)
    assert "accuracy" not in table
    assert table["latency (ms)"]["student"] > 0


def test_another_device_times_a_copy(student, dls):
    before = [p.data_ptr() for p in student.parameters()]
    table = compare_models({"student": student}, dls=dls, device="cpu", repeats=1)
    assert [p.data_ptr() for p in student.parameters()] == before
    assert table.attrs["device"].startswith("CPU")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_is_named(student, dls):
    at = [p.device for p in student.parameters()]
    table = compare_models({"student": student}, dls=dls, device="cuda", repeats=3)
    assert table.attrs["device"] == torch.cuda.get_device_name()
    assert [p.device for p in student.parameters()] == at


@pytest.mark.parametrize(
    ("models", "kwargs", "error", "match"),
    [
        ({}, {}, ValueError, "needs models and repeats >= 1, got \\[\\] and 50"),
        ({"a": Net()}, {"repeats": 0}, ValueError, "repeats >= 1, got \\['a'\\] and 0"),
        ({"a": Net()}, {}, ValueError, r"models\['a'\] is a plain model: give dls="),
        ({"a": "resnet18"}, {}, TypeError, r"models\['a'\] must be a Learner or a model \(nn.Module\), got a str"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, kwargs, error, match):
    with pytest.raises(error, match=match):
        compare_models(models, **kwargs)


def test_the_table_shows_rounded_numbers_and_says_how_they_were_measured(three):
    shown = repr(TABLE)
    for text in ("372,682", "1,501", "0.52", "0.996", "103×", "5.2×", "1.0×"):
        assert text in shown
        assert text in TABLE._repr_html_()
    assert TABLE.parameters["teacher"] == 372682
    table = compare_models(three, repeats=2)
    assert f"batch of 1 on CPU, {torch.get_num_threads()} thread, median of 2 runs" in repr(table)
    assert "teacher = 1" in table._repr_html_()
    assert isinstance(table[["accuracy"]], ModelTable)


def test_latency_is_on_a_log_axis_and_areas_are_parameters():
    ax = plot_tradeoff(TABLE)
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "accuracy"
    assert [tuple(c.get_offsets()[0]) for c in ax.collections] == [(0.52, 0.9956), (0.1, 0.9167), (0.11, 0.9578)]
    big, small, _ = (c.get_sizes()[0] for c in ax.collections)
    assert big / small == pytest.approx(372682 / 3628)
    assert "teacher\n372,682 parameters" in [t.get_text() for t in ax.texts]


@pytest.mark.parametrize(
    ("table", "kwargs", "ends"),
    [
        (TABLE, {}, ("student alone", "student")),
        (TABLE, {"arrow": ("teacher", "student")}, ("teacher", "student")),
        (TABLE.rename({"student alone": "small"}), {}, None),
    ],
)
def test_an_arrow_goes_from_the_student_alone_to_the_last_row(table, kwargs, ends):
    arrows = [t for t in plot_tradeoff(table, **kwargs).texts if t.arrow_patch is not None]
    assert len(arrows) == (ends is not None)
    if ends:
        (arrow,) = arrows
        where = [(table["latency (ms)"][name], table.accuracy[name]) for name in ends]
        assert [arrow.xyann, arrow.xy] == where


def test_the_picture_is_drawn_in_the_axes_given():
    fig, (_, given) = plt.subplots(1, 2)
    assert plot_tradeoff(TABLE, "accuracy", ax=given) is given
    assert not fig.axes[0].has_data()


@pytest.mark.parametrize(
    ("table", "kwargs", "match"),
    [
        (TABLE.drop(columns="accuracy"), {}, "needs a table of compare_models with metrics, got metric=None"),
        (TABLE, {"metric": "speed"}, "got metric='speed'"),
        (TABLE, {"arrow": ("student alone", "best")}, r"arrow must name two rows of \['teacher', 'student alone'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(table, kwargs, match):
    with pytest.raises(ValueError, match=match):
        plot_tradeoff(table, **kwargs)
