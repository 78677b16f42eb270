"""Losses that compare how the samples of a batch relate to each other, layer by layer.

All start from products of the flattened features, (B, B), so student and teacher may differ in everything but
the batch: channels, resolution, rank.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import Features, pairs, total
from ._traits import feature_loss

__all__ = ["PKT", "RKD", "Similarity"]


@feature_loss()
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
    return total(F.mse_loss(_similarity(s, p), _similarity(t, p)) for _, s, t in pairs("Similarity", fm_s, fm_t))


@feature_loss()
def RKD(
    fm_s: Features,  # student features (B, ...) by layer
    fm_t: Features,  # teacher features (B, ...) by layer
    w_d: float = 25.0,  # weight of the distances between two samples
    w_a: float = 50.0,  # weight of the angles between three samples; 0 spares their memory
    **kwargs: Any,
) -> Tensor:
    """`w_d` · Huber loss of the distances between samples + `w_a` · Huber loss of the angles that three samples make.

    Distances are divided by their mean over the pairs, angles are cosines; all B² and B³ are averaged. Two that
    coincide have distance 0 and no angle, and get no gradient from either; fewer than three samples give 0. Needs
    memory for a few times B³ numbers, whatever the size of the features.

    Raises ValueError for missing layers or unequal batches.
    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2.
    """
    return total(_rkd(s, t, w_d, w_a) for _, s, t in pairs("RKD", fm_s, fm_t))


@feature_loss()
def PKT(
    fm_s: Features,  # student features (B, ...) by layer
    fm_t: Features,  # teacher features (B, ...) by layer
    **kwargs: Any,
) -> Tensor:
    """Mean over B×B of P_t · log(P_t / P_s), where P are the cosines between samples, moved to 0…1, rows of sum 1.

    The logarithms are of P + 1e-7, so values down to about -1e-6 occur. A sample of zeros has cosine 0 with
    all and no gradient. A batch of one sample gives 0.

    Raises ValueError for missing layers or unequal batches.
    Source: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.
    """
    return total(_pkt(_neighbors(s), _neighbors(t)) for _, s, t in pairs("PKT", fm_s, fm_t))


def _similarity(f: Tensor, p: float) -> Tensor:
    return F.normalize(_gram(_flat(f)), p=p, dim=1)


def _rkd(s: Tensor, t: Tensor, w_d: float, w_a: float) -> Tensor:
    gram_s, gram_t = (_gram(f - f.mean(0)) for f in (_flat(s), _flat(t)))  # centered: less cancels in distances
    d_s, d_t = _distances(gram_s), _distances(gram_t)
    loss = w_d * F.smooth_l1_loss(_over_mean(d_s), _over_mean(d_t))
    if w_a == 0:
        return loss
    return loss + w_a * F.smooth_l1_loss(_angles(gram_s, d_s), _angles(gram_t, d_t))


def _distances(gram: Tensor) -> Tensor:
    norms = gram.diagonal()
    scale = norms[:, None] + norms
    squared = scale - 2 * gram
    same = squared <= 100 * torch.finfo(gram.dtype).eps * scale  # as far as rounding can tell
    return squared.masked_fill(same, 1).sqrt().masked_fill(same, 0)


def _over_mean(d: Tensor) -> Tensor:
    mean = d.sum() / max(len(d) * (len(d) - 1), 1)
    return d / mean.masked_fill(mean == 0, 1)


def _angles(gram: Tensor, d: Tensor) -> Tensor:
    "cos of the angle at sample j between samples i and k, in [j, i, k]: <i-j, k-j> = G_ik - G_ij - G_jk + G_jj."
    inverse = d.masked_fill(d == 0, math.inf).reciprocal()
    dots = gram - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    return dots * inverse[:, :, None] * inverse[:, None, :]


def _pkt(p_s: Tensor, p_t: Tensor) -> Tensor:
    return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


def _neighbors(f: Tensor) -> Tensor:
    gram = _gram(_flat(f))
    norms = gram.diagonal()
    inverse = norms.masked_fill(norms == 0, math.inf).rsqrt()
    p = (gram * inverse[:, None] * inverse + 1).clamp(min=0) / 2  # rounding gives cosines below -1
    return p / p.sum(1, keepdim=True)


def _flat(f: Tensor) -> Tensor:
    return f.flatten(1) if f.ndim > 1 else f.unsqueeze(1)


def _gram(f: Tensor) -> Tensor:
    gram = f @ f.detach().T
    if f.requires_grad:  # G is symmetric: the other half of its gradient is the transpose, which spares a product
        gram = gram + gram.T - gram.detach()
    return gram
