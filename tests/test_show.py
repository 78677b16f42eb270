"What the pictures show, and that models and style are left as they were."

import copy
import inspect
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import IMAGES, PAIRS, Net, hooks, same, state
from fastai.torch_core import TensorImage
from torch import nn

import fasterai_kd.show
from fasterai_kd import Attention, KnowledgeDistillationCallback, match_feature_layers
from fasterai_kd.show import *

LAYERS = dict(zip(("student", "teacher"), PAIRS, strict=True))
NAN = float("nan")


def history(**parts):
    "As a callback that was trained."
    return SimpleNamespace(history=parts)


FIT = history(task_loss=[3.0, 2.0, 1.0, 0.5], kd_loss=[0.4, NAN, NAN, 0.2], weight=[0.5, 0.0, 0.0, 0.25])


@pytest.fixture
def pairs(student, teacher):
    return match_feature_layers(student, teacher, IMAGES[:1])


@pytest.fixture
def draw(student, teacher, pairs):
    "Each picture of one axes, by name: `draw[name](ax=...)`."
    return {
        "show_pairs": lambda **kw: show_pairs(pairs, **kw),
        "plot_losses": lambda **kw: plot_losses(FIT, **kw),
        "plot_similarity": lambda **kw: plot_similarity(student, teacher, IMAGES, **kw),
    }


ONE = ["show_pairs", "plot_losses", "plot_similarity"]


def texts(ax):
    return [t.get_text() for t in ax.texts]


def ticks(axis):
    return [t.get_text() for t in axis.get_ticklabels()]


# All of them


@pytest.mark.parametrize("name", ONE)
def test_a_picture_is_a_new_figure_or_drawn_in_the_axes_given_and_sets_no_style(draw, name):
    style, figures = dict(mpl.rcParams), plt.get_fignums()
    ax = draw[name]()
    assert isinstance(ax, mpl.axes.Axes)
    assert len(plt.get_fignums()) == len(figures) + 1
    fig, (_, given) = plt.subplots(1, 2)
    figures = plt.get_fignums()
    assert draw[name](ax=given) is given
    assert plt.get_fignums() == figures
    assert given.has_data()
    assert not fig.axes[0].has_data()
    assert dict(mpl.rcParams) == style


@pytest.mark.parametrize("name", ONE)
def test_a_picture_of_one_axes_refuses_several(draw, name):
    with pytest.raises(ValueError, match="ax must be one axes, got array"):
        draw[name](ax=plt.subplots(1, 2)[1])


