"What a teacher gives for a batch."

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tensors import plain, predictions, tensors

__all__ = ["TeacherOutput", "warn_of_probabilities"]


class TeacherOutput(NamedTuple):
    "What a teacher gives for a batch."

    output: Any  # what its model returned; from a cache the predictions in it
    features: dict[str, Tensor]  # by layer
    pixels: tuple[int, int] | None = None  # height and width of the images that it got
    columns: Sequence[int] | None = None  # of the predictions, the student's classes; None: all
    class_dim: int = 1  # of the predictions

    @property
    def pred(self) -> Tensor:
        "The predictions for the student's classes, one tensor in float32."
        pred: Tensor = plain(predictions(self.output))
        if self.columns is None:
            return pred
        has = pred.shape[self.class_dim] if pred.ndim > self.class_dim else 1
        if max(self.columns) >= has:
            raise ValueError(
                f"the teacher gives {has} output{'s' * (has > 1)}, in which the student's classes cannot be picked by "
                f"name (columns {', '.join(map(str, self.columns[:10]))}): teacher and student have their classes in "
                "another order, or not the same ones. Make the student's dataloaders with the teacher's vocab, e.g. "
                "CategoryBlock(vocab=teacher.dls.vocab, sort=False)"
            )
        return pred.index_select(self.class_dim, torch.tensor(self.columns, device=pred.device))

    def fault(self) -> str | None:
        "Which part has nan or inf?"
        outputs = [*self.features.items(), *(("predictions", x) for x in tensors(self.output))]
        return next((name for name, x in outputs if not torch.isfinite(x).all()), None)


def warn_of_probabilities(output: Any) -> None:
    "Losses take logits: a softmax of probabilities is nearly flat."
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2 or not output.is_floating_point():
        return
    if bool((output >= 0).all() & ((output.float().sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the teacher's predictions are probabilities: they are positive and sum to 1. Losses take logits: give the "
            "model without its softmax, or predictions.log() by a Teacher of your own",
            stacklevel=2,
        )
