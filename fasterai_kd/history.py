"The losses of each step, and how student and teacher agree: the history and the metrics."

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any

import torch
from fastai.learner import AvgMetric, Learner
from torch import Tensor

from ._tensors import shape_of

__all__ = ["LossHistory", "check_metrics"]

CHUNK = 256  # steps


class LossHistory:
    "Keeps task loss, distillation loss and its parts; a few hundred steps at a time move off the device."

    def __init__(self) -> None:
        self.compares: set[str] = set()  # which of 'agreement' and 'teacher_accuracy' somebody wants to see
        self.reset([])

    def reset(self, names: Sequence[str]) -> None:
        "A new fit, with these parts of the distillation loss."
        self.clear_batch()
        self._names = list(names)
        self._steps: list[tuple[list[Tensor], float]] = []
        self._history: dict[str, list[float]] = {name: [] for name in ("task_loss", "kd_loss", *names, "weight")}

    def clear_batch(self) -> None:
        "The end of a fit: metrics of one without the callback must not show its last batch."
        self._last: dict[str, Tensor] = {}
        self._compared: dict[str, tuple[Tensor, Tensor]] = {}

    def compare(self, pred: Any, teacher_pred: Any, target: Any) -> None:
        "Note what is to be seen of the classes that student and teacher predict."
        self._compared = {}
        if not self.compares:
            return
        student, teacher = (_classes(x, whose) for x, whose in ((pred, "student"), (teacher_pred, "teacher")))
        if "agreement" in self.compares:
            self._compared["agreement"] = _hits("agreement", teacher, student)
        if "teacher_accuracy" in self.compares:
            self._compared["teacher_accuracy"] = _hits("teacher_accuracy", teacher, target, teacher_pred.shape[1])

    def record(
        self,
        task: Tensor,
        kd: Tensor | None,  # None: the teacher did not run, shown as nan
        weight: float,
        parts: Mapping[str, Tensor],  # of `kd`; one that is missing is shown as 0, if `kd` is there
        step: bool,  # a training step?
    ) -> None:
        "The parts of one batch."
        if task.ndim:  # fastai asks for a loss a sample in `get_preds(with_loss=True)`
            task = task.mean()
        missing = torch.full_like(task, nan if kd is None else 0.0)
        if kd is None:
            self._compared = {}
        self._last = {"task_loss": task, "kd_loss": missing if kd is None else kd}
        self._last |= {name: parts.get(name, missing).detach() for name in self._names}
        if step:
            self._steps.append((list(self._last.values()), weight))
            if len(self._steps) == CHUNK:
                self.collect()

    @property
    def history(self) -> dict[str, list[float]]:
        "`task_loss`, `kd_loss`, its parts and `weight`, a value a step."
        self.collect()
        return self._history

    def collect(self) -> None:
        "Move the steps so far off the device."
        if self._steps:
            values, weights = zip(*self._steps, strict=True)
            columns = torch.stack([torch.stack(v) for v in values], 1).tolist()
            for name, column in zip(self._history, [*columns, list(weights)], strict=True):
                self._history[name] += column
            self._steps = []

    def metrics(self, names: Sequence[str]) -> list[AvgMetric]:
        "Means over the samples, of these."
        return [_LossMetric(self._metric(name)) for name in names]

    def share(self, name: str) -> AvgMetric:
        "Of 'agreement' or 'teacher_accuracy'."
        self.compares.add(name)
        return _Share(self, name)

    def _metric(self, name: str) -> Callable[..., Tensor]:
        def value(*preds_and_targets: Any) -> Tensor:
            return self._last.get(name, torch.tensor(nan))

        value.__name__ = name
        return value


def check_metrics(metrics: Sequence[Any]) -> None:
    "ValueError for metrics that compare with labels where there are none."
    names = [m.name for m in metrics if not isinstance(m, (_LossMetric, _Share))]
    if names:
        raise ValueError(
            f"the dataloaders have no labels, which {', '.join(names)} would need: give the Learner no other metrics "
            "than those of the callback"
        )


class _LossMetric(AvgMetric):
    "Of a loss."


class _Share(AvgMetric):
    "Hits among all that count, over the batches; nan if one of them was not compared."

    def __init__(self, history: LossHistory, name: str):
        self._history, self._name = history, name

    @property
    def name(self) -> str:
        return self._name

    def accumulate(self, learn: Learner) -> None:
        hits, counted = self._history._compared.get(self._name) or (torch.tensor(nan), torch.tensor(1.0))
        self.total += learn.to_detach(hits)
        self.count += learn.to_detach(counted)


def _classes(output: Any, whose: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
        got = shape_of(output) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"agreement and teacher_accuracy are of classes (B, C, ...), the {whose} gives {got}")
    return output.detach().argmax(1)


def _hits(name: str, predicted: Tensor, classes: Any, n: int | None = None) -> tuple[Tensor, Tensor]:
    "How many samples, or positions, are equal, and of how many; with `n` of those whose class is one of `n`."
    if not isinstance(classes, Tensor) or classes.numel() != predicted.numel():
        got = shape_of(classes) if isinstance(classes, Tensor) else type(classes).__name__
        raise ValueError(f"{name} compares classes {shape_of(predicted)}, got {got}")
    counted = torch.ones_like(classes, dtype=torch.bool) if n is None else (classes >= 0) & (classes < n)
    return (predicted == classes.view_as(predicted)).sum().float(), counted.sum().float()
