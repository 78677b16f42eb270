"The callback that adds a distillation loss to a fastai training loop."

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import AvgMetric
from fastcore.basics import listify
from torch import Tensor, nn

from ._arguments import (
    check_cache,
    check_ensemble,
    check_moving,
    check_schedule,
    check_stored,
    check_teacher_runs,
    check_tfm,
    check_trained,
    check_weights,
)
from ._blend import blend, scheduled
from ._classes import class_dim, classes_first
from ._measure import Later
from ._tensors import plain, unwrap
from ._vocab import check_vocab
from .adapters import Adapters
from .auto_weight import AutoWeight
from .cache import TeacherCache
from .inputs import teacher_inputs
from .loss_call import LossCall, mix_of
from .losses._pairs import total
from .losses.combine import CombinedLoss
from .losses.matching import get_model_layers, get_module_by_name, match_feature_layers
from .parts import LossParts
from .schedule import Schedule
from .teacher import Teacher, as_teacher
from .teacher_pass import TeacherPass
from .watch import StudentWatch

__all__ = [
    "KnowledgeDistillationCallback",
    "TeacherCache",
    "get_model_layers",
    "get_module_by_name",
    "match_feature_layers",
]


class KnowledgeDistillationCallback(Callback):
    """Train the learner's model, the student, to follow `teacher` as well as the labels.

    The total loss is (1-w) · task loss + w · distillation loss with w = `weight` · `schedule`, in training and in
    validation; with `task_weight` it is `task_weight` · task loss + w · distillation loss.

    `loss` is any function called as `loss(pred=, teacher_pred=, fm_s=, fm_t=, target=)` that returns a scalar;
    `fm_s` and `fm_t` are the features of the student's and the teacher's layers by name, in the order given.
    Tensors come in float32, outside autocast. A loss that uses labels has `target` in its signature: MixUp and CutMix
    mix it as they mix the task loss. The teacher runs once a batch on the student's inputs (or on what `teacher_tfm`
    makes of them), in evaluation mode and without a graph. It does not run where there are no labels, in `get_preds`,
    or while `schedule` keeps the weight at 0.

    Raises TypeError and ValueError for what cannot work: arguments at once, layers of the student when `fit` starts,
    shapes at the first batch; FloatingPointError before the step of a batch for which the teacher gives nan or inf.
    """

    _ask_teacher: Teacher | None
    _distils_with: Teacher | None  # in this batch
    _is_finite: Later | None  # the distillation loss of this batch
    _teacher_xb: Sequence[Any]  # what the teacher gets in this batch
    _checked: bool  # has a batch gone through all of it?
    _steps: bool  # is this step taken?
    order = 0  # after the task loss; before GradientAccumulation divides it and MixedPrecision leaves autocast

    def __init__(
        self,
        teacher: Any,  # model, Learner, path of an exported Learner, a list of these (an ensemble), or `EMATeacher()`
        loss: Callable[..., Tensor],  # one of the losses, a `partial` of one, or your own
        activations_student: str | Sequence[str] | None = None,  # student layers to compare
        activations_teacher: str | Sequence[str] | None = None,  # teacher layers, paired with them by position
        weight: float | str = 0.5,  # weight of the distillation loss; "auto": balance the gradients of both losses
        schedule: Any = None,  # `Schedule`, or any function: share of the training done → factor on `weight`
        *,
        task_weight: float | None = None,  # weight of the task loss; None: 1 - w
        distill_valid: bool = True,  # False: validation shows the plain task loss and spares the teacher
        teacher_tfm: Callable[..., Any] | None = None,  # the student's inputs → the teacher's: size, normalisation, ...
        fast_teacher: bool = False,  # a private copy with BatchNorm folded, in the faster memory format
        teacher_dtype: torch.dtype | None = None,  # autocast of the teacher alone; None: as the student
        compile_teacher: bool | dict[str, Any] = False,  # torch.compile of a private copy; or its arguments
        cache: bool | str | Path | TeacherCache = False,  # store outputs by sample: in memory, or a folder's path
        cache_size: float | None = None,  # of at most so many GiB; None: 4
        adapter: Any = None,  # 'auto' lets FitNet, ActivationBoundaries, CWD compare unequal channels; or a function
    ):
        check_weights(weight, task_weight)
        check_schedule(schedule)
        check_teacher_runs(teacher_dtype, compile_teacher)
        check_tfm(teacher_tfm)
        self._ask_teacher = as_teacher(teacher)
        self.loss, self.weight, self.schedule = loss, weight, schedule
        self.task_weight, self.distill_valid = task_weight, distill_valid
        self.activations_student, self.activations_teacher = listify(activations_student), listify(activations_teacher)
        self.teacher_dtype, self.teacher_tfm = teacher_dtype, teacher_tfm
        self._parts, self._adapters = LossParts(), Adapters(adapter)
        self._teacher_pass = TeacherPass(fast_teacher, compile_teacher, check_cache(cache, cache_size))
        self._init_state()
        self._look_at_loss()
        self.current_weight = self._base_weight()

    # One batch, in the order in which things happen

    def before_fit(self) -> None:
        "Check what can be checked before the first batch."  # fastai calls it for `validate` and `get_preds` as well
        self._watch.stop()
        self._adapters.begin_fit(trial=hasattr(self.learn, "lr_finder"))
        self._init_state()
        if sum(cb is self for cb in self.learn.cbs) > 1:
            raise ValueError("this callback is in the Learner already: give it to the Learner or to `fit`, not to both")
        if self._ask_teacher is None:
            return
        others = [cb for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillationCallback) and cb is not self]
        if not self._ask_teacher.is_fixed and any(cb._ask_teacher is self._ask_teacher for cb in others):
            raise ValueError("two callbacks would update one EMATeacher twice a step: give each its own")
        self._ask_teacher.class_dim = 1
        self._ask_teacher.refresh()
        self._ask_teacher.check(unwrap(self.learn.model))
        self._look_at_loss()
        if self._call_loss.names("teacher_pred"):
            check_vocab(self._ask_teacher, self.dls)
        check_trained([p.loss for p in self._call_loss.parts], self.learn.opt)
        if self.teacher is None:  # an average that is yet to be has the student's layers
            self._teacher_pass.capture.layers(self.learn.model)
        self._watch.capture.layers(self.learn.model)
        param = next(self.learn.model.parameters(), None)
        if param is not None:  # the learner has moved it to its device, which torch's DataLoaders do not know
            self._call_loss.to(param.device)

    def before_train(self) -> None:
        "A new fit begins a new history."
        self._reset_teacher()
        if self.train_iter:
            return
        self._parts.reset(self._part_names())
        if self._ask_teacher is None:
            warnings.warn(
                "KnowledgeDistillationCallback was loaded from a file, without its teacher, and does nothing: "
                "set its `teacher`, or remove it with `learn.remove_cb(KnowledgeDistillationCallback)`",
                stacklevel=2,
            )

    def before_validate(self) -> None:
        "A recurrent teacher starts where the student does."
        self._reset_teacher()

    def before_batch(self) -> None:
        "Set the weight and hook the student: only now it is wrapped as it will run (DDP, ...)."
        if self.training or self.train_iter:  # `validate` outside a fit keeps the last weight
            self.current_weight = self._weight_now()
        self._distils_with = self._ask_teacher if self._needs_teacher() else None
        if self._distils_with is not None:
            self._distils_with.follow(unwrap(self.learn.model), anew=self.training and not self.train_iter)
            self._watch.start(self.learn)

    def after_loss(self) -> None:
        "Blend the distillation loss into the task loss."
        if not len(self.yb):
            return
        kd, part, parts = None, self.learn.loss.detach(), {}
        if self._distils_with is not None:
            parts = self._kd_loss(self._distils_with)
            kd = total(iter(parts.values())).to(part.dtype) if parts else torch.zeros_like(part)
            if self._auto is not None and self.training and parts:
                self._auto.measure(self.learn.loss_grad, kd, self.learn.model)
                self.current_weight = self._weight_now()
            self._is_finite = Later(torch.isfinite(kd.detach()))
            self.learn.loss_grad = blend(self.learn.loss_grad, kd, self.current_weight, self.task_weight)
            self.learn.loss, kd = self.learn.loss_grad.clone(), kd.detach()
        self._parts.note(part, kd, self.current_weight, parts, step=self.training)

    def before_step(self) -> None:
        "Before its gradient is used: is the teacher's part a number?"
        self._check_teacher()
        self._adapters.join(self.learn)
        self._steps = True

    def after_cancel_step(self) -> None:
        "Mixed precision leaves out a step whose gradients overflow."
        self._steps = False

    def after_step(self) -> None:
        "Also of one that was cancelled: the learner now drops all gradients."
        self._adapters.leave(stepped=True)
        if self._steps and self._ask_teacher is not None:
            self._ask_teacher.after_step()  # one made of the student follows it

    def after_batch(self) -> None:
        "Forget the batch, also one that was cancelled."
        self._watch.stop()
        self._adapters.leave()
        self._check_teacher()
        if self.training and not len(self.yb):
            warnings.warn(
                "the batches have no labels, so fastai trains nothing: to learn from the teacher alone give any labels "
                "and task_weight=0",
                stacklevel=2,
            )

    def after_train(self) -> None:
        "Move the epoch's losses off the device."
        _ = self.history
        self._teacher_pass.end_epoch()

    def after_fit(self) -> None:
        "Forget a batch that CancelFitException ended."
        self._watch.stop()
        self._adapters.end_fit()
        if self._auto is not None and self._steps:
            self._auto.say()

    # What the user reads

    @property
    def teacher(self) -> nn.Module | None:
        "The teacher's model; of an `EMATeacher` the average."
        return self._ask_teacher.model if self._ask_teacher is not None else None

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        self._ask_teacher = as_teacher(teacher)

    @property
    def cache(self) -> TeacherCache | None:
        "The stored outputs; another callback may share them."
        return self._teacher_pass.cache

    @property
    def teacher_report(self) -> str:
        "What runs in the teacher's place: 'plain', or what was folded, its memory format and size."
        return self._teacher_pass.report

    @property
    def adapters(self) -> nn.ModuleDict:
        "The adapters by pair of layers, 'layer1/0->layer2' for layer1.0 and layer2: there from the first batch on."
        return self._adapters.modules

    @property
    def history(self) -> dict[str, list[float]]:
        """`task_loss`, `kd_loss` and `weight` of each step of the last fit; nan where the teacher did not run.

        Of a combined loss also the share of each part, by name: they add up to `kd_loss`.
        """
        return self._parts.history

    @property
    def metrics(self) -> list[AvgMetric]:
        """Columns of the progress table: `Learner(..., metrics=[accuracy, *kd.metrics])`.

        `task_loss`, `kd_loss` and the parts of a combined loss.
        """
        return self._parts.metrics(["task_loss", "kd_loss", *self._part_names()])

    @property
    def agreement(self) -> AvgMetric:
        """A column of the progress table: `Learner(..., metrics=[accuracy, kd.agreement, kd.teacher_accuracy])`.

        For which share of the samples, or of the positions of dense outputs, do student and teacher predict the same
        class? nan where the teacher does not run, as with `distill_valid=False`. A loss on features alone then lets the
        teacher run to its end.

        Source: Stanton et al., "Does Knowledge Distillation Really Work?", NeurIPS 2021: fidelity.
        """
        return self._compare("agreement")

    @property
    def teacher_accuracy(self) -> AvgMetric:
        """A column of the progress table, as `agreement`: for which share does the teacher predict the label?

        Labels that are none of the classes, such as a mask's void, do not count.
        """
        return self._compare("teacher_accuracy")

    # How

    def _compare(self, name: str) -> AvgMetric:
        return self._parts.share(name)

    def _part_names(self) -> list[str]:
        parts = self._call_loss.parts
        return [p.name for p in parts] if isinstance(self.loss, CombinedLoss) else []

    def _weight_now(self) -> float:
        return scheduled(self._base_weight(), self.schedule, self._pct(), self.task_weight)

    def _base_weight(self) -> float:
        return float(self.weight) if self._auto is None else self._auto.weight

    def _needs_teacher(self) -> bool:
        "Does this batch? The first one does, so that mistakes show early."
        resting = self.current_weight == 0 and self.task_weight is None and self._checked
        wanted = self.training or self.distill_valid
        predicting = hasattr(self.learn, "gather_preds")
        return len(self.yb) > 0 and wanted and not resting and not predicting

    def _kd_loss(self, teacher: Teacher) -> dict[str, Tensor]:
        "By part."
        pred, fm_s = self.learn.pred, self._watch.take()
        if self.training and not self._checked:
            _warn_if_fixed(fm_s)
        dim = teacher.class_dim = class_dim(pred, self.y, self.learn.loss_func, teacher.class_dim)
        self._teacher_xb = teacher_inputs(self.teacher_tfm, self.xb)
        teacher_pred, fm_t = self._teacher_pass(teacher, self._teacher_xb, self.training, isinstance(pred, Tensor))
        self._parts.compare(classes_first(plain(pred), dim), classes_first(teacher_pred, dim), plain(self.y))
        outputs = {"pred": pred, "teacher_pred": teacher_pred, "fm_s": fm_s, "fm_t": fm_t}
        with torch.autocast(self.learn.loss_grad.device.type, enabled=False):
            adapt = self._adapters.of(self.learn.model, teacher.model)
            mix = mix_of(self.learn) if self.training else None
            parts = self._call_loss(outputs, self.y, mix, self._pct(), adapt, dim)
        self._checked = True
        return parts

    def _pct(self) -> float:
        return min(getattr(self, "pct_train", 1.0), 1.0)  # fastai's sum may come to 1 + 1e-16

    def _check_teacher(self) -> None:
        "A student that diverges is TerminateOnNaNCallback's business; a teacher that does is none to learn from."
        is_finite, self._is_finite = self._is_finite, None
        xb, self._teacher_xb = self._teacher_xb, ()
        if is_finite is None or is_finite or self._distils_with is None:
            return
        one_tensor = isinstance(self.learn.pred, Tensor)
        faulty = self._teacher_pass.find_fault(self._distils_with, xb, self.training, one_tensor)
        if faulty is not None:
            self.learn.opt.zero_grad()
            self.adapters.zero_grad()
            phase = "training" if self.training else "validation"
            raise FloatingPointError(
                f"the teacher gives nan or inf ({faulty}) in {phase} batch {self.iter} of epoch {self.epoch}: are "
                "its weights sound, its precision sufficient, the inputs those it was trained on?"
            )

    def _look_at_loss(self) -> None:
        "And at the layers that it compares: the user may have changed it."
        call = self._call_loss = LossCall(self.loss, self.activations_student, self.activations_teacher)
        self._watch = StudentWatch(call.student)
        for percent in range(101):  # not only when the training is nearly done; functions may depend on more than this
            if isinstance(self.schedule, Schedule):
                scheduled(self._base_weight(), self.schedule, percent / 100, self.task_weight)
            for part in call.parts:
                if isinstance(part.schedule, Schedule):
                    part.weight_at(percent / 100)
        if self._ask_teacher is not None:
            check_ensemble(self._ask_teacher, [p.loss for p in call.parts], call.teacher)
            check_moving(self._ask_teacher, self._teacher_pass)
            check_stored(self.cache, self._ask_teacher, [p.loss for p in call.parts])
            for teacher in (self._ask_teacher, *self._ask_teacher.members):
                teacher.precision = self.teacher_dtype
            self._teacher_pass.begin_fit(call.teacher, call.reads_predictions or bool(self._parts.compares))
            if self._ask_teacher.model is not None:
                self._teacher_pass.capture.layers(self._ask_teacher.model)  # do they exist?

    def _init_state(self) -> None:
        "What is not saved, and new with each fit."
        super()._init_state()
        self._distils_with = self._is_finite = None
        self._auto = AutoWeight(self.task_weight) if self.weight == "auto" else None
        self._teacher_xb, self._checked, self._steps = (), False, False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:  # the end of a fit with `cbs=kd`, whatever ended it
            self._watch.stop()
            self._adapters.leave()
            self._parts.forget()
            self._teacher_xb = ()
        super().__setattr__(name, value)

    def _reset_teacher(self) -> None:
        if self._ask_teacher is not None:
            self._ask_teacher.reset()


def _warn_if_fixed(fm_s: dict[str, Tensor]) -> None:
    if fm_s and not any(fm.requires_grad for fm in fm_s.values()):
        warnings.warn(
            f"the student's layers {', '.join(fm_s)} cannot learn from the teacher: they are frozen, or inside "
            "torch.utils.checkpoint with use_reentrant=True (set it to False)",
            stacklevel=2,
        )
