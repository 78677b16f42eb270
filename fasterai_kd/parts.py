"The parts of the loss: of the last batch for metrics, of every training step for the history."

from typing import Any

import torch
from fastai.learner import AvgMetric
from torch import Tensor

__all__ = ["LossParts"]


class LossParts:
    "Keeps task and distillation loss as tensors where they are; `history` moves them off the device."

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        "A new fit."
        self.forget()
        self._steps: list[tuple[Tensor, Tensor, float]] = []
        self._history: dict[str, list[float]] = {"task_loss": [], "kd_loss": [], "weight": []}

    def forget(self) -> None:
        "The end of a fit: metrics of one without the callback must not show its last batch."
        self._last = (torch.tensor(torch.nan), torch.tensor(torch.nan))

    def note(
        self,
        task: Tensor,
        kd: Tensor | None,  # None: the teacher did not run, shown as nan
        weight: float,
        step: bool,  # a training step?
    ) -> None:
        "The parts of one batch."
        if task.ndim:  # fastai asks for a loss a sample in `get_preds(with_loss=True)`
            task = task.mean()
        kd = torch.full_like(task, torch.nan) if kd is None else kd
        self._last = (task, kd)
        if step:
            self._steps.append((task, kd, weight))

    @property
    def history(self) -> dict[str, list[float]]:
        "`task_loss`, `kd_loss` and `weight`, a value a step."
        if self._steps:
            task, kd, weight = zip(*self._steps, strict=True)
            self._history["task_loss"] += torch.stack(task).tolist()
            self._history["kd_loss"] += torch.stack(kd).tolist()
            self._history["weight"] += weight
            self._steps = []
        return self._history

    @property
    def metrics(self) -> list[AvgMetric]:
        "Means over the samples."
        return [AvgMetric(self.task_loss), AvgMetric(self.kd_loss)]

    def task_loss(self, *preds_and_targets: Any) -> Tensor:
        "Of the last batch."
        return self._last[0]

    def kd_loss(self, *preds_and_targets: Any) -> Tensor:
        "Of the last batch."
        return self._last[1]
