"The losses on features, against formulas written anew with numpy, and the laws they keep."

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorBase, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.testing import assert_close

from fasterai_kd import CWD, ActivationBoundaries, Attention, FitNet, Similarity

law = settings(deadline=None, derandomize=True, max_examples=20)
f64 = torch.float64


# The formulas, for one pair of layers


def attention(s, t, p=2.0):
    maps = []
    for f in (s, t):
        energy = np.stack([sum(abs(channel) ** p for channel in sample).ravel() for sample in f])
        maps.append(energy / np.sqrt((energy**2).sum(1, keepdims=True)))
    return np.mean((maps[0] - maps[1]) ** 2)


def similarity(s, t, p=2.0):
    def rows(f):
        for a in f:
            row = np.array([np.vdot(a, b) for b in f])
            yield row / np.linalg.norm(row, ord=p)

    return np.mean([(a - b) ** 2 for a, b in zip(rows(s), rows(t), strict=True)])


def fitnet(s, t):
    return sum((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)) / s.size


def boundaries(s, t, m=2.0):
    total = 0.0
    for a, b in zip(s.flat, t.flat, strict=True):
        if b > 0:
            total += max(m - a, 0) ** 2
        else:
            total += max(a + m, 0) ** 2
    return total / s.size


def cwd(s, t, T=4.0):
    total = 0.0
    for f, g in zip(s.reshape(-1, s[0, 0].size), t.reshape(-1, t[0, 0].size), strict=True):  # channel by channel
        q, p = np.exp(f / T) / np.exp(f / T).sum(), np.exp(g / T) / np.exp(g / T).sum()
        total += np.sum(p * np.log(p / q))
    return T**2 * total / (s.shape[0] * s.shape[1])


CASES = {
    "Attention": (Attention, attention, {}),
    "Attention p=1": (Attention, attention, {"p": 1}),
    "Attention p=3": (Attention, attention, {"p": 3}),
    "Attention p=4": (Attention, attention, {"p": 4}),
    "Attention p=2.5": (Attention, attention, {"p": 2.5}),
    "Similarity": (Similarity, similarity, {}),
    "Similarity p=1": (Similarity, similarity, {"p": 1}),
    "Similarity p=inf": (Similarity, similarity, {"p": math.inf}),
    "FitNet": (FitNet, fitnet, {}),
    "ActivationBoundaries": (ActivationBoundaries, boundaries, {}),
    "ActivationBoundaries m=0.5": (ActivationBoundaries, boundaries, {"m": 0.5}),
    "CWD": (CWD, cwd, {}),
    "CWD T=1": (CWD, cwd, {"T": 1}),
}
ALL = {name: partial(loss, **args) for name, (loss, _, args) in CASES.items()}
FIVE = [Attention, Similarity, FitNet, ActivationBoundaries, CWD]
CHANNELS_MAY_DIFFER = [name for name in ALL if name.startswith(("Attention", "Similarity"))]
OF_ONE_SHAPE = [name for name in ALL if name.startswith(("FitNet", "Activation", "CWD"))]
OF_ANY_RANK = [name for name in OF_ONE_SHAPE if not name.startswith("CWD")]
SQUARES = [name for name in ALL if not name.startswith("CWD")]

formulas = pytest.mark.parametrize(("loss", "formula", "args"), CASES.values(), ids=CASES)
each_loss = pytest.mark.parametrize("loss", FIVE)


def losses(names=tuple(ALL)):
    return pytest.mark.parametrize("loss", [ALL[name] for name in names], ids=names)


def features(*shape, seed=0, **kwargs):
    "No value within 0.1 of 0, where |F| has its kink."
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)
    return (x + 0.1 * x.sign()).to(**kwargs)


def pair(*shape, **kwargs):
    return features(*shape, **kwargs), features(*shape, seed=1, **kwargs)


def value(loss, s, t):
    return loss({"s": s}, {"t": t})


def any_features(*shape):
    "Multiples of 1/8, zeros and ties among them."
    return arrays(np.int64, shape, elements=st.integers(-24, 24)).map(lambda a: torch.from_numpy(a).double() / 8)


# Values and gradients


@formulas
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 2, 3, 3), (4, 1, 2, 7)], ids=str)
def test_value_is_the_formula(loss, formula, args, shape, device):
    s, t = pair(*shape)
    got = value(partial(loss, **args), s.to(device), t.to(device))
    assert got.shape == ()
    assert got.item() == pytest.approx(formula(s.numpy(), t.numpy(), **args), rel=1e-9, abs=1e-15)


