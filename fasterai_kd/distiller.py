"The distillation loss of a batch: what student and teacher make of it, and how the loss compares them."

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from ._class_axis import class_dim, classes_first
from ._modules import keeps_state, unwrap
from ._tensors import DeferredBool, pixels, plain, predictions, size_of, take_first, tensors
from .data.unlabeled import (
    StudentBatch,
    UnlabeledInputs,
    mean_by_size,
    no_task_loss,
    placeholder,
    student_batches,
)
from .data.views import views_of
from .extra_optimizers import ExtraOptimizers
from .features.adapters import Adapters
from .features.hooks import warn_if_fixed
from .features.layout import Aligner, Layouts
from .features.student import StudentForward
from .history import LossHistory, check_metrics
from .losses.evaluate import LossEvaluator, mix_of
from .teacher.output import TeacherOutput
from .teacher.teacher import Teacher

__all__ = ["Distiller"]


class Distiller:
    "`start` before the student's forward, `evaluate` after the task loss, `check_finite` before the step."

    def __init__(
        self,
        teacher: Teacher | None,  # None: it was left out of a file
        adapter: Any,
        unlabeled: Any,
        history: LossHistory,  # which compares predictions
    ):
        self.teacher, self.checked = teacher, False  # has a batch gone through all of it?
        self.adapters, self._extra, self._history = Adapters(adapter), ExtraOptimizers(), history
        self._unlabeled = None if unlabeled is None else UnlabeledInputs(unlabeled)
        self._task_loss: Any = None  # of the learner, while a batch without labels has another
        self._more: tuple[Any, ...] = ()  # unlabeled inputs of this batch
        self._layouts: tuple[Layouts, Layouts] | None = None  # of student and teacher, in this fit
        self._outs: list[TeacherOutput] = []  # of this batch, until they are known to be finite
        self._is_finite: DeferredBool | None = None  # the distillation loss of this batch
        self.no_labels = False  # in this batch?

    def set_loss(self, loss: Callable[..., Tensor], student: Sequence[str], teacher: Sequence[str]) -> None:
        "The loss and the layers that it compares; ValueError for what this teacher cannot give."
        self.evaluator = LossEvaluator(loss, student, teacher)
        self._student = StudentForward(self.evaluator.student)
        if self.adapters.make is not None and not self.evaluator.takes_adapters:
            warnings.warn("no loss here compares features of equal shapes: the adapter is not used", stacklevel=2)
        why = self.teacher and self.teacher.why_no_raw_outputs
        if why and self.evaluator.any("raw_outputs"):
            raise ValueError(f"{why}, but the loss needs the outputs as they are: use SoftTarget, or one teacher alone")

    def begin_fit(self, learn: Learner) -> None:
        "Do teacher, student, loss and data go together?"
        trial = hasattr(learn, "lr_finder")
        self.checked, self._warned, self._class_dim, self._layouts = False, False, 1, None
        self.adapters.begin_fit(trial)
        self._extra.begin_fit(self.modules, trial)
        if self._unlabeled is not None:
            self._unlabeled.begin_fit(learn)
        if self.teacher is None:
            return
        student = unwrap(learn.model)
        views = views_of(learn)
        self.teacher.begin_fit(student, 1 if views is None else views.k, trial)
        self.teacher.find_layers(self.evaluator.teacher, student)
        self._student.hooks.layers(learn.model)
        self.teacher.meet_data(learn.dls, self.evaluator.names("teacher_pred") or bool(self._history.compares))
        self.evaluator.to_device_of(student)
        self.evaluator.warn_of_independent_classes(learn.loss_func)

    def start(
        self,
        learn: Learner,
        anew: bool,  # the first batch of a fit?
        eager: bool,  # run a compiled student uncompiled
    ) -> None:
        "Draw unlabeled inputs and hook the student: only now it is wrapped as it will run (DDP, ...)."
        assert self.teacher is not None
        self.teacher.follow(unwrap(learn.model), anew)
        self._more = self._unlabeled.draw(learn.xb) if self._unlabeled is not None and learn.training else ()
        joins = bool(self._more) and not keeps_state(learn.model)  # recurrent models sort and mask their batches
        self._student.start(learn, eager, self._more if joins else ())

    def after_pred(self, learn: Learner) -> None:
        "The student's forward is done; a batch without labels has the task loss 0."
        self._student.end_forward()
        self.no_labels = not len(learn.yb)
        if self.no_labels:
            check_metrics(learn.metrics)
            self._task_loss, learn.loss_func = learn.loss_func, no_task_loss
            learn.yb = (placeholder(learn.xb),)

    def evaluate(
        self,
        learn: Learner,
        pct: float,  # share of the training done
    ) -> dict[str, Tensor]:
        "The distillation loss by part."
        self.restore_task_loss(learn)
        batches = student_batches(learn, self._student, self._more)
        if learn.training and not self.checked:
            self._warned = warn_if_fixed(batches[0].features)
        y = None if self.no_labels else learn.y
        self._class_dim = class_dim(learn.pred, y, learn.loss_func, self._class_dim)
        values = [self._evaluate(learn, batch, pct) for batch in batches]
        self.checked = True
        return mean_by_size(batches, values)

    def _evaluate(self, learn: Learner, batch: StudentBatch, pct: float) -> dict[str, Tensor]:
        assert self.teacher is not None
        dim, y = self._class_dim, None if self.no_labels or batch.labeled == 0 else learn.y
        out = self.teacher.forward(
            batch.xb,
            self.evaluator.teacher,
            class_dim=dim,
            reads_predictions=self.evaluator.any("reads_predictions") or bool(self._history.compares),
            as_returned=self.evaluator.reads_whole_outputs(batch.pred),
        )
        self._outs.append(out)
        if batch.labeled != 0 and self._history.compares:
            self._compare(learn, batch, out, plain(y))
        if self._layouts is None:
            self._layouts = Layouts(unwrap(learn.model), "student"), Layouts(self.teacher.model, "teacher")
        align = Aligner(*self._layouts, (pixels(batch.xb), out.pixels)).align
        with torch.autocast(learn.loss_grad.device.type, enabled=False):
            adapt = self.adapters.of(learn.model, self.teacher.model)
            mix = mix_of(learn) if learn.training else None
            return self.evaluator.evaluate(
                batch.pred, out, batch.features, y, mix, pct, align, adapt, dim, batch.labeled
            )

    def _compare(self, learn: Learner, batch: StudentBatch, out: TeacherOutput, y: Any) -> None:
        "For agreement and the teacher's accuracy, of the labeled samples."
        own, teachers = predictions(learn.pred, "the student"), take_first(out.pred, size_of(learn.xb), len(batch))
        ignored, dim = getattr(learn.loss_func, "ignore_index", None), self._class_dim
        self._history.compare(classes_first(plain(own), dim), classes_first(teachers, dim), y, ignored)

    def watch(self, kd: Tensor, training: bool) -> None:
        "Is the distillation loss finite? To be read later: the device is not waited for."
        if training and not kd.requires_grad and not self._warned:
            self._warned = True
            warnings.warn("the distillation loss has no gradient: the student does not learn from it", stacklevel=2)
        self._is_finite = DeferredBool(torch.isfinite(kd.detach()))

    def check_finite(self, learn: Learner) -> None:
        "A student that diverges is TerminateOnNaNCallback's business; a teacher that does is none to learn from."
        is_finite, outs, self._is_finite, self._outs = self._is_finite, self._outs, None, []
        if is_finite is None or is_finite or not _is_number(learn.pred):
            return
        fault = next(filter(None, (out.fault() for out in outs)), None)
        if fault is None:
            return
        for holder in filter(None, (learn.opt, *self.modules)):
            holder.zero_grad()
        raise FloatingPointError(
            f"the teacher gives nan or inf ({fault}) in {'training' if learn.training else 'validation'} batch "
            f"{learn.iter} of epoch {learn.epoch}: check its weights, its dtype and its input normalization"
        )

    def after_step(self, learn: Learner, taken: bool) -> None:
        "What is trained beside the student makes its step; a teacher made of the student follows it."
        self._extra.after_step(learn, self.modules, taken)
        if taken and self.teacher is not None:
            self.teacher.after_step()

    def restore_task_loss(self, learn: Learner) -> None:
        "After a batch without labels."
        if self._task_loss is not None:
            learn.loss_func, self._task_loss = self._task_loss, None

    def stop(self) -> None:
        "Drop the batch."
        self._student.stop()
        self._more, self._outs, self._is_finite, self.no_labels = (), [], None, False

    def end_fit(self) -> None:
        "Drop the batch, the optimizers and the loader's workers."
        self.stop()
        if self._unlabeled is not None:
            self._unlabeled.end_fit()
        self._extra.end_fit()
        self.adapters.end_fit()
        self._layouts = None

    @property
    def joins_inputs(self) -> bool:
        "Does the student see more than the learner's inputs?"
        return self._unlabeled is not None

    @property
    def hooks_student(self) -> bool:
        "Do its forward hooks read or change what the student gives?"
        return self.joins_inputs or bool(self.evaluator.student)

    @property
    def modules(self) -> list[nn.Module]:
        "What is trained beside the student."
        return [*self.adapters.modules.values(), *self.evaluator.modules]


def _is_number(pred: Any) -> bool:
    "No nan or inf; -inf is a mask."
    return all(bool((x < math.inf).all()) for x in tensors(pred))
