"Keys that say whether two tensors, or two models, are the same bit for bit."

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["content_keys", "fingerprint"]

# odd constants of 64 bits, as in splitmix64 (Steele, Lea & Flood, OOPSLA 2014), as signed numbers
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def content_keys(xb: Sequence[Any]) -> Tensor:
    """Two hashes of 64 bits (B, 2) of each sample of a batch: of all bytes, shapes and dtypes of its tensors.

    Each word of 8 bytes is mixed with a constant of its position, and the results are added: exact integers, the same
    in any order of computation, on any device, in any process. Two different samples get the same key with a
    probability of about 2⁻¹²⁸.

    Raises TypeError for what is no tensor, or a sparse one, ValueError for tensors that are not of one batch size.
    """
    keys: Tensor | None = None
    for i, x in enumerate(xb):
        if not isinstance(x, Tensor):
            raise TypeError(f"input {i} is no tensor but a {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"input {i} is no dense tensor but {x.layout}")
        if not x.ndim or len(x) != len(xb[0]):
            raise ValueError(f"input {i} is not of the batch size of the first: {tuple(x.shape)}")
        seed = _number(f"{i} {tuple(x.shape[1:])} {x.dtype}")
        own = _mix(_hash_words(_words(x)) + seed)
        keys = own if keys is None else _mix(keys + own)
    if keys is None:
        raise ValueError("there is no input")
    return keys


def fingerprint(model: nn.Module) -> str:
    """Of the names and values of all parameters and buffers, and of the types of the modules.

    Works for quantized models too, whose weights are packed: those are in the state dict alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(" ".join(f"{name} {type(m).__qualname__}" for name, m in model.named_modules()).encode())
    state = {**dict(model.named_parameters()), **dict(model.named_buffers()), **model.state_dict()}
    for name, value in state.items():
        digest.update(name.encode())
        for x in _inner_tensors(value):
            digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
            digest.update(_digest(x))
    return digest.hexdigest()


def _inner_tensors(x: Any) -> Iterator[Tensor]:
    "Plain dense tensors: of tuples, of tensor subclasses that are made of several, dequantized ones."
    if isinstance(x, (tuple, list)):
        for part in x:
            yield from _inner_tensors(part)
    elif isinstance(x, Tensor) and hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _inner_tensors(getattr(x, name))
    elif isinstance(x, Tensor):
        yield x.dequantize() if x.is_quantized else x if x.layout == torch.strided else x.to_dense()


def _digest(x: Tensor) -> bytes:
    return hashlib.blake2b(_bytes(x.cpu()).numpy().data, digest_size=16).digest()


def _bytes(x: Tensor) -> Tensor:
    return x.detach().as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8)


def _words(x: Tensor) -> Tensor:
    "The bytes of each sample as int64 (B, n), the last word filled up with zeros."
    sample = _bytes(x).view(len(x), math.prod(x.shape[1:]) * x.element_size())
    if not sample.numel():
        return sample.long()
    if sample.shape[1] % 8 or sample.storage_offset() % 8:
        sample = F.pad(sample, (0, -sample.shape[1] % 8)).clone()
    return sample.view(torch.int64)


def _hash_words(words: Tensor) -> Tensor:
    a, b = _constants(words.shape[1], words.device)
    rows = len(words) if words.is_cuda else max(1, 2**16 // max(1, words.shape[1]))  # what fits a CPU's cache
    parts = []
    for part in words.split(rows):  # type: ignore[no-untyped-call]
        mixed = _mix(part ^ a)
        parts.append(torch.stack([mixed.sum(1), mixed.mul_(b).sum(1)], 1))
    return torch.cat(parts)


@lru_cache(16)
def _constants(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    "Two numbers for each position, the second odd."
    position = torch.arange(1, n + 1, device=device)
    a = _mix(_mix(position * _GOLDEN) * _MIX2)
    return a, _mix(_mix(a + _GOLDEN) * _MIX2) | 1


def _mix(x: Tensor) -> Tensor:
    "A bijection of 64 bits in which each bit of `x` changes many; the shifts are logical."
    x = (x ^ (x >> 32).bitwise_and_(0xFFFFFFFF)).mul_(_MIX1)
    return x ^ (x >> 29).bitwise_and_(0x7FFFFFFFF)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
