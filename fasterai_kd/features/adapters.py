"Modules that bring the student's features to the shape of the teacher's, trained along with the student."

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._modules import unwrap
from .._tensors import shape_of

__all__ = ["Adapters"]

Features = Mapping[str, Tensor]
Adapt = Callable[[Features, Features], dict[str, dict[str, Tensor]]]


class Adapters:
    """`of(student, teacher)` gives a function that brings the pairs of features of one batch to equal shapes.

    A pair of unequal channels gets a module at its first batch and keeps it as long as student and teacher are the
    same two.
    """

    def __init__(
        self,
        make: Any = None,  # None: never; "auto", or a function (student channels, teacher channels) → module
    ):
        if make not in (None, "auto") and (isinstance(make, nn.Module) or not callable(make)):
            raise TypeError(
                f"adapter must be 'auto' or a function (student channels, teacher channels) → module, got {make!r}"
            )
        self.make = make
        self.modules = nn.ModuleDict()  # by pair of layers
        self._whose: tuple[Any, ...] = ()  # weak references to student and teacher
        self._before_trial: list[str] | None = None

    def begin_fit(self, trial: bool) -> None:
        "Modules that a trial makes, as lr_find is one, do not outlive it."
        self.end_fit()
        self._before_trial = list(self.modules) if trial else None

    def end_fit(self) -> None:
        "Drop what a trial made, and what a student that diverged has left."
        kept, self._before_trial = self._before_trial, None
        for key in list(self.modules):
            if kept is not None and key not in kept:
                del self.modules[key]
        if not all(torch.isfinite(x).all() for x in self.modules.state_dict().values()):
            self.modules = nn.ModuleDict()

    def of(self, student: nn.Module, teacher: nn.Module) -> Adapt | None:
        "For one batch; a pair that several losses compare is adapted once."
        if self.make is None:
            return None
        if [r() for r in self._whose] != [unwrap(student), teacher]:
            self._whose, self.modules = (ref(unwrap(student)), ref(teacher)), nn.ModuleDict()
        return partial(self._adapt, student, {})

    def __reduce__(self) -> tuple[Any, ...]:
        "Copies and files have none yet."
        return Adapters, (self.make,)

    def _adapt(
        self, student: nn.Module, done: dict[str, tuple[Tensor, Tensor]], fm_s: Features, fm_t: Features
    ) -> dict[str, dict[str, Tensor]]:
        keys = []
        for (name_s, s), (name_t, t) in zip(fm_s.items(), fm_t.items(), strict=True):
            name_s, name_t = name_s.split("#")[0], name_t.split("#")[0]
            keys.append(f"{name_s}->{name_t}".replace(".", "/"))
            if keys[-1] not in done:
                self._check(f"student layer {name_s!r} and teacher layer {name_t!r}", s, t)
                done[keys[-1]] = self._pair(student, keys[-1], s, t)
        sides = (dict(zip(fm, (done[k][i] for k in keys), strict=True)) for i, fm in enumerate((fm_s, fm_t)))
        return dict(zip(("fm_s", "fm_t"), sides, strict=True))

    def _check(self, names: str, s: Tensor, t: Tensor) -> None:
        fit = s.ndim == t.ndim and s.ndim in (2, 3, 4) and (s.ndim != 3 or s.shape[1] == t.shape[1])
        if self.make == "auto" and s.shape != t.shape and not fit:
            raise ValueError(
                "adapter='auto' is for features (B, C), (B, C, H, W), or (B, tokens, C) with as many tokens, but "
                f"{names} give {shape_of(s)} and {shape_of(t)}: pair other layers; a loss of your own that compares "
                "unequal shapes declares it by `loss.same_shape = False`"
            )

    def _pair(self, student: nn.Module, key: str, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if s.ndim == t.ndim == 4:
            size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
            s, t = (f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (s, t))
        c_s, c_t = (f.shape[2 if f.ndim == 3 else 1] for f in (s, t))
        if c_s == c_t:
            return s, t
        if key not in self.modules:
            self.modules[key] = self._new(c_s, c_t, s, student)
        several = s.numel() > c_s  # BatchNorm has no statistics of a single sample
        return self.modules[key].train(unwrap(student).training and several)(s), t

    def _new(self, c_s: int, c_t: int, s: Tensor, student: nn.Module) -> nn.Module:
        with torch.random.fork_rng([s.device] if s.is_cuda else []):  # the student's random numbers stay its own
            module = _auto(c_s, c_t, s.ndim) if self.make == "auto" else self.make(c_s, c_t)
        if not isinstance(module, nn.Module):
            raise TypeError(f"adapter({c_s}, {c_t}) must return an nn.Module, got {module!r}")
        module = module.to(s.device, s.dtype)
        if isinstance(student, DistributedDataParallel):
            for x in module.state_dict().values():
                dist.broadcast(x, dist.get_global_rank(student.process_group, 0), student.process_group)
        return module


def _auto(c_s: int, c_t: int, ndim: int) -> nn.Module:
    if ndim == 4:
        return nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t))
    return nn.Sequential(nn.Linear(c_s, c_t, bias=False), nn.BatchNorm1d(c_t) if ndim == 2 else nn.LayerNorm(c_t))
