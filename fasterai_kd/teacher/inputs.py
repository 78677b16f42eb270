"The teacher's inputs, made from the student's."

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._tensors import shape_of, tensors

__all__ = ["renormalize"]

Stats = tuple[Any, Any]  # mean and standard deviation of the channels


def renormalize(
    student_stats: Stats,  # mean and standard deviation with which the dataloaders normalize, such as `imagenet_stats`
    teacher_stats: Stats,  # those with which the teacher was trained
) -> Callable[[Tensor], Tensor]:
    """A `tfm` for images (B, C, H, W): `Teacher(model, tfm=renormalize(imagenet_stats, cifar_stats))`.

    Images of one channel become those of three, all the same, if the teacher has three means.

    Raises ValueError for unequal numbers of channels and standard deviations that are not positive.
    """
    (mean_s, std_s), (mean_t, std_t) = (map(_numbers, stats) for stats in (student_stats, teacher_stats))
    lengths = [len(x) for x in (mean_s, std_s, mean_t, std_t)]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3] or lengths[0] not in (1, lengths[2]):
        raise ValueError(f"renormalize takes two pairs (mean, std) of one length, got lengths {lengths}")
    if min(*std_s.tolist(), *std_t.tolist()) <= 0:
        raise ValueError(f"standard deviations must be positive, got {std_s.tolist()} and {std_t.tolist()}")
    return partial(_scale, (std_s / std_t).tolist(), ((mean_s - mean_t) / std_t).tolist(), lengths[0])


def transformed(
    tfm: Callable[..., Any] | None,
    xb: Sequence[Any],  # the student's
) -> Sequence[Any]:
    "The teacher's inputs; TypeError if `tfm` returns neither a tensor nor a tuple."
    if tfm is None:
        return xb
    with torch.no_grad():
        inputs = tfm(*xb)
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if next(tensors(inputs), None) is None:
        raise TypeError(f"tfm must return the teacher's inputs, a tensor or a tuple of them, got {inputs!r}")
    return inputs


def _numbers(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).flatten().cpu()


def _scale(scale: Sequence[float], shift: Sequence[float], channels: int, x: Tensor) -> Tensor:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"renormalize expects images (B, {channels}, H, W), got {shape_of(x)}")
    a, b = (x.new_tensor(v).view(-1, 1, 1) for v in (scale, shift))
    return x * a + b
