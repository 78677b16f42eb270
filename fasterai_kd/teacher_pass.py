"One pass of the teacher over a batch, as fast as the user allows."

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._fingerprint import fingerprint
from ._measure import difference, full_precision, is_faster, size_of
from ._packing import PREDICTIONS, Outputs
from ._tensors import by_position, plain, tensors
from .cache import TeacherCache
from .capture import Enough, FeatureCapture
from .fast import compile_with_features, fast_copy, has_hooks, private_copy, use_channels_last
from .teacher import Teacher, device_of, logits

__all__ = ["TeacherPass"]

TOLERANCE = 1e-4  # of the largest value


class TeacherPass:
    """`teacher_pass(teacher, xb, training)` gives the teacher's output and the features of its layers.

    Where nobody reads the output, the forward pass ends after the last layer and the output is None. With `fast` or
    `compiled`, the first training batch prepares what then runs in the teacher's place; with `cache` nothing runs for
    samples whose outputs are stored.
    """

    def __init__(
        self,
        fast: bool = False,  # a copy with BatchNorm folded, in the faster memory format
        compiled: bool | Mapping[str, Any] = False,  # by torch.compile; or its arguments
        cache: TeacherCache | None = None,
    ):
        self.fast, self.compiled, self.cache = fast, compiled, cache
        self.layers: list[str] = []
        self.reads_output, self.report, self._fingerprint = True, "plain", ""
        self._stamp: tuple[Any, ...]
        self._prepared: tuple[str, list[tuple[Any, bool]]] | None = None  # for that fingerprint
        self.begin_fit([], True)

    def begin_fit(
        self,
        layers: Sequence[str],  # of the teacher
        reads_output: bool,  # does the loss?
    ) -> None:
        "Look at the teacher again."
        if (list(layers), reads_output) != (self.layers, self.reads_output):
            self._prepared = None
        self.layers, self.reads_output = list(layers), reads_output
        self._state, self._stamp, self._changes = "new", (), False
        self.capture = FeatureCapture(self.layers, "teacher")
        self._may_stop: bool | None = None  # once known
        if self.cache is not None:
            self.cache.begin_fit()

    def __reduce__(self) -> tuple[Any, ...]:
        "Copies and files leave out what was prepared; copies share the cache."
        return TeacherPass, (self.fast, self.compiled, self.cache)

    def end_epoch(self) -> None:
        "Of training."
        self._stamp = (None,)  # in any case look at the weights once an epoch
        if self.cache is not None:
            self.cache.end_epoch()

    def __call__(
        self,
        teacher: Teacher,
        xb: Sequence[Any],
        training: bool,
        one_tensor: bool = True,  # the predictions, of an output that may have more
    ) -> tuple[Any, dict[str, Tensor]]:
        if self.fast or self.compiled or self.cache is not None:
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

        if self.cache is None or self._changes:
            outputs = ask(xb)
        else:
            outputs = self.cache(xb, ask, self._question(teacher, xb, one_tensor), training)
        return outputs.pop(PREDICTIONS, None), outputs

    def _look_at(self, teacher: Teacher, xb: Sequence[Any]) -> None:
        "Is it the same teacher as in the last batch, bit for bit? If someone trains it, it runs plainly from then on."
        if self._changes:
            return
        if not self._stamp:
            for member in teacher.members:
                member.inputs(xb)  # moves it to their device
        before, stamp = (self._stamp, self._fingerprint), teacher.stamp(closely=self.cache is not None)
        if stamp == self._stamp:
            return
        self._stamp, self._fingerprint = stamp, fingerprint(teacher.model)
        if not before[0] or self._fingerprint == before[1]:  # the first batch; written to, or moved, but not changed
            return
        self._changes = True
        if self._state == "prepared":
            self.report = "plain: its weights changed during the fit"
        self._state = "plain"
        teacher.refresh()
        if self.cache is not None:
            warnings.warn("the teacher changed during the fit: its outputs are not stored until the next", stacklevel=2)

    def _question(self, teacher: Teacher, xb: Sequence[Any], one_tensor: bool) -> str:
        "All that the outputs depend on but the inputs."
        device = device_of(xb)
        kind = device.type if device is not None else "cpu"
        own, students = teacher.precision, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        how = (self.layers, self.reads_output, one_tensor, own, students, self.fast, bool(self.compiled))
        return f"{self._fingerprint} {how}"

    def _ask(self, teacher: Teacher, xb: Sequence[Any], training: bool) -> tuple[Any, dict[str, Tensor]]:
        if self._may_stop is None:
            self._may_stop = not self.reads_output and not has_hooks(teacher.model)  # hooks of the user must run
        if training and self._state == "new" and (self.fast or self.compiled):
            self._prepare(teacher, xb)
        if self._state == "prepared" and self.compiled and self.layers:
            output, features = teacher(xb)
            return output, by_position(self.layers, features)
        with self.capture.start(teacher.runs, self._may_stop):
            try:
                output = teacher(xb)
            except Enough:
                output = None
            return output, self.capture.take()

    def _prepare(self, teacher: Teacher, xb: Sequence[Any]) -> None:
        "For this fit, or as for the last one."
        self._state = "prepared"
        if self._prepared is not None and self._prepared[0] == self._fingerprint:
            for member, how in zip(teacher.members, self._prepared[1], strict=True):
                member.adopt(*how)
            return
        reports = []
        for member in teacher.members:
            member.inputs(xb)  # moves it to their device
            reports.append(self._hurry(member, xb) if self.fast else "plain")
            if self.compiled:
                options = {} if self.compiled is True else dict(self.compiled)
                runs = compile_with_features(member.runs, self.layers, self.reads_output, **options)
                member.adopt(runs, member.channels_last)
                reports[-1] += ", compiled"
        self._prepared = self._fingerprint, [(m.runs, m.channels_last) for m in teacher.members]
        self.report = "; ".join(reports)

    def _hurry(self, teacher: Teacher, xb: Sequence[Any]) -> str:
        "Let a fast copy run, if its outputs are right; what was done."
        fast, folded = fast_copy(teacher.model, self.layers)
        if fast is None:
            return "plain: it cannot be traced, or keeps hooks or a state of its own"
        expected = self._outputs(teacher, xb)
        fast, last = self._in_faster_format(teacher, fast, xb)
        if not folded and not last:
            teacher.refresh()
            return "plain: there is nothing to fold, and channels_last does not pay"
        teacher.adopt(fast, last)
        error = max(map(difference, expected, self._outputs(teacher, xb)))
        if error > TOLERANCE:
            teacher.refresh()
            warnings.warn(
                f"fast_teacher: the fast copy's outputs differ by {error:.1e} of the largest (more than "
                f"{TOLERANCE:g}), so the teacher runs as it is",
                stacklevel=2,
            )
            return f"plain: the fast copy's outputs differ by {error:.1e}"
        size = size_of(fast, besides=teacher.model) / 2**20
        return f"{folded} BatchNorm folded{', channels_last' if last else ''}, {size:.1f} MiB more, within {error:.0e}"

    def _outputs(self, teacher: Teacher, xb: Sequence[Any]) -> list[Tensor]:
        "All of them, and the features, in full precision."
        with full_precision(), FeatureCapture(self.layers, "teacher").start(teacher.runs) as capture:
            output = teacher(xb)
            return [*tensors(output), *capture.take().values()]

    def _in_faster_format(self, teacher: Teacher, model: nn.Module, xb: Sequence[Any]) -> tuple[nn.Module, bool]:
        "The model, and is it in channels_last?"
        other = private_copy(model)
        if not use_channels_last(other):
            return model, False

        def run(runs: nn.Module, last: bool) -> Tensor:
            teacher.adopt(runs, last)
            return teacher(xb)

        last = is_faster(partial(run, other, True), partial(run, model, False), device_of(xb))
        return (other, True) if last else (model, False)
