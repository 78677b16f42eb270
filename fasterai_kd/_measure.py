"Is one way to compute something faster than another, are the results the same, what memory does it take?"

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Later", "difference", "full_precision", "is_faster", "size_of"]


class Later:
    "`bool(Later(flag))`, read when it is needed: the host does not wait for what the device was given since."

    def __init__(self, flag: Tensor):
        self._flag = flag.to("cpu", non_blocking=flag.is_cuda)
        self._ready = torch.cuda.Event() if flag.is_cuda else None  # type: ignore[no-untyped-call]
        if self._ready is not None:
            self._ready.record()

    def __bool__(self) -> bool:
        if self._ready is not None:
            self._ready.synchronize()
        return bool(self._flag)


def is_faster(
    a: Callable[[], Any],
    b: Callable[[], Any],  # what is there
    device: torch.device | None,
    rounds: int = 3,
) -> bool:
    "Is `a` clearly faster than `b`?"
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for f, seen in zip((a, b), times, strict=True):
            start = _now(device)
            f()
            seen.append(_now(device) - start)
    return min(times[0][1:]) < 0.95 * min(times[1][1:])  # the first ones warm up


def _now(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def difference(a: Tensor, b: Tensor, floor: float = 1.0) -> float:
    "The largest, as a share of the largest value (of `floor` if that is smaller)."
    if a.shape != b.shape:
        return math.inf
    if not a.numel() or torch.equal(a, b):
        return 0.0
    error = ((a.double() - b.double()).abs().max() / a.abs().max().clamp(min=floor)).item()
    return math.inf if math.isnan(error) else error


@contextmanager
def full_precision() -> Iterator[None]:
    "No TF32, so that two ways to compute the same can be compared."
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


def size_of(model: nn.Module, besides: nn.Module) -> int:
    "Bytes of its tensors that the other model does not have."
    there = {t.data_ptr() for t in (*besides.parameters(), *besides.buffers())}
    own = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(size for ptr, size in own.items() if ptr not in there)
