"What the losses share: outputs, features, labels and temperature, checked; divergence of softmaxes; sum over pairs."

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .._class_axis import index_labels
from .._tensors import plain, shape_of
from ._traits import unequal_losses

__all__ = [
    "Features",
    "channel_dim",
    "check_temperature",
    "class_indices",
    "counted",
    "equal_pairs",
    "kl",
    "logits",
    "mean",
    "pairs",
    "same_shape",
    "times",
    "total",
    "z_score",
]

Features = Mapping[str, Tensor]
FLAT = 1e-6  # what varies less than this has no shape


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


def logits(loss: str, pred: Tensor, teacher_pred: Tensor, T: float = 1) -> tuple[Tensor, Tensor]:
    "As `same_shape`, for a softmax over dim 1."
    s, t = same_shape(loss, pred, teacher_pred)
    if s.ndim < 2 or s.shape[1] < 2:
        raise ValueError(
            f"{loss} needs logits (B, C) of two or more classes, got {shape_of(s)}: "
            "for regression use Logits, for a single logit MultiLabel"
        )
    check_temperature(loss, T)
    return s, t


def check_temperature(loss: str, T: float) -> None:
    if not 0 < T < math.inf:
        raise ValueError(f"{loss} needs a finite temperature T > 0, got {T}")


def class_indices(loss: str, target: Tensor, s: Tensor) -> Tensor:
    "The target as an index for dim 1 of `s`."
    if not isinstance(target, Tensor):
        raise TypeError(f"{loss} needs one tensor of labels, got a {type(target).__name__}")
    y = index_labels(plain(target), s)
    if y.is_floating_point() or y.shape != s.shape[:1] + s.shape[2:]:
        raise ValueError(
            f"{loss} needs one class index per sample for logits {shape_of(s)}, got a target "
            f"{shape_of(y)} of {y.dtype}: for soft targets use SoftTarget, for multi-label ones MultiLabel"
        )
    return y.long().unsqueeze(1)


def counted(
    loss: str,
    s: Tensor,  # of the student (N, C, ...)
    t: Tensor,  # of the teacher
    target: Tensor | None,  # class indices of all samples, or of the first ones: the others have no labels, and count
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both with 0 where samples or positions do not count, and which do (N, ...); None: all.

    Zeros in place of the outputs, and not only of the losses: 0 · nan is nan in the backward pass.
    """
    if ignore_index is None:
        return s, t, None
    if target is None:
        raise ValueError(f"{loss} ignores the label {ignore_index}, so it needs `target`, the labels")
    n = len(target)
    if n == 0:
        return s, t, None
    counts = torch.ones(s.shape[:1] + s.shape[2:], dtype=torch.bool, device=s.device)
    counts[:n] = class_indices(loss, target, s[:n]).squeeze(1) != ignore_index
    void = ~counts.unsqueeze(1)
    return s.masked_fill(void, 0), t.masked_fill(void, 0), counts


def mean(values: Tensor, counts: Tensor | None) -> Tensor:
    "Of those that count; 0 if none does."
    if counts is None:
        return values.mean()
    return values.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


def kl(s: Tensor, t: Tensor, T: float = 1) -> Tensor:
    "KL(softmax(t / T) ‖ softmax(s / T)) over dim 1."
    log_s, log_t = (s / T).log_softmax(1), (t / T).log_softmax(1)
    return times(log_t.exp(), log_t - log_s).sum(1)


def times(p_t: Tensor, log_ratio: Tensor) -> Tensor:
    "`p_t · log_ratio`; a class that the teacher rules out (logit -inf) counts 0, also where the student does so too."
    return p_t * torch.where(p_t == 0, 0.0, log_ratio)


def z_score(z: Tensor) -> Tensor:
    """Over the classes that no mask rules out, be it -inf or the least number of a dtype.

    Equal logits, as of a head that starts at 0, become 0 and keep their gradient: divided by almost 0 it would explode.
    """
    kept = z > torch.finfo(torch.float16).min
    n = kept.sum(1, keepdim=True, dtype=z.dtype)
    centered = torch.where(kept, z - torch.where(kept, z, 0.0).sum(1, keepdim=True) / n, 0.0)
    std = centered.norm(dim=1, keepdim=True) / (n - 1).clamp(min=1).sqrt()
    return torch.where(kept, centered / torch.where(std > FLAT, 1e-7 + std, 1.0), -math.inf)


def pairs(loss: str, fm_s: Features, fm_t: Features) -> Iterator[tuple[str, Tensor, Tensor]]:
    "(names for errors, student features, teacher features) of each pair, plain and float, the teacher's detached."
    n_s, n_t = len(fm_s or ()), len(fm_t or ())
    if n_s == 0 or n_s != n_t:
        raise ValueError(
            f"{loss} compares layers in pairs, got {n_s} of the student and {n_t} of the teacher: "
            "give activations_student and activations_teacher, e.g. from match_feature_layers"
        )
    for (name_s, s), (name_t, t) in zip(fm_s.items(), fm_t.items(), strict=True):
        names = f"student layer {name_s!r} and teacher layer {name_t!r}"
        if s.shape[:1] != t.shape[:1]:
            raise ValueError(f"{loss}: {names} give different batches, {shape_of(s)} and {shape_of(t)}")
        yield names, plain(s), plain(t).detach()


def equal_pairs(loss: str, fm_s: Features, fm_t: Features) -> Iterator[tuple[str, Tensor, Tensor]]:
    "As `pairs`, of one shape and memory format."
    for names, s, t in pairs(loss, fm_s, fm_t):
        if s.shape != t.shape:
            raise ValueError(
                f"{loss} needs features of one shape, but {names} give {shape_of(s)} and {shape_of(t)}: "
                f"pair other layers, give the callback adapter='auto', or use one of {', '.join(unequal_losses())}"
            )
        if s.stride() != t.stride():  # channels_last, say: one copy is cheaper than each step across two formats
            t = torch.empty_like(s).copy_(t)
        yield names, s, t


def channel_dim(f: Tensor) -> int:
    "1 of maps and vectors, the last of tokens (B, N, C)."
    return 2 if f.ndim == 3 else 1


def total(losses: Iterator[Tensor]) -> Tensor:
    "The sum of the losses, of pairs or parts."
    loss = next(losses)
    for another in losses:
        loss = loss + another
    return loss
