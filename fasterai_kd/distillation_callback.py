"The callback that adds a distillation loss to a fastai training loop."

import copy
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.learner import AvgMetric
from fastcore.basics import detuplify, listify
from torch import Tensor, nn

from ._arguments import check_layers, check_schedule, check_weights, loss_parameters
from ._tensors import plain, unwrap
from .capture import FeatureCapture
from .losses.matching import get_model_layers, get_module_by_name, match_feature_layers
from .teacher import Teacher, as_model, logits

__all__ = ["KnowledgeDistillationCallback", "get_model_layers", "get_module_by_name", "match_feature_layers"]


class KnowledgeDistillationCallback(Callback):
    """Train the learner's model, the student, to follow `teacher` as well as the labels.

    The total loss is (1-w) · task loss + w · distillation loss with w = `weight` · `schedule`, in training and in
    validation; with `task_weight` it is `task_weight` · task loss + w · distillation loss.

    `loss` is any function called as `loss(pred=, teacher_pred=, fm_s=, fm_t=, target=)` that returns a scalar;
    `fm_s` and `fm_t` are the features of the student's and the teacher's layers by name, in the order given.
    All tensors come in float32, outside autocast. The teacher runs once a batch on the student's inputs, in evaluation
    mode and without a graph; it does not run where there are no labels, in `get_preds`, or while `schedule` keeps the
    weight at 0.

    Raises TypeError and ValueError for what cannot work: arguments at once, layers of the student when `fit` starts,
    shapes at the first batch.
    """

    order = 0  # after the task loss; before GradientAccumulation divides it and MixedPrecision leaves autocast

    def __init__(
        self,
        teacher: Any,  # model, Learner, path of an exported Learner, or a list of these (an ensemble)
        loss: Callable[..., Tensor],  # one of the losses, a `partial` of one, or your own
        activations_student: str | Sequence[str] | None = None,  # student layers to compare
        activations_teacher: str | Sequence[str] | None = None,  # teacher layers, paired with them by position
        weight: float = 0.5,  # weight of the distillation loss
        schedule: Any = None,  # `Schedule`, or any function: share of the training done → factor on `weight`
        *,
        task_weight: float | None = None,  # weight of the task loss; None: 1 - w
        distill_valid: bool = True,  # False: validation shows the plain task loss and spares the teacher
    ):
        self.teacher, self.loss, self.weight, self.schedule = as_model(teacher), loss, weight, schedule
        self.task_weight, self.distill_valid, self.current_weight = task_weight, distill_valid, float(weight)
        self.activations_student, self.activations_teacher = listify(activations_student), listify(activations_teacher)
        check_weights(weight, task_weight)
        check_schedule(schedule)
        self._loss_params = loss_parameters(loss)
        check_layers(self.activations_student, self.activations_teacher, self._loss_params, self.teacher)
        self._capture_s: FeatureCapture | None = None
        self._history: dict[str, list[float]] = {}
        self._parts: dict[str, Tensor] = {}
        self._steps: list[tuple[Tensor, Tensor, float]] = []
        self._hook: Any = None
        self._capture("teacher")  # do its layers exist?

    # One batch, in the order in which things happen

    def before_fit(self) -> None:
        "Check what can be checked before the first batch."
        self._release()
        self._history, self._steps = {"task_loss": [], "kd_loss": [], "weight": []}, []
        if self.teacher is None:
            warnings.warn(
                "KnowledgeDistillationCallback was loaded from a file, without its teacher, and does nothing: "
                "set its `teacher`, or remove it with `learn.remove_cb(KnowledgeDistillationCallback)`",
                stacklevel=2,
            )
        elif unwrap(self.learn.model) is unwrap(self.teacher):
            raise ValueError("teacher and student are the same model: train a new one, e.g. a smaller one")
        else:
            self._capture("student")
        if isinstance(self.loss, nn.Module):
            self.loss.to(self.dls.device)

    def before_batch(self) -> None:
        "Set the weight and hook the student: only now it is wrapped as it will run (DDP, ...)."
        self._stop()
        self.current_weight = self._weight_now()
        if not self._distils():
            return
        if self._capture_s is None:
            self._capture_s, self._capture_t = self._capture("student"), self._capture("teacher")
            self._ask_teacher = Teacher(self.teacher)
        self._capture_s.start()
        self._hook = self.learn.model.register_forward_pre_hook(self._before_forward)

    def after_loss(self) -> None:
        "Blend the distillation loss into the task loss."
        if not len(self.yb):
            return
        nan = torch.full_like(self.learn.loss.detach(), torch.nan)
        self._parts = {"task_loss": self.learn.loss.detach(), "kd_loss": nan}
        if self._hook is None:
            return
        fm_s = self._capture_s.take()
        with self._capture_t:
            teacher_pred = self._ask_teacher(self.xb)
            fm_t = self._capture_t.take()
        task, w = self.learn.loss_grad, self.current_weight
        kd = self._kd_loss(teacher_pred, fm_s, fm_t).to(task.dtype)
        self._parts["kd_loss"] = kd.detach()
        total = torch.lerp(task, kd, w) if self.task_weight is None else self.task_weight * task + w * kd
        self.learn.loss_grad, self.learn.loss = total, total.clone()

    def after_batch(self) -> None:
        "Forget the batch."
        self._stop()
        if self.training and self._parts:
            self._steps.append((*self._parts.values(), self.current_weight))

    def after_train(self) -> None:
        "Free the epoch's losses on the device."
        self._record()

    def after_fit(self) -> None:
        "Let go of the student."
        self._release()

    # What the user reads

    @property
    def history(self) -> dict[str, list[float]]:
        "`task_loss`, `kd_loss` and `weight` of each training step of the last fit; nan where the teacher did not run."
        self._record()
        return self._history

    @property
    def metrics(self) -> list[AvgMetric]:
        "`task_loss` and `kd_loss` as columns of the progress table: `Learner(..., metrics=[accuracy, *kd.metrics])`."
        return [self._metric("task_loss"), self._metric("kd_loss")]

    # How

    def _weight_now(self) -> float:
        pct = getattr(self, "pct_train", 1.0)  # a Learner that never trained has none: as after training
        factor = 1.0 if self.schedule is None else getattr(self.schedule, "progress", self.schedule)(pct)
        w = float(self.weight * factor)
        check_weights(w, self.task_weight, where=f" at {pct:.0%} of the training (weight {self.weight} times schedule)")
        return w

    def _distils(self) -> bool:
        "Does this batch need the teacher? The first one does, so that mistakes show."
        off = self.current_weight == 0 and self.task_weight is None and self._capture_s is not None
        predicting = hasattr(self.learn, "gather_preds")
        wanted = self.training or self.distill_valid
        return len(self.yb) > 0 and wanted and not off and not predicting and self.teacher is not None

    def _capture(self, whose: str) -> FeatureCapture:
        model, names = unwrap(self.teacher), self.activations_teacher
        if whose == "student":
            model, names = unwrap(self.learn.model), self.activations_student
            if not hasattr(model, "model"):  # fasterai also takes names that start at the Learner
                names = [name.removeprefix("model.") for name in names]
        return FeatureCapture(model, names, whose)

    def _kd_loss(self, teacher_pred: Any, fm_s: dict[str, Tensor], fm_t: dict[str, Tensor]) -> Tensor:
        pred = self.learn.pred
        if isinstance(pred, Tensor):
            teacher_pred = logits(teacher_pred)
        outputs = {"pred": plain(pred), "teacher_pred": plain(teacher_pred), "fm_s": fm_s, "fm_t": fm_t}
        mix = getattr(self.learn.loss_func, "__self__", None)
        with torch.autocast(self.learn.loss_grad.device.type, enabled=False):
            if isinstance(mix, MixHandler) and self.training and "target" in self._loss_params:
                kd = self._mixed_loss(mix, outputs)
            else:
                kd = self.loss(**outputs, target=plain(self.y))
        if not isinstance(kd, Tensor) or kd.ndim:
            raise TypeError(f"the distillation loss must return a scalar tensor, got {kd!r}")
        return kd

    def _mixed_loss(self, mix: MixHandler, outputs: dict[str, Any]) -> Tensor:
        "MixUp and CutMix mix a loss on labels, not the labels: of each sample where the loss can, else of the batch."
        each = {"reduction": "none"} if "reduction" in self._loss_params else {}
        kd = self.loss(**outputs, target=plain(self.y), **each)
        kd1 = self.loss(**outputs, target=plain(detuplify(mix.yb1)), **each)
        return torch.lerp(kd1, kd, mix.lam.to(kd.dtype)).mean()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        "Capture the learner's own forward only. After an interrupted batch another one finds the hooks: remove them."
        own = len(args) == len(self.xb) and all(a is b for a, b in zip(args, self.xb, strict=True))
        self._capture_s.recording = own
        if not own and not self._in_batch():
            self._release()

    def _in_batch(self) -> bool:
        return any(
            f.f_code.co_name == "one_batch" and f.f_locals.get("self") is self.learn
            for f, _ in traceback.walk_stack(None)
        )

    def _metric(self, part: str) -> AvgMetric:
        def value(*preds_and_targets: Any) -> Tensor:
            return self._parts[part]

        value.__name__ = part
        return AvgMetric(value)

    def _record(self) -> None:
        if self._steps:
            task, kd, weight = zip(*self._steps, strict=True)
            self._history["task_loss"] += torch.stack(task).tolist()
            self._history["kd_loss"] += torch.stack(kd).tolist()
            self._history["weight"] += weight
            self._steps = []

    # Letting go

    def _stop(self) -> None:
        "Remove the hooks of a batch and what they hold."
        if self._hook is not None:
            self._hook.remove()
            self._capture_s.stop()
            self._hook = None

    def _release(self) -> None:
        self._stop()
        self._capture_s = self._capture_t = self._ask_teacher = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:  # the end of a fit with `cbs=`, whatever ended it
            self._release()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        "Without the teacher: `learn.export()` saves the student alone."
        return {**self._settings(), "teacher": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "KnowledgeDistillationCallback":
        "With the same teacher."
        memo[id(self.teacher)] = self.teacher
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self._settings(), memo))
        return new

    def _settings(self) -> dict[str, Any]:
        self._record()
        transient = dict.fromkeys(("_capture_s", "_capture_t", "_ask_teacher", "_hook"))
        return {**super().__getstate__(), **transient, "_parts": {}}
