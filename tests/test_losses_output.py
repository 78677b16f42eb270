"The losses on outputs, against formulas written anew with numpy and scipy, and the laws they keep."

import re
from functools import partial

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorBase, TensorCategory, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.testing import assert_close

from fasterai_kd import DIST, DecoupledKD, Logits, Mutual, SoftTarget

law = settings(deadline=None, derandomize=True, max_examples=20)
f64 = torch.float64


# The formulas, for one sample or position: student logits, teacher logits, class


def soft_target(s, t, y, T=5.0):
    return T**2 * rel_entr(softmax(t / T), softmax(s / T)).sum()


def mutual(s, t, y):
    return np.sum(softmax(t) * np.log(softmax(t) / softmax(s)))


def logits(s, t, y):
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def others(z, y):
    p = softmax(z)
    return np.delete(p, y) / (1 - p[y])


def decoupled(s, t, y, T=4.0, alpha=1.0, beta=8.0):
    b_s, b_t = softmax(s / T)[y], softmax(t / T)[y]
    tckd = b_t * np.log(b_t / b_s) + (1 - b_t) * np.log((1 - b_t) / (1 - b_s))
    return T**2 * (alpha * tckd + beta * rel_entr(others(t / T, y), others(s / T, y)).sum())


def normalized(s, t, y, T=4.0, alpha=1.0, beta=8.0, normalize=True):
    p_s, p_t = softmax(s)[y], softmax(t)[y]
    return alpha * p_t * np.log(p_t / p_s) + beta * T**2 * rel_entr(others(t / T, y), others(s / T, y)).sum()


def z_scored(formula):
    def standardized(s, t, y, standardize=True, **args):
        return formula(*((z - z.mean()) / (1e-7 + z.std(ddof=1)) for z in (s, t)), y, **args)

    return standardized


def dist(s, t, beta=1.0, gamma=1.0, T=1.0):
    "For all samples: two tables of logits."
    p_s, p_t = (softmax(z / T, axis=1) for z in (s, t))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)]
    return T**2 * (beta * (1 - np.mean(rows)) + gamma * (1 - np.mean(columns)))


def table(x):
    "One row for each sample or position."
    return np.moveaxis(x.numpy(), 1, -1).reshape(-1, x.shape[1])


def over_samples(formula, s, t, y, **args):
    return np.mean([formula(*row, **args) for row in zip(table(s), table(t), y.numpy().ravel(), strict=True)])


CASES = {
    "SoftTarget": (SoftTarget, soft_target, {}),
    "SoftTarget T=2": (SoftTarget, soft_target, {"T": 2}),
    "Mutual": (Mutual, mutual, {}),
    "Logits": (Logits, logits, {}),
    "DecoupledKD": (DecoupledKD, decoupled, {}),
    "DecoupledKD T=1": (DecoupledKD, decoupled, {"T": 1, "alpha": 0.5, "beta": 2}),
    "Normalized KD": (DecoupledKD, normalized, {"normalize": True}),
    "Normalized KD T=2": (DecoupledKD, normalized, {"normalize": True, "T": 2, "alpha": 3, "beta": 0.5}),
    "SoftTarget z": (SoftTarget, z_scored(soft_target), {"standardize": True, "T": 2}),
    "DecoupledKD z": (DecoupledKD, z_scored(decoupled), {"standardize": True}),
    "Normalized KD z": (DecoupledKD, z_scored(normalized), {"standardize": True, "normalize": True}),
}
OVER_THE_BATCH = {"DIST": DIST, "DIST T=4": partial(DIST, beta=0.5, gamma=2.0, T=4.0)}  # not a mean over samples
Z_SCORED = [name for name in CASES if name.endswith("z")]
ALL = {name: partial(loss, **args) for name, (loss, _, args) in CASES.items()} | OVER_THE_BATCH
MEANS = [name for name in CASES if name not in Z_SCORED]
DIVERGENCES = [name for name in MEANS if "Normalized" not in name]  # zero and smallest at student == teacher
SOFTMAXES = [name for name in MEANS if name != "Logits"]