@formulas
def test_float32_is_enough(loss, formula, args, device):
    s, t = pair(3, 4, 5, 6)
    got = value(partial(loss, **args), *pair(3, 4, 5, 6, dtype=torch.float32, device=device))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(formula(s.numpy(), t.numpy(), **args), rel=1e-5)


@losses(CHANNELS_MAY_DIFFER)
def test_attention_and_similarity_take_any_number_of_channels(loss):
    formula = attention if loss.func is Attention else similarity
    s, t = features(3, 4, 5, 5), features(3, 7, 5, 5)
    assert value(loss, s, t).item() == pytest.approx(formula(s.numpy(), t.numpy(), **loss.keywords), rel=1e-9)


@pytest.mark.parametrize("shape_s", [(3, 4, 5, 5), (3, 6), (3, 2, 7), (3,)], ids=str)
@pytest.mark.parametrize("shape_t", [(3, 2, 2, 8), (3, 1, 2, 3, 4)], ids=str)
def test_similarity_takes_features_of_any_rank(shape_s, shape_t):
    s, t = features(*shape_s), features(*shape_t)
    assert value(Similarity, s, t).item() == pytest.approx(similarity(s.numpy(), t.numpy()), rel=1e-9)


@losses(OF_ANY_RANK)
@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 7), (3, 2, 2, 2, 2)], ids=str)
def test_fitnet_and_activation_boundaries_take_any_rank(loss, shape):
    formula = fitnet if loss.func is FitNet else boundaries
    s, t = pair(*shape)
    assert value(loss, s, t).item() == pytest.approx(formula(s.numpy(), t.numpy(), **loss.keywords), rel=1e-9)


@losses()
def test_gradient_is_the_derivative_of_the_value(loss):
    s, t = pair(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: value(loss, s, t), s.requires_grad_())


@losses()
def test_gradient_reaches_every_layer_and_sample_of_the_student_and_never_the_teacher(loss, device):
    s, t = ({i: x.to(device).requires_grad_() for i, x in enumerate(pair(3, 4, 3, 3))} for _ in "st")
    t = dict(zip(t, reversed(t.values()), strict=True))
    loss(s, t).backward()
    assert all((x.grad.flatten(1).abs().sum(1) > 0).all() for x in s.values())
    assert all(x.grad is None for x in t.values())


@losses()
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_a_layer_of_zeros_gives_finite_values_and_gradients(loss, dead):
    s, t = pair(3, 4, 3, 3)
    s, t = s * (dead == "teacher"), t * (dead == "student")
    got = value(loss, s.requires_grad_(), t)
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@losses()
def test_half_precision_is_computed_in_float32(loss, dtype, device):
    s, t = (x.mul(200).to(dtype) for x in pair(3, 4, 5, 5, device=device))  # squares and products overflow float16
    got = value(loss, s.requires_grad_(), t)
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert got == value(loss, s.float(), t.float())
    assert got == value(loss, s, t.float())
    got.backward()
    assert s.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@losses()
def test_half_precision_is_close_to_float32(loss, dtype):
    s, t = pair(3, 4, 5, 5)
    assert value(loss, s.to(dtype), t.to(dtype)).item() == pytest.approx(value(loss, s, t).item(), rel=0.03)


# Maps of unequal size


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_attention_pools_the_larger_map_to_the_smaller(p, larger):
    big, small = features(3, 4, 6, 10), features(3, 5, 3, 5)
    energy = big.abs().pow(p).mean(1, keepdim=True).view(3, 1, 3, 2, 5, 2).mean((3, 5))  # means of blocks of 2x2
    expected = attention(energy.numpy(), small.abs().pow(p).numpy(), p=1)
    s, t = (big, small) if larger == "student" else (small, big)
    got = Attention({"s": s.requires_grad_()}, {"t": t}, p=p)
    assert got.item() == pytest.approx(expected, rel=1e-9)
    got.backward()
    assert (s.grad != 0).all()


