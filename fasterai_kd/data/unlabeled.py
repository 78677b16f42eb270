"Inputs without labels, which the student sees beside the labeled ones."

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import length_hint
from typing import Any, NamedTuple

import torch
from fastai.data.core import DataLoaders, test_set
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import num_distrib, rank_distrib, to_device
from torch import Tensor
from torch.utils.data import DataLoader as TorchDataLoader

from .._tensors import device_of, join, predictions, size_of, tensors
from .views import OwnDraws, RepeatedViews, views_of

__all__ = [
    "UnlabeledInputs",
    "mean_by_size",
    "no_task_loss",
    "placeholder",
    "student_batches",
]


NO_BATCH = "the unlabeled DataLoader gives no batch: has it fewer items than its batch size, and drop_last?"


class UnlabeledInputs:
    """Draws batches of inputs, anew when they are exhausted; each of several processes draws its own share.

    Raises TypeError for what is neither a DataLoader nor a list of items, ValueError where there are none, or where the
    learner's dataloaders cannot load items.
    """

    def __init__(
        self,
        source: Any,  # DataLoader of fastai or torch, whose labels are ignored, or a list of items such as paths
    ):
        if isinstance(source, DataLoaders):
            source = source.train
        is_loader = isinstance(source, (DataLoader, TorchDataLoader))
        if not is_loader and (isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Sequence)):
            raise TypeError(f"unlabeled must be a DataLoader or a list of items, got a {type(source).__name__}")
        if not length_hint(source, 1):  # a stream has no length
            raise ValueError(NO_BATCH if is_loader else "unlabeled has no items")
        self._source, self._is_loader = source, is_loader
        self._loader: Any = None
        self._batches: Iterator[Any] = iter(())
        self._views: RepeatedViews | None = None  # of the learner
        self._draws: OwnDraws | None = None  # of this epoch, with them
        self._epoch = 0

    def begin_fit(self, learn: Learner) -> None:
        "With the transforms of the learner's training data, if it was given items."
        self.end_fit()
        self._views = views_of(learn)
        self._n_inp = getattr(learn.dls, "n_inp", 1)
        self._loader = self._source if self._is_loader else _loader_of_items(self._source, learn.dls)

    def draw(self, xb: Sequence[Any]) -> tuple[Any, ...]:
        "Inputs of a batch, on the device of `xb`."
        with self._repeating():
            batch = next(self._batches, None)
            if batch is None:
                self._batches = self._begin()
                batch = next(self._batches, None)
        if batch is None:
            raise ValueError(NO_BATCH)
        inputs = (batch,) if isinstance(batch, (Tensor, Mapping)) else tuple(batch)[: self._n_inp]
        moved: tuple[Any, ...] = to_device(inputs, device_of(xb))
        return moved

    def end_fit(self) -> None:
        "Let the loader's workers go."
        self._batches, self._draws = iter(()), None

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnlabeledInputs":
        "A copy of the callback draws the same inputs in fits of its own."
        return UnlabeledInputs(self._source)

    def __reduce__(self) -> tuple[Any, ...]:
        "A callback that is saved leaves the data out."
        return _none, ()

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        "With RepeatedViews each epoch begins anew, and draws from states of its own: those of its seed."
        if self._views is None:
            yield
            return
        if self._draws is None or self._epoch != self._views.epoch:
            self._batches, self._epoch = iter(()), self._views.epoch
            self._draws = OwnDraws(self._loader, self._views.seed_at(self._epoch))
        self._draws.switch(True)
        try:
            yield
        finally:
            self._draws.switch(False)

    def _begin(self) -> Iterator[Any]:
        world = num_distrib() or 1
        batches = iter(self._loader)
        return islice(batches, rank_distrib(), None, world) if world > 1 and self._is_loader else batches


def _none() -> None:
    "What is loaded in its place."


def _loader_of_items(items: Sequence[Any], dls: Any) -> Any:
    "As the training data, without labels."
    train: Any = getattr(dls, "train", None)
    if not hasattr(train, "after_batch") or not hasattr(getattr(train, "dataset", None), "tls"):
        raise ValueError("a list of unlabeled items needs dataloaders made by fastai: give a DataLoader instead")
    world = num_distrib() or 1
    dataset = test_set(train.dataset, items[rank_distrib() :: world] if world > 1 else items)
    for tl in dataset.tls:  # random transforms as in training
        tl.tfms.split_idx = 0
    return train.new(dataset, shuffle=True, drop_last=len(dataset) >= train.bs)


class StudentBatch(NamedTuple):
    "What the student made of some inputs."

    xb: Any
    pred: Any
    features: dict[str, Tensor]
    labeled: int | None  # the first so many have labels; None: all

    def __len__(self) -> int:
        return size_of(self.xb)


def student_batches(
    learn: Learner,
    forward: Any,  # `StudentForward`, after the learner's own
    unlabeled: tuple[Any, ...],  # inputs drawn for this batch, or none
) -> list[StudentBatch]:
    "The learner's batch, joined to the unlabeled one; or both, where the unlabeled one needs a forward of its own."
    features, joined, output = forward.pop()
    own = StudentBatch(learn.xb, learn.pred, features, None)
    if not unlabeled:
        return [own]
    if joined is not None:
        return [StudentBatch(joined, join(learn.pred, _as(learn.pred, output)), features, len(own))]
    with forward.hooks.on(learn.model):
        output = learn.model(*unlabeled)
    return [own, StudentBatch(unlabeled, _as(learn.pred, output), forward.hooks.pop(), 0)]


def mean_by_size(batches: Sequence[StudentBatch], values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    "Of the losses by name; what labels are needed for is of the first batch alone."
    if len(batches) == 1:
        return values[0]
    n, m = map(len, batches)
    first, second = values
    return {name: (n * x + m * second[name]) / (n + m) if name in second else x for name, x in first.items()}


def _as(pred: Any, output: Any) -> Any:
    "The output in the form that callbacks have given the predictions."
    return predictions(output, "the student").to(pred.dtype) if isinstance(pred, Tensor) else output


def placeholder(xb: Sequence[Any]) -> Tensor:
    "A target for a batch without one, by which fastai takes a step: nan for each sample."
    x = next(tensors(xb))
    return torch.full((len(x),), torch.nan, device=x.device)


def no_task_loss(pred: Any, target: Tensor) -> Tensor:
    "0, where there are no labels."
    return target.new_zeros(())