formulas = pytest.mark.parametrize(("loss", "formula", "args"), CASES.values(), ids=CASES)


def losses(names=tuple(ALL)):
    return pytest.mark.parametrize("loss", [ALL[name] for name in names], ids=names)


def batch(*shape, scale=3.0, **kwargs):
    rng = torch.Generator().manual_seed(len(shape))
    s, t = (torch.randn(shape, generator=rng, dtype=f64).mul(scale).to(**kwargs) for _ in "st")
    return s, t, torch.randint(shape[1], shape[:1] + shape[2:], generator=rng).to(s.device)


@st.composite
def batches(draw, shapes=((1, 2), (4, 3), (3, 6), (2, 3, 2, 2))):
    shape = draw(st.sampled_from(shapes))
    s, t = (torch.from_numpy(draw(arrays(np.float64, shape, elements=st.floats(-20, 20)))) for _ in "st")
    return s, t, torch.from_numpy(draw(arrays(np.int64, shape[:1] + shape[2:], elements=st.integers(0, shape[1] - 1))))


def tables(*shape):
    "Multiples of 1/8, ties and constant rows among them: of a variance that is 0 or not tiny."
    return arrays(np.int64, shape, elements=st.integers(-24, 24)).map(lambda a: torch.from_numpy(a).double() / 8)


temperatures = st.floats(0.5, 20)


# Values and gradients


@formulas
@pytest.mark.parametrize("shape", [(6, 5), (1, 2), (2, 4, 3, 2), (3, 3, 7), (2, 3, 2, 2, 2)], ids=str)
def test_value_is_the_mean_of_the_formula_over_samples_and_positions(loss, formula, args, shape, device):
    got = loss(*(x.to(device) for x in batch(*shape)[:2]), target=batch(*shape)[2].to(device), **args)
    assert got.shape == ()
    assert got.item() == pytest.approx(over_samples(formula, *batch(*shape), **args), rel=1e-9)


@formulas
def test_float32_is_enough(loss, formula, args, device):
    s, t, y = batch(6, 5, dtype=torch.float32, device=device)
    got = loss(s, t, target=y, **args)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(over_samples(formula, *batch(6, 5), **args), rel=1e-5)


@pytest.mark.parametrize("args", [{}, {"beta": 0.5, "gamma": 2.0, "T": 4.0}], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (2, 2), (2, 4, 3, 2), (3, 3, 7), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [f64, torch.float32], ids=str)
def test_dist_is_the_formula_with_a_row_for_each_sample_and_position(args, shape, dtype, device):
    s, t, _ = batch(*shape, scale=1.0)
    got = DIST(*(x.to(device, dtype) for x in (s, t)), **args)
    assert (got.shape, got.dtype) == ((), dtype)
    assert got.item() == pytest.approx(dist(table(s), table(t), **args), rel=1e-5)  # the 1e-8 in the denominator


@losses()
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)], ids=str)
def test_gradient_is_the_derivative_of_the_value(loss, shape):
    s, t, y = batch(*shape, scale=1.0)
    assert torch.autograd.gradcheck(lambda s: loss(s, t, target=y), s.requires_grad_())


@losses()
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)], ids=str)
def test_gradient_reaches_every_sample_of_the_student_and_never_the_teacher(loss, shape, device):
    s, t, y = batch(*shape, device=device)
    loss(s.requires_grad_(), t.requires_grad_(), target=y).backward()
    assert (s.grad.abs().sum(1) > 0).all()
    assert t.grad is None


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