def test_attention_pools_maps_where_neither_is_the_larger_and_where_sizes_do_not_divide():
    s, t = features(2, 3, 7, 2), features(2, 3, 4, 5)

    def pooled(f):  # windows from floor(i * n / 4) to ceil((i + 1) * n / 4), so that they cover the map
        a = (f.numpy() ** 2).sum(1, keepdims=True)
        for axis, size in ((2, 4), (3, 2)):
            n = a.shape[axis]
            cells = [range(i * n // size, math.ceil((i + 1) * n / size)) for i in range(size)]
            a = np.concatenate([a.take(c, axis).mean(axis, keepdims=True) for c in cells], axis)
        return a

    assert value(Attention, s, t).item() == pytest.approx(attention(pooled(s), pooled(t), p=1), rel=1e-9)


def test_attention_of_an_enlarged_map_is_zero():
    s = features(2, 3, 4, 5)
    assert value(Attention, s, s.repeat_interleave(2, 2).repeat_interleave(3, 3)) == pytest.approx(0, abs=1e-15)


# What may be given


@losses()
def test_tensors_of_fastai_work_and_give_a_plain_tensor(loss):
    s, t = pair(2, 3, 4, 4, dtype=torch.float32)
    s_img = TensorImage(s.clone()).requires_grad_()
    got = value(loss, s_img, TensorBase(t))
    assert type(got) is Tensor
    assert got == value(loss, s, t)
    got.backward()
    assert s_img.grad.abs().sum() > 0


@formulas
def test_further_keywords_are_ignored_and_partial_sets_arguments(loss, formula, args):
    s, t = pair(2, 3, 4, 4)
    fm_s, fm_t, out = {"s": s}, {"t": t}, torch.zeros(2, 5)
    got = partial(loss, **args)(pred=out, teacher_pred=out, fm_s=fm_s, fm_t=fm_t, target=out, lam=0.3)
    assert got == loss(fm_s, fm_t, **args)


@losses()
def test_inputs_are_left_as_they_are(loss):
    s, t = pair(2, 3, 4, 4)
    fm_s, fm_t = {"s": s}, {"t": t}
    loss(fm_s, fm_t)
    assert (list(fm_s), list(fm_t)) == (["s"], ["t"])
    assert s._version == t._version == 0
    assert all(torch.equal(a, b) for a, b in zip((s, t), pair(2, 3, 4, 4), strict=True))


@losses()
def test_memory_format_makes_no_difference(loss):
    s, t = pair(2, 3, 4, 5)
    last = s.contiguous(memory_format=torch.channels_last)
    assert_close(value(loss, last, t), value(loss, s, t))
    assert_close(value(loss, last, t.transpose(2, 3).contiguous().transpose(2, 3)), value(loss, s, t))


def test_similarity_of_a_batch_of_one_is_zero():
    assert value(Similarity, features(1, 3, 4, 4), features(1, 5)) == 0


# Laws


@losses(SQUARES)
@law
@given(any_features(2, 3, 2, 2), any_features(2, 3, 2, 2))
def test_loss_is_never_negative(loss, s, t):
    assert value(loss, s, t) >= 0


@losses([name for name in SQUARES if not name.startswith("Activation")])
@law
@given(any_features(2, 3, 2, 2))
def test_loss_is_zero_with_no_gradient_at_the_teachers_features(loss, t):
    s = t.clone().requires_grad_()
    got = value(loss, s, t)
    got.backward()
    assert got == 0
    assert (s.grad == 0).all()


@law
@given(any_features(2, 3, 2, 2), any_features(2, 3, 2, 2), st.floats(0, 4))
def test_activation_boundaries_is_zero_only_where_the_student_is_beyond_the_margin_on_the_teachers_side(s, t, m):
    on = t > 0
    beyond = torch.where(on, m + s.abs(), -m - s.abs()).requires_grad_()
    got = ActivationBoundaries({"s": beyond}, {"t": t}, m=m)
    got.backward()
    assert got == 0
    assert (beyond.grad == 0).all()
    short = torch.where(on, m - 0.5, 0.5 - m)
    assert ActivationBoundaries({"s": short}, {"t": t}, m=m) == pytest.approx(0.25)


@losses()
@law
@given(any_features(3, 3, 2, 2), any_features(3, 3, 2, 2), st.permutations(range(3)), st.permutations(range(3)))
def test_order_of_samples_and_of_channels_makes_no_difference(loss, s, t, samples, channels):
    assert_close(value(loss, s[samples][:, channels], t[samples][:, channels]), value(loss, s, t))


@law
@given(any_features(2, 3, 2, 2), any_features(2, 2, 2, 2), st.permutations(range(3)))
def test_attention_does_not_see_the_order_of_the_channels(s, t, order):
    assert_close(value(Attention, s[:, order], t), value(Attention, s, t))


@law
@given(any_features(2, 3, 2, 2), any_features(2, 2, 2, 2), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(1, 4))
def test_attention_does_not_see_positive_scale(s, t, a, b, p):
    scaled = Attention({"s": s * torch.tensor([a, b], dtype=f64).view(2, 1, 1, 1)}, {"t": t * b}, p=p)
    assert_close(scaled, Attention({"s": s}, {"t": t}, p=p))


@law
@given(any_features(2, 3, 2, 2), any_features(2, 2, 2, 2), st.integers(1, 4), st.integers(1, 4))
def test_attention_does_not_see_the_number_of_channels(s, t, n, m):
    assert_close(value(Attention, s.repeat(1, n, 1, 1), t.repeat_interleave(m, 1)), value(Attention, s, t))


@law
@given(any_features(3, 2, 2, 2), any_features(3, 5), st.integers(0, 2**32 - 1))
def test_similarity_does_not_see_orthogonal_mixing_of_the_features(s, t, seed):
    rng = torch.Generator().manual_seed(seed)
    q_s, q_t = (torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=f64)).Q for n in (8, 5))
    assert_close(value(Similarity, s.flatten(1) @ q_s, t @ q_t), value(Similarity, s, t))


