"Outputs of a batch as one record a sample, and back."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai_kd.teacher._packing import KEY, PREDICTIONS, Packing, agree

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def keys(n):
    return np.arange(2 * n, dtype="<i8").reshape(n, 2)


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=4),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_what_is_packed_comes_back_bit_for_bit(n, parts):
    outputs = {
        f"layer{i}.é": (torch.randn(n, *shape) * 5).to(dtype) if dtype != torch.bool else torch.randn(n, *shape) > 0
        for i, (dtype, shape) in enumerate(parts)
    }
    records = Packing().pack(keys(n), outputs)
    assert np.array_equal(records[KEY], keys(n))
    got = Packing().unpack(records, CPU)
    assert list(got) == list(outputs)
    for name, x in outputs.items():
        expected = x.float() if x.dtype == torch.float16 else x
        assert got[name].dtype == expected.dtype
        assert torch.equal(got[name], expected)


def test_outputs_are_copies():
    records = Packing().pack(keys(2), {"a": torch.ones(2, 3)})
    Packing().unpack(records, CPU)["a"].zero_()
    assert (records["a"] == 1).all()


def test_half_precision_takes_half_the_bytes_and_leaves_integers():
    outputs = {"a": torch.randn(4, 10), "b": torch.arange(4)}
    records = Packing(half=True).pack(keys(4), outputs)
    assert records.dtype["a"].base == np.float16
    assert records.dtype["b"] == np.int64
    torch.testing.assert_close(Packing(half=True).unpack(records, CPU)["a"], outputs["a"], rtol=1e-3, atol=1e-3)


def test_infinity_may_be_stored_in_half_precision_and_a_value_too_large_may_not():
    Packing(half=True).pack(keys(1), {"a": torch.tensor([[float("inf")]])})
    with pytest.raises(ValueError, match=r"a have values up to 7e\+04, too large for float16"):
        Packing(half=True).pack(keys(1), {"a": torch.tensor([[7e4]])})


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_keeps_the_likeliest_probabilities_and_spreads_the_rest_evenly(k):
    logits = torch.randn(5, 8)
    packing = Packing(top_k=k)
    p = packing.unpack(packing.pack(keys(5), {PREDICTIONS: logits}), CPU)[PREDICTIONS].exp()
    expected, top = logits.softmax(1), logits.topk(k, 1).indices
    torch.testing.assert_close(p.gather(1, top), expected.gather(1, top))
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    others = p.scatter(1, top, torch.nan)
    assert all(len(set(row[~row.isnan()].tolist())) == 1 for row in others)


@pytest.mark.parametrize("shape", [(4, 3), (4, 8, 2)])
def test_top_k_is_for_more_classes_than_it_keeps(shape):
    with pytest.raises(ValueError, match=r"top_k=3 is for logits \(B, C\) of more than 3 classes, the teacher gives"):
        Packing(top_k=3).pack(keys(4), {PREDICTIONS: torch.randn(shape)})


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3, 2)])
def test_what_is_no_row_a_sample_is_refused(x):
    with pytest.raises(ValueError, match=r"the teacher's a are .* for 4 samples: they cannot be stored by sample"):
        Packing().pack(keys(4), {"a": x})


def test_outputs_agree_within_a_share_of_the_largest():
    a = {"a": torch.tensor([[1.0, 100.0]]), "b": torch.zeros(0)}
    assert agree(a, {"a": torch.tensor([[1.05, 100.0]]), "b": torch.zeros(0)}, 1e-3)
    assert not agree(a, {"a": torch.tensor([[1.2, 100.0]]), "b": torch.zeros(0)}, 1e-3)
    assert not agree(a, {"a": torch.tensor([[1.0]]), "b": torch.zeros(0)}, 1e-3)


def test_agreement_is_to_the_tolerance_and_of_one_shape_also_beside_nan_and_infinity():
    def compare(change, value=None):
        x = torch.tensor([[2.0, 4.0, value or 1.0], [1.0, 1.0, 1.0]])
        return agree({"a": x}, {"a": x + torch.tensor([[change, 0, 0], [0, 0, 0]])}, 0.01)

    for value in (None, math.nan, math.inf, -math.inf):
        assert compare(0.039, value)
        assert not compare(0.041, value)
    assert not agree({"a": torch.ones(2, 3)}, {"a": torch.ones(1, 3)}, 0.01)
