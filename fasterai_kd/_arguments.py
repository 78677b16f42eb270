"Checks of what the user gives to the callback: each error says what to do."

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cache import GIB, TeacherCache
from .losses.combine import function_of, name_of
from .losses.output import Logits
from .teacher import Ensemble, Teacher
from .teacher_pass import TeacherPass

__all__ = [
    "check_cache",
    "check_ensemble",
    "check_layers",
    "check_moving",
    "check_schedule",
    "check_stored",
    "check_teacher_runs",
    "check_tfm",
    "check_trained",
    "check_weights",
    "loss_parameters",
    "needs_equal_shapes",
    "reads_predictions",
]

_OUTPUTS = ("pred", "teacher_pred", "fm_s", "fm_t", "target")


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


def check_schedule(schedule: Any) -> None:
    "None, a `Schedule` or a function."
    if schedule is None:
        return
    if not callable(getattr(schedule, "progress", schedule)):
        raise TypeError(f"schedule must be a Schedule or a function pct → factor, got {schedule!r}")
    try:
        inspect.signature(getattr(schedule, "progress", schedule)).bind(0.0)
    except ValueError:  # compiled, without a signature
        return
    except TypeError as e:
        raise TypeError(
            f"schedule must be a Schedule or a function pct → factor, such as SchedCos(0, 1); {schedule!r}: {e}"
        ) from e


def loss_parameters(loss: Callable[..., Any]) -> dict[str, bool]:
    "The named parameters of `loss` → are they required? The callback must be able to call it."
    if not callable(loss):
        raise TypeError(f"loss must be a function such as SoftTarget, got {loss!r}")
    signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    try:
        signature.bind(**dict.fromkeys(_OUTPUTS))
    except TypeError as e:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(
            f"{name}{signature} cannot be called as loss(pred=, teacher_pred=, fm_s=, fm_t=, target=): {e}. "
            "Name the arguments it uses so, and add **kwargs for the others"
        ) from None
    if isinstance(loss, partial) and str(loss.func.__module__).startswith("fasterai_kd."):
        _check_keywords(loss)
    return {name: p.default is p.empty for name, p in signature.parameters.items()}


def _check_keywords(loss: partial[Any]) -> None:
    "Of a loss of this library, whose **kwargs would take a misspelt one without a word."
    known = [name for name, p in inspect.signature(loss.func).parameters.items() if p.kind != p.VAR_KEYWORD]
    for name in loss.keywords:
        if name not in (*known, *_OUTPUTS):
            options = [name for name in known if name not in _OUTPUTS]
            near = get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"{name_of(loss)} has no argument {name!r}: {hint}It has {', '.join(options) or 'none'}")


def reads_predictions(loss: Callable[..., Any]) -> bool:
    "Of the teacher: yes, unless its attribute of this name says no, and not one that functools.wraps copied."
    own = function_of(loss)
    return bool(getattr(own, "reads_predictions", True)) or hasattr(own, "__wrapped__")


def needs_equal_shapes(loss: Callable[..., Any]) -> bool:
    "Of its features, so that an adapter is for it: as its attribute of this name says, else if it names them."
    wanted = getattr(function_of(loss), "needs_equal_shapes", None)
    return "fm_s" in loss_parameters(loss) if wanted is None else bool(wanted)


def check_teacher_runs(teacher_dtype: torch.dtype | None, compile_teacher: Any) -> None:
    "A dtype that autocast knows, arguments that torch.compile may take."
    if teacher_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"teacher_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {teacher_dtype}")
    if not isinstance(compile_teacher, (bool, Mapping)):
        raise TypeError(f"compile_teacher must be True or a dict of torch.compile's arguments, got {compile_teacher!r}")


def check_tfm(teacher_tfm: Any) -> None:
    "None or a function."
    if teacher_tfm is not None and not callable(teacher_tfm):
        raise TypeError(f"teacher_tfm must be a function: the student's inputs → the teacher's, got {teacher_tfm!r}")


def check_cache(
    cache: Any,  # True, a path or a TeacherCache
    size: float | None,
) -> TeacherCache | None:
    "The cache that the user means."
    off = cache is None or cache is False
    if size is not None and (off or isinstance(cache, TeacherCache)):
        raise ValueError("cache_size is for cache=True or a path; a TeacherCache has its own size")
    if isinstance(cache, TeacherCache) or off:
        return None if off else cache
    if cache is not True and not isinstance(cache, (str, Path)):
        raise TypeError(f"cache must be True, the path of a folder or a TeacherCache, got {cache!r}")
    return TeacherCache(None if cache is True else cache, GIB if size is None else size)


def check_stored(cache: TeacherCache | None, source: Teacher, losses: Sequence[Callable[..., Any]]) -> None:
    "Can outputs of this teacher be stored by sample, and serve these losses?"
    if cache is None:
        return
    if source.keeps_state():
        raise ValueError(
            "the teacher has a method `reset`, so it is recurrent and keeps a state from batch to batch: its outputs "
            "cannot be stored by sample, use no cache"
        )
    if cache.packing.top_k and any(function_of(loss) is Logits for loss in losses):
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
    if isinstance(source, Ensemble) and any(function_of(loss) is Logits for loss in losses):
        raise ValueError("an ensemble gives log-probabilities, Logits compares raw outputs: give one teacher")


def check_trained(losses: Sequence[Callable[..., Any]], opt: Any) -> None:
    "Does the optimizer know the parameters of a loss that is a module?"
    modules = [loss for loss in losses if isinstance(loss, nn.Module)]
    if opt is None or not any(p.requires_grad for m in modules for p in m.parameters()):
        return
    known = {id(p) for group in opt.param_lists for p in group}
    for module in modules:
        if any(p.requires_grad and id(p) not in known for p in module.parameters()):
            name = type(module).__name__
            warnings.warn(
                f"the parameters of the loss {name} are not trained: give them to the optimizer by "
                "Learner(..., splitter=lambda model: [[*model.parameters(), *loss.parameters()]]), "
                "or set requires_grad_(False)",
                stacklevel=2,
            )


def check_moving(source: Teacher, how: TeacherPass) -> None:
    "What a teacher that changes with each step cannot have: stored outputs, a copy that runs in its place."
    given = {"cache": how.cache is not None, "fast_teacher": how.fast, "compile_teacher": how.compiled is not None}
    names = [name for name, it in given.items() if it]
    if names and not source.is_fixed:
        raise ValueError(f"{type(source).__name__} changes with each step: give no {' and no '.join(names)}")
