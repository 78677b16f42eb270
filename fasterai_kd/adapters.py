"Modules that bring the student's features to the shape of the teacher's, trained along with the student."

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.torch_core import norm_bias_params
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ._tensors import shape_of, unwrap

__all__ = ["Adapters"]

Features = Mapping[str, Tensor]
Adapt = Callable[[Features, Features], dict[str, dict[str, Tensor]]]


@dataclass
class _Trained:
    "Adapters and what the optimizer knows of them."

    whose: tuple[ReferenceType[nn.Module], ...] = ()  # student and teacher
    modules: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    opt: ReferenceType[Any] | None = None  # optimizer of the states
    states: list[dict[Tensor, Any]] = field(default_factory=list)  # as `_states`
    beside: Any = None  # what the optimizer kept of a parameter of the student meanwhile


class Adapters:
    """`of(student, teacher)` gives a function that brings the pairs of features of one batch to equal shapes.

    A pair of unequal channels gets a module at its first batch and keeps it as long as student and teacher are the
    same two. A module's parameters are in the last group of the learner's optimizer, which trains also when the others
    are frozen, but only from `join` to `leave`, for the step itself: groups of their own would not fit to rates,
    schedules and files made for the student's, and what is saved between two steps is the student's alone.
    """

    def __init__(
        self,
        make: Any = None,  # None: never; "auto", or a function (student channels, teacher channels) → module
    ):
        if make not in (None, "auto") and (isinstance(make, nn.Module) or not callable(make)):
            raise TypeError(
                f"adapter must be 'auto' or a function (student channels, teacher channels) → module: {make!r}"
            )
        self.make = make
        self._trained = _Trained()
        self._aside: _Trained | None = None
        self._joined: Any = None  # the optimizer that the parameters are in

    @property
    def modules(self) -> nn.ModuleDict:
        "By pair of layers."
        return self._trained.modules

    def begin_fit(self, trial: bool) -> None:
        "A trial, as lr_find is, trains copies."
        self.end_fit()
        if trial:
            self._trained, self._aside = deepcopy(self._trained), self._trained

    def end_fit(self) -> None:
        "Back to what was before a trial, and away with what a student that diverged has left."
        self.leave()
        if self._aside is not None:
            self._trained, self._aside = self._aside, None
        if not all(torch.isfinite(x).all() for x in self.modules.state_dict().values()):
            self._trained = _Trained()

    def of(self, student: nn.Module, teacher: nn.Module) -> Adapt | None:
        "For one batch; a pair that several losses compare is adapted once."
        if self.make is None:
            return None
        if [r() for r in self._trained.whose] != [unwrap(student), teacher]:
            self._trained = _Trained((ref(unwrap(student)), ref(teacher)))
        return partial(self._adapt, student, {})

    def join(self, learn: Learner) -> None:
        "Into the optimizer, for one step, with gradients averaged over all processes."
        if not len(self.modules):
            return
        if hasattr(learn, "non_native_mixed_precision"):
            raise ValueError("adapters do not work with NonNativeMixedPrecision: use learn.to_fp16()")
        self._average(learn.model)
        known, opt, params = self._trained, learn.opt, list(self.modules.parameters())
        if known.opt is None or known.opt() is not opt or known.beside is not _beside(opt):
            known.opt, known.states = ref(opt), []  # new or, as `freeze` does it, cleared
        no_wd = set() if learn.wd_bn_bias else set(norm_bias_params(self.modules))
        for state, kept in zip_longest(_states(opt), known.states):  # there are as many, or none kept
            for p in params:
                state.setdefault(p, (kept or {}).get(p, {"do_wd": False} if p in no_wd else {}))
            no_wd = set()  # torch's own optimizers know it not
        _list(opt).extend(params)
        self._joined = opt

    def leave(self, stepped: bool = False) -> None:
        "The optimizer is the student's again."
        if stepped:
            self.modules.zero_grad()
        if self._joined is None:
            return
        opt, self._joined = self._joined, None
        own = set(self.modules.parameters())
        items = _list(opt)
        items[:] = [p for p in items if p not in own]
        self._trained.states = [{p: state.pop(p) for p in own if p in state} for state in _states(opt)]
        self._trained.beside = _beside(opt)

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
                "unequal shapes says so by `loss.needs_equal_shapes = False`"
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
        return self.modules[key].train(unwrap(student).training)(s), t

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

    def _average(self, student: nn.Module) -> None:
        "Gradients and BatchNorm statistics, over the processes that train this student."
        if not isinstance(student, DistributedDataParallel):
            return
        averages = [b for b in self.modules.buffers() if b.is_floating_point()]
        for x in [*averages, *(p.grad for p in self.modules.parameters() if p.grad is not None)]:
            dist.all_reduce(x, group=student.process_group)
            x /= student.process_group.size()


def _auto(c_s: int, c_t: int, ndim: int) -> nn.Module:
    if ndim == 4:
        return nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t))
    return nn.Sequential(nn.Linear(c_s, c_t, bias=False), nn.BatchNorm1d(c_t) if ndim == 2 else nn.LayerNorm(c_t))


def _list(opt: Any) -> list[Tensor]:
    "Parameters of the last group, itself."
    last = opt.param_lists[-1]
    return getattr(last, "items", last)  # of a fastcore L


def _beside(opt: Any) -> Any:
    "What the optimizer keeps of the first parameter in that group: another object once the optimizer was cleared."
    *_, state = _states(opt)
    return next((state.get(p) for p in _list(opt)), None)


def _states(opt: Any) -> Iterator[dict[Tensor, Any]]:
    "By parameter: the optimizer's, and that of the one that it wraps."
    while opt is not None:
        yield opt.state
        opt = vars(opt).get("opt")