@pytest.mark.parametrize("name", fasterai_kd.show.__all__)
def test_functions_have_a_docstring_and_typed_arguments(name):
    f = getattr(fasterai_kd.show, name)
    assert len(f.__doc__) > 30
    assert all(p.annotation is not p.empty for p in inspect.signature(f).parameters.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_models_are_left_as_they_were_even_if_a_layer_does_not_run(student, teacher, training, broken):
    before = copy.deepcopy(student)
    models = (student, teacher, before)
    for m in models:
        m.train(training)
        m.bn1.train(not training)
    states, modes = [state(m) for m in models], [[x.training for x in m.modules()] for m in models]
    layers, random = LAYERS, torch.get_rng_state()
    if broken:
        teacher.unused = nn.Conv2d(1, 1, 1)
        layers, modes[1] = {**LAYERS, "teacher": ["conv1", "unused", "layer1"]}, [x.training for x in teacher.modules()]
        states[1] = state(teacher)
    for draw in (
        lambda: show_attention(IMAGES[0], student, teacher, layers, before),
        lambda: plot_similarity(student, teacher, IMAGES, layers, before),
    ):
        if broken:
            with pytest.raises(RuntimeError, match="layer 'unused' of the teacher did not run"):
                draw()
        else:
            draw()
        assert [[x.training for x in m.modules()] for m in models] == modes
        assert all(same(state(m), s) for m, s in zip(models, states, strict=True))
        assert sum(map(hooks, models)) == 0
        assert all(p.grad is None for m in models for p in m.parameters())
    if not broken:
        assert torch.equal(torch.get_rng_state(), random)


# Pairs


def test_each_pair_has_its_names_sizes_and_losses_in_one_row(pairs):
    wide = match_feature_layers(Net(), Net(8), IMAGES[:1])
    wide["student"] += ["layer1", "head"]
    wide["teacher"] += ["conv1", "head"]
    ax = show_pairs(wide)
    rows = {}
    for t in ax.texts:
        rows.setdefault(round(t.get_position()[1]), []).append(t.get_text())
    fit = "Attention, PKT, RKD, Similarity"
    assert rows == {
        -1: ["student", "teacher"],
        0: ["conv1", "conv1", "16×16, 4 ↔ 8 channels", fit],
        1: ["layer1", "layer1", "8×8, 4 ↔ 8 channels", fit],
        2: ["layer2", "layer2", "4×4, 8 ↔ 16 channels", fit],
        3: ["layer1", "conv1", "8×8 ↔ 16×16, 4 ↔ 8 channels", fit],
        4: ["head", "head"],
    }
    assert [line.get_linestyle() for line in ax.lines] == ["--"] * 5
    ax = show_pairs(pairs)
    assert [line.get_linestyle() for line in ax.lines] == ["-"] * 3
    assert texts(ax).count("all losses") == 3


def test_rows_are_what_the_table_prints(pairs):
    lines = str(pairs).splitlines()[1:]
    assert [line.split() for line in lines] == [
        [r.student, "<->", r.teacher, r.resolution, *r.channels.split(), r.fit] for r in pairs.rows
    ]


def test_pairs_of_unequal_length_and_plain_dicts_are_refused(pairs):
    with pytest.raises(TypeError, match=r"show_pairs draws what match_feature_layers returns, got \{"):
        show_pairs(dict(pairs))
    pairs["student"].pop()
    with pytest.raises(ValueError, match=r"the student has 2 \['conv1', 'layer1'\] and the teacher 3"):
        show_pairs(pairs)


# Attention


def maps_by_hand(model, x):
    "The mean over channels of F², in evaluation mode."
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        conv1 = model.conv1(x[None])
        layer1 = model.layer1(model.bn1(conv1).relu())
        layer2 = model.layer2(layer1)
    return [fm[0].pow(2).mean(0).numpy() for fm in (conv1, layer1, layer2)]


def drawn(column):
    return [a.images[0].get_array() for a in column]


@pytest.mark.parametrize("pairs", [None, LAYERS])
def test_attention_is_the_mean_square_over_channels_of_student_before_and_after_and_teacher(student, teacher, pairs):
    before, x = Net(), IMAGES[3]
    axes = show_attention(x, student, teacher, pairs, before)
    assert axes.shape == (3, 4)
    assert [a.get_title() for a in axes[0]] == ["image", "student before", "student after", "teacher"]
    assert [a.get_ylabel() for a in axes[:, 0]] == ["conv1 ↔ conv1", "layer1 ↔ layer1", "layer2 ↔ layer2"]
    for column, model in zip(axes.T[1:], (before, student, teacher), strict=True):
        for got, expected in zip(drawn(column), maps_by_hand(model, x), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert all(a.images[0].norm.vmin == 0 for a in axes.flat)


def test_the_image_is_shown_from_0_to_1_in_each_row(student, teacher):
    axes = show_attention(TensorImage(IMAGES[0]), student, teacher, LAYERS)
    assert axes.shape == (3, 3)
    expected = IMAGES[0].permute(1, 2, 0) - IMAGES[0].min()
    for image in drawn(axes[:, 0]):
        np.testing.assert_allclose(image, expected / expected.max(), rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_that_have_no_three_channels_are_grey_and_constant_ones_are_drawn(channels):
    net = nn.Sequential(nn.Conv2d(channels, 2, 3))
    layers = {"student": "0", "teacher": ["0"]}  # one name needs no list
    (image,) = drawn(show_attention(torch.ones(channels, 8, 8), net, net, layers)[:, 0])
    assert image.shape == (8, 8)
    assert not image.any()


def test_layers_may_be_paired_in_any_order_and_repeat(student, teacher):
    axes = show_attention(IMAGES[0], student, teacher, {"student": ["layer2", "conv1"], "teacher": ["conv1", "conv1"]})
    conv1, _, layer2 = maps_by_hand(student, IMAGES[0])
    teacher_map = maps_by_hand(teacher, IMAGES[0])[0]
    for got, expected in zip(drawn(axes[:, 1:].flat), (layer2, teacher_map, conv1, teacher_map), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_attention_is_drawn_in_the_axes_given_if_they_are_as_many_as_needed(student, teacher):
    given = plt.subplots(3, 3)[1]
    axes = show_attention(IMAGES[:1], student, teacher, LAYERS, ax=given)
    assert all(a is b for a, b in zip(axes.flat, given.flat, strict=True))
    with pytest.raises(ValueError, match=r"ax must be an array of axes of shape \(3, 4\)"):
        show_attention(IMAGES[0], student, teacher, LAYERS, before=student, ax=given)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": IMAGES[:2]}, ValueError, r"one image \(C, H, W\), got \(2, 3, 16, 16\): give xb\[0\]"),
        ({"x": IMAGES[0, 0]}, ValueError, r"one image \(C, H, W\), got \(16, 16\)"),
        ({"pairs": {"student": ["conv1"], "teacher": ["conv1", "layer1"]}}, ValueError, "layers pair by position"),
        ({"pairs": {"student": ["conv1"]}}, ValueError, "give layers as {'student': names, 'teacher': names}, got"),
        ({"pairs": {"student": ["head"], "teacher": ["conv1"]}}, ValueError, r"'head' of the student gives \(1, 4\)"),
        ({"pairs": {"student": ["conv2"], "teacher": ["conv1"]}}, ValueError, "student has no layer 'conv2'"),
        ({"teacher": "resnet"}, TypeError, "the teacher must be a model .* got 'resnet'"),
        ({"before": 3}, TypeError, "the student must be a model .* got 3"),
    ],
)
def test_what_cannot_be_shown_as_attention_is_refused(student, teacher, change, error, match):
    with pytest.raises(error, match=match):
        show_attention(**{"x": IMAGES[0], "student": student, "teacher": teacher, "pairs": LAYERS, **change})


def test_learners_and_half_precision_models_will_do(make_learner, student, teacher, dls):
    learner, half = make_learner(), copy.deepcopy(teacher).to(torch.bfloat16)
    axes = show_attention(dls.one_batch()[0][0], learner, half, LAYERS)
    for got, expected in zip(drawn(axes[:, 1]), maps_by_hand(student, IMAGES[0]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    for got, expected in zip(drawn(axes[:, 2]), maps_by_hand(teacher, IMAGES[0]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0.1, atol=0.01)
    assert plot_similarity(learner, make_learner(teacher), dls.one_batch()[0]).images


# Losses


def test_losses_have_gaps_where_the_teacher_rested_and_the_weight_its_own_axis():
    ax = plot_losses(FIT, smooth=0)
    task, kd = ax.lines
    np.testing.assert_array_equal(task.get_ydata(), [3, 2, 1, 0.5])
    np.testing.assert_array_equal(kd.get_ydata(), [0.4, NAN, NAN, 0.2])
    right = ax.figure.axes[1]
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [0.5, 0, 0, 0.25])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["task loss", "distillation loss", "weight (right)"]
    assert (ax.get_xlabel(), ax.get_ylabel(), right.get_ylabel()) == ("step", "loss", "weight")
    assert task.get_color() != kd.get_color()


def test_running_means_lie_over_the_losses_themselves():
    faint_task, task, faint_kd, kd = plot_losses(FIT, smooth=0.5).lines
    np.testing.assert_array_equal(faint_task.get_ydata(), [3, 2, 1, 0.5])
    np.testing.assert_allclose(task.get_ydata(), [3, (2 + 3 / 2) / 1.5, (1 + 2 / 2 + 3 / 4) / 1.75, 1])
    np.testing.assert_array_equal(faint_kd.get_ydata(), [0.4, NAN, NAN, 0.2])
    np.testing.assert_allclose(kd.get_ydata(), [0.4, NAN, NAN, 0.4 / 1.5])
    assert faint_kd.get_color() == kd.get_color()


@pytest.mark.parametrize(
    ("kd", "scale"),
    [([1.0, 0.1], "log"), ([NAN, NAN], "log"), ([0.0, 1.0], "linear"), ([NAN, -1.0], "linear")],
)
def test_the_scale_is_logarithmic_where_losses_allow_it(kd, scale):
    ax = plot_losses(history(task_loss=[1.0, 2.0], kd_loss=kd, weight=[0.0, 0.0]))
    ax.figure.canvas.draw()
    assert ax.get_yscale() == scale


def test_further_parts_of_the_loss_are_drawn_too():
    parts = {f"part{i}": [1.0, 2.0] for i in range(8)}
    ax = plot_losses(history(task_loss=[1.0, 1.0], kd_loss=[1.0, 1.0], weight=[0.5, 0.5], **parts), smooth=0)
    assert [line.get_label() for line in ax.lines] == ["task loss", "distillation loss", *parts]


def test_losses_of_a_real_fit_and_none_before(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, Attention, *PAIRS)
    with pytest.raises(ValueError, match="has no steps: train with cbs=kd first"):
        plot_losses(kd)
    make_learner().fit(2, cbs=kd)
    ax = plot_losses(kd, smooth=0)
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), kd.history["kd_loss"])
    assert len(ax.lines[1].get_ydata()) == 8


@pytest.mark.parametrize("smooth", [-0.1, 1, NAN])
def test_smoothing_is_a_share(smooth):
    with pytest.raises(ValueError, match="smooth must be at least 0 and below 1, got"):
        plot_losses(FIT, smooth)


# Similarity


def cka_by_features(x, y):
    "‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features: the form without Gram matrices, in numpy."
    x, y = (np.asarray(a.double().flatten(1)) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def cka_by_hsic(x, y):
    "HSIC(K, L) = tr(KHLH) / (n - 1)², with the centring matrix H."
    n = len(x)
    H = torch.eye(n, dtype=torch.double) - 1 / n
    K, L = (a.double().flatten(1) @ a.double().flatten(1).T for a in (x, y))
    kl, kk, ll = (torch.trace(a @ H @ b @ H) / (n - 1) ** 2 for a, b in ((K, L), (K, K), (L, L)))
    return float(kl / (kk * ll).sqrt())


@pytest.mark.parametrize("shape", [(20, 7), (20, 3, 4, 4), (20, 70_000)])
def test_cka_is_that_of_the_paper(shape):
    x = torch.randn(shape)
    y = x.flatten(1) @ torch.randn(x[0].numel(), 5) + 3
    assert linear_cka(x, y) == pytest.approx(cka_by_hsic(x, y), rel=1e-6)
    if x[0].numel() < 1000:
        assert linear_cka(x, y) == pytest.approx(cka_by_features(x, y), rel=1e-6)


def test_cka_sees_neither_rotation_nor_scale_nor_shift_and_is_1_for_the_same():
    x, y = torch.randn(12, 6, dtype=torch.double), torch.randn(12, 4, dtype=torch.double)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(5 * x @ q + 1, y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))
    assert 0 < linear_cka(x, y) < 1
    assert np.isnan(linear_cka(x, torch.full((12, 3), 0.1)))


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), r"of the same samples, got \(3, 2\) and \(4, 2\)"),
        (torch.ones(1, 2), torch.ones(1, 2), r"one is not enough: got features \(1, 2\)"),
    ],
)
def test_cka_needs_two_samples_and_the_same_ones(x, y, match):
    with pytest.raises(ValueError, match=match):
        linear_cka(x, y)


