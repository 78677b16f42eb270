"Augmentation that repeats itself after a few epochs, so that a teacher's stored outputs can be used."

import random
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback

__all__ = ["RepeatedViews"]


class RepeatedViews(Callback):
    """Draws order and augmentation of epoch e from the seed of epoch e mod `k`: `cbs=[kd, RepeatedViews(2)]`.

    A teacher's cache then hits from epoch `k` on, although images are augmented: each image has `k` views. Item and
    batch transforms, workers and MixUp draw from these seeds. The model does not: its dropout differs in each epoch.

    Raises ValueError for fewer than one view.
    """

    order = 95  # after MixUp has drawn
    run_valid = False

    def __init__(
        self,
        k: int = 2,  # views of each image
        seed: int = 0,  # of the first view
    ):
        if k < 1:
            raise ValueError(f"RepeatedViews needs one view or more, got {k}")
        self.k, self.seed = k, seed
        self._others: tuple[Any, ...] = ()  # states that are not in use: the model's or the views'
        self._draws_views = False

    def before_train(self) -> None:
        "From here on the loader draws the views of this epoch."
        seed = self.seed + self.epoch % self.k
        self._others, self._draws_views = _states(), True
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        loader: Any = getattr(self.dl, "dl", self.dl)  # inside fastai's DistributedDL
        if hasattr(loader, "rng"):
            loader.rng = random.Random(seed)
        generator = getattr(loader, "generator", None)
        if generator is not None:
            generator.manual_seed(seed)

    def before_batch(self) -> None:
        "The batch is drawn: back to the model's random numbers."
        self._swap(draws_views=False)

    def after_batch(self) -> None:
        "The next batch is to be drawn."
        self._swap(draws_views=True)

    def after_train(self) -> None:
        "What follows draws what it would have drawn."
        self._swap(draws_views=False)

    def _swap(self, draws_views: bool) -> None:
        if self._draws_views != draws_views:
            states, self._others, self._draws_views = self._others, _states(), draws_views
            _restore(states)


def _states() -> tuple[Any, ...]:
    on_cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_cuda


def _restore(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
