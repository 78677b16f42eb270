"""Losses that compare feature maps of paired layers, position by position.

`fm_s` and `fm_t` map layer names to features, the student's and the teacher's. They pair by position:
the first with the first, and so on. The loss is the sum over the pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tensors import shape_of
from ._checks import Features, channel_dim, check_temperature, equal_pairs, kl, pairs, total
from ._traits import feature_loss
from .relations import Similarity

__all__ = ["CWD", "ActivationBoundaries", "Attention", "Cosine", "FitNet", "Similarity"]


@feature_loss(compares_positions=True)
def Attention(
    fm_s: Features,  # student feature maps (B, C, H, W), or tokens (B, N, C), by layer
    fm_t: Features,  # teacher feature maps (B, C', H', W'), or tokens (B, N, C'), by layer
    p: float = 2,  # power of the activations
    **kwargs: Any,
) -> Tensor:
    """Mean squared difference of the attention maps: mean over channels of `|F|^p`, of unit norm over H·W.

    Channels may differ. Of maps with unequal H×W the larger is average-pooled to the smaller. Tokens are positions.

    Raises ValueError for missing layers, unequal batches, 1×1 maps, unequal numbers of tokens, or other features.
    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 2.
    """
    return total(_attention(p, *pair) for pair in pairs("Attention", fm_s, fm_t))


@feature_loss(same_shape=True, compares_positions=True)
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


@feature_loss(same_shape=True, compares_positions=True)
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


@feature_loss(same_shape=True, compares_positions=True)
def CWD(
    fm_s: Features,  # student feature maps (B, C, H, W) or (B, C, D, H, W), or tokens (B, N, C), by layer
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


@feature_loss(same_shape=True, compares_positions=True)
def Cosine(
    fm_s: Features,  # student embeddings (B, C), tokens (B, N, C) or feature maps (B, C, H, W) by layer
    fm_t: Features,  # teacher features by layer, of the same shapes
    **kwargs: Any,
) -> Tensor:
    """1 - the cosine between the feature vectors along the channels, mean over samples and positions.

    For embeddings and encoders, whose features mean something by their direction. The channels may differ with
    `adapter="auto"`. The callback averages a map, or tokens, where the other side is a vector.

    Raises ValueError for missing layers or unequal shapes.
    Source: Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model", CVPR 2024, section 3: summary features.
    """
    return total(_cosine(s, t) for _, s, t in equal_pairs("Cosine", fm_s, fm_t))


def _attention(p: float, names: str, s: Tensor, t: Tensor) -> Tensor:
    if s.ndim != t.ndim or s.ndim not in (3, 4) or (s.ndim == 3 and s.shape[1] != t.shape[1]):
        raise ValueError(
            f"Attention compares feature maps (B, C, H, W), or equally many tokens (B, N, C), but {names} give "
            f"{shape_of(s)} and {shape_of(t)}: name layers with maps, or use Similarity"
        )
    a_s, a_t = _attention_map(s, p), _attention_map(t, p)
    if s.ndim == 3:
        return F.mse_loss(F.normalize(a_s), F.normalize(a_t))
    size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    if size == (1, 1):
        raise ValueError(f"Attention compares where maps are large, but of {names} one has 1x1 pixels: name others")
    if a_s.shape != a_t.shape:
        a_s, a_t = F.adaptive_avg_pool2d(a_s, size), F.adaptive_avg_pool2d(a_t, size)
    return F.mse_loss(F.normalize(a_s.flatten(1)), F.normalize(a_t.flatten(1)))


def _attention_map(f: Tensor, p: float) -> Tensor:
    dim = channel_dim(f)
    return (f * f if p == 2 else f.abs().pow(p)).sum(dim) / f.shape[dim]  # the mean, cheaper in backward


def _boundaries(s: Tensor, t: Tensor, m: float) -> Tensor:
    # where the student is beyond the margin the goal is the student itself: no loss, no gradient
    fixed = s.detach()
    goal = torch.where(t > 0, fixed.clamp(min=m), fixed.clamp(max=-m))
    return F.mse_loss(s, goal)


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s, t, channel_dim(s)).mean()


def _channels(T: float, names: str, s: Tensor, t: Tensor) -> Tensor:
    if s.ndim < 3 or s[0].numel() == s.shape[channel_dim(s)]:
        raise ValueError(
            f"CWD compares the positions of each channel, but {names} give {shape_of(s)}: "
            "name layers with maps, or use Similarity"
        )
    s, t = (x.movedim(channel_dim(x), 1) for x in (s, t))
    return kl(s.flatten(2).flatten(0, 1) / T, t.flatten(2).flatten(0, 1) / T).mean() * T**2
