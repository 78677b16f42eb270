"What is true of single losses on predictions: the laws they keep, what they refuse."

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_losses import PREDICTIONS, batch, eighths, f64, law, losses, select, x23, y2
from torch.testing import assert_close

from fasterai_kd import DIST, DecoupledKD, HardTarget, Logits, MultiLabel, Mutual, SoftTarget

MEANS = {label: case for label, case in PREDICTIONS.items() if case.row.of == "sample"}
SOFTMAXES = select("SoftTarget", "Mutual", "DecoupledKD", "DIST", standardize=False)
DIVERGENCES = select("SoftTarget", "Mutual", "Logits", "DecoupledKD", standardize=False, normalize=False)
Z_SCORED = select("SoftTarget", "DecoupledKD", standardize=True)


@st.composite
def batches(draw, shapes=((1, 2), (4, 3), (3, 6), (2, 3, 2, 2))):
    shape = draw(st.sampled_from(shapes))
    s, t = (torch.from_numpy(draw(arrays(np.float64, shape, elements=st.floats(-20, 20)))) for _ in "st")
    return s, t, torch.from_numpy(draw(arrays(np.int64, shape[:1] + shape[2:], elements=st.integers(0, shape[1] - 1))))


temperatures = st.floats(0.5, 20)


# Gradients


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(("T", "alpha", "beta"), [(1.0, 1.0, 1.5), (4.0, 0.5, 8.0)])
def test_normalized_kd_trains_as_the_authors_loss_does(shape, T, alpha, beta):
    "Yang et al.: -(alpha p_t[y] log p_s[y]) - beta T² Σ_{j≠y} q_t[j] log q_s[j], for rows of logits."
    s, t, y = batch(*shape)
    s.requires_grad_()
    rows_s, rows_t = (x.movedim(1, -1).flatten(0, -2) for x in (s, t))
    rest = torch.ones_like(rows_s).scatter_(1, y.flatten()[:, None], 0).bool()
    q_s, q_t = (x[rest].view(len(x), -1).div(T).softmax(1) for x in (rows_s, rows_t))
    authors = -alpha * rows_t.softmax(1)[~rest] * rows_s.log_softmax(1)[~rest] - beta * T**2 * (q_t * q_s.log()).sum(1)
    (expected,) = torch.autograd.grad(authors.mean(), s)
    (got,) = torch.autograd.grad(DecoupledKD(s, t, T, alpha, beta, target=y, normalize=True), s)
    assert_close(got, expected)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_a_confident_wrong_student_still_gets_its_gradient(T):
    s = torch.tensor([[-100.0, 100.0, 90.0]], requires_grad=True)
    DecoupledKD(s, -s, T=T, beta=0, target=torch.tensor([0])).backward()
    among_others = (s[:, 1:] / T).softmax(1)  # the two-way KL pulls the target up and the others down as they weigh
    assert_close(s.grad, torch.cat([torch.full((1, 1), -T), T * among_others], dim=1))


# What may be given


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, Logits, DIST])
def test_labels_are_used_by_decoupled_kd_only(loss):
    s, t, y = batch(4, 3)
    assert loss(s, t) == loss(s, t, target=y) == loss(s, t, target=None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_may_be_integers_of_any_size(dtype):
    s, t, y = batch(4, 3)
    assert DecoupledKD(s, t, target=y.to(dtype)) == DecoupledKD(s, t, target=y)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 3)], ids=str)
def test_logits_takes_regression_outputs_of_any_shape(shape):
    assert Logits(torch.full(shape, 3.0), torch.ones(shape)) == 4


# Laws


@losses(DIVERGENCES)
@law
@given(batches())
def test_divergence_is_never_negative_and_zero_at_the_teachers_outputs_with_no_gradient(loss, b):
    s, t, y = b
    assert loss(s, t, target=y) >= -1e-9
    same = t.clone().requires_grad_()
    at_teacher = loss(same, t, target=y)
    at_teacher.backward()
    assert at_teacher.abs() < 1e-9
    assert same.grad.abs().max() < 1e-9


@law
@given(batches(), temperatures)
def test_normalized_kd_is_zero_at_the_teachers_outputs(b, T):
    _, t, y = b
    assert DecoupledKD(t, t, T=T, target=y, normalize=True).abs() < 1e-9


@law
@given(batches())
def test_soft_target_at_temperature_one_is_mutual(b):
    assert_close(SoftTarget(*b[:2], T=1), Mutual(*b[:2]))


@losses(SOFTMAXES)
@law
@given(batches(), st.floats(-30, 30), st.floats(-30, 30))
def test_a_constant_added_to_all_logits_of_a_sample_changes_nothing(loss, b, c, d):
    s, t, y = b
    shift = torch.linspace(-1, 1, len(s), dtype=f64).view(-1, *[1] * (s.ndim - 1))
    assert_close(loss(s + c * shift, t + d, target=y), loss(s, t, target=y))


