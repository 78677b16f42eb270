"One pass of the teacher over a batch, as fast as the user allows."

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._fingerprint import fingerprint
from ._packing import PREDICTIONS, Outputs
from ._tensors import by_position, plain, tensors
from .cache import TeacherCache
from .capture import Enough, FeatureCapture
from .fast import has_hooks, why_no_copy
from .prepare import Preparation
from .teacher import Teacher, device_of, logits

__all__ = ["TeacherPass"]


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
        self.fast, self.cache = fast, cache
        self.compiled = None if compiled is False else {} if compiled is True else compiled
        self.layers: list[str] = []
        self.reads_output, self.report, self._fingerprint = True, "plain", ""
        self._stamp: tuple[Any, ...]
        self._prepared: tuple[str, str, list[tuple[Any, bool] | None]] | None = None  # for what, report, what runs
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
        return TeacherPass, (self.fast, False if self.compiled is None else self.compiled, self.cache)

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

        if self.cache is None or self._changes:
            outputs = ask(xb)
        else:
            outputs = self.cache(xb, ask, self._question(teacher, xb, one_tensor), training)
        return outputs.pop(PREDICTIONS, None), outputs

    def find_fault(self, teacher: Teacher, xb: Sequence[Any], training: bool, one_tensor: bool) -> str | None:
        "Which output has nan or inf? Asks again."
        output, features = self(teacher, xb, training, one_tensor)
        outputs = [*features.items(), *(("predictions", x) for x in tensors(output))]
        return next((name for name, x in outputs if not torch.isfinite(x).all()), None)

    @property
    def _hurries(self) -> bool:
        return self.fast or self.compiled is not None

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
        how = (self.layers, self.reads_output, one_tensor, own, students, self.fast, self.compiled is not None)
        return f"{self._fingerprint} {how}"

    def _ask(self, teacher: Teacher, xb: Sequence[Any], training: bool) -> tuple[Any, dict[str, Tensor]]:
        if self._may_stop is None:  # not where hooks of the user must run, or a state is kept for the next batch
            whole = has_hooks(teacher.model) or teacher.keeps_state()
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
            prepare = Preparation(self.layers, self.reads_output, self.fast, self.compiled)
            report = "; ".join([prepare(member, xb) for member in teacher.members])
            adopted = [None if m.runs is m.model else (m.runs, m.channels_last) for m in teacher.members]
            self._prepared = what, report, adopted
        else:
            for member, how in zip(teacher.members, self._prepared[2], strict=True):
                if how is not None:
                    member.adopt(*how)
        self._state, self.report = "prepared", self._prepared[1]
