"The teacher's inputs, made from the student's."

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from fastai.basics import Pipeline, Transform
from fastai.data.transforms import Normalize
from fastai.vision.core import TensorImage
from torch import Tensor, nn

from .._tensors import as_input, device_of, map_tensors, plain, shape_of, tensors

__all__ = ["renormalize"]

HALF = (torch.float16, torch.bfloat16)
Stats = tuple[Any, Any]  # mean and standard deviation of the channels


def renormalize(
    student_stats: Stats | Normalize,  # with which the dataloaders normalize: `imagenet_stats`, or their `Normalize`
    teacher_stats: Stats | Normalize,  # with which the teacher was trained
) -> Callable[[Tensor], Tensor]:
    """A `tfm` for images (B, C, H, W): `Teacher(model, tfm=renormalize(imagenet_stats, cifar_stats))`.

    Statistics are pairs of means and standard deviations of the channels. Images of one channel become those of three,
    all the same, if the teacher has three means. Of several inputs all images are renormalized, and nothing else.

    Raises ValueError for unequal numbers of channels and standard deviations that are not positive.
    """
    (mean_s, std_s), (mean_t, std_t) = (map(_numbers, _pair(stats)) for stats in (student_stats, teacher_stats))
    lengths = [len(x) for x in (mean_s, std_s, mean_t, std_t)]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3] or lengths[0] not in (1, lengths[2]):
        raise ValueError(f"renormalize takes two pairs (mean, std) of one length, got lengths {lengths}")
    if min(*std_s.tolist(), *std_t.tolist()) <= 0:
        raise ValueError(f"standard deviations must be positive, got {std_s.tolist()} and {std_t.tolist()}")
    return partial(_scale, (std_s / std_t).tolist(), ((mean_s - mean_t) / std_t).tolist(), lengths[0])


class InputTransform:
    """`apply` makes the teacher's inputs from the student's.

    Images come as fastai's `TensorImage`, so that its batch transforms act; those for training act too.
    """

    def __init__(self, tfm: Any):
        if isinstance(tfm, (list, tuple)) and all(map(callable, tfm)):
            tfm = Pipeline(tfm, split_idx=0)
        if tfm is not None and not callable(tfm):
            raise TypeError(f"tfm must be a function, the student's inputs → the teacher's, got {tfm!r}")
        self.tfm, self._checked = tfm, False

    def apply(self, xb: Sequence[Any]) -> Sequence[Any]:
        "TypeError if `tfm` returns neither a tensor nor a tuple; a warning if it changes nothing."
        if self.tfm is None:
            return xb
        typed = [_as_image(x) for x in xb]
        with torch.no_grad():
            if isinstance(self.tfm, Transform):
                inputs = self.tfm(typed[0] if len(typed) == 1 else tuple(typed), split_idx=0)
            else:
                inputs = self.tfm(*typed)
        inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        if next(tensors(inputs), None) is None:
            raise TypeError(f"tfm must return the teacher's inputs, a tensor or a tuple of them, got {inputs!r}")
        if not self._checked:
            self._checked = True
            if _same(typed, inputs):
                warnings.warn("the teacher's tfm returns its inputs unchanged: does it know their type?", stacklevel=2)
        return inputs


def prepared(model: nn.Module, xb: Sequence[Any]) -> list[Any]:
    "Plain inputs in the model's precision; moves the model to them."
    inputs, device = [map_tensors(plain, x) for x in xb], device_of(xb)
    p = next((p for p in model.parameters() if p.is_floating_point()), None)
    if p is None or device is None:
        return inputs
    if p.device != device:
        model.to(device)
    return [map_tensors(lambda x: as_input(x, p), x) for x in inputs]


def autocast(dtype: torch.dtype | None, inputs: Sequence[Any]) -> Any:
    "To this dtype, on the device of the inputs; None: as it is."
    device = device_of(inputs)
    if dtype is None or device is None:
        return nullcontext()
    return torch.autocast(device.type, dtype if dtype in HALF else None, enabled=dtype in HALF)


def autocast_dtype(inputs: Sequence[Any]) -> torch.dtype | None:
    "The dtype of the student's autocast, if it is on."
    device = device_of(inputs)
    kind = device.type if device is not None else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def normalization(dls: Any) -> tuple[list[float], list[float]] | None:
    "Mean and standard deviation of the channels with which fastai's dataloaders normalize; None where they do not."
    for tfm in getattr(getattr(dls, "after_batch", None), "fs", ()):
        if isinstance(tfm, Normalize) and isinstance(tfm.mean, Tensor):
            return tfm.mean.flatten().tolist(), tfm.std.flatten().tolist()
    return None


def image_size(dls: Any) -> tuple[int, int] | None:
    "To which fastai's dataloaders bring images, by their last transform with a size."
    tfms = [t for name in ("after_item", "after_batch") for t in getattr(getattr(dls, name, None), "fs", ())]
    sizes = [size for t in tfms if (size := getattr(t, "size", None)) is not None]
    size = sizes[-1] if sizes else None
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) and len(size) == 2 else None


def _pair(stats: Any) -> Any:
    return (stats.mean, stats.std) if isinstance(stats, Normalize) else stats


def _numbers(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).flatten().cpu()


def _scale(scale: Sequence[float], shift: Sequence[float], channels: int, *xb: Any) -> Any:
    "Images among the inputs; the others stay as they are."
    is_image = [isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() and x.shape[1] == channels for x in xb]
    if not any(is_image):
        raise ValueError(
            f"renormalize expects images (B, {channels}, H, W), got {', '.join(map(shape_of, tensors(xb)))}: these "
            "are the student's inputs, give Teacher(..., tfm=...) a function that makes those of the teacher"
        )
    inputs = [_scaled(x, scale, shift) if image else x for x, image in zip(xb, is_image, strict=True)]
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def _scaled(x: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    a, b = (x.new_tensor(v).view(-1, 1, 1) for v in (scale, shift))
    return x * a + b


def _as_image(x: Any) -> Any:
    images = type(x) is Tensor and x.ndim == 4 and x.shape[1] in (1, 3) and x.is_floating_point()
    return x.as_subclass(TensorImage) if images else x


def _same(xb: Sequence[Any], inputs: Sequence[Any]) -> bool:
    return len(xb) == len(inputs) and all(
        a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all()))
        for a, b in zip(xb, inputs, strict=True)
    )
