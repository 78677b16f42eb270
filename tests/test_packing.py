"Outputs as rows of bytes, and back."

import math

import pytest
import torch

from fasterai_kd._packing import PREDICTIONS, Packing

CPU = torch.device("cpu")
ALL = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def there_and_back(packing, outputs):
    layout, rows = packing.pack(outputs)
    assert rows.shape[0] == len(next(iter(outputs.values())))
    return packing.unpack(layout, rows, CPU)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 5), (0,)])
@pytest.mark.parametrize("dtype", ALL)
def test_any_tensor_comes_back_bit_for_bit_halves_as_float32(dtype, shape, n):
    outputs = {
        "odd": (torch.randn(n, 3) * 9).to(torch.uint8),  # what follows begins at an odd byte
        PREDICTIONS: (torch.randn(n, *shape) * 9).to(dtype),
        "last": torch.randn(n, 2).double(),
    }
    back = there_and_back(Packing(), outputs)
    assert list(back) == list(outputs)
    for name, x in outputs.items():
        half = x.dtype in (torch.float16, torch.bfloat16)
        torch.testing.assert_close(back[name], x.float() if half else x, rtol=0, atol=0)


def test_nan_inf_and_minus_zero_come_back():
    x = torch.tensor([[math.nan, math.inf, -math.inf, -0.0]])
    back = there_and_back(Packing(), {"a": x})["a"]
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))


def test_layouts_in_memory_do_not_matter():
    x = torch.randn(2, 3, 4, 5)
    for y in (
        x.transpose(1, 3),
        x.contiguous(memory_format=torch.channels_last),
        x[:, :, ::2],
        x[:1].expand(2, 3, 4, 5),
    ):
        assert torch.equal(there_and_back(Packing(), {"a": y})["a"], y)


def test_rows_share_no_memory_with_the_outputs():
    x = torch.ones(2, 3)
    layout, rows = Packing().pack({"a": x})
    x.zero_()
    back = Packing().unpack(layout, rows.copy(), CPU)["a"]
    assert torch.equal(back, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_bytes_and_leaves_integers_as_they_are(dtype):
    outputs = {"x": torch.randn(3, 4), "i": torch.arange(2**40, 2**40 + 3)}
    _, rows = Packing(dtype).pack(outputs)
    assert rows.shape == (3, 4 * 2 + 8)
    back = there_and_back(Packing(dtype), outputs)
    assert torch.equal(back["x"], outputs["x"].to(dtype).float())
    assert torch.equal(back["i"], outputs["i"])


def test_an_overflow_is_refused_with_the_value_and_the_way_out():
    with pytest.raises(ValueError, match=r"the teacher's layer1 have values up to 7e\+04.*bfloat16"):
        Packing(torch.float16).pack({"layer1": torch.tensor([[70000.0]])})
    x = torch.tensor([[70000.0, math.inf]])
    there_and_back(Packing(torch.bfloat16), {"layer1": x})
    there_and_back(Packing(torch.float16), {"layer1": torch.tensor([[math.inf, 1.0]])})


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_top_k_keeps_the_likeliest_classes_and_spreads_the_rest_evenly(n, k, dtype):
    logits = torch.randn(n, 7) * 3
    features = torch.randn(n, 3)
    back = there_and_back(Packing(dtype, k), {PREDICTIONS: logits, "layer1": features})
    p, q = logits.softmax(1), back[PREDICTIONS].exp()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype is None else {"rtol": 1e-2, "atol": 1e-3}
    top, classes = p.topk(k, 1)
    torch.testing.assert_close(q.gather(1, classes), top, **near)
    torch.testing.assert_close(q.sum(1), torch.ones(n), **near)
    rest = q.scatter(1, classes, math.nan)
    rest = rest[~rest.isnan()].view(n, -1)
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))
    torch.testing.assert_close(back["layer1"], features, **near)


@pytest.mark.parametrize("name", ["top", "classes", "rest"])
def test_layers_may_be_named_like_the_parts_of_top_k(name):
    outputs = {PREDICTIONS: torch.randn(2, 5), name: torch.randn(2, 3)}
    back = there_and_back(Packing(None, 2), outputs)
    assert torch.equal(back[name], outputs[name])
    torch.testing.assert_close(back[PREDICTIONS].exp().sum(1), torch.ones(2))


@pytest.mark.parametrize("shape", [(2, 3), (2, 2), (2, 5, 4), (2,)])
def test_top_k_of_too_few_classes_or_of_no_logits_is_refused(shape):
    with pytest.raises(ValueError, match=r"top_k=3 is for logits \(B, C\) of more than 3 classes, the teacher gives"):
        Packing(None, 3).pack({PREDICTIONS: torch.randn(shape)})


def test_without_predictions_top_k_does_nothing():
    outputs = {"layer1": torch.randn(2, 3)}
    assert torch.equal(there_and_back(Packing(None, 2), outputs)["layer1"], outputs["layer1"])
