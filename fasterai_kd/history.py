"The losses of each step, and how student and teacher agree: the history and the metrics."

import warnings
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
        self.compares: set[str] = set()  # which of 'agreement' and 'teacher_accuracy' the metrics show
        self.reset([])

    def begin_fit(self, metrics: Sequence[Any]) -> None:
        "What do the learner's metrics compare?"
        check_nested(metrics)
        self.compares = {m.name for m in metrics if isinstance(m, _Share) and m.history is self}

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

    def compare(
        self,
        pred: Any,
        teacher_pred: Any,
        target: Any,
        ignored: int | None = None,  # label that does not count
    ) -> None:
        "Note what is to be seen of the classes that student and teacher predict."
        self._compared = {}
        if not self.compares:
            return
        student, teacher = (_classes(x, whose) for x, whose in ((pred, "student"), (teacher_pred, "teacher")))
        if pred.shape[1] != teacher_pred.shape[1]:
            raise ValueError(
                f"agreement needs the same classes, the student has {pred.shape[1]} and the teacher "
                f"{teacher_pred.shape[1]}: leave this metric out"
            )
        void = _void(target, ignored, teacher)
        if "agreement" in self.compares:
            self._compared["agreement"] = _hits("agreement", teacher, student, void)
        if "teacher_accuracy" in self.compares:
            outside = _outside(target, pred.shape[1], teacher)
            self._compared["teacher_accuracy"] = _hits("teacher_accuracy", teacher, target, void | outside)

    @property
    def in_fit(self) -> bool:
        "Is there a batch of a fit?"
        return bool(self._last)

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
        return [_LossMetric(self._metric(name), self) for name in names]

    def share(self, name: str) -> AvgMetric:
        "Of 'agreement' or 'teacher_accuracy'."
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


def check_nested(metrics: Sequence[Any]) -> None:
    "TypeError for `metrics=[kd.metrics]`, which fastai finds after the first epoch."
    if any(isinstance(getattr(m, "func", None), (list, tuple)) for m in metrics):
        raise TypeError("one of the Learner's metrics holds a list: write metrics=[accuracy, *kd.metrics]")


class _LossMetric(AvgMetric):
    "Of a loss; a warning where its callback is not in the fit."

    def __init__(self, func: Any, history: LossHistory):
        super().__init__(func)
        self._history, self._warned = history, False

    def accumulate(self, learn: Learner) -> None:
        if not self._history.in_fit and not self._warned:
            self._warned = True
            warnings.warn(
                f"the metric {self.name} is of a distillation callback that is not in this fit: it shows nan",
                stacklevel=2,
            )
        super().accumulate(learn)


class _Share(AvgMetric):
    "Hits among all that count, over the batches; nan if one of them was not compared."

    def __init__(self, history: LossHistory, name: str):
        self.history, self._name = history, name

    @property
    def name(self) -> str:
        return self._name

    def accumulate(self, learn: Learner) -> None:
        hits, counted = self.history._compared.get(self._name) or (torch.tensor(nan), torch.tensor(1.0))
        self.total += learn.to_detach(hits)
        self.count += learn.to_detach(counted)


def _classes(output: Any, whose: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
        got = shape_of(output) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"agreement and teacher_accuracy need classes (B, C, ...), but the {whose} gives {got}")
    return output.detach().argmax(1)


def _fits(target: Any, predicted: Tensor) -> bool:
    return isinstance(target, Tensor) and target.numel() == predicted.numel()


def _void(target: Any, ignored: int | None, predicted: Tensor) -> Tensor:
    "Which samples, or positions, have the label that does not count?"
    if ignored is None or not _fits(target, predicted):
        return torch.zeros_like(predicted, dtype=torch.bool)
    return (target == ignored).view_as(predicted)


def _outside(target: Any, n: int, predicted: Tensor) -> Any:
    "Which labels are none of the `n` classes?"
    return ((target < 0) | (target >= n)).view_as(predicted) if _fits(target, predicted) else False


def _hits(name: str, predicted: Tensor, classes: Any, void: Any) -> tuple[Tensor, Tensor]:
    "How many samples, or positions, are equal, and of how many; without the void ones."
    if not isinstance(classes, Tensor) or classes.numel() != predicted.numel():
        got = shape_of(classes) if isinstance(classes, Tensor) else type(classes).__name__
        raise ValueError(f"{name} compares classes {shape_of(predicted)}, got {got}")
    counted = ~void.view_as(predicted)
    return ((predicted == classes.view_as(predicted)) & counted).sum().float(), counted.sum().float()
