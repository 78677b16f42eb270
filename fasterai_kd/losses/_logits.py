"What the losses on outputs share: logits, labels and temperature, checked, and the divergence of softmaxes."

import math

import torch
from torch import Tensor

from .._classes import index_labels
from .._tensors import plain, shape_of

__all__ = ["check_temperature", "class_indices", "finite", "kl", "logits", "same_shape"]


def same_shape(loss: str, pred: Tensor, teacher_pred: Tensor) -> tuple[Tensor, Tensor]:
    "Both as plain float tensors, the teacher's detached."
    for who, x in (("student", pred), ("teacher", teacher_pred)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{loss} compares tensors, but the {who}'s output is a {type(x).__name__}")
    if pred.shape != teacher_pred.shape:
        raise ValueError(
            f"{loss} needs outputs of one shape: the student gives {shape_of(pred)}, "
            f"the teacher {shape_of(teacher_pred)}. Do both have the same number of classes?"
        )
    return plain(pred), plain(teacher_pred).detach()


def logits(
    loss: str, pred: Tensor, teacher_pred: Tensor, T: float = 1, standardize: bool = False
) -> tuple[Tensor, Tensor]:
    "As `same_shape`, for a softmax over dim 1."
    s, t = same_shape(loss, pred, teacher_pred)
    if s.ndim < 2 or s.shape[1] < 2:
        raise ValueError(
            f"{loss} needs logits (B, C) of two or more classes, got {shape_of(s)}: "
            "for regression or a single logit use Logits"
        )
    check_temperature(loss, T)
    return (_z_score(s), _z_score(t)) if standardize else (s, t)


def check_temperature(loss: str, T: float) -> None:
    if not 0 < T < math.inf:
        raise ValueError(f"{loss} needs a finite temperature T > 0, got {T}")


def class_indices(target: Tensor, s: Tensor) -> Tensor:
    "The target as an index for dim 1 of `s`."
    if not isinstance(target, Tensor):
        raise TypeError(f"DecoupledKD needs one tensor of labels, got a {type(target).__name__}")
    y = index_labels(plain(target), s)
    if y.is_floating_point() or y.shape != s.shape[:1] + s.shape[2:]:
        raise ValueError(
            f"DecoupledKD needs one class index per sample for logits {shape_of(s)}, got a target "
            f"{shape_of(y)} of {y.dtype}: for soft or multi-label targets use SoftTarget or Logits"
        )
    return y.long().unsqueeze(1)


def kl(s: Tensor, t: Tensor, T: float = 1) -> Tensor:
    "KL(softmax(t / T) ‖ softmax(s / T)) over dim 1."
    log_s, log_t = (s / T).log_softmax(1), finite((t / T).log_softmax(1))
    return (log_t.exp() * (log_t - log_s)).sum(1)


def finite(log_p: Tensor) -> Tensor:
    "A class that the teacher rules out (logit -inf) counts 0 · log 0 = 0."
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _z_score(z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True))