@losses()
@pytest.mark.parametrize("teacher", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_logits_give_finite_values_and_gradients_in_float32(loss, teacher, size):
    s = (size * torch.tensor([[1.0, -1, 0], [-1, 1, 1]])).requires_grad_()
    value = loss(s, teacher * s.detach(), target=torch.tensor([0, 0]))
    value.backward()
    assert value.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@losses()
def test_half_precision_is_computed_in_float32(loss, dtype, device):
    s, t, y = batch(6, 5, scale=300.0, dtype=dtype, device=device)  # squares overflow float16
    got = loss(s.requires_grad_(), t, target=y)
    assert got.dtype == torch.float32
    assert got == loss(s.float(), t.float(), target=y)
    assert got == loss(s, t.float(), target=y)
    got.backward()
    assert s.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@losses()
def test_half_precision_is_close_to_float32(loss, dtype):
    s, t, y = batch(6, 5)
    assert loss(s.to(dtype), t.to(dtype), target=y).item() == pytest.approx(loss(s, t, target=y).item(), rel=0.03)


# What may be given


@losses()
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 4)], ids=str)
def test_tensors_of_fastai_work_and_give_a_plain_tensor(loss, shape):
    s, t, y = batch(*shape, dtype=torch.float32)
    s_img = TensorImage(s.clone()).requires_grad_()
    got = loss(s_img, TensorBase(t), target=TensorCategory(y))
    assert type(got) is Tensor
    assert got == loss(s, t, target=y)
    got.backward()
    assert s_img.grad.abs().sum() > 0


@formulas
def test_further_keywords_are_ignored_and_partial_sets_arguments(loss, formula, args):
    s, t, y = batch(4, 3)
    got = partial(loss, **args)(pred=s, teacher_pred=t, fm_s={}, fm_t={}, target=y, lam=0.3)
    assert got == loss(s, t, target=y, **args)


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, Logits, DIST])
def test_labels_are_used_by_decoupled_kd_only(loss):
    s, t, y = batch(4, 3)
    assert loss(s, t) == loss(s, t, target=y) == loss(s, t, target=None)


@pytest.mark.parametrize("loss", OVER_THE_BATCH.values(), ids=OVER_THE_BATCH)
def test_dist_ignores_further_keywords(loss):
    s, t, y = batch(4, 3)
    assert loss(pred=s, teacher_pred=t, fm_s={}, fm_t={}, target=y, lam=0.3) == loss(s, t)


@losses()
def test_inputs_are_left_as_they_are(loss):
    given_ = batch(4, 3)
    loss(*given_[:2], target=given_[2])
    assert [x._version for x in given_] == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(given_, batch(4, 3), strict=True))


@losses()
def test_memory_format_makes_no_difference(loss):
    s, t, y = batch(2, 3, 4, 5)
    last = s.contiguous(memory_format=torch.channels_last)
    assert_close(loss(last, t, target=y), loss(s, t, target=y))


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


@losses([*SOFTMAXES, *OVER_THE_BATCH])
@law
@given(batches(), st.floats(-30, 30), st.floats(-30, 30))
def test_a_constant_added_to_all_logits_of_a_sample_changes_nothing(loss, b, c, d):
    s, t, y = b
    shift = torch.linspace(-1, 1, len(s), dtype=f64).view(-1, *[1] * (s.ndim - 1))
    assert_close(loss(s + c * shift, t + d, target=y), loss(s, t, target=y))


@losses()
@law
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_samples_and_of_classes_makes_no_difference(loss, b, random):
    s, t, y = b
    samples, classes = (torch.tensor(random.sample(range(n), n)) for n in s.shape[:2])
    moved = [x[samples][:, classes] for x in (s, t)]
    assert_close(loss(*moved, target=classes.argsort()[y[samples]]), loss(s, t, target=y))


@losses(MEANS + Z_SCORED)
@law
@given(batches())
def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_samples(loss, b):
    each = [loss(s[None], t[None], target=y[None]) for s, t, y in zip(*b, strict=True)]
    assert_close(loss(*b[:2], target=b[2]), torch.stack(each).mean())


@losses(MEANS + Z_SCORED)
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
@given(tables(5, 4), tables(5, 4), st.floats(0.1, 1), st.booleans())
def test_dist_does_not_see_a_positive_affine_change_of_the_probabilities(s, t, a, student):
    mixed = [(a * z.softmax(1) + (1 - a) / 4).log() if of == student else z for of, z in ((True, s), (False, t))]
    assert_close(DIST(*mixed), DIST(s, t), atol=1e-5, rtol=0)


