"Several teachers as one."

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import shape_of
from .inputs import autocast
from .teacher import Teacher, as_teacher

__all__ = ["Ensemble"]


class Ensemble(Teacher, of_lists=True):
    "Several classifiers as one: the mean of their probabilities, as log-probabilities. `Teacher([a, b])` makes one."

    why_no_raw_outputs = "an ensemble gives log-probabilities"

    @property
    def members(self) -> list[Teacher]:
        return [member for teacher in self._members for member in teacher.members]

    def begin_fit(self, student: nn.Module, views: int = 1, trial: bool = False) -> None:
        super().begin_fit(student, views, trial)
        for teacher in self._members:
            teacher.begin_fit(student, views, trial)

    def meet_data(self, dls: Any, compares_classes: bool) -> None:
        for teacher in self._members:
            teacher.meet_data(dls, compares_classes)

    def begin_epoch(self, training: bool) -> None:
        super().begin_epoch(training)
        for teacher in self._members:
            teacher.begin_epoch(training)

    def end_fit(self) -> None:
        super().end_fit()
        for teacher in self._members:
            teacher.end_fit()

    def find_layers(self, names: Sequence[str], student: nn.Module | None = None) -> None:
        if names:
            raise ValueError("an ensemble has no common layers to compare: give one teacher, or a loss on predictions")

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        new: Any = super().__deepcopy__(memo)
        new._members = [teacher.__deepcopy__(memo) for teacher in self._members]
        return new

    def _take(self, source: Any) -> None:
        self._members = [as_teacher(t) for t in source]
        if not all(t.is_fixed for t in self._members):
            raise ValueError("an average of the student cannot be a member of an ensemble: give it alone")
        if not self._members:
            raise TypeError("teacher must be a model (nn.Module) or a list of several, got an empty list")
        self.model = nn.ModuleList(t.model for t in self._members)

    def _run(self, xb: Sequence[Any], layers: Sequence[str], class_dim: int) -> tuple[Any, dict[str, Tensor]]:
        self.find_layers(layers)
        with autocast(self.dtype, xb):
            preds = [teacher.forward(xb, class_dim=class_dim).pred for teacher in self._members]
        if len({p.shape for p in preds}) > 1:
            raise ValueError(
                "the members of an ensemble must predict the same classes, they give "
                f"{', '.join(map(shape_of, preds))}: give one teacher"
            )
        if preds[0].ndim < 2 or preds[0].shape[class_dim] < 2:
            raise ValueError(f"an ensemble is of classifiers (B, C), got {shape_of(preds[0])}: give one teacher")
        return torch.stack([p.log_softmax(class_dim) for p in preds]).exp().mean(0).log(), {}
