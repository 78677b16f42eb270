"How task and distillation loss become one."

from typing import Any

import torch
from torch import Tensor

from ._arguments import check_weights
from .losses.combine import factor_at

__all__ = ["blend", "scheduled"]


def scheduled(weight: float, schedule: Any, pct: float, task_weight: float | None) -> float:
    "The weight at this share of the training; ValueError where the schedule makes it one that cannot be."
    where = ""
    if schedule is not None:
        factor = factor_at(schedule, pct)
        where = f" at {pct:.0%} of the training, where the schedule gives {factor:g}"
        weight = round(weight * factor, 12)
    check_weights(weight, task_weight, where)
    return weight


def blend(task: Tensor, kd: Tensor, weight: float, task_weight: float | None) -> Tensor:
    "(1 - weight) · task + weight · kd, or task_weight · task + weight · kd."
    if task_weight is not None:
        return task_weight * task + weight * kd
    return torch.lerp(task, kd, weight) if weight else task
