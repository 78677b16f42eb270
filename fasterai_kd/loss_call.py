"How the callback calls the distillation loss, whole or in parts."

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner
from fastcore.basics import detuplify
from torch import Tensor, nn

from ._arguments import check_layers, check_schedule, loss_parameters, needs_equal_shapes, reads_predictions
from ._classes import as_rows, classes_first
from ._tensors import plain, shape_of
from .adapters import Adapt
from .losses import DIST, DecoupledKD, Mutual, SoftTarget
from .losses.combine import Part, function_of, parts_of

__all__ = ["LossCall", "mix_of"]

OVER_CLASSES = (SoftTarget, DecoupledKD, Mutual, DIST)  # those in dim 1


class LossCall:
    """`loss_call(outputs, y, mix, pct)`: the values of the parts by name, weighted, in float32 and outside autocast.

    Parts whose weight is 0 by now have none; the first batch computes them nevertheless, so that mistakes show.
    `student` and `teacher` are all layers that the parts compare, in pairs.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        student: Sequence[str],  # layers for parts that name none
        teacher: Sequence[str],
    ):
        own = {"student": list(student), "teacher": list(teacher)}
        self.parts = [replace(p, pairs=own if p.pairs is None else p.pairs) for p in parts_of(loss)]
        self._params = {p.name: loss_parameters(p.loss) for p in self.parts}
        self._adapts = {p.name for p in self.parts if needs_equal_shapes(p.loss)}
        self._checked = False
        together: dict[tuple[str, str], None] = {}
        for p in self.parts:
            pairs = p.pairs or own
            check_schedule(p.schedule)
            check_layers(pairs["student"], pairs["teacher"], self._params[p.name])
            together |= dict.fromkeys(zip(pairs["student"], pairs["teacher"], strict=True))
        self.student, self.teacher = ([pair[side] for pair in together] for side in (0, 1))

    @property
    def reads_predictions(self) -> bool:
        "The teacher's."
        return any(reads_predictions(p.loss) for p in self.parts)

    def names(self, output: str) -> bool:
        "Does a part have this output in its signature?"
        return any(output in params for params in self._params.values())

    def to(self, device: torch.device) -> None:
        "Losses that are modules."
        for p in self.parts:
            if isinstance(p.loss, nn.Module):
                p.loss.to(device)

    def __call__(
        self,
        outputs: dict[str, Any],  # pred, teacher_pred, fm_s and fm_t
        y: Any,  # the target
        mix: MixHandler | None,  # MixUp or CutMix, if it mixes the task loss of this batch
        pct: float,  # share of the training done
        adapt: Adapt | None = None,  # brings features to equal shapes
        dim: int = 1,  # where the predictions have their classes
    ) -> dict[str, Tensor]:
        outputs = {name: x if isinstance(x, dict) else plain(x) for name, x in outputs.items()}
        y, over_classes, labels = plain(y), outputs, plain(y)
        if dim != 1:  # as rows, which is faster; mixed samples must stay together
            arrange = partial(classes_first, dim=dim) if mix is not None else as_rows
            over_classes = outputs | {who: arrange(outputs.get(who)) for who in ("pred", "teacher_pred")}
            labels = y if mix is not None else y.flatten()
        values = {}
        for p in self.parts:
            weight = p.weight_at(pct)
            if weight or not self._checked:
                given = (over_classes, labels) if function_of(p.loss) in OVER_CLASSES else (outputs, y)
                value = self._value(p, *given, mix, adapt)
            if weight:
                values[p.name] = weight * value
        self._checked = True
        return values

    def _value(
        self, part: Part, outputs: dict[str, Any], y: Any, mix: MixHandler | None, adapt: Adapt | None
    ) -> Tensor:
        outputs = outputs | part.select(outputs["fm_s"], outputs["fm_t"])
        if adapt is not None and part.name in self._adapts:
            outputs |= adapt(outputs["fm_s"], outputs["fm_t"])
        if mix is None or "target" not in self._params[part.name]:
            value = self._call(part, outputs, adapt, target=y)
        else:  # the loss on two labels, mixed: of each sample where we know how, else of the batch
            each = {"reduction": "none"} if function_of(part.loss) is DecoupledKD else {}
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
            shapes = [f"{name} {shape_of(x)}" for name, x in outputs.items() if isinstance(x, Tensor)]
            hint = ""
            for (name_s, s), (name_t, t) in zip(outputs["fm_s"].items(), outputs["fm_t"].items(), strict=True):
                shapes.append(f"student layer {name_s!r} {shape_of(s)} and teacher layer {name_t!r} {shape_of(t)}")
                if s.shape != t.shape and part.name in self._adapts and adapt is None:
                    hint = ". The callback's adapter='auto' brings layers to one shape"
            if "out of bounds" in str(e) and function_of(part.loss) is DecoupledKD:
                hint = ". Labels must be classes; void ones are left out with ignore_index"
            raise RuntimeError(f"{part.name}: {e}. It got {', '.join(shapes)}{hint}") from e


def mix_of(learn: Learner) -> MixHandler | None:
    "MixUp or CutMix, while it mixes the task loss."
    mix = getattr(learn.loss_func, "__self__", None)
    return mix if isinstance(mix, MixHandler) else None
