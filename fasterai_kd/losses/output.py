"Losses that compare the final predictions of student and teacher: logits (B, C), or dense (B, C, ...)."

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    FLAT,
    check_temperature,
    class_indices,
    counted,
    kl,
    logits,
    mean,
    same_shape,
    times,
    z_score,
)
from ._traits import logit_loss

__all__ = ["DIST", "DecoupledKD", "HardTarget", "Logits", "MultiLabel", "Mutual", "SoftTarget"]


@logit_loss(over_classes=True)
def SoftTarget(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    T: float = 5,  # temperature: higher shows more of the small probabilities
    *,
    standardize: bool = False,  # first bring the logits of each sample to mean 0 and standard deviation 1
    target: Tensor | None = None,  # class indices, read only with `ignore_index`
    ignore_index: int | None = None,  # label of samples or positions that do not count, such as a mask's void
    **kwargs: Any,
) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmaxes at temperature `T`, mean over the batch (and positions).

    With `standardize=True` the scale of the logits no longer counts, only how the classes relate; of two
    classes that leaves which is the larger.

    Raises ValueError for unequal shapes, fewer than two classes or `T` ≤ 0.
    Sources: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", NeurIPS workshop 2014, section 2;
    for `standardize`, Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    s, t, counts = counted("SoftTarget", *logits("SoftTarget", pred, teacher_pred, T), target, ignore_index)
    s, t = (z_score(s), z_score(t)) if standardize else (s, t)
    return mean(kl(s, t, T), counts) * T**2


@logit_loss(over_classes=True)
def Mutual(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    *,
    target: Tensor | None = None,  # class indices, read only with `ignore_index`
    ignore_index: int | None = None,  # label of samples or positions that do not count
    **kwargs: Any,
) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes without a temperature, mean over the batch (and positions).

    Raises ValueError for unequal shapes or fewer than two classes.
    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018, section 3: the mimicry loss.
    """
    s, t, counts = counted("Mutual", *logits("Mutual", pred, teacher_pred), target, ignore_index)
    return mean(kl(s, t), counts)


@logit_loss(raw_outputs=True)
def Logits(
    pred: Tensor,  # student outputs, any shape
    teacher_pred: Tensor,  # teacher outputs, same shape
    *,
    target: Tensor | None = None,  # class indices, read only with `ignore_index`
    ignore_index: int | None = None,  # label of samples or positions that do not count
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the raw outputs: for regression, or logits as they are.

    A class that the teacher rules out by the logit -inf counts 0.

    Raises ValueError for unequal shapes.
    Source: Ba & Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, eq. 1.
    """
    s, t, counts = counted("Logits", *same_shape("Logits", pred, teacher_pred), target, ignore_index)
    out = t == -math.inf
    s, t = s.masked_fill(out, 0), t.masked_fill(out, 0)
    return F.mse_loss(s, t) if counts is None else mean((s - t).square().mean(1), counts)


@logit_loss(raw_outputs=True)
def MultiLabel(
    pred: Tensor,  # student logits, any shape, such as (B, C), or (B,) of a single logit
    teacher_pred: Tensor,  # teacher logits, same shape
    T: float = 1.0,  # temperature
    **kwargs: Any,
) -> Tensor:
    """T² · KL(teacher ‖ student) of the sigmoids at temperature `T`, mean over the batch and the classes.

    For classes that are independent, where the task loss is `BCEWithLogitsLoss`: each logit is a yes or no of its own.

    Raises ValueError for unequal shapes or `T` ≤ 0.
    Source: Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, section 3.2: one-versus-all logits.
    """
    check_temperature("MultiLabel", T)
    s, t = (x / T for x in same_shape("MultiLabel", pred, teacher_pred))
    yes, no = F.logsigmoid(t), F.logsigmoid(-t)
    losses = times(yes.exp(), yes - F.logsigmoid(s)) + times(no.exp(), no - F.logsigmoid(-s))
    return losses.mean() * T**2


