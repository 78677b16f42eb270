"What the losses on features share: pairs of layers, checked, and the sum over them."

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._tensors import plain, shape_of

__all__ = ["Features", "equal_pairs", "equal_shapes", "features_only", "pairs", "total"]

Features = Mapping[str, Tensor]
Loss = TypeVar("Loss", bound=Callable[..., Any])


def features_only(loss: Loss) -> Loss:
    "Say that `loss` reads features alone, so that the teacher may stop after its last layer; of whatever channels."
    loss.reads_predictions = loss.needs_equal_shapes = False  # type: ignore[attr-defined]
    return loss


def equal_shapes(loss: Loss) -> Loss:
    "Say that `loss` reads features alone, of equal shapes: the callback's `adapter` is for it."
    loss = features_only(loss)
    loss.needs_equal_shapes = True  # type: ignore[attr-defined]
    return loss


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
                "pair other layers, give the callback adapter='auto', or use Attention, Similarity, RKD or PKT"
            )
        if s.stride() != t.stride():  # channels_last, say: one copy is cheaper than each step across two formats
            t = torch.empty_like(s).copy_(t)
        yield names, s, t


def total(losses: Iterator[Tensor]) -> Tensor:
    "The sum of the losses, of pairs or parts."
    loss = next(losses)
    for another in losses:
        loss = loss + another
    return loss
