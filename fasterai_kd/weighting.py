"How task and distillation loss become one: weights, over time, and of equal gradients."

import math
from typing import Any

import torch
import torch.distributed as dist
from fastai.torch_core import rank_distrib
from torch import Tensor, nn

from ._modules import unwrap
from .schedule import check_schedule, factor_at

__all__ = ["AutoWeight", "Weighting", "check_weights"]

ROUNDING = math.log(1e5)  # of the ratio of two gradients: beyond this one of them is rounding


class Weighting:
    """(1 - w) · task + w · distillation loss, or with a task weight: task_weight · task + w · distillation loss.

    w is `weight` · `schedule`. `weight="auto"` makes a sum, with task weight ½ unless another is given: a share of the
    task loss near 0 would scale the whole gradient down, to where Adam's eps counts.

    Raises TypeError and ValueError for weights that cannot be, also where a `Schedule` leads to them.
    """

    def __init__(self, weight: float | str, schedule: Any, task_weight: float | None):
        check_weights(weight, task_weight)
        auto = weight == "auto"
        self.task_weight = 0.5 if auto and task_weight is None else task_weight
        self.schedule, self._weight = schedule, weight
        self.auto = AutoWeight(self.task_weight) if auto and self.task_weight is not None else None
        check_schedule(schedule, self.at)

    @property
    def base(self) -> float:
        "The weight of the distillation loss without the schedule."
        return float(self._weight) if self.auto is None else self.auto.weight

    def at(self, pct: float) -> float:
        "The weight of the distillation loss at this share of the training."
        weight = self.base
        if self.schedule is None:
            return weight
        factor = factor_at(self.schedule, pct)
        weight = round(weight * factor, 12)
        check_weights(weight, self.task_weight, f" at {pct:.0%} of the training, where the schedule gives {factor:g}")
        return weight

    @property
    def measuring(self) -> bool:
        "Are the gradients of this batch to be compared?"
        return self.auto is not None and self.auto.measuring

    def measure(self, task: Tensor, kd: Tensor, student: nn.Module) -> None:
        'For `weight="auto"`, before the backward pass.'
        if self.auto is not None:
            self.auto.measure(task, kd, student)

    def report(self) -> None:
        "At the end of a fit."
        if self.auto is not None:
            self.auto.report()

    def blend(
        self,
        task: Tensor,
        kd: Tensor | None,  # None while the weight is 0
        weight: float,
    ) -> Tensor:
        "The total loss."
        share = 1 - weight if self.task_weight is None else self.task_weight
        if share == 0:  # also of a task loss that is nan, as where all labels are ignored
            task = task.nan_to_num(0.0, 0.0, 0.0)
        if kd is not None and weight == 0 and not task.requires_grad:  # without labels: there is no other gradient
            task = task + 0 * kd.nan_to_num(0.0, 0.0, 0.0)
        if self.task_weight is not None:
            task = self.task_weight * task
            return task if kd is None or weight == 0 else task + weight * kd
        return task if kd is None or weight == 0 else torch.lerp(task, kd, weight)


