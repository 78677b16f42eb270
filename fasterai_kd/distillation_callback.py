"The callback that adds a distillation loss to a fastai training loop."

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.learner import AvgMetric
from fastcore.basics import listify
from torch import Tensor, nn

from ._tensors import plain
from .distiller import Distiller
from .history import LossHistory
from .losses._checks import total
from .losses.matching import get_model_layers, get_module_by_name, match_feature_layers
from .teacher.teacher import as_teacher
from .weighting import Weighting

__all__ = ["KnowledgeDistillationCallback", "get_model_layers", "get_module_by_name", "match_feature_layers"]

LOADED = """KnowledgeDistillationCallback was loaded from a file, without its teacher, and does nothing: set its \
`teacher`, or remove it with `learn.remove_cb(KnowledgeDistillationCallback)`"""


class KnowledgeDistillationCallback(Callback):
    """Trains the learner's model, the student, to follow `teacher` as well as the labels.

    The total loss is (1-w) · task loss + w · distillation loss with w = `weight` · `schedule`, in training and in
    validation; with `task_weight` it is `task_weight` · task loss + w · distillation loss.

    `loss` is any function called as `loss(pred=, teacher_pred=, fm_s=, fm_t=, target=)` that returns a scalar;
    `fm_s` and `fm_t` are the features of the student's and the teacher's layers by name, in the order given.
    Tensors are in float32, outside autocast. A loss that uses labels has `target` in its signature: MixUp and CutMix
    mix it as they mix the task loss. If the loss is a module, it is trained too. The teacher runs once per batch on the
    student's inputs, in evaluation mode under `no_grad`. It does not run in `get_preds`, or while `schedule` keeps the
    weight at 0. `Teacher` has the options of a teacher, such as a cache.

    With `unlabeled`, each training batch comes with a batch of inputs without labels: the task loss and the metrics use
    the labeled inputs, the distillation loss uses both. Dataloaders without any labels train from the teacher alone.

    Raises TypeError and ValueError for wrong arguments at once, for the student's layers when `fit` starts, for shapes
    at the first batch; FloatingPointError if the teacher gives nan or inf, before the optimizer steps.
    """

    order = 0  # after the task loss; before GradientAccumulation divides it and MixedPrecision leaves autocast
    _active = _rests = False  # does the teacher run in this batch, or does the schedule keep the weight at 0?
    _steps = False  # is this step taken?

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
        distill_valid: bool = True,  # False: validation shows the plain task loss, without the teacher
        adapter: Any = None,  # 'auto' lets losses that need equal shapes, as FitNet, compare others; or a function
        unlabeled: Any = None,  # inputs without labels to learn from too: a DataLoader, or a list of items (files)
    ):
        self.loss, self.weight, self.schedule = loss, weight, schedule
        self.task_weight, self.distill_valid = task_weight, distill_valid
        self.activations_student = activations_student and listify(activations_student)
        self.activations_teacher = activations_teacher and listify(activations_teacher)
        self._history = LossHistory()
        source = as_teacher(teacher)
        self._distiller = Distiller(source, adapter, unlabeled, self._history)
        self._read_attributes()
        source.find_layers(self._distiller.evaluator.teacher)
        self.current_weight = self._weighting.base

    # One batch, in the order in which things happen

    def before_fit(self) -> None:
        "Check what can be checked before the first batch."  # fastai calls it for `validate` and `get_preds` as well
        self._leave()
        self._steps = False
        if sum(cb is self for cb in self.learn.cbs) > 1:
            raise ValueError("this callback is in the Learner already: give it to the Learner or to `fit`, not to both")
        teacher = self._distiller.teacher
        others = [cb for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillationCallback) and cb is not self]
        if teacher and not teacher.is_fixed and any(cb._distiller.teacher is teacher for cb in others):
            raise ValueError("two callbacks would update one EMATeacher twice a step: give each its own")
        if any(cb.loss is self.loss and cb.teacher is self.teacher is not None for cb in others):
            warnings.warn("two distillation callbacks with the same teacher and loss: both are blended", stacklevel=2)
        if self._distiller.joins_inputs and any(cb._distiller.hooks_student for cb in others):
            raise ValueError(
                "unlabeled inputs of one distillation callback do not go together with layers or unlabeled inputs of "
                "another: give one callback combine(...) of the losses"
            )
        self._history.begin_fit(self.learn.metrics)
        self._read_attributes()
        self._distiller.begin_fit(self.learn)

    def before_train(self) -> None:
        "A new fit begins a new history."
        if not self.train_iter:
            self._history.reset(self._distiller.evaluator.part_names)
        if self._distiller.teacher is not None:
            self._distiller.teacher.begin_epoch(training=True)
        elif not self.train_iter:
            warnings.warn(LOADED, stacklevel=2)

    def before_validate(self) -> None:
        "A recurrent teacher starts where the student does."
        if self._distiller.teacher is not None:
            self._distiller.teacher.begin_epoch(training=False)

    def before_batch(self) -> None:
        "Set the weight; does the teacher run?"
        if self.training or self.train_iter:  # `validate` outside a fit keeps the last weight
            self.current_weight = self._weighting.at(self._pct())
        wanted = (self.training or self.distill_valid) and not hasattr(self.learn, "gather_preds")
        # where the schedule keeps the weight at 0 the teacher rests, but in the first batch, so that mistakes show
        self._rests = wanted and self.current_weight == 0 and self._distiller.checked
        self._active = wanted and not self._rests and self._distiller.teacher is not None
        if self._active:
            eager = self.training and self._weighting.measuring
            self._distiller.start(self.learn, self.training and not self.train_iter, eager)

    def after_pred(self) -> None:
        "The student's forward is done; a batch without labels has the task loss 0."
        if self._active:
            self._distiller.after_pred(self.learn)

    def after_loss(self) -> None:
        "Blend the distillation loss into the task loss."
        if not len(self.yb):
            return
        kd, task, parts = None, self.learn.loss.detach(), {}
        if self._active:
            parts = self._distiller.evaluate(self.learn, self._pct())
            kd = total(iter(parts.values())).to(task.dtype) if parts else torch.zeros_like(task)
            if self.training and parts and self._weighting.measuring and not self._distiller.no_labels:
                self._weighting.measure(self.learn.loss_grad, kd, self.learn.model)
                self.current_weight = self._weighting.at(self._pct())
            self._distiller.watch(kd, self.training and bool(parts))
        if self._active or self._rests:
            self.learn.loss_grad = self._weighting.blend(self.learn.loss_grad, kd, self.current_weight)
            self.learn.loss = plain(self.learn.loss_grad.clone())  # fastai's Recorder fails on bfloat16
        kd = None if kd is None else kd.detach()
        self._history.record(task, kd, self.current_weight, parts, step=self.training)

    def before_step(self) -> None:
        "Before its gradient is used: is the teacher's part a number?"
        self._distiller.check_finite(self.learn)
        self._steps = True

    def after_cancel_step(self) -> None:
        "Mixed precision leaves out a step whose gradients overflow."
        self._steps = False

    def after_step(self) -> None:
        "Also of one that was cancelled: the learner now drops all gradients."
        self._distiller.after_step(self.learn, taken=self._steps)

    def after_batch(self) -> None:
        "Drop the batch, also one that was cancelled."
        self._distiller.restore_task_loss(self.learn)
        self._distiller.check_finite(self.learn)
        self._distiller.stop()

    def after_fit(self) -> None:
        "Drop a batch that CancelFitException ended."
        self._leave()
        if self._steps:
            self._weighting.report()
        if self._distiller.teacher is not None:
            self._distiller.teacher.end_fit()

    # What the user reads

    @property
    def teacher(self) -> nn.Module | None:
        "The teacher's model; of an `EMATeacher` the average."
        return self._distiller.teacher.model if self._distiller.teacher is not None else None

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        self._distiller.teacher = as_teacher(teacher)

    @property
    def adapters(self) -> nn.ModuleDict:
        "The adapters by pair of layers, 'layer1/0->layer2' for layer1.0 and layer2: there from the first batch on."
        return self._distiller.adapters.modules

    @property
    def history(self) -> dict[str, list[float]]:
        "`task_loss`, `kd_loss`, its parts and `weight` in each step of the last fit; nan without the teacher."
        return self._history.history

    @property
    def metrics(self) -> list[AvgMetric]:
        "`task_loss`, `kd_loss` and the parts of a combined loss: `Learner(..., metrics=[accuracy, *kd.metrics])`."
        return self._history.metrics(["task_loss", "kd_loss", *self._distiller.evaluator.part_names])

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

    def _read_attributes(self) -> None:
        "The user may have changed them since."
        self._weighting = Weighting(self.weight, self.schedule, self.task_weight)
        self._distiller.set_loss(self.loss, self.activations_student or [], self.activations_teacher or [])

    def _pct(self) -> float:
        return min(getattr(self, "pct_train", 1.0), 1.0)  # fastai's sum may come to 1 + 1e-16

    def _leave(self) -> None:
        "Nothing of the last fit stays."
        if self.learn is not None:
            self._distiller.restore_task_loss(self.learn)
        self._distiller.end_fit()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:  # the end of a fit with `cbs=kd`, whatever ended it
            self._leave()
            self._history.clear_batch()
        super().__setattr__(name, value)