@logit_loss(over_classes=True)
def HardTarget(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    *,
    target: Tensor | None = None,  # class indices, read only with `ignore_index`
    ignore_index: int | None = None,  # label of samples or positions that do not count
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy with the teacher's most likely class, mean over the batch (and positions).

    Raises ValueError for unequal shapes or fewer than two classes.
    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021,
    eq. 3: hard-label distillation.
    """
    s, t, counts = counted("HardTarget", *logits("HardTarget", pred, teacher_pred), target, ignore_index)
    return mean(F.cross_entropy(s, t.argmax(1), reduction="none"), counts)


@logit_loss(over_classes=True, reduction=True, needs_labels=True)
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
    ignore_index: int | None = None,  # label of samples or positions that do not count, such as a mask's void
    standardize: bool = False,  # first bring the logits of each sample to mean 0 and standard deviation 1
    **kwargs: Any,
) -> Tensor:
    """T² · (`alpha` · TCKD + `beta` · NCKD), mean over the batch (and positions).

    TCKD is the KL of the two-way distributions (target, rest), NCKD the KL of the softmaxes over the
    C-1 other classes. With `normalize=True` the first part becomes p_t[y] · log(p_t[y] / p_s[y]) at
    temperature 1, without T²; this can be negative.

    Raises ValueError without `target`, for unequal shapes, a target that is not class indices, or `T` ≤ 0.
    Sources: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eq. 7; for `normalize`, Yang et al.,
    "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023: NKD, less the teacher's entropy;
    for `standardize`, Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    if target is None:
        raise ValueError("DecoupledKD needs `target`, the labels; without labels use SoftTarget")
    s, t, counts = counted("DecoupledKD", *logits("DecoupledKD", pred, teacher_pred, T), target, ignore_index)
    s, t = (z_score(s), z_score(t)) if standardize else (s, t)
    y = class_indices("DecoupledKD", target, s)
    if counts is not None:
        y = y.masked_fill(~counts.unsqueeze(1), 0)
    log_p_s, log_rest_s, z_s = _split_target(s / T, y)
    log_p_t, log_rest_t, z_t = _split_target(t / T, y)
    q_t = z_t.scatter(1, y, -math.inf).exp()  # teacher among the other classes; 0 at the target
    nckd = times(q_t, z_t - z_s).sum(1, keepdim=True)
    if normalize:
        log_p1_s, log_p1_t = (z.log_softmax(1).gather(1, y) for z in (s, t))
        tckd = times(log_p1_t.exp(), log_p1_t - log_p1_s) / T**2
    else:
        tckd = times(log_p_t.exp(), log_p_t - log_p_s) + times(log_rest_t.exp(), log_rest_t - log_rest_s)
    loss = (alpha * tckd + beta * nckd) * T**2
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    loss = loss.flatten(1 if reduction == "none" else 0)
    return loss.mean(-1) if counts is None else loss.sum(-1) / counts.reshape(loss.shape).sum(-1).clamp(min=1)


@logit_loss(over_classes=True)
def DIST(
    pred: Tensor,  # student logits (B, C) or (B, C, ...)
    teacher_pred: Tensor,  # teacher logits, same shape
    beta: float = 1.0,  # weight of the correlation over the classes of each sample
    gamma: float = 1.0,  # weight of the correlation over the samples of each class
    T: float = 1.0,  # temperature
    *,
    target: Tensor | None = None,  # class indices, read only with `ignore_index`
    ignore_index: int | None = None,  # label of samples or positions that do not count
    **kwargs: Any,
) -> Tensor:
    """T² · (`beta` · (1 - correlation of rows) + `gamma` · (1 - correlation of columns)) of the softmaxes at `T`.

    Rows are samples, columns classes; the means of their Pearson correlations are taken. Each position of a
    dense output is a sample, of one table of B·positions rows. What hardly varies has correlation 0: a class
    that no sample shows, and all columns of a single sample, which then add the constant T² · `gamma`.

    Raises ValueError for unequal shapes, fewer than two classes or `T` ≤ 0.
    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """
    s, t, counts = counted("DIST", *logits("DIST", pred, teacher_pred, T), target, ignore_index)
    p_s, p_t = ((z / T).softmax(1).movedim(1, -1).flatten(0, -2) for z in (s, t))
    if counts is not None:
        p_s, p_t = p_s[counts.flatten()], p_t[counts.flatten()]
        if not len(p_s):
            return s.sum() * 0
    rows, columns = (1 - _pearson(p_s, p_t, dim).mean() for dim in (1, 0))
    return (beta * rows + gamma * columns) * T**2


def _split_target(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    "log p[y] and log(1 - p[y]) of softmax(z), and `z` shifted to log-probabilities among the other classes."
    others = z.scatter(1, y, -math.inf).clamp(min=torch.finfo(z.dtype).min)  # finite if no class is left
    rest = others.logsumexp(1, keepdim=True)
    z_y = z.gather(1, y)
    total = torch.logaddexp(z_y, rest)
    return z_y - total, rest - total, z - rest


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    "0 where one of both hardly varies, with a gradient that does not explode."
    a, b = (_scaled(x - x.mean(dim, keepdim=True), x.norm(dim=dim, keepdim=True), dim) for x in (a, b))
    return (a * b).sum(dim)


def _scaled(a: Tensor, size: Tensor, dim: int) -> Tensor:
    "To the norm 1; what is almost 0 beside its `size` stays as it is."
    norm = a.norm(dim=dim, keepdim=True)
    return a / torch.where(norm > FLAT * size, norm, 1.0)
