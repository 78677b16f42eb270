"""Losses that compare feature maps of paired layers.

`fm_s` and `fm_t` map layer names to features, the student's and the teacher's. They pair by position:
the first with the first, and so on. The loss is the sum over the pairs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tensors import plain, shape_of

__all__ = ["ActivationBoundaries", "Attention", "FitNet", "Similarity"]

Features = Mapping[str, Tensor]


def Attention(
    fm_s: Features,  # student feature maps (B, C, H, W) by layer
    fm_t: Features,  # teacher feature maps (B, C', H', W') by layer
    p: float = 2,  # power of the activations
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the attention maps: mean over channels of |F|^`p`, of unit norm over H·W.

    Channels may differ. Of maps with unequal H×W the larger is average-pooled to the smaller.

    Raises ValueError for missing layers, unequal batches, 1×1 maps, or features that are not (B, C, H, W).
    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 2.
    """
    return _sum(_attention(p, *pair) for pair in _pairs("Attention", fm_s, fm_t))


def Similarity(
    fm_s: Features,  # student features (B, ...) by layer
    fm_t: Features,  # teacher features (B, ...) by layer
    pred: Tensor | None = None,  # not used
    p: float = 2,  # norm of the rows of the similarity matrices
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the B×B similarity matrices F·Fᵀ of the flattened features, rows of unit norm.

    Anything but the batch may differ: channels, resolution, rank. A batch of one sample gives 0.

    Raises ValueError for missing layers or unequal batches.
    Source: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3.
    """
    return _sum(F.mse_loss(_similarity(s, p), _similarity(t, p)) for _, s, t in _pairs("Similarity", fm_s, fm_t))


def FitNet(
    fm_s: Features,  # student features by layer
    fm_t: Features,  # teacher features by layer, of the same shapes
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the features.

    Raises ValueError for missing layers or unequal shapes.
    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3, without a regressor.
    """
    return _sum(F.mse_loss(s, t) for _, s, t in _equal_pairs("FitNet", fm_s, fm_t))


def ActivationBoundaries(
    fm_s: Features,  # student features by layer, best before the activation function
    fm_t: Features,  # teacher features by layer, of the same shapes
    m: float = 2,  # margin
    **kwargs: Any,
) -> Tensor:
    """Mean squared distance by which the student misses -`m` where the teacher is off (≤ 0), +`m` where it is on.

    Raises ValueError for missing layers or unequal shapes.
    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries", AAAI 2019: the loss with margin.
    """
    return _sum(_boundaries(s, t, m) for _, s, t in _equal_pairs("ActivationBoundaries", fm_s, fm_t))


def _attention(p: float, names: str, s: Tensor, t: Tensor) -> Tensor:
    if s.ndim != 4 or t.ndim != 4:
        raise ValueError(
            f"Attention compares feature maps (B, C, H, W), but {names} give {shape_of(s)} and {shape_of(t)}: "
            "name layers with maps, or use Similarity"
        )
    a_s, a_t = _attention_map(s, p), _attention_map(t, p)
    size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    if size == (1, 1):
        raise ValueError(f"Attention compares where maps are large, but of {names} one has 1x1 pixels: name others")
    if a_s.shape != a_t.shape:
        a_s, a_t = F.adaptive_avg_pool2d(a_s, size), F.adaptive_avg_pool2d(a_t, size)
    return F.mse_loss(F.normalize(a_s.flatten(1)), F.normalize(a_t.flatten(1)))


def _attention_map(f: Tensor, p: float) -> Tensor:
    return (f * f if p == 2 else f.abs().pow(p)).sum(1) / f.shape[1]  # the mean, cheaper in backward


def _similarity(f: Tensor, p: float) -> Tensor:
    f = f.flatten(1) if f.ndim > 1 else f.unsqueeze(1)
    gram = f @ f.detach().T
    if f.requires_grad:  # G is symmetric: the other half of its gradient is the transpose, which spares a product
        gram = gram + gram.T - gram.detach()
    return F.normalize(gram, p=p, dim=1)


def _boundaries(s: Tensor, t: Tensor, m: float) -> Tensor:
    # where the student is beyond the margin the goal is the student itself: no loss, no gradient
    fixed = s.detach()
    goal = torch.where(t > 0, fixed.clamp(min=m), fixed.clamp(max=-m))
    return F.mse_loss(s, goal)


def _sum(losses: Iterator[Tensor]) -> Tensor:
    total = next(losses)
    for loss in losses:
        total = total + loss
    return total


def _pairs(loss: str, fm_s: Features, fm_t: Features) -> Iterator[tuple[str, Tensor, Tensor]]:
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


def _equal_pairs(loss: str, fm_s: Features, fm_t: Features) -> Iterator[tuple[str, Tensor, Tensor]]:
    for names, s, t in _pairs(loss, fm_s, fm_t):
        if s.shape != t.shape:
            raise ValueError(
                f"{loss} needs features of one shape, but {names} give {shape_of(s)} and {shape_of(t)}: "
                "pair other layers, or use Attention or Similarity"
            )
        yield names, s, t
