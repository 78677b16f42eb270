"What is true of single losses on features: the laws they keep, what they refuse."

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import attention
from test_losses import eighths, f64, features, law, losses, select, shapes, value
from torch.testing import assert_close

from fasterai_kd import CWD, ActivationBoundaries, Attention, Cosine, FitNet, Similarity

FEATURES = ("Attention", "Similarity", "FitNet", "ActivationBoundaries", "CWD")


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


def test_similarity_of_a_batch_of_one_is_zero():
    assert value(Similarity, features(1, 3, 4, 4), features(1, 5)) == 0


# Laws


@losses(select("Attention", "Similarity", "FitNet", "ActivationBoundaries"))
@law
@given(eighths(2, 3, 2, 2), eighths(2, 3, 2, 2))
def test_loss_is_never_negative(loss, s, t):
    assert value(loss, s, t) >= 0


@losses(select("Attention", "Similarity", "FitNet"))
@law
@given(eighths(2, 3, 2, 2))
def test_loss_is_zero_with_no_gradient_at_the_teachers_features(loss, t):
    s = t.clone().requires_grad_()
    got = value(loss, s, t)
    got.backward()
    assert got == 0
    assert (s.grad == 0).all()


@law
@given(eighths(2, 3, 2, 2), eighths(2, 3, 2, 2), st.floats(0, 4))
def test_activation_boundaries_is_zero_only_where_the_student_is_beyond_the_margin_on_the_teachers_side(s, t, m):
    on = t > 0
    beyond = torch.where(on, m + s.abs(), -m - s.abs()).requires_grad_()
    got = ActivationBoundaries({"s": beyond}, {"t": t}, m=m)
    got.backward()
    assert got == 0
    assert (beyond.grad == 0).all()
    short = torch.where(on, m - 0.5, 0.5 - m)
    assert ActivationBoundaries({"s": short}, {"t": t}, m=m) == pytest.approx(0.25)


@losses(select(*FEATURES))
@law
@given(eighths(3, 3, 2, 2), eighths(3, 3, 2, 2), st.permutations(range(3)), st.permutations(range(3)))
def test_order_of_samples_and_of_channels_makes_no_difference(loss, s, t, samples, channels):
    assert_close(value(loss, s[samples][:, channels], t[samples][:, channels]), value(loss, s, t))


@law
@given(eighths(2, 3, 2, 2), eighths(2, 2, 2, 2), st.permutations(range(3)))
def test_attention_does_not_see_the_order_of_the_channels(s, t, order):
    assert_close(value(Attention, s[:, order], t), value(Attention, s, t))


@law
@given(eighths(2, 3, 2, 2), eighths(2, 2, 2, 2), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(1, 4))
def test_attention_does_not_see_positive_scale(s, t, a, b, p):
    scaled = Attention({"s": s * torch.tensor([a, b], dtype=f64).view(2, 1, 1, 1)}, {"t": t * b}, p=p)
    assert_close(scaled, Attention({"s": s}, {"t": t}, p=p))


@law
@given(eighths(2, 3, 2, 2), eighths(2, 2, 2, 2), st.integers(1, 4), st.integers(1, 4))
def test_attention_does_not_see_the_number_of_channels(s, t, n, m):
    assert_close(value(Attention, s.repeat(1, n, 1, 1), t.repeat_interleave(m, 1)), value(Attention, s, t))


@law
@given(eighths(3, 2, 2, 2), eighths(3, 5), st.integers(0, 2**32 - 1))
def test_similarity_does_not_see_orthogonal_mixing_of_the_features(s, t, seed):
    rng = torch.Generator().manual_seed(seed)
    q_s, q_t = (torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=f64)).Q for n in (8, 5))
    assert_close(value(Similarity, s.flatten(1) @ q_s, t @ q_t), value(Similarity, s, t))


@law
@given(eighths(3, 2, 2, 2), eighths(3, 5), st.floats(0.1, 10), st.integers(1, 5))
def test_similarity_does_not_see_positive_scale_or_features_that_are_zero(s, t, a, n):
    assert_close(value(Similarity, s * a, torch.cat([t / a, t.new_zeros(3, n)], 1)), value(Similarity, s, t))


@law
@given(eighths(2, 3, 2, 2), eighths(2, 3, 2, 2), st.floats(0.5, 20))
def test_cwd_is_never_negative_and_zero_with_no_gradient_at_the_teachers_maps(s, t, T):
    assert CWD({"s": s}, {"t": t}, T=T) >= -1e-9
    same = t.clone().requires_grad_()
    got = CWD({"s": same}, {"t": t}, T=T)
    got.backward()
    assert got.abs() < 1e-9
    assert same.grad.abs().max() < 1e-9


@law
@given(eighths(2, 3, 2, 2), eighths(2, 3, 2, 2), eighths(2, 3, 1, 1), eighths(2, 3, 1, 1))
def test_cwd_does_not_see_a_constant_added_to_a_channel(s, t, c, d):
    assert_close(value(CWD, s + c, t + d), value(CWD, s, t))


@law
@given(eighths(2, 3, 2, 2), eighths(2, 3, 2, 2), st.permutations(range(4)))
def test_cwd_does_not_see_the_order_of_the_positions(s, t, order):
    moved = [x.flatten(2)[..., order].view_as(x) for x in (s, t)]
    assert_close(value(CWD, *moved), value(CWD, s, t))


def test_a_loss_of_tokens_is_that_of_the_map_that_they_are():
    s, t = features(3, 4, 2, 5), features(3, 4, 2, 5, seed=1)
    tokens = [x.flatten(2).mT for x in (s, t)]
    for loss in (Attention, FitNet, ActivationBoundaries, CWD, Cosine):
        assert_close(value(loss, *tokens), value(loss, s, t))


# Errors


def test_the_error_names_the_pair_that_does_not_fit():
    x, y = features(3, 4, 2, 2), features(3, 5, 2, 2)
    with pytest.raises(ValueError, match="student layer 'b' and teacher layer 'B'"):
        FitNet({"a": x, "b": x, "c": x}, {"A": x, "B": y, "C": x})


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 4, 2, 2)], ids=str)
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


@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 1, 4), (3, 4, 1, 1)], ids=str)
def test_cwd_refuses_features_without_positions_whose_loss_would_always_be_0(shape):
    expected = rf"CWD .*student layer 'fc' and teacher layer 'head' give {re.escape(str(shape))}.* use Similarity"
    with pytest.raises(ValueError, match=expected):
        CWD({"fc": features(*shape)}, {"head": features(*shape)})
