"How the callback calls the distillation loss, whole or in parts."

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner
from fastcore.basics import detuplify
from torch import Tensor, nn

from .._class_axis import as_rows, classes_first, has_independent_classes
from .._tensors import map_tensors, plain, predictions, shape_of
from ..schedule import check_schedule
from ._traits import function_of, ignores_labels, is_own, name_of, parameters_of, trait
from .combine import CombinedLoss, Part, SelectedLoss, parts_of

__all__ = ["LossEvaluator", "mix_of"]

Align = Callable[
    [Any, Any, bool], dict[str, Any]
]  # features of student and teacher → in one form; may maps be averaged?
Adapt = Callable[[Any, Any], dict[str, Any]]  # likewise → of equal shapes


class LossEvaluator:
    """`evaluate` gives the values of the parts of a loss by name, weighted, in float32 and outside autocast.

    A loss that is not combined is its own only part. `student` and `teacher` are all layers that the parts compare, in
    pairs.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        student: Sequence[str],  # layers for parts that name none
        teacher: Sequence[str],
    ):
        own = {"student": list(student), "teacher": list(teacher)}
        self.parts = [replace(p, pairs=own if p.pairs is None else p.pairs) for p in parts_of(loss)]
        self._is_combined = isinstance(loss, CombinedLoss)
        self._params = {p.name: parameters_of(p.loss) for p in self.parts}
        self._adapts = {p.name for p in self.parts if trait(p.loss, "same_shape")}
        self._checked = False
        together: dict[tuple[str, str], None] = {}
        for p in self.parts:
            pairs = p.pairs or own
            check_schedule(p.schedule, p.weight_at)
            _check_layers(pairs["student"], pairs["teacher"], self._params[p.name])
            together |= dict.fromkeys(zip(pairs["student"], pairs["teacher"], strict=True))
        self.student, self.teacher = ([pair[side] for pair in together] for side in (0, 1))
        if student and all(not is_own(p.loss) and "fm_s" not in self._params[p.name] for p in self.parts):
            warnings.warn(
                f"{', '.join(p.name for p in self.parts)} reads no layers: those given are not used", stacklevel=2
            )

    @property
    def takes_adapters(self) -> bool:
        "Does a part compare features of equal shapes?"
        return bool(self._adapts)

    @property
    def part_names(self) -> list[str]:
        "Of a combined loss."
        return [p.name for p in self.parts] if self._is_combined else []

    @property
    def modules(self) -> list[nn.Module]:
        "Losses that are modules."
        return [f for p in self.parts if isinstance(f := function_of(p.loss), nn.Module)]

    def to_device_of(self, student: nn.Module) -> None:
        "Losses that are modules; the learner has moved the student to its device."
        param = next(student.parameters(), None)
        for module in self.modules:
            if param is not None:
                module.to(param.device)

    def any(self, name: str) -> bool:
        "Has a part this trait?"
        return any(trait(p.loss, name) for p in self.parts)

    def names(self, output: str) -> bool:
        "Has a part this output in its signature?"
        return any(output in params for params in self._params.values())

    def warn_of_independent_classes(
        self,
        loss_func: Any,  # the task loss
    ) -> None:
        "Where a part compares one distribution over all classes."
        names = [p.name for p in self.parts if trait(p.loss, "over_classes")]
        if names and has_independent_classes(loss_func):
            warnings.warn(
                f"the task loss {name_of(loss_func)} is of independent classes, of which several or none may be "
                f"true, but {', '.join(names)} compares one distribution over all classes: use MultiLabel",
                stacklevel=2,
            )

    def reads_whole_outputs(
        self,
        pred: Any,  # of the student
    ) -> bool:
        "Does a part read more of what the teacher's model returns than its predictions?"
        return any(_reads_whole(p, pred) for p in self.parts)

    def evaluate(
        self,
        pred: Any,  # what the student returned
        out: Any,  # the `TeacherOutput`
        fm_s: dict[str, Tensor],  # the student's features
        y: Any,  # the target; None: there are no labels
        mix: MixHandler | None,  # MixUp or CutMix, if it mixes the task loss of this batch
        pct: float,  # share of the training done
        align: Align | None = None,  # None: there are no features
        adapt: Adapt | None = None,
        class_dim: int = 1,  # where the predictions have their classes
        labeled: int | None = None,  # how many samples, the first ones, have labels; None: all
    ) -> dict[str, Tensor]:
        """The values by name. A part whose weight is 0 by now has none.

        The first batch computes all parts nevertheless, so that mistakes show. Parts that need labels see the samples
        that have some.
        """
        y, values = plain(y), {}
        for p in self.parts:
            weight = p.weight_at(pct)
            if not weight and self._checked:
                continue
            outputs = _predictions(p, pred, out) | p.select(fm_s, out.features)
            if labeled is not None and trait(p.loss, "needs_labels"):
                if not labeled:
                    continue
                outputs = map_tensors(lambda x: x[:labeled], outputs)
            value = self._value(p, *_arranged(p, outputs, y, class_dim, mix), mix, align, adapt)
            if weight:
                values[p.name] = weight * value
        self._checked = True
        return values

    def _value(
        self,
        part: Part,
        outputs: dict[str, Any],
        y: Any,
        mix: MixHandler | None,
        align: Align | None,
        adapt: Adapt | None,
    ) -> Tensor:
        adapts = adapt is not None and part.name in self._adapts
        if align is not None and (adapts or trait(part.loss, "compares_positions")):
            outputs |= align(outputs["fm_s"], outputs["fm_t"], part.name in self._adapts)
        if adapt is not None and adapts:
            outputs |= adapt(outputs["fm_s"], outputs["fm_t"])
        if mix is None or not (trait(part.loss, "needs_labels") or ignores_labels(part.loss)):
            value = self._call(part, outputs, adapt, target=y)
        else:  # the loss on two labels, mixed: of each sample where it can tell, else of the batch
            each = {"reduction": "none"} if trait(part.loss, "reduction") else {}
            value, value1 = (self._call(part, outputs, adapt, target=t, **each) for t in (y, plain(detuplify(mix.yb1))))
            value = torch.lerp(value1, value, mix.lam.to(value.dtype)).mean()
        if not isinstance(value, Tensor) or value.ndim:
            got = f"one of shape {shape_of(value)}: take its mean" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"the distillation loss must return a scalar tensor, got {got}")
        return value

    def _call(self, part: Part, outputs: dict[str, Any], adapt: Adapt | None, **kwargs: Any) -> Any:
        "The loss; torch's errors say nothing of layers and shapes, so they are added."
        try:
            return part.loss(**outputs, **kwargs)
        except RuntimeError as e:
            if type(e) is not RuntimeError:  # out of memory, not implemented
                raise
            raise RuntimeError(f"{part.name}: {e}. {self._what_it_got(part, outputs, adapt, str(e))}") from e

    def _what_it_got(self, part: Part, outputs: dict[str, Any], adapt: Adapt | None, error: str) -> str:
        shapes = [f"{name} {shape_of(x)}" for name, x in outputs.items() if isinstance(x, Tensor)]
        hint = ""
        for (name_s, s), (name_t, t) in zip(outputs["fm_s"].items(), outputs["fm_t"].items(), strict=True):
            shapes.append(f"student layer {name_s!r} {shape_of(s)} and teacher layer {name_t!r} {shape_of(t)}")
            if s.shape != t.shape and part.name in self._adapts and adapt is None:
                hint = ". The callback's adapter='auto' brings layers to one shape"
        if "out of bounds" in error and "ignore_index" in self._params[part.name]:
            hint = ". Labels must be classes; void ones are left out with ignore_index"
        return f"It got {', '.join(shapes)}{hint}"


def _reads_whole(part: Part, pred: Any) -> bool:
    "A loss of one's own gets the teacher's outputs as they are where the student has several too."
    return isinstance(part.loss, SelectedLoss) or (is_own(part.loss) and not isinstance(pred, Tensor))


def _predictions(part: Part, pred: Any, out: Any) -> dict[str, Any]:
    "Of student and teacher, one tensor each unless the loss reads whole outputs."
    if _reads_whole(part, pred):
        return {"pred": plain(pred), "teacher_pred": out.pred if isinstance(out.output, Tensor) else plain(out.output)}
    if not trait(part.loss, "reads_predictions"):
        return {"pred": plain(pred), "teacher_pred": None}
    return {"pred": plain(predictions(pred, "the student")), "teacher_pred": out.pred}


def _arranged(
    part: Part, outputs: dict[str, Any], y: Any, class_dim: int, mix: MixHandler | None
) -> tuple[dict[str, Any], Any]:
    "With the classes in dim 1 for a loss over classes: as rows, which is faster; mixed samples must stay together."
    if y is None and ignores_labels(part.loss):
        y = torch.empty(0)  # no sample has a label to ignore
    if class_dim == 1 or not (trait(part.loss, "over_classes") or ignores_labels(part.loss)):
        return outputs, y
    arrange = partial(classes_first, dim=class_dim) if mix is not None else as_rows
    labels = y.flatten() if mix is None and isinstance(y, Tensor) else y
    return outputs | {who: arrange(outputs.get(who)) for who in ("pred", "teacher_pred")}, labels


def mix_of(learn: Learner) -> MixHandler | None:
    "MixUp or CutMix, while it mixes the task loss."
    mix = getattr(learn.loss_func, "__self__", None)
    return mix if isinstance(mix, MixHandler) else None


def _check_layers(student: Sequence[str], teacher: Sequence[str], loss_params: dict[str, bool]) -> None:
    "Pairs of names, present if the loss needs them."
    if not all(isinstance(name, str) for name in (*student, *teacher)):
        raise TypeError(f"layers are given by name, as in get_model_layers(model), got {student} and {teacher}")
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