@losses({label: c for label, c in PREDICTIONS.items() if c.name != "HardTarget"})  # of equal logits it takes the first
@law
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_samples_and_of_classes_makes_no_difference(loss, b, random):
    s, t, y = b
    samples, classes = (torch.tensor(random.sample(range(n), n)) for n in s.shape[:2])
    moved = [x[samples][:, classes] for x in (s, t)]
    assert_close(loss(*moved, target=classes.argsort()[y[samples]]), loss(s, t, target=y))


@losses(MEANS)
@law
@given(batches())
def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_samples(loss, b):
    each = [loss(s[None], t[None], target=y[None]) for s, t, y in zip(*b, strict=True)]
    assert_close(loss(*b[:2], target=b[2]), torch.stack(each).mean())


@losses(MEANS)
@law
@given(batches(((2, 3, 2, 2),)), st.integers(1, 3))
def test_dense_outputs_are_averaged_over_positions_so_their_number_makes_no_difference(loss, b, n):
    s, t, y = b
    assert_close(loss(s.repeat(1, 1, n, 2), t.repeat(1, 1, n, 2), target=y.repeat(1, n, 2)), loss(s, t, target=y))
    assert_close(loss(s.flatten(2), t.flatten(2), target=y.flatten(1)), loss(s, t, target=y))


@law
@given(batches(), temperatures, st.floats(0, 10), st.floats(0, 10), st.booleans())
def test_decoupled_kd_is_linear_in_alpha_and_beta(b, T, alpha, beta, normalize):
    s, t, y = b
    f = partial(DecoupledKD, s, t, T, target=y, normalize=normalize)
    assert_close(f(alpha=alpha, beta=beta), alpha * f(alpha=1, beta=0) + beta * f(alpha=0, beta=1))


@law
@given(batches(((1, 2), (4, 2), (2, 2, 2, 2))), temperatures, st.floats(0, 10))
def test_decoupled_kd_of_two_classes_is_soft_target(b, T, beta):
    s, t, y = b
    assert_close(DecoupledKD(s, t, T, alpha=1, beta=beta, target=y), SoftTarget(s, t, T))


@law
@given(batches(((1, 3), (4, 3), (3, 6))), temperatures)
def test_the_two_parts_of_decoupled_kd_make_up_soft_target(b, T):
    "Zhao et al., eq. 5: KL = TCKD + (1 - p_t[y]) NCKD."
    s, t, y = b
    tckd, nckd = (DecoupledKD(s, t, T, a, 1 - a, target=y, reduction="none") for a in (1, 0))
    rest = 1 - (t / T).softmax(1).gather(1, y[:, None])[:, 0]
    assert_close((tckd + rest * nckd).mean(), SoftTarget(s, t, T))


def test_soft_target_at_high_temperature_matches_centred_logits():
    "Hinton et al., section 2.1, where the logits have zero mean; the gradient is that of the squares over 2C."
    s, t, _ = batch(6, 5)
    d = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert_close(SoftTarget(s, t, T=1e4), d.square().mean() / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
@law
@given(batches())
def test_reduction_none_gives_one_value_a_sample_and_their_mean_is_the_loss(normalize, b):
    s, t, y = b
    f = partial(DecoupledKD, normalize=normalize)
    each = f(s, t, target=y, reduction="none")
    assert each.shape == s.shape[:1]
    assert_close(each[0], f(s[:1], t[:1], target=y[:1]))
    assert_close(each.mean(), f(s, t, target=y))


# Correlations and z-scores


@law
@given(eighths(5, 4), eighths(5, 4), st.floats(0.1, 1), st.booleans())
def test_dist_does_not_see_a_positive_affine_change_of_the_probabilities(s, t, a, student):
    mixed = [(a * z.softmax(1) + (1 - a) / 4).log() if of == student else z for of, z in ((True, s), (False, t))]
    assert_close(DIST(*mixed), DIST(s, t), atol=1e-5, rtol=0)


@law
@given(eighths(5, 4), eighths(5, 4), st.floats(0, 4), st.floats(0, 4), temperatures)
def test_dist_lies_between_0_and_twice_its_weights_and_is_linear_in_them(s, t, beta, gamma, T):
    got = DIST(s, t, beta, gamma, T)
    assert -1e-9 <= got <= 2 * (beta + gamma) * T**2 + 1e-9
    assert_close(got, beta * DIST(s, t, 1, 0, T) + gamma * DIST(s, t, 0, 1, T))


@pytest.mark.parametrize(("shape", "T"), [((6, 5), 1.0), ((6, 5), 4.0), ((2, 3, 4, 4), 1.0)], ids=str)
def test_dist_is_zero_with_no_gradient_at_the_teachers_outputs(shape, T):
    _, t, _ = batch(*shape)
    same = t.clone().requires_grad_()
    got = DIST(same, t, T=T)
    got.backward()
    assert got.item() == pytest.approx(0, abs=1e-9)
    assert same.grad.abs().max() < 1e-4


def test_dist_of_one_sample_correlates_its_classes_and_adds_a_constant():
    s, t, _ = batch(1, 5)
    s.requires_grad_()
    (expected,) = torch.autograd.grad(DIST(s, t, gamma=0), s)
    got = DIST(s, t, gamma=3)
    (grad,) = torch.autograd.grad(got, s)
    assert_close(got, DIST(s, t, gamma=0) + 3)
    assert_close(grad, expected)


@losses(Z_SCORED | select("DIST"))
@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1])
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_a_student_that_gives_all_classes_the_same_logit_gets_a_finite_gradient(loss, constant, dtype):
    _, t, y = batch(4, 7, dtype=dtype)
    s = torch.full_like(t, constant, requires_grad=True)
    got = loss(s, t, target=y)
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@losses(Z_SCORED | select("DIST"))
def test_a_head_that_starts_at_0_gets_a_gradient_of_a_common_size(loss):
    _, t, y = batch(4, 7)
    s = torch.zeros_like(t, requires_grad=True)
    loss(s, t, target=y).backward()
    assert s.grad.norm() < 100