def test_each_student_layer_is_compared_with_each_teacher_layer(student, teacher):
    layers = {"student": ["layer1", "head"], "teacher": ["conv1", "layer2", "head"]}
    ax = plot_similarity(student, teacher, IMAGES, layers)
    got = ax.images[0].get_array()
    assert got.shape == (2, 3)
    with torch.no_grad():
        logits_s, logits_t = student.eval()(IMAGES), teacher.eval()(IMAGES)
        conv1 = teacher.conv1(IMAGES)
        layer1 = student.layer1(student.bn1(student.conv1(IMAGES)).relu())
    assert got[1, 2] == pytest.approx(cka_by_hsic(logits_s, logits_t), rel=1e-5)
    assert got[0, 0] == pytest.approx(cka_by_hsic(layer1, conv1), rel=1e-5)
    assert texts(ax) == [f"{value:.2f}" for value in got.flat]
    assert (ticks(ax.yaxis), ticks(ax.xaxis)) == (layers["student"], layers["teacher"])
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("student", "teacher")


def test_before_and_after_stand_side_by_side_on_one_scale(student, teacher):
    given = plt.subplots(1, 2)[1]
    for ax in (None, given):
        axes = plot_similarity(student, teacher, IMAGES, before=teacher, ax=ax)
        assert axes.shape == (2,)
        assert [a.get_ylabel() for a in axes] == ["student before", "student after"]
        np.testing.assert_allclose(axes[0].images[0].get_array().diagonal(), 1)
        assert all(axes[1].images[0].get_array().diagonal() < 1)
        assert {a.images[0].get_clim() for a in axes} == {(0, 1)}
    assert axes[0] is given[0]
    with pytest.raises(ValueError, match=r"ax must be an array of axes of shape \(2,\)"):
        plot_similarity(student, teacher, IMAGES, before=teacher, ax=given[0])


def test_models_with_several_inputs_take_a_tuple():
    class Two(Net):
        def forward(self, x, scale):
            return super().forward(x * scale[:, None, None, None])

    net = Two()
    ax = plot_similarity(net, net, (IMAGES, torch.arange(24)))
    assert ax.images[0].get_array()[0, 0] == pytest.approx(1)


def test_attention_may_be_drawn_over_the_image(student, teacher, pairs):
    plain = show_attention(IMAGES[3], student, teacher, pairs)
    axes = show_attention(IMAGES[3], student, teacher, pairs, overlay=True)
    assert [len(a.images) for a in axes[0]] == [1, 2, 2]
    for a, b in zip(axes[:, 1:].flat, plain[:, 1:].flat, strict=True):
        np.testing.assert_array_equal(a.images[0].get_array(), axes[0, 0].images[0].get_array())
        np.testing.assert_array_equal(a.images[1].get_array(), b.images[0].get_array())
        assert list(a.images[1].get_extent()) == [-0.5, 15.5, 15.5, -0.5]
        assert 0 < a.images[1].get_alpha() < 1
