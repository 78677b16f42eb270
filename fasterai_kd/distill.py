"One call for those who do not want to choose."

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from fastai.learner import Learner
from fastai.torch_core import to_device
from fastcore.basics import listify, patch
from fastcore.foundation import L
from torch import Tensor

from ._class_axis import class_dim, has_independent_classes, index_labels, is_of_numbers
from ._docs import describe_parameters
from ._modules import OUTPUT, evaluating
from ._tensors import PREDICTION_KEYS, predictions, shape_of
from .distillation_callback import KnowledgeDistillationCallback
from .losses import Attention, Cosine, Logits, MultiLabel, SoftTarget
from .losses._stages import find_stages, pooled_layer
from .losses._traits import name_of, parameters_of
from .losses.combine import parts_of
from .losses.matching import LayerPairs, pair_stages
from .teacher.teacher import Teacher, as_teacher
from .teacher.vocab import vocabularies

__all__ = ["distill"]

Choice = tuple[Callable[..., Tensor], dict[str, Any], str]  # loss, arguments of the callback, why


@patch  # type: ignore[untyped-decorator]
def distill(
    self: Learner,
    teacher: Any,  # model, Learner, path of an exported Learner, a list of these, or `Teacher(...)`
    epochs: int,  # of training; after `freeze_epochs` if given
    lr: float | None = None,  # highest learning rate; None: the Learner's own, with `freeze_epochs` 2e-3
    *,
    unlabeled: Any = None,  # images without labels to learn from too: a DataLoader, or a list of files
    loss: Callable[..., Tensor] | None = None,  # None: picked
    weight: float | str = "auto",  # of the distillation loss; without labels "auto" is 1
    freeze_epochs: int | None = None,  # for a pretrained student: `fine_tune`, with a frozen body for this many epochs
    **kwargs: Any,  # of the callback, such as `schedule`, and of `fit_one_cycle` or `fine_tune`, such as `wd`
) -> KnowledgeDistillationCallback:
    """Trains the student with a teacher: picks the loss, its layers and its weight, and prints which and why.

    `SoftTarget` where student and teacher predict the same classes, those of a teacher's Learner by name, `MultiLabel`
    where these are independent, `Logits` where both predict the same numbers, `Cosine` on embeddings where the teacher
    is an encoder without a head, `Attention` on the pairs of `match_feature_layers` where only features can be
    compared. The progress table shows task and distillation loss beside the metrics.

    An encoder is a teacher whose `num_classes` is 0; if it says nothing, one whose last layer is not linear.

    Returns the callback, with its `history`. Raises TypeError for unknown arguments, ValueError where nothing can be
    compared, such as the features of an ensemble, and for a Learner that has a distillation callback already.
    """
    if any(isinstance(cb, KnowledgeDistillationCallback) for cb in self.cbs):
        raise ValueError(
            "the Learner has a KnowledgeDistillationCallback already, and their losses would be blended twice: use "
            "`fit`, or remove it with learn.remove_cb(KnowledgeDistillationCallback)"
        )
    teacher, cbs = as_teacher(teacher), listify(kwargs.pop("cbs", None))
    options = {name: kwargs.pop(name) for name in _OPTIONS & kwargs.keys()}
    fit = partial(self.fit_one_cycle, epochs, lr)
    if freeze_epochs is not None:
        fit = partial(self.fine_tune, epochs, 2e-3 if lr is None else lr, freeze_epochs)
    inspect.signature(fit).bind(**kwargs)
    xb, y = _sample(self)
    if loss is None:
        loss, layers, why = _choose(self, teacher, xb, y)
        why = f", since {why}"
    else:
        layers, why = _layers_for(loss, self, teacher, xb) if "activations_student" not in options else {}, ""
    if y is None and weight == "auto":
        weight = 1.0  # there is no other loss to balance
    kd = KnowledgeDistillationCallback(teacher, loss, weight=weight, unlabeled=unlabeled, **{**layers, **options})
    print(f"distill with {name_of(loss)}{why}")
    metrics = self.metrics
    self.metrics = metrics + L(kd.metrics)
    try:
        fit(cbs=[kd, *cbs], **kwargs)
    finally:
        self.metrics = metrics
    return kd


describe_parameters(Learner.distill)
_OPTIONS = {"activations_student", "activations_teacher", "schedule", "task_weight", "distill_valid", "adapter"}