@law
@given(tables(5, 4), tables(5, 4), st.floats(0, 4), st.floats(0, 4), temperatures)
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
    assert got.item() == pytest.approx(0, abs=1e-4 * T**2)  # the 1e-8 in the denominator
    assert same.grad.abs().max() < 1e-4


def test_dist_of_one_sample_correlates_its_classes_and_adds_a_constant():
    s, t, _ = batch(1, 5)
    s.requires_grad_()
    (expected,) = torch.autograd.grad(DIST(s, t, gamma=0), s)
    got = DIST(s, t, gamma=3)
    (grad,) = torch.autograd.grad(got, s)
    assert_close(got, DIST(s, t, gamma=0) + 3)
    assert_close(grad, expected)


@losses([*Z_SCORED, *OVER_THE_BATCH])
@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1])
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_a_student_that_gives_all_classes_the_same_logit_gets_a_finite_gradient(loss, constant, dtype):
    _, t, y = batch(4, 7, dtype=dtype)
    s = torch.full_like(t, constant, requires_grad=True)
    got = loss(s, t, target=y)
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@losses(Z_SCORED)
@law
@given(tables(4, 5), tables(4, 5), st.floats(0.5, 10), st.floats(0.5, 10), st.floats(-9, 9), st.floats(-9, 9))
def test_standardized_losses_see_neither_scale_nor_shift_of_the_logits_of_a_sample(loss, s, t, a, b, c, d):
    y, rows = torch.tensor([0, 1, 2, 4]), torch.linspace(1, 2, 4, dtype=f64)[:, None]
    assert_close(loss(a * rows * s + c * rows, b * t + d, target=y), loss(s, t, target=y), atol=1e-5, rtol=0)


@losses(["SoftTarget z", "DecoupledKD z"])
@law
@given(tables(4, 5), tables(4, 5), st.floats(0.5, 10))
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

x23, y2 = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, Logits, DecoupledKD, DIST])
@pytest.mark.parametrize(
    "shape", [(2, 4), (1, 3), (3,), (2, 1), (4, 3), (2, 3, 1), (1, 2, 3)], ids=lambda shape: f"teacher {shape}"
)
def test_unequal_shapes_are_refused_and_never_broadcast(loss, shape):
    expected = rf"{loss.__name__} .*student gives {re.escape('(2, 3)')}, the teacher {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=expected):
        loss(x23, torch.zeros(shape), target=y2)


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, Logits, DecoupledKD, DIST])
def test_outputs_that_are_no_tensors_are_refused(loss):
    with pytest.raises(TypeError, match=rf"{loss.__name__} .*student's output is a tuple"):
        loss((x23, x23), x23, target=y2)
    with pytest.raises(TypeError, match=rf"{loss.__name__} .*teacher's output is a dict"):
        loss(x23, {"out": x23}, target=y2)


@pytest.mark.parametrize("loss", [SoftTarget, DecoupledKD, DIST])
@pytest.mark.parametrize("T", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(loss, T):
    with pytest.raises(ValueError, match=rf"{loss.__name__} needs a finite temperature T > 0, got {T}"):
        loss(x23, x23, T=T, target=y2)


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


def test_an_infinite_temperature_is_refused():
    with pytest.raises(ValueError, match="finite temperature"):
        SoftTarget(torch.randn(2, 3), torch.randn(2, 3), T=float("inf"))


@pytest.mark.parametrize("loss", [SoftTarget, Mutual, DecoupledKD], ids=lambda f: f.__name__)
def test_classes_that_the_teacher_rules_out_with_minus_infinity_count_nothing(loss):
    s, t, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    t[:, 3] = float("-inf")
    value = loss(s, t, target=y)
    nearly = loss(s, t.clamp(min=-1e4), target=y)
    torch.testing.assert_close(value, nearly)
    value.backward()
    assert s.grad.isfinite().all()
