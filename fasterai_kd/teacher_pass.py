"One pass of the teacher over a batch, as fast as the user allows."

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._fingerprint import fingerprint
from ._measure import difference, full_precision, is_faster, size_of
from ._packing import PREDICTIONS, Outputs
from ._tensors import plain, tensors
from .cache import TeacherCache
from .capture import Enough, FeatureCapture, by_position
from .fast import compile_with_features, fast_copy, has_hooks, private_copy, use_channels_last, why_no_copy
from .teacher import Teacher, device_of, logits

__all__ = ["TeacherPass"]

TOLERANCE = 1e-4  # of the largest value


class TeacherPass:
    """`teacher_pass(teacher, xb, training)` gives the teacher's output and the features of `layers`.

    Where nobody reads the output, the forward pass ends after the last layer and the output is None. With `fast` or
    `compiled`, the first training batch prepares what then runs in the teacher's place; with `cache` nothing runs for
    samples whose outputs are stored.
    """

    def __init__(
        self,
        layers: Sequence[str],  # of the teacher
        fast: bool = False,  # a copy with BatchNorm folded, in the faster memory format
        compiled: bool | Mapping[str, Any] = False,  # by torch.compile; or its arguments
        cache: TeacherCache | None = None,
    ):
        self.layers, self.fast, self.cache = list(layers), fast, cache
        self.compiled = {} if compiled is True else compiled  # False, or the arguments
        self.reads_output, self.report, self._fingerprint = True, "plain", ""
        self._prepared: tuple[str, str, list[tuple[Any, bool] | None]] | None = None  # for what, report, what runs
        self.begin_fit(True)

    def begin_fit(self, reads_output: bool) -> None:
        "Look at the teacher again; `reads_output`: does the loss?"
        if reads_output != self.reads_output:
            self._prepared = None
        self.reads_output, self._state, self._stamp, self._question = reads_output, "new", -1, ""
        self.capture = FeatureCapture(self.layers, "teacher")
        self._may_stop: bool | None = None  # once known
        if self.cache is not None:
            self.cache.begin_fit()

    def __reduce__(self) -> tuple[Any, ...]:
        "Copies and files leave out what was prepared; copies share the cache."
        return TeacherPass, (self.layers, self.fast, self.compiled, self.cache)

    def end_epoch(self) -> None:
        "Of training."
        if self.cache is not None:
            self.cache.end_epoch()

    def __call__(
        self,
        teacher: Teacher,
        xb: Sequence[Any],
        training: bool,
        one_tensor: bool = True,  # the predictions, of an output that may have more
    ) -> tuple[Any, dict[str, Tensor]]:
        if self._hurries or self.cache is not None:
            self._look_at(teacher, xb)

        def ask(inputs: Sequence[Any]) -> Outputs:
            output, features = self._ask(teacher, inputs, training)
            if not self.reads_output:
                return features
            if one_tensor:
                output = plain(logits(output))
            elif self.cache is not None and not isinstance(output, Tensor):
                raise TypeError(f"the cache stores one tensor of predictions, not a {type(output).__name__}: use none")
            return {PREDICTIONS: output} | features

        outputs = ask(xb) if self.cache is None else self.cache(xb, ask, self._question, training)
        return outputs.pop(PREDICTIONS, None), outputs

    @property
    def _hurries(self) -> bool:
        return self.fast or self.compiled is not False

    def _look_at(self, teacher: Teacher, xb: Sequence[Any]) -> None:
        "Is it the same teacher as in the last batch, bit for bit?"
        if self._stamp < 0:
            for member in teacher.members:
                member.inputs(xb)  # moves it to their device, which changes the stamp
        stamp = teacher.stamp()
        if stamp == self._stamp:
            return
        if self._state == "prepared":  # someone trains it during the fit
            self._state, self.report = "plain", "plain: its weights changed during the fit"
            teacher.refresh()
        self._stamp = stamp
        if self._state == "plain" and self.cache is None:
            return  # a fingerprint costs more than the copy would save, if the weights change in each batch
        self._fingerprint = fingerprint(teacher.model)
        device = device_of(xb)
        kind = device.type if device is not None else "cpu"
        own, students = teacher.precision, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        how = (self.layers, self.reads_output, own, students, self.fast, self.compiled is not False)
        self._question = f"{self._fingerprint} {how}"

    def _ask(self, teacher: Teacher, xb: Sequence[Any], training: bool) -> tuple[Any, dict[str, Tensor]]:
        if self._may_stop is None:  # not where hooks of the user must run, or a state is kept for the next batch
            whole = has_hooks(teacher.model) or hasattr(teacher.model, "reset")
            self._may_stop = not self.reads_output and not whole
        if training and self._state == "new" and self._hurries:
            self._prepare(teacher, xb)
        if self.layers and not isinstance(teacher.runs, nn.Module):  # compiled
            output, features = teacher(xb)
            return output, by_position(self.layers, features, "teacher")
        with self.capture.start(teacher.runs, self._may_stop):
            try:
                output = teacher(xb)
            except Enough:
                output = None
            return output, self.capture.take()

    def _prepare(self, teacher: Teacher, xb: Sequence[Any]) -> None:
        "For this fit, or as for the last one."
        what = f"{self._fingerprint} {device_of(xb)} {why_no_copy(teacher.model)}"
        if self._prepared is None or self._prepared[0] != what:
            report = "; ".join([self._prepare_one(member, xb) for member in teacher.members])
            adopted = [None if m.runs is m.model else (m.runs, m.channels_last) for m in teacher.members]
            self._prepared = what, report, adopted
        else:
            for member, how in zip(teacher.members, self._prepared[2], strict=True):
                if how is not None:
                    member.adopt(*how)
        self._state, self.report = "prepared", self._prepared[1]

    def _prepare_one(self, teacher: Teacher, xb: Sequence[Any]) -> str:
        "Let a fast or compiled copy run, or both in one; what was done."
        why = why_no_copy(teacher.model)
        if why:
            return f"plain: {why}"
        report = self._hurry(teacher, xb) if self.fast else "plain"
        if self.compiled is False:
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