@losses(Z_SCORED)
@law
@given(eighths(4, 5), eighths(4, 5), st.floats(0.5, 10), st.floats(0.5, 10), st.floats(-9, 9), st.floats(-9, 9))
def test_standardized_losses_see_neither_scale_nor_shift_of_the_logits_of_a_sample(loss, s, t, a, b, c, d):
    y, rows = torch.tensor([0, 1, 2, 4]), torch.linspace(1, 2, 4, dtype=f64)[:, None]
    assert_close(loss(a * rows * s + c * rows, b * t + d, target=y), loss(s, t, target=y), atol=1e-5, rtol=0)


@losses(select("SoftTarget", "DecoupledKD", standardize=True, normalize=False))
@law
@given(eighths(4, 5), eighths(4, 5), st.floats(0.5, 10))
def test_standardized_divergence_is_never_negative_and_zero_where_the_student_is_a_scaled_teacher(loss, s, t, a):
    y = torch.tensor([0, 1, 2, 4])
    assert loss(s, t, target=y) >= -1e-9
    assert loss(a * t + 1, t, target=y).abs() < 1e-9


def test_standardized_is_the_loss_of_z_scores_of_any_temperature_and_reduction():
    s, t, y = batch(4, 5)
    z_s, z_t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (s, t))
    assert_close(SoftTarget(s, t, 2, standardize=True), SoftTarget(z_s, z_t, 2), rtol=1e-6, atol=0)
    got = DecoupledKD(s, t, 2, target=y, reduction="none", standardize=True)
    assert_close(got, DecoupledKD(z_s, z_t, 2, target=y, reduction="none"), rtol=1e-6, atol=0)


# Errors


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, DecoupledKD, DIST])
@pytest.mark.parametrize("shape", [(2, 1), (2,), (2, 1, 4, 4)], ids=str)
def test_fewer_than_two_classes_are_refused(loss, shape):
    with pytest.raises(ValueError, match=rf"{loss.__name__} needs .*two or more classes, got {re.escape(str(shape))}"):
        loss(torch.zeros(shape), torch.zeros(shape), target=y2)


@pytest.mark.parametrize("normalize", [False, True])
def test_decoupled_kd_without_labels_is_refused(normalize):
    with pytest.raises(ValueError, match="DecoupledKD needs `target`"):
        DecoupledKD(x23, x23, normalize=normalize)


@pytest.mark.parametrize(
    ("target", "got"),
    [
        (torch.zeros(2), r"\(2,\) of torch.float32"),
        (x23, r"\(2, 3\) of torch.float32"),
        (x23.long(), r"\(2, 3\) of torch.int64"),
        (y2[:1], r"\(1,\) of torch.int64"),
        (y2[0], r"\(\) of torch.int64"),
    ],
    ids=["floats", "soft labels", "one-hot", "too few", "no batch"],
)
def test_targets_that_are_not_one_class_index_a_sample_are_refused(target, got):
    with pytest.raises(ValueError, match=rf"DecoupledKD needs one class index per sample .*\(2, 3\), got .*{got}"):
        DecoupledKD(x23, x23, target=target)


