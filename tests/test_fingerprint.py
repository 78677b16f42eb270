"Keys by content: the same for the same bytes, others for all else."

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai_kd.teacher import _fingerprint
from fasterai_kd.teacher._fingerprint import content_keys, fingerprint

fixed = settings(derandomize=True, deadline=None, max_examples=60)
DTYPES = [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
BYTES = {torch.uint8: 3, torch.float16: 10, torch.float32: 12, torch.int64: 16}


def keys(*xb):
    return [tuple(key) for key in content_keys(xb).tolist()]


def of_bytes(data, dtype=torch.uint8):
    "A batch of one."
    return torch.tensor(list(data), dtype=torch.uint8).view(dtype)[None]


@fixed
@given(st.binary(min_size=1, max_size=70), st.data())
def test_a_single_changed_byte_changes_both_numbers_of_the_key(data, draw):
    at, by = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255))
    other = bytearray(data)
    other[at] ^= by
    (key,), (key2,) = keys(of_bytes(data)), keys(of_bytes(other))
    assert key[0] != key2[0]
    assert key[1] != key2[1]


@fixed
@given(st.binary(min_size=2, max_size=70), st.data())
def test_two_bytes_that_change_together_do_not_cancel_out(data, draw):
    at = draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=2, max_size=2, unique=True))
    other = bytearray(data)
    for i in at:
        other[i] ^= draw.draw(st.integers(1, 255))
    assert keys(of_bytes(data)) != keys(of_bytes(other))


@pytest.mark.parametrize("start", ["zeros", "ones", "random"])
@pytest.mark.parametrize("bit", [0, 7, 31, 32, 62, 63])
def test_flips_of_one_bit_in_any_two_words_all_have_keys_of_their_own(start, bit):
    n = 64
    word = {"zeros": torch.zeros, "ones": torch.ones, "random": lambda *s, dtype: torch.randint(-9, 9, s)}[start]
    batch = word(1, n, dtype=torch.int64).repeat(n * n, 1)
    flip = torch.tensor(-(2**63) if bit == 63 else 2**bit)
    rows = torch.arange(n * n)
    batch[rows, rows // n] ^= flip
    batch[rows, rows % n] ^= flip * (rows // n != rows % n)
    first, second = content_keys([batch]).T.tolist()
    pairs = n * (n + 1) // 2
    assert len(set(first)) == len(set(second)) == pairs


def test_words_that_change_places_change_the_key():
    words = torch.arange(12).repeat(132, 1)
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    for row, (i, j) in enumerate(pairs):
        words[row, [i, j]] = words[row, [j, i]]
    assert len(set(keys(words))) == 66


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_samples_of_any_dtype_have_keys_of_their_own(dtype):
    x = torch.randint(0, 256, (2000, 48), dtype=torch.uint8)
    x = x % 2 > 0 if dtype is torch.bool else x.view(dtype)
    first, second = content_keys([x]).T.tolist()
    assert len(set(first)) == len(set(second)) == 2000


def test_each_bit_of_the_key_depends_on_each_bit_of_a_word():
    words = torch.randint(-(2**62), 2**62, (2000, 1))
    one = content_keys([words])
    for bit in range(63):
        changed = content_keys([words ^ (1 << bit)]) ^ one
        for out in range(64):
            share = ((changed >> out) & 1).double().mean(0)
            assert ((share > 0.4) & (share < 0.6)).all()


@pytest.mark.parametrize("shape", [(12,), (3, 4), (4, 3), (1, 12), (12, 1), (2, 6), (1, 3, 4)])
def test_the_shape_belongs_to_the_key(shape):
    x = torch.arange(12.0)
    assert keys(x.view(1, 2, 2, 3)) != keys(x.view(1, *shape))


def test_the_dtype_and_trailing_zeros_belong_to_the_key():
    zeros = [torch.zeros(1, 8 // d.itemsize, dtype=d) for d in DTYPES]
    zeros += [torch.zeros(1, n, dtype=torch.uint8) for n in (0, 1, 2, 7)]
    assert len({keys(z)[0] for z in zeros}) == len(zeros)


def test_minus_zero_and_the_payload_of_nan_count():
    assert keys(torch.tensor([[0.0]])) != keys(torch.tensor([[-0.0]]))
    nan = torch.tensor([[2143289344], [2143289345]], dtype=torch.int32).view(torch.float32)
    assert len(set(keys(nan))) == 2
    assert keys(nan) == keys(nan.clone())


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_key_of_a_sample_depends_on_no_other_nor_on_its_place(dtype, n):
    x = torch.randint(0, 256, (9, n * 8), dtype=torch.uint8).view(dtype)[:, : 2 * n - 1].contiguous()
    all_at_once = keys(x)
    assert all_at_once == [keys(row[None])[0] for row in x]
    order = torch.randperm(9)
    assert keys(x[order]) == [all_at_once[i] for i in order]


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:],
        lambda x: torch.cat([x, x])[1:9],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)[1:],
        lambda x: x.contiguous(memory_format=torch.channels_last)[1:],
        lambda x: torch.stack([x, x], -1)[1:, ..., 0],
        lambda x: x.flip(0).flip(0)[1:],
    ],
    ids=["offset", "slice", "transposed", "channels_last", "strided", "flipped"],
)
def test_how_a_tensor_lies_in_memory_does_not_count(dtype, view):
    x = torch.arange(9 * 45, dtype=torch.float64).view(9, 3, 3, 5).to(dtype)
    assert keys(view(x))[:8] == keys(x[1:9].clone())