@law
@given(any_features(3, 2, 2, 2), any_features(3, 5), st.floats(0.1, 10), st.integers(1, 5))
def test_similarity_does_not_see_positive_scale_or_features_that_are_zero(s, t, a, n):
    assert_close(value(Similarity, s * a, torch.cat([t / a, t.new_zeros(3, n)], 1)), value(Similarity, s, t))


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 2, 3, 4)], ids=str)
def test_cwd_takes_maps_of_any_number_of_dimensions(shape):
    s, t = pair(*shape)
    assert value(CWD, s, t).item() == pytest.approx(cwd(s.numpy(), t.numpy()), rel=1e-9)


@law
@given(any_features(2, 3, 2, 2), any_features(2, 3, 2, 2), st.floats(0.5, 20))
def test_cwd_is_never_negative_and_zero_with_no_gradient_at_the_teachers_maps(s, t, T):
    assert CWD({"s": s}, {"t": t}, T=T) >= -1e-9
    same = t.clone().requires_grad_()
    got = CWD({"s": same}, {"t": t}, T=T)
    got.backward()
    assert got.abs() < 1e-9
    assert same.grad.abs().max() < 1e-9


@law
@given(any_features(2, 3, 2, 2), any_features(2, 3, 2, 2), any_features(2, 3, 1, 1), any_features(2, 3, 1, 1))
def test_cwd_does_not_see_a_constant_added_to_a_channel(s, t, c, d):
    assert_close(value(CWD, s + c, t + d), value(CWD, s, t))


@law
@given(any_features(2, 3, 2, 2), any_features(2, 3, 2, 2), st.permutations(range(4)))
def test_cwd_does_not_see_the_order_of_the_positions(s, t, order):
    assert_close(value(CWD, s.flatten(2)[..., order], t.flatten(2)[..., order]), value(CWD, s, t))


@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("teacher", [-1.0, 0.0, 1.0])
def test_cwd_of_large_features_is_finite_in_float32(T, teacher):
    s = (100 * pair(2, 3, 4, 4, dtype=torch.float32)[0].sign()).requires_grad_()
    got = CWD({"s": s}, {"t": teacher * s.detach()}, T=T)
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@losses()
@law
@given(any_features(2, 3, 3, 2, 2), any_features(2, 3, 3, 2, 2))
def test_loss_of_several_pairs_is_the_sum_paired_by_position_whatever_the_names(loss, s, t):
    both = loss({"a": s[0], "b": s[1]}, {"b": t[0], "a": t[1]})
    assert_close(both, value(loss, s[0], t[0]) + value(loss, s[1], t[1]))
    assert_close(both, loss({"b": s[1], "a": s[0]}, {"a": t[1], "b": t[0]}))


# Errors


def shapes(s, t):
    return re.escape(f"{s} and {t}")