def test_dense_targets_need_one_class_index_a_position():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"one class index .*\(2, 3, 4, 5\), got .*\(2, 5, 4\)"):
        DecoupledKD(x, x, target=torch.zeros(2, 5, 4, dtype=torch.long))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
        DecoupledKD(x23, x23, target=y2, reduction="sum")


def test_labels_that_are_not_one_tensor_are_refused():
    z = torch.randn(2, 3)
    with pytest.raises(TypeError, match="DecoupledKD needs one tensor of labels, got a tuple"):
        DecoupledKD(z, z, target=(torch.tensor([0, 1]), torch.tensor([0, 1])))


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, DecoupledKD], ids=lambda f: f.__name__)
def test_classes_that_the_teacher_rules_out_with_minus_infinity_count_nothing(loss):
    s, t, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    t[:, 3] = float("-inf")
    value = loss(s, t, target=y)
    nearly = loss(s, t.clamp(min=-1e4), target=y)
    torch.testing.assert_close(value, nearly)
    value.backward()
    assert s.grad.isfinite().all()


# Labels that do not count

IGNORING = [SoftTarget, Mutual, Logits, DIST, HardTarget, DecoupledKD]
VOID = 255


@pytest.mark.parametrize("loss", IGNORING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 2)], ids=str)
def test_what_is_ignored_counts_neither_in_the_value_nor_in_the_gradient(loss, shape):
    s, t, y = batch(*shape)
    void = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    rows_s, rows_t = (x.movedim(1, -1)[~void] for x in (s, t))
    s.requires_grad_()
    got = loss(s, t, target=y.masked_fill(void, VOID), ignore_index=VOID)
    assert_close(got, loss(rows_s, rows_t, target=y[~void]))
    got.backward()
    grad = s.grad.movedim(1, -1)
    assert (grad[void] == 0).all()
    assert (grad[~void].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("loss", IGNORING, ids=lambda f: f.__name__)
def test_where_all_are_ignored_the_loss_is_0_and_has_a_gradient(loss):
    s, t, y = batch(4, 5)
    got = loss(s.requires_grad_(), t, target=torch.full_like(y, VOID), ignore_index=VOID)
    got.backward()
    assert got == 0
    assert (s.grad == 0).all()


@pytest.mark.parametrize("loss", IGNORING[:-1], ids=lambda f: f.__name__)
def test_samples_beyond_the_labels_have_none_and_count(loss):
    s, t, y = batch(6, 5)
    y = y.clone()
    y[1] = VOID
    keep = [0, 2, 3, 4, 5]
    assert_close(loss(s, t, target=y[:3], ignore_index=VOID), loss(s[keep], t[keep]))
    assert_close(loss(s, t, target=y[:0], ignore_index=VOID), loss(s, t))


@pytest.mark.parametrize("loss", IGNORING[:-1], ids=lambda f: f.__name__)
def test_ignoring_needs_labels(loss):
    s, t, _ = batch(4, 5)
    with pytest.raises(ValueError, match=f"{loss.__name__} ignores the label 255, so it needs `target`"):
        loss(s, t, ignore_index=VOID)


@pytest.mark.parametrize("loss", IGNORING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_ignored_positions_may_be_nan_and_change_no_gradient(loss, who):
    s, t, y = batch(2, 5, 3, 2)
    void = torch.zeros_like(y, dtype=torch.bool)
    void[:, 0] = True
    bad = [x.movedim(1, -1).clone() for x in (s, t)]
    bad[who == "teacher"][void] = torch.nan
    results = []
    for a, b in ((s, t), (x.movedim(-1, 1) for x in bad)):
        a = a.detach().requires_grad_()
        value = loss(a, b, target=y.masked_fill(void, VOID), ignore_index=VOID)
        results.append((value, *torch.autograd.grad(value, a)))
    assert_close(*results)


# Independent classes


@law
@given(eighths(4, 3), eighths(4, 3))
def test_multi_label_is_soft_target_of_yes_and_no(s, t):
    yes_no = [torch.stack([z, torch.zeros_like(z)], 1).movedim(1, -1).flatten(0, 1) for z in (s, t)]
    assert_close(MultiLabel(s, t, T=2), SoftTarget(*yes_no, T=2))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (2, 1, 3, 3)], ids=str)
def test_multi_label_takes_single_logits_and_masks_and_sees_a_constant_added_to_all(shape):
    z = torch.randn(shape, dtype=torch.float64)
    assert MultiLabel(z, z) == 0
    assert MultiLabel(z + 1, z) > 0


def test_hard_target_is_cross_entropy_with_the_teachers_class():
    s, t, _ = batch(6, 5)
    assert_close(HardTarget(s, t), torch.nn.functional.cross_entropy(s, t.argmax(1)))
    assert_close(HardTarget(s, t), HardTarget(s, 100 * t))