def test_a_large_batch_in_blocks_gives_the_same_keys_as_each_sample_alone():
    x = torch.randn(5, 3, 128, 131)
    assert keys(x) == [keys(row[None])[0] for row in x]


def test_each_input_and_its_place_count():
    a, b = torch.arange(6).view(3, 2), torch.arange(6, 12).view(3, 2)
    several = [(a,), (a, a), (a, b), (b, a), (a, b, b), (b, b, a), (torch.cat([a, b], 1),)]
    assert len({keys(*xb)[0] for xb in several}) == len(several)
    changed = b.clone()
    changed[1, 1] += 1
    assert [i == j for i, j in zip(keys(a, b), keys(a, changed), strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("xb", "error", "text"),
    [
        ([{"x": 1}], TypeError, "input 0 is no tensor but a dict"),
        ([torch.zeros(2, 1), [1, 2]], TypeError, "input 1 is no tensor but a list"),
        ([torch.eye(2).to_sparse()], TypeError, "input 0 is no dense tensor"),
        ([torch.zeros(2, 1), torch.zeros(3, 1)], ValueError, r"input 1 is not of the batch size .*\(3, 1\)"),
        ([torch.tensor(1)], ValueError, "input 0 is not of the batch size"),
        ([], ValueError, "no input"),
    ],
)
def test_what_has_no_samples_is_refused_by_name(xb, error, text):
    with pytest.raises(error, match=text):
        content_keys(xb)


# --- models ---


class Scaled(nn.Module):
    "With a number, a function and a tensor that `repr` does not show."

    def __init__(self, scale=1.0, act=F.relu, sizes=(1, 2), mask=0.0):
        super().__init__()
        self.fc, self.scale, self.act, self.sizes, self.mask = nn.Linear(2, 2), scale, act, sizes, torch.tensor(mask)

    def forward(self, x):
        return self.act(self.fc(x)) * self.scale + self.mask


def scaled(**kwargs):
    torch.manual_seed(0)
    return Scaled(**kwargs)


def test_a_copy_in_any_mode_has_the_same_fingerprint(teacher):
    torch.manual_seed(1)
    assert fingerprint(Net().train()) == fingerprint(teacher)
    assert fingerprint(scaled()) == fingerprint(scaled())


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var", "bn1.num_batches_tracked", "head.bias"])
def test_one_changed_number_of_a_parameter_or_buffer_changes_the_fingerprint(teacher, name):
    before = fingerprint(teacher)
    teacher.state_dict()[name].view(-1)[-1:] += 1
    assert fingerprint(teacher) != before


def test_another_kind_of_module_changes_the_fingerprint():
    linear = nn.Linear(2, 2)
    assert fingerprint(nn.Sequential(linear, nn.ReLU())) != fingerprint(nn.Sequential(linear, nn.GELU()))


def test_the_fingerprint_holds_no_addresses():
    from fastai.layers import Lambda

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), Lambda(lambda x: x))

    assert fingerprint(model()) == fingerprint(model())