def _choose(learn: Learner, teacher: Teacher, xb: tuple[Any, ...], y: Any) -> Choice:
    if teacher.model is None:
        raise TypeError(
            "distill cannot pick a loss for an EMATeacher, which has yet to be made: give loss=SoftTarget, say"
        )
    with torch.no_grad(), evaluating(learn.model):
        pred = predictions(learn.model(*xb), "the student")
    y = index_labels(y, pred)
    dim = class_dim(pred, y, learn.loss_func)
    _meet_data(teacher, learn.dls)
    out = teacher.forward(xb, class_dim=dim)
    comparable = pred.shape == out.pred.shape
    if (y is None or not comparable) and _is_encoder(teacher, out.output, xb):
        layers = {"activations_student": pooled_layer(learn.model, xb), "activations_teacher": OUTPUT}
        why = f"the teacher is an encoder, whose embeddings {shape_of(out.pred)} the student is to give"
        return Cosine, {**layers, "adapter": "auto"}, why
    if not comparable:
        shapes = f"{shape_of(pred)} and {shape_of(out.pred)}"
        pairs = _pairs(learn, teacher, xb, shapes)
        return Attention, _layers(pairs), f"their predictions differ, {shapes}:\n{pairs}"
    if has_independent_classes(learn.loss_func):
        return MultiLabel, {}, f"both predict the same independent classes, {shape_of(pred)}"
    if _are_classes(pred, y, learn.loss_func):
        return SoftTarget, {}, f"both predict the same {pred.shape[dim]} classes"
    return Logits, {}, f"both predict the same numbers, {shape_of(pred)}"


def _meet_data(teacher: Teacher, dls: Any) -> None:
    "The columns of its predictions are those of the student's classes, unless it does not know these."
    try:
        teacher.meet_data(dls, True)
    except ValueError:
        teacher.meet_data(dls, False)


def _is_encoder(teacher: Teacher, output: Any, xb: tuple[Any, ...]) -> bool:
    "Does it give embeddings and no predictions?"
    if teacher.members != [teacher]:
        return False
    if isinstance(output, Mapping):
        return not any(key in output for key in PREDICTION_KEYS)
    names = vocabularies(teacher.dls).classes
    if names and len(names) in predictions(output).shape[1:]:
        return False
    return teacher.method is not None or not find_stages(teacher.model, tuple(teacher.inputs(xb))).has_head


def _layers_for(loss: Callable[..., Any], learn: Learner, teacher: Teacher, xb: tuple[Any, ...]) -> dict[str, Any]:
    "The pairs of layers for a loss that cannot do without."
    needs = [p for p in parts_of(loss) if p.pairs is None and parameters_of(p.loss).get("fm_s")]
    return _layers(_match(learn, teacher, xb)) if needs else {}


def _layers(pairs: LayerPairs) -> dict[str, Any]:
    return {"activations_student": pairs["student"], "activations_teacher": pairs["teacher"]}


def _are_classes(pred: Tensor, y: Any, loss_func: Any) -> bool:
    "Logits of two or more classes? Without labels, unless the task loss is of numbers."
    if pred.ndim < 2 or pred.shape[class_dim(pred, y)] < 2:
        return False
    if y is None or not isinstance(y, Tensor):
        return y is None and not is_of_numbers(loss_func)
    return not y.is_floating_point() and y.ndim == pred.ndim - 1


def _sample(learn: Learner) -> tuple[tuple[Any, ...], Any]:
    "A batch as the fit will see it, of the validation set if there is one: its order is not drawn."
    dls, n_valid = learn.dls, len(learn.dls.loaders) > 1 and len(learn.dls.valid)
    learn.model.to(getattr(dls, "device", None))  # which torch's DataLoaders do not have
    with torch.random.fork_rng([]):  # a loader draws a seed for its workers
        loader = dls.valid if n_valid else dls.train
        batch = loader.one_batch() if hasattr(loader, "one_batch") else next(iter(loader))
    batch = to_device(batch, next((p.device for p in learn.model.parameters()), None))
    batch = (batch,) if isinstance(batch, Tensor) else batch
    n_inp = getattr(dls, "n_inp", max(1, len(batch) - 1))
    return batch[:n_inp], batch[n_inp] if len(batch) > n_inp else None


def _pairs(learn: Learner, teacher: Teacher, xb: tuple[Any, ...], shapes: str) -> LayerPairs:
    try:
        return _match(learn, teacher, xb)
    except ValueError as e:
        raise ValueError(
            f"there is nothing to compare: the predictions of student and teacher are {shapes}, and {e}"
        ) from None


def _match(learn: Learner, teacher: Teacher, xb: tuple[Any, ...]) -> LayerPairs:
    "Each model on its own inputs; an average of the student has its layers."
    model = learn.model if teacher.model is None else teacher.model
    teacher.find_layers([OUTPUT])  # which an ensemble refuses
    return pair_stages(find_stages(learn.model, xb), find_stages(model, tuple(teacher.inputs(xb))))
