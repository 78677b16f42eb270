"The losses on relations between samples, against formulas written anew with numpy, and the laws they keep."

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorBase, TensorImage
from hypothesis import given
from hypothesis import strategies as st
from test_losses_intermediate import any_features, features, law, pair, shapes, value
from torch import Tensor
from torch.testing import assert_close

from fasterai_kd import PKT, RKD

f64 = torch.float64


# The formulas, for one pair of layers


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def rkd(s, t, w_d=25.0, w_a=50.0):
    s, t = (f.reshape(len(f), -1) for f in (s, t))
    n = range(len(s))

    def unit(v):
        return v / np.linalg.norm(v) if v.any() else v

    def distances(f):
        d = np.array([[np.linalg.norm(a - b) for b in f] for a in f])
        apart = [d[i, j] for i in n for j in n if i != j]
        return d / np.mean(apart) if any(apart) else d

    def cosine(f, i, j, k):
        return unit(f[i] - f[j]) @ unit(f[k] - f[j])

    far = [huber(x) for x in (distances(s) - distances(t)).flat]
    turned = [huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in itertools.product(n, repeat=3)]
    return w_d * np.mean(far) + w_a * np.mean(turned)


def pkt(s, t):
    def near(f):
        f = f.reshape(len(f), -1)
        for a in f:
            row = [(a @ b / np.sqrt((a @ a) * (b @ b)) + 1) / 2 if a.any() and b.any() else 0.5 for b in f]
            yield [x / sum(row) for x in row]

    rows = zip(near(t), near(s), strict=True)
    return np.mean([p * np.log((p + 1e-7) / (q + 1e-7)) for row in rows for p, q in zip(*row, strict=True)])


CASES = {
    "RKD": (RKD, rkd, {}),
    "RKD distances": (RKD, rkd, {"w_d": 2, "w_a": 0}),
    "RKD angles": (RKD, rkd, {"w_d": 0, "w_a": 3}),
    "PKT": (PKT, pkt, {}),
}
ALL = {name: partial(loss, **args) for name, (loss, _, args) in CASES.items()}

formulas = pytest.mark.parametrize(("loss", "formula", "args"), CASES.values(), ids=CASES)
losses = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
both = pytest.mark.parametrize("loss", [RKD, PKT])
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


# Values and gradients


@formulas
@pytest.mark.parametrize("shape_s", [(5, 4, 3, 2), (5, 6), (5,)], ids=str)
@pytest.mark.parametrize("shape_t", [(5, 2, 2, 4), (5, 1, 2, 3, 2), (5, 3)], ids=str)
def test_value_is_the_formula_for_features_of_any_rank_and_size(loss, formula, args, shape_s, shape_t, device):
    s, t = features(*shape_s), features(*shape_t, seed=1)
    got = value(partial(loss, **args), s.to(device), t.to(device))
    assert got.shape == ()
    assert got.item() == pytest.approx(formula(s.numpy(), t.numpy(), **args), rel=1e-9)


@formulas
def test_float32_is_enough(loss, formula, args, device):
    s, t = pair(5, 4, 3, 3)
    got = value(partial(loss, **args), *pair(5, 4, 3, 3, dtype=torch.float32, device=device))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(formula(s.numpy(), t.numpy(), **args), rel=1e-4)


@losses
@pytest.mark.parametrize("n", [2, 3, 5])
def test_gradient_is_the_derivative_of_the_value(loss, n):
    s, t = features(n, 2, 2, 2), features(n, 3, seed=1)
    assert torch.autograd.gradcheck(lambda s: value(loss, s, t), s.requires_grad_())


@losses
def test_gradient_reaches_every_layer_and_sample_of_the_student_and_never_the_teacher(loss, device):
    s, t = ({i: x.to(device).requires_grad_() for i, x in enumerate(pair(4, 3, 3))} for _ in "st")
    t = dict(zip(t, reversed(t.values()), strict=True))
    loss(s, t).backward()
    assert all((x.grad.flatten(1).abs().sum(1) > 0).all() for x in s.values())
    assert all(x.grad is None for x in t.values())


@formulas
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_samples_that_coincide_count_as_the_formula_says_with_finite_gradients(loss, formula, args, who):
    s, t = pair(5, 3, 2)
    for f in {"student": [s], "teacher": [t], "both": [s, t]}[who]:
        f[1] = f[3] = f[0]
    got = value(partial(loss, **args), s.requires_grad_(), t)
    got.backward()
    assert got.item() == pytest.approx(formula(s.detach().numpy(), t.numpy(), **args), rel=1e-6)
    assert s.grad.isfinite().all()