class AutoWeight:
    """Balances the norms of the two losses' gradients at the last weights of the student that both reach.

    `measure` looks at the first batches. `weight` comes from the geometric mean of the ratios so far, so it is near
    from the first batch on, and fixed after the last of them. The idea of GradNorm (Chen et al., ICML 2018), measured
    once.
    """

    def __init__(
        self,
        task_weight: float,  # of the task loss
        batches: int = 10,  # of training
    ):
        self.task_weight, self.batches = task_weight, batches
        self._logs: list[float] = []
        self._seen = 0  # batches
        self._at: tuple[str, Tensor] | None = None
        self._said = False

    @property
    def measuring(self) -> bool:
        "Are there batches to come?"
        return self._seen < self.batches

    @property
    def weight(self) -> float:
        "So far; with nothing measured as if both gradients were equal."
        ratio = math.exp(sum(self._logs) / len(self._logs)) if self._logs else 1.0
        return self.task_weight * ratio

    def measure(self, task: Tensor, kd: Tensor, student: nn.Module) -> None:
        "In one batch, before its backward pass. Raises ValueError where no weights get a gradient from both losses."
        if not self.measuring:
            return
        self._seen += 1
        self._at = self._at or _last_shared(task, kd, unwrap(student))
        if self._at is not None:
            norms = [_gradient(loss, self._at[1]).norm() for loss in (task, kd)]
            ratio = (norms[0] / norms[1]).log().item()
            if abs(ratio) < ROUNDING:  # else one of them is 0, or noise, as where student and teacher agree
                self._logs.append(ratio)
        if not self.measuring:
            if not self._logs:
                raise ValueError(_NOTHING_SHARED)
            self.report()

    def report(self) -> None:
        "Print once what was measured, also at the end of a fit that had fewer batches."
        if self._at is not None and self._logs and not self._said and rank_distrib() == 0:
            mean, n = math.exp(sum(self._logs) / len(self._logs)), len(self._logs)
            print(
                f"weight='auto': {self.weight:.4g}, with task_weight={self.task_weight:g}. In {n} batch"
                f"{'es' * (n > 1)} the gradient norm of the task loss was {mean:.3g} times that of the distillation "
                f"loss, measured at the parameter {self._at[0]}"
            )
        self._said = True


def _gradient(loss: Tensor, param: Tensor) -> Tensor:
    "At one parameter; with several processes of the mean loss, as DDP averages it."
    grad = torch.autograd.grad(loss, param, retain_graph=True)[0].float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return grad


_NOTHING_SHARED = (
    "weight='auto' compares the gradients of task and distillation loss, but no parameter of the student gets one from "
    "both: give a number"
)


def _last_shared(task: Tensor, kd: Tensor, student: nn.Module) -> tuple[str, Tensor] | None:
    """Name and tensor, in the order in which the student has them; a matrix or kernel rather than a bias.

    None where a loss has the gradient 0 in this batch. From the last one backwards, so that the pass goes no further
    into the student than it must: torch refuses it through `torch.utils.checkpoint` with use_reentrant=True.
    """
    reached = _parameters_in_graph(task) & _parameters_in_graph(kd)
    params = [(name, p) for name, p in student.named_parameters() if p in reached]
    if not params:
        raise ValueError(_NOTHING_SHARED)
    for at in (*reversed([at for at in params if at[1].ndim > 1]), *reversed(params)):
        if all(_gradient(loss, at[1]).any() for loss in (task, kd)):
            return at
    return None


def _parameters_in_graph(loss: Tensor) -> set[Any]:
    nodes, seen, params = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        params.add(getattr(node, "variable", None))
        nodes += [n for n, _ in node.next_functions]
    return params


def check_weights(weight: float | str, task_weight: float | None, where: str = "") -> None:
    "A share of the loss, or two weights ≥ 0; or 'auto'."
    if isinstance(weight, str):
        if weight != "auto":
            raise ValueError(f"weight must be a number or 'auto', got {weight!r}")
        if task_weight == 0:
            raise ValueError("weight='auto' balances two losses, with task_weight=0 there is one: give a number")
        weight = 0.0
    for name, value in (("weight", weight), ("task_weight", 0.0 if task_weight is None else task_weight)):
        if not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number, got {value!r}")
    top = 1 if task_weight is None else math.inf
    if not 0 <= weight <= top or weight == math.inf:
        hint = "; for a larger weight give task_weight too: the loss is then a sum" if top == 1 else ""
        raise ValueError(f"weight must be between 0 and {top:g}, got {weight:g}{where}{hint}")
    if task_weight is not None and not 0 <= task_weight < math.inf:
        raise ValueError(f"task_weight must be 0 or more, got {task_weight}")
