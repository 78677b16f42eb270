"Augmentation that repeats itself after a few epochs, so that a teacher's stored outputs can be used."

import random
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner

__all__ = ["OwnDraws", "RepeatedViews", "views_of"]


class RepeatedViews(Callback):
    """Draws order and augmentation of epoch e from the seed of epoch e mod `k`: `cbs=[kd, RepeatedViews(2)]`.

    A teacher's cache then hits from epoch `k` on, although images are augmented: each image has `k` views. Item and
    batch transforms, workers and MixUp draw from these seeds. The model does not: its dropout differs in each epoch.
    Unlabeled inputs repeat too: each epoch starts their loader again, so of many the student sees those of `k` epochs.

    Raises ValueError for fewer than one view.
    """

    order = 95  # after MixUp has drawn
    run_valid = False
    _draws: "OwnDraws | None" = None
    _stateattrs = ("_draws",)  # a file leaves it out

    def __init__(
        self,
        k: int = 2,  # views of each image
        seed: int = 0,  # of the first view
    ):
        if k < 1:
            raise ValueError(f"RepeatedViews needs one view or more, got {k}")
        self.k, self.seed = k, seed

    def before_fit(self) -> None:
        "What Ctrl-C left behind."
        self._switch(draws=False)

    def before_train(self) -> None:
        "From here on the loader draws the views of this epoch."
        self._draws = OwnDraws(self.dl, self.seed_at(self.epoch))

    def before_batch(self) -> None:
        "The batch is drawn: back to the model's random numbers."
        self._switch(draws=False)

    def after_batch(self) -> None:
        "The next batch is to be drawn."
        self._switch(draws=True)

    def after_train(self) -> None:
        "What follows draws what it would have drawn."
        self._switch(draws=False)

    def after_fit(self) -> None:
        "Also after a CancelFitException between two batches."
        self._switch(draws=False)

    def seed_at(self, epoch: int) -> int:
        "The seed of the views of an epoch."
        return self.seed + epoch % self.k

    def _switch(self, draws: bool) -> None:
        if self._draws is not None:
            self._draws.switch(draws)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:  # the end of a fit with `cbs=RepeatedViews()`, whatever ended it
            self._switch(draws=False)
            self._draws = None
        super().__setattr__(name, value)


def views_of(learn: Learner) -> RepeatedViews | None:
    "Of the learner's callbacks, the one that repeats views."
    return next((cb for cb in learn.cbs if isinstance(cb, RepeatedViews)), None)


class OwnDraws:
    "Random states that are in use while a loader draws, at first those of `seed`; then `switch` puts the others back."

    def __init__(self, loader: Any, seed: int):
        self._loader: Any = getattr(loader, "dl", loader)  # inside fastai's DistributedDL
        self._generator: Any = getattr(self._loader, "generator", None)
        self._others, self._draws = self._states(), True  # states that are not in use
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        if hasattr(self._loader, "rng"):
            self._loader.rng = random.Random(seed)
        if self._generator is not None:
            self._generator.manual_seed(seed)

    def switch(self, draws: bool) -> None:
        "Does the loader draw from here on?"
        if self._draws != draws:
            states, self._others, self._draws = self._others, self._states(), draws
            self._restore(*states)

    def _states(self) -> tuple[Any, ...]:
        on_cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        generator = None if self._generator is None else self._generator.get_state()
        rng = getattr(self._loader, "rng", None)
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_cuda, rng, generator

    def _restore(self, python: Any, numpy: Any, cpu: Any, cuda: Any, rng: Any, generator: Any) -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        if rng is not None:
            self._loader.rng = rng
        if generator is not None:
            self._generator.set_state(generator)