@losses
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_samples_that_coincide_in_float32_get_the_value_of_float64_and_a_gradient_of_its_size(loss, scale):
    s, t = pair(6, 700)
    s = s + 3  # as after a ReLU: a mean that is larger than the differences
    s[1] = s[4] = s[0]
    s32, t32 = (scale * s).float().requires_grad_(), t.float()
    got = value(loss, s32, t32)
    got.backward()
    exact = (scale * s).requires_grad_()
    value(loss, exact, t).backward()
    assert got.item() == pytest.approx(value(loss, s, t).item(), rel=1e-3)
    assert_close(s32.grad.double(), exact.grad, rtol=0, atol=1e-2 * exact.grad.abs().max().item())


@losses
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_a_layer_of_zeros_gives_finite_values_and_gradients(loss, dead):
    s, t = pair(4, 4, 3, 3)
    s, t = s * (dead == "teacher"), t * (dead == "student")
    got = value(loss, s.requires_grad_(), t)
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


def test_pkt_gives_a_sample_of_zeros_no_gradient():
    s, t = pair(4, 6)
    s[2] = 0
    got = value(PKT, s.requires_grad_(), t)
    got.backward()
    assert got.item() == pytest.approx(pkt(s.detach().numpy(), t.numpy()), rel=1e-9)
    assert (s.grad.abs().sum(1) > 0).tolist() == [True, True, False, True]


def test_pkt_of_opposite_samples_is_finite_where_rounding_gives_cosines_below_minus_one():
    f = features(40, 33, dtype=torch.float32)
    s = torch.cat([f, -f, -3 * f]).requires_grad_()
    got = value(PKT, s, features(120, 5, dtype=torch.float32))
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@losses
@halves
def test_half_precision_is_computed_in_float32(loss, dtype, device):
    s, t = (x.mul(200).to(dtype) for x in pair(4, 4, 5, 5, device=device))  # squares and products overflow float16
    got = value(loss, s.requires_grad_(), t)
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert got == value(loss, s.float(), t.float())
    assert got == value(loss, s, t.float())
    got.backward()
    assert s.grad.dtype == dtype


@losses
@halves
def test_half_precision_is_close_to_float32(loss, dtype):
    s, t = pair(4, 4, 5, 5)
    assert value(loss, s.to(dtype), t.to(dtype)).item() == pytest.approx(value(loss, s, t).item(), rel=0.03)


@losses
@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
def test_large_features_give_the_value_of_float64_in_float32(loss, offset):
    s, t = (30 * x + offset for x in pair(4, 5, 3))
    s32 = s.float().requires_grad_()
    got = value(loss, s32, t.float())
    got.backward()
    assert got.item() == pytest.approx(value(loss, s, t).item(), rel=1e-3, abs=1e-6)
    assert s32.grad.isfinite().all()


# What may be given


@losses
def test_tensors_of_fastai_work_and_give_a_plain_tensor(loss):
    s, t = pair(3, 3, 4, 4, dtype=torch.float32)
    s_img = TensorImage(s.clone()).requires_grad_()
    got = value(loss, s_img, TensorBase(t))
    assert type(got) is Tensor
    assert got == value(loss, s, t)
    got.backward()
    assert s_img.grad.abs().sum() > 0


@formulas
def test_further_keywords_are_ignored_and_partial_sets_arguments(loss, formula, args):
    s, t = pair(3, 3, 4, 4)
    fm_s, fm_t, out = {"s": s}, {"t": t}, torch.zeros(3, 5)
    got = partial(loss, **args)(pred=out, teacher_pred=out, fm_s=fm_s, fm_t=fm_t, target=out, lam=0.3)
    assert got == loss(fm_s, fm_t, **args)


@losses
def test_inputs_are_left_as_they_are(loss):
    s, t = pair(3, 3, 4, 4)
    value(loss, s, t)
    assert s._version == t._version == 0
    assert all(torch.equal(a, b) for a, b in zip((s, t), pair(3, 3, 4, 4), strict=True))


