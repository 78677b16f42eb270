"Losses that compare the final predictions of student and teacher: logits (B, C), or dense (B, C, ...)."

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tensors import plain, shape_of

__all__ = ["DecoupledKD", "Logits", "Mutual", "SoftTarget"]


def SoftTarget(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    T: float = 5,  # temperature: higher shows more of the small probabilities
    **kwargs: Any,
) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmaxes at temperature `T`, mean over the batch (and positions).

    Raises ValueError for unequal shapes, fewer than two classes or `T` ≤ 0.
    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", NeurIPS workshop 2014, section 2.
    """
    s, t = _logits("SoftTarget", pred, teacher_pred, T)
    return _kl(s / T, t / T).mean() * T**2


def Mutual(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    **kwargs: Any,
) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes without a temperature, mean over the batch (and positions).

    Raises ValueError for unequal shapes or fewer than two classes.
    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018, section 3: the mimicry loss.
    """
    return _kl(*_logits("Mutual", pred, teacher_pred)).mean()


def Logits(
    pred: Tensor,  # student outputs, any shape
    teacher_pred: Tensor,  # teacher outputs, same shape
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the raw outputs: for regression, or logits as they are.

    Raises ValueError for unequal shapes.
    Source: Ba & Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, eq. 1.
    """
    return F.mse_loss(*_same_shape("Logits", pred, teacher_pred))


def DecoupledKD(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    T: float = 4,  # temperature
    alpha: float = 1.0,  # weight of the target class part (TCKD)
    beta: float = 8.0,  # weight of the part among the other classes (NCKD)
    target: Tensor | None = None,  # class indices (B,) or (B, ...), 0 to C-1: required
    normalize: bool = False,  # Normalized KD instead
    *,
    reduction: str = "mean",  # 'mean', or 'none' for one value a sample (B,)
    **kwargs: Any,
) -> Tensor:
    """T² · (`alpha` · TCKD + `beta` · NCKD), mean over the batch (and positions).

    TCKD is the KL of the two-way distributions (target, rest), NCKD the KL of the softmaxes over the
    C-1 other classes. With `normalize=True` the first part becomes p_t[y] · log(p_t[y] / p_s[y]) at
    temperature 1, without T²; this can be negative.

    Raises ValueError without `target`, for unequal shapes, a target that is not class indices, or `T` ≤ 0.
    Sources: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eq. 7; for `normalize`, Yang et al.,
    "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023: NKD, less the teacher's entropy.
    """
    if target is None:
        raise ValueError("DecoupledKD needs `target`, the labels; without labels use SoftTarget")
    s, t = _logits("DecoupledKD", pred, teacher_pred, T)
    y = _class_indices(target, s)
    log_p_s, log_rest_s, z_s = _split_target(s / T, y)
    log_p_t, log_rest_t, z_t = map(_finite, _split_target(t / T, y))
    q_t = z_t.scatter(1, y, -math.inf).exp()  # teacher among the other classes; 0 at the target
    nckd = (q_t * (z_t - z_s)).sum(1, keepdim=True)
    if normalize:
        log_p1_s, log_p1_t = s.log_softmax(1).gather(1, y), _finite(t.log_softmax(1).gather(1, y))
        tckd = log_p1_t.exp() * (log_p1_t - log_p1_s) / T**2
    else:
        tckd = log_p_t.exp() * (log_p_t - log_p_s) + log_rest_t.exp() * (log_rest_t - log_rest_s)
    loss = (alpha * tckd + beta * nckd) * T**2
    if reduction == "none":
        return loss.flatten(1).mean(1)
    if reduction == "mean":
        return loss.mean()
    raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def _split_target(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    "log p[y] and log(1 - p[y]) of softmax(z), and `z` shifted to log-probabilities among the other classes."
    rest = z.scatter(1, y, -math.inf).logsumexp(1, keepdim=True)
    z_y = z.gather(1, y)
    total = torch.logaddexp(z_y, rest)
    return z_y - total, rest - total, z - rest


def _kl(s: Tensor, t: Tensor) -> Tensor:
    "KL(softmax(t) ‖ softmax(s)) over the classes (dim 1)."
    log_s, log_t = s.log_softmax(1), _finite(t.log_softmax(1))
    return (log_t.exp() * (log_t - log_s)).sum(1)


def _finite(log_p: Tensor) -> Tensor:
    "A class that the teacher rules out (logit -inf) counts 0 · log 0 = 0."
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _same_shape(loss: str, pred: Tensor, teacher_pred: Tensor) -> tuple[Tensor, Tensor]:
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


def _logits(loss: str, pred: Tensor, teacher_pred: Tensor, T: float = 1) -> tuple[Tensor, Tensor]:
    "As `_same_shape`, for a softmax over dim 1."
    s, t = _same_shape(loss, pred, teacher_pred)
    if s.ndim < 2 or s.shape[1] < 2:
        raise ValueError(
            f"{loss} needs logits (B, C) of two or more classes, got {shape_of(s)}: "
            "for regression or a single logit use Logits"
        )
    if not 0 < T < math.inf:
        raise ValueError(f"{loss} needs a finite temperature T > 0, got {T}")
    return s, t


def _class_indices(target: Tensor, s: Tensor) -> Tensor:
    "The target as an index for dim 1 of `s`."
    if not isinstance(target, Tensor):
        raise TypeError(f"DecoupledKD needs one tensor of labels, got a {type(target).__name__}")
    y = plain(target)
    if y.is_floating_point() or y.shape != s.shape[:1] + s.shape[2:]:
        raise ValueError(
            f"DecoupledKD needs one class index per sample for logits {shape_of(s)}, got a target "
            f"{shape_of(y)} of {y.dtype}: for soft or multi-label targets use SoftTarget or Logits"
        )
    return y.long().unsqueeze(1)
