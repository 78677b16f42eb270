"The callback that adds a distillation loss to a fastai training loop."

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import AvgMetric
from fastcore.basics import listify
from torch import Tensor, nn

from ._class_axis import class_dim, classes_first
from ._modules import unwrap
from ._tensors import DeferredBool, plain
from .extra_optimizers import ExtraOptimizers
from .features.adapters import Adapters
from .features.hooks import StudentFeatures, warn_if_fixed
from .history import LossHistory
from .losses._checks import total
from .losses.evaluate import LossEvaluator, mix_of
from .losses.matching import get_model_layers, get_module_by_name, match_feature_layers
from .teacher.teacher import Teacher, TeacherOutput, as_teacher
from .teacher.vocab import check_vocab
from .weighting import Weighting

__all__ = ["KnowledgeDistillationCallback", "get_model_layers", "get_module_by_name", "match_feature_layers"]

LOADED = """KnowledgeDistillationCallback was loaded from a file, without its teacher, and does nothing: set its \
`teacher`, or remove it with `learn.remove_cb(KnowledgeDistillationCallback)`"""
UNLABELED = """the batches have no labels, so fastai trains nothing: to learn from the teacher alone give any labels \
and task_weight=0"""


class KnowledgeDistillationCallback(Callback):
    """Trains the learner's model, the student, to follow `teacher` as well as the labels.

    The total loss is (1-w) · task loss + w · distillation loss with w = `weight` · `schedule`, in training and in
    validation; with `task_weight` it is `task_weight` · task loss + w · distillation loss.

    `loss` is any function called as `loss(pred=, teacher_pred=, fm_s=, fm_t=, target=)` that returns a scalar;
    `fm_s` and `fm_t` are the features of the student's and the teacher's layers by name, in the order given.
    Tensors come in float32, outside autocast. A loss that uses labels has `target` in its signature: MixUp and CutMix
    mix it as they mix the task loss. A loss that is a module is trained along. The teacher runs once a batch on the
    student's inputs, in evaluation mode under `no_grad`. It does not run where there are no labels, in `get_preds`, or
    while `schedule` keeps the weight at 0. `Teacher` has the options of a teacher, such as a cache.

    Raises TypeError and ValueError for what cannot work: arguments at once, layers of the student when `fit` starts,
    shapes at the first batch; FloatingPointError for nan or inf of the teacher, before they reach a step.
    """

    order = 0  # after the task loss; before GradientAccumulation divides it and MixedPrecision leaves autocast
    _teacher: Teacher | None
    _out: TeacherOutput | None  # of this batch, until it is known to be finite
    _is_finite: DeferredBool | None  # the distillation loss of this batch
    _active = _rests = False  # does the teacher run in this batch, or does the schedule keep the weight at 0?
    _checked = _steps = False  # has a batch gone through all of it, is this step taken?
    _class_dim = 1  # as in the last batch

    def __init__(
        self,
        teacher: Any,  # model, Learner, path of an exported Learner, a list of these, `Teacher(...)` or `EMATeacher()`
        loss: Callable[..., Tensor],  # one of the losses, a `partial` of one, or your own
        activations_student: str | Sequence[str] | None = None,  # student layers to compare
        activations_teacher: str | Sequence[str] | None = None,  # teacher layers, paired with them by position
        weight: float | str = 0.5,  # weight of the distillation loss; "auto": balance the gradients of both losses
        schedule: Any = None,  # `Schedule`, or any function: share of the training done → factor on `weight`
        *,
        task_weight: float | None = None,  # weight of the task loss; None: 1 - w
        distill_valid: bool = True,  # False: validation shows the plain task loss and spares the teacher
        adapter: Any = None,  # 'auto' lets FitNet, ActivationBoundaries, CWD compare unequal channels; or a function
    ):
        self._teacher = as_teacher(teacher)
        self.loss, self.weight, self.schedule = loss, weight, schedule
        self.task_weight, self.distill_valid = task_weight, distill_valid
        self.activations_student = activations_student and listify(activations_student)
        self.activations_teacher = activations_teacher and listify(activations_teacher)
        self._history, self._adapters, self._extra = LossHistory(), Adapters(adapter), ExtraOptimizers()
        self._init_state()
        self._read_attributes()
        self._teacher.find_layers(self._evaluator.teacher)
        self.current_weight = self._weighting.base

    # One batch, in the order in which things happen

    def before_fit(self) -> None:
        "Check what can be checked before the first batch."  # fastai calls it for `validate` and `get_preds` as well
        self._leave()
        self._init_state()
        if sum(cb is self for cb in self.learn.cbs) > 1:
            raise ValueError("this callback is in the Learner already: give it to the Learner or to `fit`, not to both")
        self._read_attributes()
        trial = hasattr(self.learn, "lr_finder")
        self._adapters.begin_fit(trial)
        self._extra.begin_fit(self._modules(), trial)
        if self._teacher is not None:
            self._meet(self._teacher, unwrap(self.learn.model))

    def before_train(self) -> None:
        "A new fit begins a new history."
        if not self.train_iter:
            self._history.reset(self._evaluator.part_names)
        if self._teacher is not None:
            self._teacher.begin_epoch(training=True)
        elif not self.train_iter:
            warnings.warn(LOADED, stacklevel=2)

    def before_validate(self) -> None:
        "A recurrent teacher starts where the student does."
        if self._teacher is not None:
            self._teacher.begin_epoch(training=False)

    def before_batch(self) -> None:
        "Set the weight and hook the student: only now it is wrapped as it will run (DDP, ...)."
        if self.training or self.train_iter:  # `validate` outside a fit keeps the last weight
            self.current_weight = self._weighting.at(self._pct())
        wanted = len(self.yb) > 0 and (self.training or self.distill_valid) and not hasattr(self.learn, "gather_preds")
        self._rests = wanted and self.current_weight == 0 and self._checked  # the first batch runs, to show mistakes
        self._active = wanted and not self._rests and self._teacher is not None
        if self._active and self._teacher is not None:
            self._teacher.follow(unwrap(self.learn.model), anew=self.training and not self.train_iter)
            auto = self._weighting.auto
            self._features.start(self.learn, eager=self.training and auto is not None and auto.measuring)

    def after_loss(self) -> None:
        "Blend the distillation loss into the task loss."
        if not len(self.yb):
            return
        kd, task, parts = None, self.learn.loss.detach(), {}
        if self._active:
            parts = self._distill()
            kd = total(iter(parts.values())).to(task.dtype) if parts else torch.zeros_like(task)
            if self._weighting.auto is not None and self.training and parts:
                self._weighting.auto.measure(self.learn.loss_grad, kd, self.learn.model)
                self.current_weight = self._weighting.at(self._pct())
            self._is_finite = DeferredBool(torch.isfinite(kd.detach()))
        if self._active or self._rests:
            self.learn.loss_grad = self._weighting.blend(self.learn.loss_grad, kd, self.current_weight)
            self.learn.loss = self.learn.loss_grad.clone()
        kd = None if kd is None else kd.detach()
        self._history.record(task, kd, self.current_weight, parts, step=self.training)

    def before_step(self) -> None:
        "Before its gradient is used: is the teacher's part a number?"
        self._check_finite()
        self._steps = True

    def after_cancel_step(self) -> None:
        "Mixed precision leaves out a step whose gradients overflow."
        self._steps = False

    def after_step(self) -> None:
        "Also of one that was cancelled: the learner now drops all gradients."
        self._extra.after_step(self.learn, self._modules(), self._steps)
        if self._steps and self._teacher is not None:
            self._teacher.after_step()  # one made of the student follows it

    def after_batch(self) -> None:
        "Drop the batch, also one that was cancelled."
        self._features.stop()
        self._check_finite()
        if self.training and not len(self.yb):
            warnings.warn(UNLABELED, stacklevel=2)

    def after_train(self) -> None:
        "Move the losses of the epoch off the device."
        self._history.collect()

    def after_fit(self) -> None:
        "Drop a batch that CancelFitException ended."
        self._leave()
        if self._weighting.auto is not None and self._steps:
            self._weighting.auto.report()
        if self._teacher is not None:
            self._teacher.end_fit()

    # What the user reads

    @property
    def teacher(self) -> nn.Module | None:
        "The teacher's model; of an `EMATeacher` the average."
        return self._teacher.model if self._teacher is not None else None

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        self._teacher = as_teacher(teacher)

    @property
    def adapters(self) -> nn.ModuleDict:
        "The adapters by pair of layers, 'layer1/0->layer2' for layer1.0 and layer2: there from the first batch on."
        return self._adapters.modules

    @property
    def history(self) -> dict[str, list[float]]:
        "`task_loss`, `kd_loss`, its parts and `weight` in each step of the last fit; nan without the teacher."
        return self._history.history

    @property
    def metrics(self) -> list[AvgMetric]:
        "`task_loss`, `kd_loss` and the parts of a combined loss: `Learner(..., metrics=[accuracy, *kd.metrics])`."
        return self._history.metrics(["task_loss", "kd_loss", *self._evaluator.part_names])

    @property
    def agreement(self) -> AvgMetric:
        """A metric: the share of samples, or positions, for which student and teacher predict the same class.

        nan where the teacher does not run, as with `distill_valid=False`.
        Source: Stanton et al., "Does Knowledge Distillation Really Work?", NeurIPS 2021: fidelity.
        """
        return self._history.share("agreement")

    @property
    def teacher_accuracy(self) -> AvgMetric:
        "A metric, as `agreement`: the share for which the teacher predicts the label; a mask's void does not count."
        return self._history.share("teacher_accuracy")

    # How

    def _distill(self) -> dict[str, Tensor]:
        "The distillation loss by part."
        assert self._teacher is not None
        pred, fm_s, evaluator = self.learn.pred, self._features.pop(), self._evaluator
        if self.training and not self._checked:
            warn_if_fixed(fm_s)
        dim = self._class_dim = class_dim(pred, self.y, self.learn.loss_func, self._class_dim)
        reads = evaluator.any("reads_predictions") or bool(self._history.compares)
        whole = not isinstance(pred, Tensor)  # a student of several outputs gets the teacher's as they are
        out = self._out = self._teacher.forward(
            self.xb, evaluator.teacher, class_dim=dim, reads_predictions=reads, as_returned=whole
        )
        teacher_pred = None if not reads else out.output if whole else out.pred
        self._history.compare(classes_first(plain(pred), dim), classes_first(teacher_pred, dim), plain(self.y))
        outputs = {"pred": pred, "teacher_pred": teacher_pred, "fm_s": fm_s, "fm_t": out.features}
        with torch.autocast(self.learn.loss_grad.device.type, enabled=False):
            adapt = self._adapters.of(self.learn.model, self._teacher.model)
            mix = mix_of(self.learn) if self.training else None
            parts = evaluator.evaluate(outputs, self.y, mix, self._pct(), adapt, dim)
        self._checked = True
        return parts

    def _check_finite(self) -> None:
        "A student that diverges is TerminateOnNaNCallback's business; a teacher that does is none to learn from."
        is_finite, out, self._is_finite, self._out = self._is_finite, self._out, None, None
        fault = None if is_finite is None or is_finite or out is None else out.fault()
        if fault is None:
            return
        for holder in filter(None, (self.learn.opt, *self._modules())):
            holder.zero_grad()
        raise FloatingPointError(
            f"the teacher gives nan or inf ({fault}) in {'training' if self.training else 'validation'} batch "
            f"{self.iter} of epoch {self.epoch}: check its weights, its dtype and its input normalization"
        )

    def _read_attributes(self) -> None:
        "The user may have changed them since."
        self._weighting = Weighting(self.weight, self.schedule, self.task_weight)
        self._evaluator = LossEvaluator(self.loss, self.activations_student or [], self.activations_teacher or [])
        self._features = StudentFeatures(self._evaluator.student)
        why = self._teacher and self._teacher.why_no_raw_outputs
        if why and self._evaluator.any("raw_outputs"):
            raise ValueError(f"{why}, but the loss compares raw outputs: use SoftTarget")

    def _meet(self, teacher: Teacher, student: nn.Module) -> None:
        "Do teacher, student and loss go together?"
        users = [cb for cb in self.learn.cbs if getattr(cb, "_teacher", None) is teacher]
        if len(users) > 1 and not teacher.is_fixed:
            raise ValueError("two callbacks would update one EMATeacher twice a step: give each its own")
        teacher.begin_fit(student)
        teacher.find_layers(self._evaluator.teacher, student)
        self._features.hooks.layers(self.learn.model)
        if self._evaluator.names("teacher_pred"):
            check_vocab(teacher, self.dls)
        self._evaluator.to_device_of(student)

    def _modules(self) -> list[nn.Module]:
        "What is trained beside the student."
        return [*self._adapters.modules.values(), *self._evaluator.modules]

    def _pct(self) -> float:
        return min(getattr(self, "pct_train", 1.0), 1.0)  # fastai's sum may come to 1 + 1e-16

    def _init_state(self) -> None:
        "What is not saved, and new with each fit."
        super()._init_state()
        self._out = self._is_finite = None
        self._active = self._rests = self._checked = self._steps = False
        self._class_dim = 1

    def _leave(self) -> None:
        "Hooks, the last batch, optimizers."
        self._features.stop()
        self._out = None
        self._extra.end_fit()
        self._adapters.end_fit()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:  # the end of a fit with `cbs=kd`, whatever ended it
            self._leave()
            self._history.clear_batch()
        super().__setattr__(name, value)
