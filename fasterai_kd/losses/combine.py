"Several losses as one."

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fastcore.basics import listify
from torch import Tensor

from .._tensors import by_position, one_of, plain
from ..schedule import factor_at
from ._checks import total
from ._traits import name_of

__all__ = ["CombinedLoss", "Part", "SelectedLoss", "combine", "parts_of", "select"]

_RESERVED = ("task_loss", "kd_loss", "weight")
Pairs = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Part:
    "One loss of several."

    name: str
    loss: Callable[..., Tensor]
    weight: float = 1.0
    pairs: Pairs | None = None  # {"student": names, "teacher": names}; None: whatever features there are
    schedule: Any = None  # a `Schedule` or function: share of the training done → factor on `weight`

    def weight_at(self, pct: float) -> float:
        "At this share of the training."
        factor = 1.0 if self.schedule is None else factor_at(self.schedule, pct)
        if not 0 <= factor < math.inf:
            when = f"at {pct:.0%} of the training"
            raise ValueError(f"factors must be 0 or more, the schedule of {self.name} gives {factor:g} {when}")
        return self.weight * factor

    def select(self, fm_s: Mapping[str, Tensor] | None, fm_t: Mapping[str, Tensor] | None) -> dict[str, Any]:
        "Of all features, those of its layers."
        if self.pairs is None:
            return {"fm_s": fm_s, "fm_t": fm_t}
        return {
            "fm_s": by_position(self.pairs["student"], fm_s or {}, "student"),
            "fm_t": by_position(self.pairs["teacher"], fm_t or {}, "teacher"),
        }


class CombinedLoss:
    "The sum of the parts, each with its weight; called like any loss, `parts` has them."

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)

    def __call__(
        self,
        pred: Any = None,  # outputs as for any loss
        teacher_pred: Any = None,
        fm_s: Mapping[str, Tensor] | None = None,  # features by layer, at least of the layers that the parts name
        fm_t: Mapping[str, Tensor] | None = None,
        target: Any = None,
        pct: float = 1.0,  # share of the training done, for parts with a schedule
    ) -> Tensor:
        outputs = {"pred": pred, "teacher_pred": teacher_pred, "target": target}
        due = [(p, weight) for p in self.parts if (weight := p.weight_at(pct))]
        values = [weight * p.loss(**outputs, **p.select(fm_s, fm_t)) for p, weight in due]
        return total(iter(values)) if values else torch.zeros(())

    def __repr__(self) -> str:
        return f"combine({', '.join(f'{p.weight:g} · {p.name}' for p in self.parts)})"


def combine(
    *parts: Any,  # (loss, weight), (loss, weight, pairs) or (loss, weight, pairs, schedule); or one dict of these
) -> CombinedLoss:
    """A weighted sum of losses, with one teacher pass: `combine((SoftTarget, 0.9), (Attention, 1000.0, pairs))`.

    `pairs` are layers as from `match_feature_layers`; a part without them compares those that the callback is given.
    Each part's share is in `kd.history` and `kd.metrics` under the name of its loss, or of its key in a dict.

    Raises TypeError and ValueError for parts of another form, negative weights, lists of unequal length.
    """
    named = dict(parts[0]) if len(parts) == 1 and isinstance(parts[0], Mapping) else None
    items = [(None, p) for p in parts] if named is None else list(named.items())
    if not items:
        raise ValueError("combine needs at least one part: (loss, weight)")
    made: list[Part] = []
    for name, item in items:
        part = _as_part(name, item)
        taken = [p.name for p in made]
        if part.name in taken or part.name in _RESERVED:
            if name is not None:
                raise ValueError(f"a part cannot be called {name!r}: the name is taken or reserved")
            n = next(n for n in range(2, len(taken) + 3) if f"{part.name}_{n}" not in taken)
            part = replace(part, name=f"{part.name}_{n}")
        made.append(part)
    return CombinedLoss(made)


class SelectedLoss(partial):  # type: ignore[type-arg]
    "A loss that picks what it reads among several outputs; else it is the loss that it was made of."

    outputs: tuple[Any, Any]  # of student and teacher

    def __call__(self, pred: Any = None, teacher_pred: Any = None, **kwargs: Any) -> Tensor:
        student, teacher = self.outputs
        pred, teacher_pred = one_of(pred, student, "the student"), one_of(teacher_pred, teacher, "the teacher")
        loss: Tensor = super().__call__(pred=plain(pred), teacher_pred=plain(teacher_pred), **kwargs)
        return loss


def select(
    loss: Callable[..., Tensor],  # of predictions
    student: Any = None,  # the student's output: key of its dict, index in its tuple, or a function of all
    teacher: Any = None,  # the teacher's, likewise
) -> Callable[..., Tensor]:
    """`loss` of one of several outputs: `select(SoftTarget, "species", "species")`, also as a part of `combine`.

    None stands for the predictions: 'logits' or 'out' of a dict, the first of a tuple. A model that returns a single
    tensor, as one with a distillation token does in evaluation mode, has no others: it is taken as it is.

    Raises TypeError for a combined loss, ValueError at the first batch for an output that the model does not have.
    """
    if isinstance(loss, (CombinedLoss, SelectedLoss)) or not callable(loss):
        raise TypeError(f"select takes one loss, got {loss!r}: give combine parts, as (select(Mutual, 1), 0.5)")
    selected = SelectedLoss(loss)
    selected.outputs = student, teacher
    return selected


def parts_of(loss: Callable[..., Tensor]) -> list[Part]:
    "Of a combined loss; any other is its own only part."
    return loss.parts if isinstance(loss, CombinedLoss) else [Part(name_of(loss), loss)]


def _as_part(name: str | None, item: Any) -> Part:
    item = item if isinstance(item, (tuple, list)) else (item,)
    if not 1 <= len(item) <= 4 or not callable(item[0]):
        form = "(loss, weight), (loss, weight, pairs) or (loss, weight, pairs, schedule)"
        raise TypeError(f"a part of a combined loss is {form}, got {item!r}")
    loss, weight, pairs, schedule = (*item, None, None, None)[:4]
    if isinstance(loss, CombinedLoss):
        raise TypeError("a part of a combined loss cannot be a combined loss: give all parts at once")
    weight = 1.0 if weight is None else weight
    if not hasattr(weight, "__float__") or not 0 <= float(weight) < math.inf:
        raise ValueError(f"the weight of {name or name_of(loss)} must be 0 or more, got {weight!r}")
    if pairs is not None and not (isinstance(pairs, Mapping) and {"student", "teacher"} <= pairs.keys()):
        raise TypeError(f"the pairs of {name or name_of(loss)} must be as from match_feature_layers, got {pairs!r}")
    if pairs is not None:
        pairs = {side: listify(pairs[side]) for side in ("student", "teacher")}
        if len(pairs["student"]) != len(pairs["teacher"]):
            raise ValueError(f"layers pair by position, {name or name_of(loss)} has unequal numbers: {pairs}")
    return Part(name or name_of(loss), loss, float(weight), pairs, schedule)
