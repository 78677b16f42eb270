"""Losses that compare feature maps of paired layers, position by position.

`fm_s` and `fm_t` map layer names to features, the student's and the teacher's. They pair by position:
the first with the first, and so on. The loss is the sum over the pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tensors import shape_of
from ._checks import Features, check_temperature, equal_pairs, kl, pairs, total
from ._traits import feature_loss
from .relations import Similarity

__all__ = ["CWD", "ActivationBoundaries", "Attention", "FitNet", "Similarity"]


@feature_loss()
def Attention(
    fm_s: Features,  # student feature maps (B, C, H, W) by layer
    fm_t: Features,  # teacher feature maps (B, C', H', W') by layer
    p: float = 2,  # power of the activations
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the attention maps: mean over channels of `|F|^p`, of unit norm over H·W.

    Channels may differ. Of maps with unequal H×W the larger is average-pooled to the smaller.

    Raises ValueError for missing layers, unequal batches, 1×1 maps, or features that are not (B, C, H, W).
    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 2.
    """
    return total(_attention(p, *pair) for pair in pairs("Attention", fm_s, fm_t))


@feature_loss(same_shape=True)
def FitNet(
    fm_s: Features,  # student features by layer
    fm_t: Features,  # teacher features by layer, of the same shapes
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the features.

    Raises ValueError for missing layers or unequal shapes.
    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3; regressor: see `adapter`.
    """
    return total(F.mse_loss(s, t) for _, s, t in equal_pairs("FitNet", fm_s, fm_t))


@feature_loss(same_shape=True)
def ActivationBoundaries(
    fm_s: Features,  # student features by layer, best before the activation function
    fm_t: Features,  # teacher features by layer, of the same shapes
    m: float = 2,  # margin
    **kwargs: Any,
) -> Tensor:
    """Mean squared distance by which the student misses `-m` where the teacher is off (≤ 0), `+m` where it is on.

    Raises ValueError for missing layers or unequal shapes.
    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries", AAAI 2019: the loss with margin.
    """
    return total(_boundaries(s, t, m) for _, s, t in equal_pairs("ActivationBoundaries", fm_s, fm_t))


@feature_loss(same_shape=True)
def CWD(
    fm_s: Features,  # student feature maps (B, C, H, W) by layer; any number of dimensions after the channels
    fm_t: Features,  # teacher feature maps by layer, of the same shapes
    T: float = 4.0,  # temperature
    **kwargs: Any,
) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmaxes over the positions of each channel, mean over batch and channels.

    Raises ValueError for missing layers, unequal shapes, features without positions, or `T` ≤ 0.
    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
    """
    check_temperature("CWD", T)
    return total(_channels(T, *pair) for pair in equal_pairs("CWD", fm_s, fm_t))


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


def _boundaries(s: Tensor, t: Tensor, m: float) -> Tensor:
    # where the student is beyond the margin the goal is the student itself: no loss, no gradient
    fixed = s.detach()
    goal = torch.where(t > 0, fixed.clamp(min=m), fixed.clamp(max=-m))
    return F.mse_loss(s, goal)


def _channels(T: float, names: str, s: Tensor, t: Tensor) -> Tensor:
    if s.ndim < 3 or s.shape[2:].numel() < 2:
        raise ValueError(
            f"CWD compares the positions of each channel, but {names} give {shape_of(s)}: "
            "name layers with maps, or use Similarity"
        )
    return kl(s.flatten(2).flatten(0, 1) / T, t.flatten(2).flatten(0, 1) / T).mean() * T**2
