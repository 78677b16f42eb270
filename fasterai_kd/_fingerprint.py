"Keys that say whether two tensors, or two models, are the same bit for bit."

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import CodeType
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
    "Of each parameter and buffer, the architecture as printed, the code of its classes and their plain attributes."
    digest = hashlib.blake2b(repr(model).encode(), digest_size=16)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        digest.update(_digest(t))
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__}".encode())
        digest.update(_class_code(kind))  # type: ignore[arg-type]
        for key in sorted(vars(module).keys() - _OF_EACH_MODULE):
            digest.update(f"{key} {_text(vars(module)[key])}".encode())
    return digest.hexdigest()


_OF_EACH_MODULE = vars(nn.Module()).keys()


def _text(value: Any) -> str:
    "Of what may change a model's outputs; objects count by their type."
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {_digest(value).hex()}"
    code = getattr(value, "__code__", None)
    return " ".join(_code(code)) if code is not None else type(value).__qualname__


@lru_cache(1024)
def _class_code(kind: type) -> bytes:
    "Of the methods that the user wrote: of the class and those it inherits from."
    kinds = [k for k in kind.__mro__ if k not in nn.Module.__mro__ and not k.__module__.startswith("torch.nn.")]
    functions: list[tuple[str, Callable[..., Any]]] = [item for k in kinds for item in vars(k).items()]
    codes = [(name, f.__code__) for name, f in functions if hasattr(f, "__code__")]
    return hashlib.blake2b("\n".join(f"{name} {' '.join(_code(c))}" for name, c in codes).encode()).digest()


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _code(const)
        else:  # the order of a set differs from process to process
            yield repr(sorted(map(repr, const)) if isinstance(const, frozenset) else const)


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
