"What is true of single losses on relations between samples: values where samples coincide, the laws they keep."

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import pkt
from test_losses import cases, eighths, f64, features, law, losses, pair, select, value
from torch.testing import assert_close

from fasterai_kd import PKT, RKD

RELATIONS = select("RKD", "PKT")


# Values and gradients


@cases(RELATIONS)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_samples_that_coincide_count_as_the_formula_says_with_finite_gradients(case, who):
    s, t = pair(5, 3, 2)
    for f in {"student": [s], "teacher": [t], "both": [s, t]}[who]:
        f[1] = f[3] = f[0]
    got = value(case.loss, s.requires_grad_(), t)
    got.backward()
    expected = case.row.formula(s.detach().numpy(), t.numpy(), **case.options)
    assert got.item() == pytest.approx(expected, rel=1e-6)
    assert s.grad.isfinite().all()


@losses(RELATIONS)
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


def test_pkt_gives_a_sample_of_zeros_no_gradient():
    s, t = pair(4, 6)
    s[2] = 0
    got = value(PKT, s.requires_grad_(), t)
    got.backward()
    assert got.item() == pytest.approx(pkt(s.detach().numpy(), t.numpy()), rel=1e-9)
    assert (s.grad.abs().sum(1) > 0).tolist() == [True, True, False, True]


def test_pkt_of_opposite_samples_is_finite_where_rounding_gives_cosines_below_minus_one():
    for seed in range(400):
        f = torch.randn(1, 17, generator=torch.Generator().manual_seed(seed))
        s = torch.cat([f, -3 * f]).requires_grad_()
        got = value(PKT, s, features(2, 5, dtype=torch.float32))
        got.backward()
        assert got.isfinite()
        assert s.grad.isfinite().all()


@losses(RELATIONS)
@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0, 2e4])
def test_large_features_give_the_value_of_float64_in_float32(loss, offset):
    s, t = (30 * x + offset for x in pair(4, 5, 3))
    s32 = s.float().requires_grad_()
    got = value(loss, s32, t.float())
    got.backward()
    assert got.item() == pytest.approx(value(loss, s, t).item(), rel=1e-3, abs=1e-6)
    assert s32.grad.isfinite().all()


# What may be given


@pytest.mark.parametrize(("loss", "n"), [(RKD, 1), (RKD, 2), (PKT, 1)])
def test_a_batch_too_small_to_have_relations_gives_0_with_a_gradient_of_0(loss, n):
    s = features(n, 3, 4, 4).requires_grad_()
    got = value(loss, s, features(n, 5, seed=1))
    got.backward()
    assert got.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-9


# Laws


@losses(RELATIONS)
@law
@given(eighths(4, 2, 3), eighths(4, 5))
def test_loss_is_never_negative_but_for_the_constants_in_logarithms(loss, s, t):
    assert value(loss, s, t) >= (-2e-6 if loss.func is PKT else 0)


@losses(RELATIONS)
@law
@given(eighths(4, 2, 3))
def test_loss_is_zero_with_no_gradient_at_the_teachers_features(loss, t):
    s = t.clone().requires_grad_()
    got = value(loss, s, t)
    got.backward()
    assert got.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-5


@losses(RELATIONS)
@law
@given(eighths(4, 3, 2), eighths(4, 5), st.permutations(range(4)), st.permutations(range(3)))
def test_order_of_samples_and_of_channels_makes_no_difference(loss, s, t, samples, channels):
    assert_close(value(loss, s[samples][:, channels], t[samples]), value(loss, s, t))


@losses(RELATIONS)
@law
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.booleans())
def test_scaling_and_rotation_of_the_features_make_no_difference(loss, seed, a, twice):
    s, t = features(4, 3, 2, seed=seed), features(4, 5, seed=seed + 1)
    if twice:
        s[1], t[2] = s[0], t[3]
    q_s, q_t = (torch.linalg.qr(features(n, n, seed=seed + n)).Q for n in (6, 5))
    assert_close(value(loss, a * s.flatten(1) @ q_s, t @ q_t / a), value(loss, s, t))


@law
@given(eighths(4, 3, 2), eighths(4, 5), eighths(3, 2), eighths(5))
def test_rkd_does_not_see_what_all_samples_have_in_common(s, t, c, d):
    assert_close(value(RKD, s + c, t + d), value(RKD, s, t))


@law
@given(eighths(4, 3, 2), eighths(4, 5), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_pkt_does_not_see_positive_scale_of_a_sample(s, t, a):
    scale = torch.tensor(a, dtype=f64)
    assert_close(value(PKT, s * scale[:, None, None], t / scale[:, None]), value(PKT, s, t), atol=1e-5, rtol=0)


@law
@given(eighths(4, 3, 2), eighths(4, 5), st.floats(0, 50), st.floats(0, 50))
def test_rkd_is_linear_in_its_weights(s, t, w_d, w_a):
    f = partial(RKD, {"s": s}, {"t": t})
    assert_close(f(w_d=w_d, w_a=w_a), w_d * f(w_d=1, w_a=0) + w_a * f(w_d=0, w_a=1))
