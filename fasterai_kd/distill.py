"One call for those who do not want to choose."

from collections.abc import Callable
from typing import Any

import torch
from fastai.learner import Learner
from fastai.torch_core import to_device
from fastcore.basics import listify, patch
from torch import Tensor, nn

from ._class_axis import class_dim, index_labels
from ._docs import describe_parameters
from ._modules import evaluating
from ._tensors import predictions, shape_of
from .distillation_callback import KnowledgeDistillationCallback
from .losses import Attention, Logits, SoftTarget
from .losses.matching import LayerPairs, match_feature_layers
from .teacher.teacher import Teacher, as_teacher

__all__ = ["distill"]

Choice = tuple[Callable[..., Tensor], dict[str, Any], str]  # loss, arguments of the callback, why


@patch  # type: ignore[untyped-decorator]
def distill(
    self: Learner,
    teacher: Any,  # model, Learner, path of an exported Learner, or a list of these
    epochs: int,  # of `fit_one_cycle`
    lr: float | None = None,  # highest learning rate; None: the Learner's own
    **kwargs: Any,  # for `fit_one_cycle`
) -> KnowledgeDistillationCallback:
    """`fit_one_cycle` with a teacher: picks the loss, its layers and its weight, and says which and why.

    `SoftTarget` where student and teacher predict the same classes, `Logits` where they predict the same numbers,
    `Attention` on the pairs of `match_feature_layers` where only their features can be compared; `weight="auto"`.

    Returns the callback, with its `history`. Raises ValueError where nothing can be compared.
    """
    teacher = as_teacher(teacher)
    loss, layers, why = _choose(self, teacher)
    print(f"distill with {loss.__name__}, since {why}")
    kd = KnowledgeDistillationCallback(teacher, loss, **layers, weight="auto")
    self.fit_one_cycle(epochs, lr, cbs=[kd, *listify(kwargs.pop("cbs", None))], **kwargs)
    return kd


describe_parameters(Learner.distill)


def _choose(learn: Learner, teacher: Teacher) -> Choice:
    if teacher.model is None:
        raise TypeError("an average of the student has yet to be made: give it to KnowledgeDistillationCallback")
    xb, y = _sample(learn)
    with torch.no_grad(), evaluating(learn.model):
        pred = predictions(learn.model(*xb), "the student")
    y = index_labels(y, pred)
    dim = class_dim(pred, y, learn.loss_func)
    teacher_pred = teacher.forward(xb, class_dim=dim).pred
    if pred.shape != teacher_pred.shape:
        pairs = _pairs(learn, teacher.model, xb, f"{shape_of(pred)} and {shape_of(teacher_pred)}")
        layers = {"activations_student": pairs["student"], "activations_teacher": pairs["teacher"]}
        return Attention, layers, f"their predictions differ, {shape_of(pred)} and {shape_of(teacher_pred)}:\n{pairs}"
    if _are_classes(pred, y):
        return SoftTarget, {}, f"both predict the same {pred.shape[dim]} classes"
    return Logits, {}, f"both predict the same numbers, {shape_of(pred)}"


def _are_classes(pred: Tensor, y: Any) -> bool:
    "Logits (B, C, ...) or (B, ..., C) and indices (B, ...)?"
    indices = isinstance(y, Tensor) and not y.is_floating_point() and y.ndim == pred.ndim - 1
    return indices and pred.ndim > 1 and pred.shape[class_dim(pred, y)] > 1


def _sample(learn: Learner) -> tuple[tuple[Any, ...], Any]:
    "A batch as the fit will see it, of the validation set if there is one: its order is not drawn."
    dls, n_valid = learn.dls, len(learn.dls.loaders) > 1 and len(learn.dls.valid)
    learn.model.to(getattr(dls, "device", None))  # which torch's DataLoaders do not have
    with torch.random.fork_rng([]):  # a loader draws a seed for its workers
        loader = dls.valid if n_valid else dls.train
        batch = loader.one_batch() if hasattr(loader, "one_batch") else next(iter(loader))
    batch = to_device(batch, next((p.device for p in learn.model.parameters()), None))
    n_inp = getattr(dls, "n_inp", max(1, len(batch) - 1))
    return batch[:n_inp], batch[n_inp] if len(batch) > n_inp else None


def _pairs(learn: Learner, teacher: nn.Module, xb: tuple[Any, ...], shapes: str) -> LayerPairs:
    try:
        return match_feature_layers(learn.model, teacher, xb)
    except ValueError as e:
        raise ValueError(
            f"there is nothing to compare: the predictions of student and teacher are {shapes}, and {e}. "
            "Give KnowledgeDistillationCallback a loss and layers"
        ) from None
