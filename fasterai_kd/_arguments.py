"Checks of what the user gives to the callback: each error says what to do."

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cache import GIB, TeacherCache
from .losses.output import Logits
from .teacher import Ensemble, Teacher

__all__ = [
    "check_cache",
    "check_dtype",
    "check_ensemble",
    "check_layers",
    "check_schedule",
    "check_top_k",
    "check_weights",
    "loss_parameters",
    "needs_equal_shapes",
    "reads_predictions",
]


def check_weights(weight: float, task_weight: float | None, where: str = "") -> None:
    "A share of the loss, or two weights ≥ 0."
    top = 1 if task_weight is None else math.inf
    if not 0 <= weight <= top or weight == math.inf:
        hint = "; for a larger weight give task_weight too: the loss is then a sum" if top == 1 else ""
        raise ValueError(f"weight must be between 0 and {top:g}, got {weight:g}{where}{hint}")
    if task_weight is not None and not 0 <= task_weight < math.inf:
        raise ValueError(f"task_weight must be 0 or more, got {task_weight}")


def check_schedule(schedule: Any) -> None:
    "None, a `Schedule` or a function."
    if schedule is not None and not callable(getattr(schedule, "progress", schedule)):
        raise TypeError(f"schedule must be a Schedule or a function pct → factor, got {schedule!r}")


def loss_parameters(loss: Callable[..., Any]) -> dict[str, bool]:
    "The named parameters of `loss` → are they required? The callback must be able to call it."
    if not callable(loss):
        raise TypeError(f"loss must be a function such as SoftTarget, got {loss!r}")
    signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    try:
        signature.bind(**dict.fromkeys(("pred", "teacher_pred", "fm_s", "fm_t", "target")))
    except TypeError as e:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(
            f"{name}{signature} cannot be called as loss(pred=, teacher_pred=, fm_s=, fm_t=, target=): {e}. "
            "Name the arguments it uses so, and add **kwargs for the others"
        ) from None
    return {name: p.default is p.empty for name, p in signature.parameters.items()}


def reads_predictions(loss: Callable[..., Any]) -> bool:
    "Of the teacher: yes, unless its attribute of this name says no."
    return bool(getattr(getattr(loss, "func", loss), "reads_predictions", True))


def needs_equal_shapes(loss: Callable[..., Any]) -> bool:
    "Of its features, so that an adapter is for it: as its attribute of this name says, else if it names them."
    wanted = getattr(getattr(loss, "func", loss), "needs_equal_shapes", None)
    return "fm_s" in loss_parameters(loss) if wanted is None else bool(wanted)


def check_dtype(teacher_dtype: torch.dtype | None) -> None:
    "One that autocast knows."
    if teacher_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"teacher_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {teacher_dtype}")


def check_cache(
    cache: Any,  # True, a path or a TeacherCache
    size: float | None,
) -> TeacherCache | None:
    "The cache that the user means."
    if size is not None and (not cache or isinstance(cache, TeacherCache)):
        raise ValueError("cache_size is for cache=True or a path; a TeacherCache has its own size")
    if cache is None or cache is False or isinstance(cache, TeacherCache):
        return cache or None
    if cache is not True and not isinstance(cache, (str, Path)):
        raise TypeError(f"cache must be True, the path of a folder or a TeacherCache, got {cache!r}")
    return TeacherCache(None if cache is True else cache, GIB if size is None else size)


def check_top_k(cache: TeacherCache | None, losses: Sequence[Callable[..., Any]]) -> None:
    "A cache of probabilities has no raw outputs."
    if cache is not None and cache.packing.top_k and any(getattr(loss, "func", loss) is Logits for loss in losses):
        raise ValueError("a cache with top_k keeps probabilities, Logits compares raw outputs: give no top_k")


def check_layers(
    student: Sequence[str],
    teacher: Sequence[str],
    loss_params: dict[str, bool],
) -> None:
    "Pairs of names, present if the loss needs them."
    if not all(isinstance(name, str) for name in (*student, *teacher)):
        raise TypeError(f"layers are given by name, as in get_model_layers(model): got {student} and {teacher}")
    if len(student) != len(teacher):
        raise ValueError(
            f"layers pair by position, but activations_student has {len(student)} {list(student)} and "
            f"activations_teacher {len(teacher)} {list(teacher)}"
        )
    if not student and (loss_params.get("fm_s") or loss_params.get("fm_t")):
        raise ValueError(
            "this loss compares layers: give activations_student and activations_teacher, "
            "e.g. pairs['student'] and pairs['teacher'] of match_feature_layers(student, teacher, x)"
        )


def check_ensemble(source: Teacher, losses: Sequence[Callable[..., Any]], layers: Sequence[str]) -> None:
    "What an ensemble cannot give: layers, raw outputs."
    if isinstance(source, Ensemble) and layers:
        raise ValueError("an ensemble has no common layers to compare: give one teacher, or a loss on outputs")
    if isinstance(source, Ensemble) and any(getattr(loss, "func", loss) is Logits for loss in losses):
        raise ValueError("an ensemble gives log-probabilities, Logits compares raw outputs: give one teacher")