class Packed(torch.Tensor):
    "As torchao's: made of several tensors."

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        return args[0]

    def __tensor_flatten__(self):
        return ["values", "scale"], None


def test_quantized_weights_count():
    prints = set()
    for values, scale in ((1, 1.0), (2, 1.0), (1, 2.0)):
        model = nn.Linear(2, 2, bias=False)
        packed = Packed(torch.full((2, 2), values, dtype=torch.int8), torch.tensor(scale))
        model.weight = nn.Parameter(packed, requires_grad=False)
        prints.add(fingerprint(model))
    assert len(prints) == 3


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_that_are_packed_in_the_state_dict_alone_count():
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no dynamic quantization")
    prints = set()
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        prints.add(fingerprint(quantize(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)))
    assert len(prints) == 2


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, lambda m: nn.Sequential(m)])
def test_another_dtype_or_wrapper_changes_the_fingerprint(teacher, change):
    before = fingerprint(teacher)
    assert fingerprint(change(teacher)) != before


CODE = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("f", {path!r})
f = importlib.util.module_from_spec(spec); spec.loader.exec_module(f)
torch.manual_seed(0)
class Net(torch.nn.Linear):
    def forward(self, x):
        return x if str(x) in {{"a", "b", "c", "d"}} else super().forward(x)
print(f.content_keys([torch.arange(20.).view(2, 10), torch.arange(2)]).tolist(), f.fingerprint(Net(3, 2)))
"""


def test_another_process_gives_the_same_keys_and_fingerprint():
    code, here = CODE.format(path=str(Path(_fingerprint.__file__))), io.StringIO()
    ran = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    with contextlib.redirect_stdout(here):
        exec(code, {"__name__": "__main__"})
    assert ran.stdout == here.getvalue() != ""


def test_keys_on_a_gpu_are_those_on_the_cpu(device):
    x = torch.randn(3, 5, 7).half()
    assert keys(x.to(device)) == keys(x)


def test_the_two_numbers_of_a_key_have_nothing_to_do_with_each_other():
    pairs = keys(torch.randn(500, 8)) + keys(torch.randn(500, 3, 5))
    assert all(a != b for a, b in pairs)
    assert len({a for a, _ in pairs} | {b for _, b in pairs}) == 2000
    bits = torch.tensor([[bin((a ^ b) & (2**64 - 1)).count("1")] for a, b in pairs], dtype=torch.float64)
    assert 30 < bits.mean() < 34


@pytest.mark.parametrize("offset", range(1, 9))
def test_bytes_that_start_at_any_place_of_their_storage_give_the_same_keys(offset):
    storage = torch.arange(offset + 64, dtype=torch.uint8)
    x = storage[offset:].view(4, 16)
    assert keys(x) == keys(x.clone())


def test_a_change_that_is_the_same_at_two_inputs_does_not_cancel_out():
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    assert not set(keys(x, x)) & set(keys(y, y))
    assert not set(keys(x, y)) & set(keys(y, x))


def test_names_shapes_and_buffers_that_no_file_has_count():
    x, buffer = torch.arange(6.0), torch.zeros(2)

    def of(name="a", shape=(2, 3)):
        model = nn.ParameterDict({name: x.view(shape)})
        model.register_buffer("hidden", buffer, persistent=False)
        return fingerprint(model)

    first = of()
    assert first == of()
    assert len({first, of(name="b"), of(shape=(3, 2))}) == 3
    buffer += 1
    assert of() != first