@losses
def test_memory_format_makes_no_difference(loss):
    s, t = pair(3, 3, 4, 5)
    last = s.contiguous(memory_format=torch.channels_last)
    assert_close(value(loss, last, t.transpose(2, 3).contiguous().transpose(2, 3)), value(loss, s, t))


@pytest.mark.parametrize(("loss", "n"), [(RKD, 1), (RKD, 2), (PKT, 1)])
def test_a_batch_too_small_to_have_relations_gives_0_with_a_gradient_of_0(loss, n):
    s = features(n, 3, 4, 4).requires_grad_()
    got = value(loss, s, features(n, 5, seed=1))
    got.backward()
    assert got.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-9


# Laws


@losses
@law
@given(any_features(4, 2, 3), any_features(4, 5))
def test_loss_is_never_negative_but_for_the_constants_in_logarithms(loss, s, t):
    assert value(loss, s, t) >= (-2e-6 if loss.func is PKT else 0)


@losses
@law
@given(any_features(4, 2, 3))
def test_loss_is_zero_with_no_gradient_at_the_teachers_features(loss, t):
    s = t.clone().requires_grad_()
    got = value(loss, s, t)
    got.backward()
    assert got.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-5


@losses
@law
@given(any_features(4, 3, 2), any_features(4, 5), st.permutations(range(4)), st.permutations(range(3)))
def test_order_of_samples_and_of_channels_makes_no_difference(loss, s, t, samples, channels):
    assert_close(value(loss, s[samples][:, channels], t[samples]), value(loss, s, t))


@losses
@law
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.booleans())
def test_scaling_and_rotation_of_the_features_make_no_difference(loss, seed, a, twice):
    s, t = features(4, 3, 2, seed=seed), features(4, 5, seed=seed + 1)
    if twice:
        s[1], t[2] = s[0], t[3]
    q_s, q_t = (torch.linalg.qr(features(n, n, seed=seed + n)).Q for n in (6, 5))
    assert_close(value(loss, a * s.flatten(1) @ q_s, t @ q_t / a), value(loss, s, t))


@law
@given(any_features(4, 3, 2), any_features(4, 5), any_features(3, 2), any_features(5))
def test_rkd_does_not_see_what_all_samples_have_in_common(s, t, c, d):
    assert_close(value(RKD, s + c, t + d), value(RKD, s, t))


@law
@given(any_features(4, 3, 2), any_features(4, 5), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_pkt_does_not_see_positive_scale_of_a_sample(s, t, a):
    scale = torch.tensor(a, dtype=f64)
    assert_close(value(PKT, s * scale[:, None, None], t / scale[:, None]), value(PKT, s, t), atol=1e-5, rtol=0)


@law
@given(any_features(4, 3, 2), any_features(4, 5), st.floats(0, 50), st.floats(0, 50))
def test_rkd_is_linear_in_its_weights(s, t, w_d, w_a):
    f = partial(RKD, {"s": s}, {"t": t})
    assert_close(f(w_d=w_d, w_a=w_a), w_d * f(w_d=1, w_a=0) + w_a * f(w_d=0, w_a=1))


@losses
@law
@given(any_features(2, 4, 3, 2), any_features(2, 4, 5))
def test_loss_of_several_pairs_is_the_sum_paired_by_position_whatever_the_names(loss, s, t):
    got = loss({"a": s[0], "b": s[1]}, {"b": t[0], "a": t[1]})
    assert_close(got, value(loss, s[0], t[0]) + value(loss, s[1], t[1]))


# Errors


@both
@pytest.mark.parametrize(("n_s", "n_t"), [(0, 0), (2, 1), (1, 2), (0, 1), (1, 0)])
def test_missing_layers_are_refused(loss, n_s, n_t):
    x = features(2, 3)
    expected = rf"{loss.__name__} compares layers in pairs, got {n_s} of the student and {n_t} of the teacher"
    with pytest.raises(ValueError, match=expected):
        loss(dict.fromkeys("ab"[:n_s], x), dict.fromkeys("ab"[:n_t], x))


@both
@pytest.mark.parametrize("n", [1, 2, 6])
def test_unequal_batches_are_refused_and_never_broadcast(loss, n):
    expected = rf"{loss.__name__}.* student layer 'conv' and teacher layer 'stem' .*batches"
    expected += rf".*{shapes((3, 4, 2, 2), (n, 7))}"
    with pytest.raises(ValueError, match=expected):
        loss({"conv": features(3, 4, 2, 2)}, {"stem": features(n, 7)})