@each_loss
def test_losses_without_layers_are_refused(loss):
    with pytest.raises(ValueError, match=rf"{loss.__name__} compares layers in pairs, got 0 .* and 0 .* activations_"):
        loss({}, {})


@each_loss
@pytest.mark.parametrize(("n_s", "n_t"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_unequal_numbers_of_layers_are_refused(loss, n_s, n_t):
    x = features(2, 3, 4, 4)
    expected = rf"{loss.__name__} compares layers in pairs, got {n_s} of the student and {n_t} of the teacher"
    with pytest.raises(ValueError, match=expected):
        loss(dict.fromkeys("ab"[:n_s], x), dict.fromkeys("ab"[:n_t], x))


@each_loss
@pytest.mark.parametrize("n", [1, 2, 6])
def test_unequal_batches_are_refused_and_never_broadcast(loss, n):
    expected = rf"{loss.__name__}.* student layer 'conv' and teacher layer 'stem' .*batches"
    expected += rf".*{shapes((3, 4, 2, 2), (n, 4, 2, 2))}"
    with pytest.raises(ValueError, match=expected):
        loss({"conv": features(3, 4, 2, 2)}, {"stem": features(n, 4, 2, 2)})


@losses(OF_ONE_SHAPE)
@pytest.mark.parametrize(
    "shape", [(3, 1, 2, 2), (3, 4, 1, 1), (3, 4, 2, 1), (3, 8, 2, 2), (3, 4), (3, 1, 4, 2, 2)], ids=str
)
def test_unequal_shapes_are_refused_and_never_broadcast(loss, shape):
    expected = rf"{loss.func.__name__} .*student layer 'conv' and teacher layer 'stem'.*{shapes((3, 4, 2, 2), shape)}"
    with pytest.raises(ValueError, match=expected):
        loss({"conv": features(3, 4, 2, 2)}, {"stem": features(*shape)})
    with pytest.raises(ValueError, match=rf".*{shapes(shape, (3, 4, 2, 2))}.* Attention, PKT, RKD, Similarity"):
        loss({"conv": features(*shape)}, {"stem": features(3, 4, 2, 2)})


def test_the_error_names_the_pair_that_does_not_fit():
    x, y = features(3, 4, 2, 2), features(3, 5, 2, 2)
    with pytest.raises(ValueError, match="student layer 'b' and teacher layer 'B'"):
        FitNet({"a": x, "b": x, "c": x}, {"A": x, "B": y, "C": x})


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (3, 1, 4, 2, 2)], ids=str)
def test_attention_of_features_that_are_no_maps_is_refused(shape):
    expected = rf"Attention .*student layer 'conv' and teacher layer 'stem'.*{shapes((3, 4, 2, 2), shape)}.*Similarity"
    with pytest.raises(ValueError, match=expected):
        Attention({"conv": features(3, 4, 2, 2)}, {"stem": features(*shape)})
    with pytest.raises(ValueError, match=shapes(shape, shape)):
        Attention({"conv": features(*shape)}, {"stem": features(*shape)})


def test_attention_refuses_maps_of_one_pixel_whose_loss_would_always_be_0():
    fm = {"avgpool": torch.randn(4, 8, 1, 1)}
    with pytest.raises(ValueError, match="'avgpool' and teacher layer 'layer4' one has 1x1"):
        Attention(fm, {"layer4": torch.randn(4, 8, 7, 7)})


def test_missing_features_are_an_error_that_says_what_to_give():
    with pytest.raises(ValueError, match="got 0 of the student and 0 of the teacher: give activations_student"):
        Attention(None, None)


@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 4, 1), (3, 4, 1, 1)], ids=str)
def test_cwd_refuses_features_without_positions_whose_loss_would_always_be_0(shape):
    expected = rf"CWD .*student layer 'fc' and teacher layer 'head' give {re.escape(str(shape))}.* use Similarity"
    with pytest.raises(ValueError, match=expected):
        CWD({"fc": features(*shape)}, {"head": features(*shape)})


@pytest.mark.parametrize("T", [0, -1.0, float("nan"), math.inf])
def test_cwd_refuses_a_temperature_that_is_not_positive_and_finite(T):
    with pytest.raises(ValueError, match=rf"CWD needs a finite temperature T > 0, got {T}"):
        CWD({"s": features(2, 3, 2, 2)}, {"t": features(2, 3, 2, 2)}, T=T)
