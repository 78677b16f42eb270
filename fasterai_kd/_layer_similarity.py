"What the layers of trained models see: features, attention maps, how alike they are."

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastai.learner import Learner
from fastcore.basics import listify, tuplify
from torch import Tensor, nn

from ._modules import evaluating
from ._tensors import pixels, plain, shape_of
from .features.hooks import FeatureHooks
from .features.layout import Layouts
from .losses.matching import match_feature_layers

__all__ = ["Layers", "attention_maps", "cka_matrix", "layer_features", "layer_names", "linear_cka"]

Layers = Mapping[str, Sequence[str]]  # {"student": names, "teacher": names}


def layer_names(
    layers: Layers | None,  # None: those of `match_feature_layers`
    student: Any,  # model or Learner
    teacher: Any,  # model or Learner
    xb: Tensor | tuple[Tensor, ...],  # a batch as the models get it
) -> tuple[list[str], list[str]]:
    "The names of the student's and of the teacher's layers."
    if layers is None:
        layers = match_feature_layers(_model(student, "student"), _model(teacher, "teacher"), xb)
    names = listify(layers.get("student")), listify(layers.get("teacher"))
    if not all(names):
        raise ValueError(f"give layers as {{'student': names, 'teacher': names}}, got {layers}")
    return names


def layer_features(
    model: Any,  # or a Learner
    names: Sequence[str],
    xb: Tensor | tuple[Tensor, ...],  # a batch as the model gets it
    who: str,  # "student" or "teacher", for errors
) -> list[Tensor]:
    "What the named layers give for a batch, on the CPU; the model runs in evaluation mode and is left as it was."
    model = _model(model, who)
    param = next(model.parameters(), torch.empty(0))
    inputs = [x.to(param.device, param.dtype if x.is_floating_point() else None) for x in map(plain, tuplify(xb))]
    hooks = FeatureHooks(names, who)
    with torch.no_grad(), evaluating(model), hooks.on(model):
        model(*inputs)
    features = hooks.pop()
    return [features[name].cpu() for name in names]


def attention_maps(model: Any, names: Sequence[str], xb: Tensor, who: str) -> list[Tensor]:
    "(B, H, W) for each layer, also of tokens: the mean over channels of F²."
    maps, layouts = layer_features(model, names, xb, who), Layouts(_model(model, who), who)
    for i, (name, fm) in enumerate(zip(names, maps, strict=True)):
        layout = layouts.of(name, fm, pixels(xb))
        if layout is None or layout.grid is None:
            raise ValueError(f"attention is of maps (B, C, H, W), but layer {name!r} of the {who} gives {shape_of(fm)}")
        maps[i] = layout.as_map(fm)
    return [fm.square().mean(1) for fm in maps]


def linear_cka(
    x: Tensor,  # (B, ...) features of a batch
    y: Tensor,  # (B, ...) other features of the same batch
) -> float:
    """Centered kernel alignment with a linear kernel, HSIC(x, y) / √(HSIC(x, x) · HSIC(y, y)): from 0 to 1 if the same.

    Rotating or scaling the features changes nothing; with few samples of many features it is near 1 for any. Constant
    features give nan.

    Raises ValueError for unequal batches or fewer than two samples.
    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3.
    """
    if len(x) != len(y):
        raise ValueError(f"linear_cka compares features of the same samples, got {shape_of(x)} and {shape_of(y)}")
    return float(_gram(x) @ _gram(y))


def cka_matrix(features_s: Sequence[Tensor], features_t: Sequence[Tensor]) -> Tensor:
    "`linear_cka` of each of the student's with each of the teacher's."
    return torch.stack([_gram(x) for x in features_s]) @ torch.stack([_gram(y) for y in features_t]).T


def _model(model: Any, who: str) -> nn.Module:
    model = model.model if isinstance(model, Learner) else model
    if not isinstance(model, nn.Module):
        raise TypeError(f"the {who} must be a model (nn.Module) or a Learner, got {model!r}")
    return model


def _gram(x: Tensor) -> Tensor:
    "Centered Gram matrix of a batch, flat and of norm 1; summed over parts, since maps in double precision are large."
    if len(x) < 2:
        raise ValueError(f"CKA compares samples of a batch, one is not enough: got features {shape_of(x)}")
    gram = torch.zeros(len(x), len(x), dtype=torch.double)
    for part in torch.split(plain(x).detach().cpu().flatten(1), 2**16, 1):
        centered = part.double() - part.double().mean(0)
        gram += centered @ centered.T
    return gram.flatten() / gram.norm()
