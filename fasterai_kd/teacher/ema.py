"A teacher that is the average of the student itself."

import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from fastai.callback.hook import Hook
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._tensors import tensors
from .teacher import Teacher

__all__ = ["EMATeacher"]


class EMATeacher(Teacher):
    """The exponential moving average of the student, a "mean teacher": `EMATeacher()` in the place of a teacher.

    A fit starts with a copy of the student; after each step of the optimizer, weights and buffers of floating point
    (such as the statistics of BatchNorm, which would not fit the averaged weights otherwise) become `decay` · their own
    + (1 - `decay`) · the student's. Other buffers are the student's. Layers have the student's names. `kd.teacher` is
    the averaged model, also after the fit: `learn.model.load_state_dict(kd.teacher.state_dict())`. It has the hooks of
    the student that are methods of the model, or torch's own, such as a weight norm's; not those of callbacks.

    Each fit starts a new average, `fine_tune` two; after `lr_find` the average from before it is there again. With
    several processes each keeps its own average, of the same weights; statistics of BatchNorm agree with
    `sync_bn=True`, fastai's default.

    Raises ValueError for a `decay` outside 0 … 1.
    Source: Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017, eq. 1; the average is torch's.
    """

    is_fixed = False

    def __init__(
        self,
        decay: float = 0.999,  # of the average: it remembers about 1 / (1 - decay) steps
    ):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        self.decay = decay
        self._average: AveragedModel | None = None
        self._student: Any = None  # a weak reference
        self._before: tuple[Any, ...] | None = None  # in a trial: these three
        self._init_state()

    def begin_fit(self, student: nn.Module, views: int = 1, trial: bool = False) -> None:
        "Another student than before gets another average."
        self.end_fit()  # of a trial that Ctrl-C ended
        if trial:
            self._before = self._average, self.model, self._student
        if self._student is None or self._student() is not student:
            self._average = self.model = None

    def meet_data(self, dls: Any, compares_classes: bool) -> None:
        "It has the student's."

    def begin_epoch(self, training: bool) -> None:
        if self.model is not None:
            super().begin_epoch(training)

    def follow(self, student: nn.Module, anew: bool) -> None:
        same = self._student is not None and self._student() is student
        if same and not anew:
            return
        self._student = weakref.ref(student)
        self._average = AveragedModel(_copyable(student), multi_avg_fn=_multi_avg_fn(self.decay), use_buffers=True)
        self._average.n_averaged += 1  # torch's first average would be the student after its first step
        self.model = self._average.module.eval()
        self._init_state()

    def after_step(self) -> None:
        student = self._student and self._student()
        if student is not None and self._average is not None:
            self._average.update_parameters(student)

    def end_fit(self) -> None:
        "The average from before a trial is there again."
        if self._before is not None:
            (self._average, self.model, self._student), self._before = self._before, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "EMATeacher":
        "A copy of the callback has a student of its own."
        return EMATeacher(self.decay)

    def __reduce__(self) -> tuple[Any, ...]:
        "A file leaves the average out."
        return EMATeacher, (self.decay,)


_TORCH = ("torch.nn.utils.", "torch.ao.")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _copyable(student: nn.Module) -> nn.Module:
    """Itself, or a copy without the hooks of others.

    Where a student keeps tensors of its last batch, they are detached: torch copies none with a graph.
    """
    attributes = [v for m in student.modules() for v in (m, *vars(m).values())]
    kept = tensors([*attributes, *(v.stored for v in attributes if isinstance(v, Hook))])
    memo: dict[int, Any] = {id(x): x.detach() for x in kept if not x.is_leaf}
    own = set(map(id, attributes))
    memo |= {id(hook): _no_hook for hooks in _hooks(student) for hook in hooks.values() if not _is_own(hook, own)}
    if not memo:
        return student
    copy = deepcopy(student, memo)
    for hooks in _hooks(copy):
        for key in [key for key, hook in hooks.items() if hook is _no_hook]:
            del hooks[key]
    return copy


def _hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    "By number, of each module."
    return (getattr(m, name) for m in model.modules() for name in _HOOKS)


def _is_own(
    hook: Any,
    own: set[int],  # modules, and what they hold, such as the hooks of a unet
) -> bool:
    "Does it belong to the model: its method, or torch's own, as of a weight norm, of pruning or an observer?"
    hook = hook.func if isinstance(hook, partial) else hook
    holder = getattr(hook, "__self__", hook)
    sources = [getattr(hook, "__module__", ""), *(c.__module__ for c in type(holder).__mro__)]
    return id(holder) in own or any(source.startswith(_TORCH) for source in sources)


def _no_hook(*args: Any) -> None:
    "In the place of a hook that is not copied."


def _multi_avg_fn(decay: float) -> Any:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(own: Sequence[Tensor], students: Sequence[Tensor], n: Any) -> None:
        if own[0].is_floating_point() or own[0].is_complex():
            average(list(own), list(students), n)
        else:  # counts and indices: an average of 5 and 5 may come to 4
            for a, b in zip(own, students, strict=True):
                a.copy_(b)

    return update
