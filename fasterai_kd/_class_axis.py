"Where the predictions have their classes, and the labels that go with them."

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["as_rows", "class_dim", "classes_first", "index_labels"]


def class_dim(
    pred: Any,
    y: Any,
    loss_func: Callable[..., Any] | None = None,  # the task loss: fastai's know their axis
    otherwise: int = 1,  # where both would fit: as in the last batch
) -> int:
    "1, or the last where labels (B, T) go with predictions (B, T, C), as of language models."
    if not isinstance(pred, Tensor) or not isinstance(y, Tensor) or y.is_floating_point() or pred.ndim < 3:
        return 1
    last, first = y.shape == pred.shape[:-1], y.shape == pred.shape[:1] + pred.shape[2:]
    if last and first:
        loss_func = getattr(getattr(loss_func, "__self__", None), "old_lf", loss_func)  # inside MixUp or CutMix
        return getattr(loss_func, "axis", otherwise) % pred.ndim
    return pred.ndim - 1 if last else 1


def classes_first(
    x: Any,  # predictions
    dim: int,  # of the classes
) -> Any:
    "With the classes in dim 1."
    return x.movedim(dim, 1) if dim != 1 and isinstance(x, Tensor) and x.ndim > dim else x


def as_rows(
    x: Any,  # predictions (..., C)
) -> Any:
    "(N, C): each position a sample."
    return x.flatten(0, -2) if isinstance(x, Tensor) else x


def index_labels(y: Any, pred: Tensor) -> Any:
    "Class indices without the dimension of size 1 that tabular data and masks have: (B, 1, ...) → (B, ...)."
    indices = isinstance(y, Tensor) and not y.is_floating_point()
    return y.squeeze(1) if indices and y.ndim == pred.ndim > 1 and y.shape[1] == 1 < pred.shape[1] else y
