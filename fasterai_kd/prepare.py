"What runs in the teacher's place: a fast copy, compiled code."

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._measure import difference, full_precision, is_faster, size_of
from ._tensors import tensors
from .capture import FeatureCapture
from .fast import compile_with_features, fast_copy, private_copy, use_channels_last, why_no_copy
from .teacher import Teacher, device_of

__all__ = ["Preparation"]

TOLERANCE = 1e-4  # of the largest value


class Preparation:
    "`prepare(teacher, xb)` lets a fast or compiled copy run, or both in one, if it may; it says what was done."

    def __init__(
        self,
        layers: Sequence[str],  # whose outputs will be looked at
        reads_output: bool,  # or those alone?
        fast: bool,  # a copy with BatchNorm folded, in the faster memory format
        compiled: Mapping[str, Any] | None,  # arguments of torch.compile
    ):
        self.layers, self.reads_output, self.fast, self.compiled = layers, reads_output, fast, compiled

    def __call__(self, teacher: Teacher, xb: Sequence[Any]) -> str:
        why = why_no_copy(teacher.model)
        if why:
            return f"plain: {why}"
        report = self._hurry(teacher, xb) if self.fast else "plain"
        if self.compiled is None:
            return report
        try:
            copied = private_copy(teacher.runs)
        except Exception as e:  # of a module of the user
            return f"plain: it cannot be copied ({e})"
        runs = compile_with_features(copied, self.layers, self.reads_output, **self.compiled)
        teacher.adopt(runs, teacher.channels_last)
        return f"{report}, compiled"

    def _hurry(self, teacher: Teacher, xb: Sequence[Any]) -> str:
        "Let a fast copy run, if its outputs are right; what was done."
        fast, folded = fast_copy(teacher.model, self.layers)
        if fast is None:
            return "plain: it cannot be copied, or traced by torch.fx, or is in half precision"
        expected = self._outputs(teacher, xb)
        try:
            fast, last = self._in_faster_format(teacher, fast, xb)
            teacher.adopt(fast, last)
            error = _error(expected, self._outputs(teacher, xb))
        except Exception as e:  # its forward pass looks at what was folded, say
            teacher.refresh()
            return f"plain: the fast copy does not run ({e})"
        if error > TOLERANCE or not (folded or last):
            teacher.refresh()
        if not folded and not last:
            return "plain: there is nothing to fold, and channels_last does not pay"
        if error > TOLERANCE:
            warnings.warn(
                f"fast_teacher: the fast copy's outputs differ by {error:.1e} of the largest (more than "
                f"{TOLERANCE:g}), so the teacher runs as it is",
                stacklevel=2,
            )
            return f"plain: the fast copy's outputs differ by {error:.1e}"
        size = size_of(fast, besides=teacher.model) / 2**20
        return f"{folded} BatchNorm folded{', channels_last' if last else ''}, {size:.1f} MiB more, within {error:.0e}"

    def _outputs(self, teacher: Teacher, xb: Sequence[Any]) -> list[Tensor]:
        "All of them, and the features, in full precision: outside autocast, the student's too."
        own, teacher.precision = teacher.precision, torch.float32
        try:
            with full_precision(), FeatureCapture(self.layers, "teacher").start(teacher.runs) as capture:
                output = teacher(xb)
                return [*tensors(output), *capture.take().values()]
        finally:
            teacher.precision = own

    def _in_faster_format(self, teacher: Teacher, model: nn.Module, xb: Sequence[Any]) -> tuple[nn.Module, bool]:
        "The model, and is it in channels_last?"
        other = private_copy(model)
        if not use_channels_last(other):
            return model, False

        def run(runs: nn.Module, last: bool) -> Tensor:
            teacher.adopt(runs, last)
            return teacher(xb)

        try:
            run(other, True)
        except RuntimeError:  # a `view` of what is no longer contiguous
            return model, False
        last = is_faster(partial(run, other, True), partial(run, model, False), device_of(xb))
        return (other, True) if last else (model, False)


def _error(expected: list[Tensor], outputs: list[Tensor]) -> float:
    if len(expected) != len(outputs):
        return math.inf
    return max((difference(a, b, floor=1e-3) for a, b in zip(expected, outputs, strict=True)), default=0.0)
