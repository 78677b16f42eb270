"A teacher that is the average of the student itself."

import weakref
from collections.abc import Sequence
from copy import deepcopy
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
    the averaged model, also after the fit: `learn.model.load_state_dict(kd.teacher.state_dict())`.

    Each fit starts a new average, `fine_tune` two. With several processes each keeps its own average, of the same
    weights; statistics of BatchNorm agree with `sync_bn=True`, fastai's default.

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
        self._init_state()

    def begin_fit(self, student: nn.Module, views: int = 1) -> None:
        "Another student than before gets another average."
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "EMATeacher":
        "A copy of the callback has a student of its own."
        return EMATeacher(self.decay)

    def __reduce__(self) -> tuple[Any, ...]:
        "A file leaves the average out."
        return EMATeacher, (self.decay,)


def _copyable(student: nn.Module) -> nn.Module:
    "Itself, or a copy of a student that keeps tensors of its last batch, of which torch copies none with a graph."
    attributes = [v for m in student.modules() for v in vars(m).values()]
    attributes += [v.stored for v in attributes if isinstance(v, Hook)]
    kept = [x for x in tensors(attributes) if not x.is_leaf]
    return deepcopy(student, {id(x): x.detach() for x in kept}) if kept else student


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
