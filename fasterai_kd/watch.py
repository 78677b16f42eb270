"The student's features in the learner's own forward pass."

import traceback
from collections.abc import Sequence
from typing import Any

from fastai.learner import Learner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .capture import FeatureCapture

__all__ = ["StudentWatch"]


class StudentWatch:
    """`start` before the student runs, `take` its features after, `stop` in any case.

    No event tells when an exception ends a batch. So the model that the learner calls has a hook too: it lets the
    layers' hooks see the learner's own forward only, and removes them all when another forward finds them after a batch
    that did not end.
    """

    def __init__(self, names: Sequence[str]):
        self.capture = FeatureCapture(names, "student")
        self._hook: RemovableHandle | None = None
        self._learn: Learner = None

    def start(self, learn: Learner) -> None:
        "Hook the layers and the model."
        self.stop()
        if not self.capture.names:
            return
        if isinstance(learn.model, nn.DataParallel) and len(learn.model.device_ids) > 1:
            raise ValueError("layers cannot be compared in DataParallel's replicas: use learn.distrib_ctx() instead")
        self._learn, self._hook = learn, learn.model.register_forward_pre_hook(self._before_forward)
        self.capture.start(learn.model)

    def take(self) -> dict[str, Tensor]:
        "The features, as `FeatureCapture.take`."
        features = self.capture.take()
        self.stop()
        return features

    def stop(self) -> None:
        "Remove all hooks and what they hold."
        self.capture.stop()
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._learn = None

    def __reduce__(self) -> tuple[Any, ...]:
        "As FeatureCapture: copies do nothing."
        return StudentWatch, (self.capture.names,)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self._learn is None:
            return
        own = len(args) == len(self._learn.xb) and all(a is b for a, b in zip(args, self._learn.xb, strict=True))
        self.capture.recording = own
        if not own and not self._in_batch():
            self.stop()

    def _in_batch(self) -> bool:
        # a callback may run the student on other inputs within a batch, whose features must stay; only the stack tells
        # this from a forward after a batch that an exception ended
        frames = (frame for frame, _ in traceback.walk_stack(None))
        return any(f.f_code.co_name == "one_batch" and f.f_locals.get("self") is self._learn for f in frames)
