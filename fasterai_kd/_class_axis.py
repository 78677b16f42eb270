"Where the predictions have their classes, and the labels that go with them."

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["as_rows", "class_dim", "classes_first", "has_independent_classes", "index_labels", "is_of_numbers"]

_INDEPENDENT = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_INDEPENDENT_FUNCTIONS = (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)
_OF_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_OF_NUMBERS_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


def class_dim(
    pred: Any,
    y: Any,
    loss_func: Callable[..., Any] | None = None,  # the task loss: fastai's know their axis
    otherwise: int = 1,  # where both would fit: as in the last batch
) -> int:
    "1, or the last where labels (B, T) go with predictions (B, T, C), as of language models."
    if y is None and isinstance(pred, Tensor) and pred.ndim == 3:  # the task loss tells what labels would
        return getattr(_without_mix(loss_func), "axis", 1) % 3
    if not isinstance(pred, Tensor) or not isinstance(y, Tensor) or y.is_floating_point() or pred.ndim < 3:
        return 1
    last, first = y.shape == pred.shape[:-1], y.shape == pred.shape[:1] + pred.shape[2:]
    if last and first:
        return getattr(_without_mix(loss_func), "axis", otherwise) % pred.ndim
    return pred.ndim - 1 if last else 1


def classes_first(
    x: Any,  # predictions
    dim: int,  # of the classes
) -> Any:
    "With the classes in dim 1."
    return x.movedim(dim, 1) if dim != 1 and isinstance(x, Tensor) and x.ndim > dim else x


def has_independent_classes(
    loss_func: Any,  # the task loss
) -> bool:
    "Is each class a yes or no of its own, as for BCEWithLogitsLoss?"
    return _is_of(loss_func, _INDEPENDENT, _INDEPENDENT_FUNCTIONS)


def is_of_numbers(
    loss_func: Any,  # the task loss
) -> bool:
    "Is it of a regression?"
    return _is_of(loss_func, _OF_NUMBERS, _OF_NUMBERS_FUNCTIONS)


def _is_of(loss_func: Any, kinds: tuple[type, ...], functions: tuple[Any, ...]) -> bool:
    "Also where fastai has flattened it, or `partial` has set arguments."
    loss_func = _without_mix(loss_func)
    own = getattr(loss_func, "func", loss_func)
    return isinstance(own, kinds) or own in functions


def _without_mix(loss_func: Any) -> Any:
    "The task loss inside MixUp or CutMix."
    return getattr(getattr(loss_func, "__self__", None), "old_lf", loss_func)


def as_rows(
    x: Any,  # predictions (..., C)
) -> Any:
    "(N, C): each position a sample."
    return x.flatten(0, -2) if isinstance(x, Tensor) else x


def index_labels(y: Any, pred: Tensor) -> Any:
    "Class indices without the dimension of size 1 that tabular data and masks have: (B, 1, ...) → (B, ...)."
    indices = isinstance(y, Tensor) and not y.is_floating_point()
    return y.squeeze(1) if indices and y.ndim == pred.ndim > 1 and y.shape[1] == 1 < pred.shape[1] else y
