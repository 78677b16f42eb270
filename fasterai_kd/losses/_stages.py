"The layers of one model that can be compared with another's: what `match_feature_layers` pairs."

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fastai.callback.hook import Hooks
from fastcore.basics import tuplify
from torch import Tensor, nn

from .._modules import OUTPUT, evaluating, uncompiled, unwrap
from .._tensors import as_input, map_tensors, pixels, tensors
from ..features.layout import Size, has_width, is_channels_last, token_grid

__all__ = ["Stages", "find_stages", "pooled_layer"]

_SKIPPED = (nn.ReLU, nn.ReLU6, nn.BatchNorm2d, nn.Dropout, nn.Identity, nn.Softmax)


@dataclass(frozen=True)
class _Layer:
    "What a layer gives for one sample."

    name: str
    channels: int
    resolution: Size
    is_map: bool  # with channels first, as of a convolutional network
    weights: int  # how many layers with weights there are in it
    in_list: bool  # is it one of a Sequential or ModuleList, as blocks are?
    is_embedding: bool  # does it come before the second layer with weights?

    @property
    def depth(self) -> int:
        return self.name.count(".")

    @property
    def is_block(self) -> bool:
        return self.in_list and self.weights > 1 and not self.is_embedding


class Stages:
    "The layers by resolution, those of a transformer without the embedding of its patches."

    def __init__(
        self,
        layers: Iterable[_Layer],  # in the order in which they run
        has_head: bool,  # or does it give embeddings?
        head: str,  # the last layer with weights
        takes_patches: bool,  # does the first layer with weights project patches?
    ):
        self.has_head = has_head
        layers = list(layers)
        self.shapes = {x.name: (x.channels, *x.resolution) for x in layers if x.resolution != (1, 1)}
        after_embedding = [x for x in layers if x.name in self.shapes and not x.is_embedding]
        self.is_transformer = not all(layer.is_map for layer in _best(after_embedding).values())
        if self.is_transformer:
            layers = [x for x in layers if x.is_block] or after_embedding
        else:
            layers = [x for x in layers if x.is_map and (after_embedding or not takes_patches)]
        before_head = [x.name for x in layers if x.weights and not f"{head}.".startswith(f"{x.name}.")]
        layers = [x for x in layers if x.name in self.shapes]
        best = _best(layers)
        self.by_resolution = {resolution: layer.name for resolution, layer in best.items()}
        blocks = _largest_group(layers) if self.is_transformer else []
        self.is_isotropic = bool(blocks) and len({x.resolution for x in layers if x.depth == blocks[0].depth}) == 1
        deepest_last = sorted(best, key=lambda r: r[0] * r[1], reverse=True)
        self.in_order = [x.name for x in blocks] if self.is_isotropic else [best[r].name for r in deepest_last]
        self.last = next(reversed(self.in_order if self.is_isotropic else before_head), None)  # of one pixel too

    def __str__(self) -> str:
        return ", ".join(f"{h}x{w} ({name})" for (h, w), name in self.by_resolution.items()) or "none"


def find_stages(model: nn.Module, sample_input: Tensor | tuple[Any, ...]) -> Stages:
    "Runs the model once in evaluation mode, on two samples: what they do not change is no feature."
    names = {m: name for name, m in model.named_modules() if name}
    layers: dict[str, _Layer] = {}
    leaves: list[nn.Module] = []  # with parameters, that ran so far

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if any(True for _ in module.parameters(recurse=False)) and not any(True for _ in module.children()):
            leaves.append(module)
        found = list(tensors(output))
        if isinstance(module, _SKIPPED) or len(found) != 1:
            return
        where = _where(module, found[0], size, model)
        if where is not None:
            in_list = isinstance(parents.get(module), (nn.Sequential, nn.ModuleList))
            is_embedding = sum(map(_has_weights, leaves)) < 2
            layers[names[module]] = _Layer(names[module], *where, _weights_in(module), in_list, is_embedding)

    parents = {child: parent for parent in model.modules() for child in parent.children()}
    param = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    xb = [map_tensors(lambda x: as_input(x, param), x) for x in tuplify(sample_input)]
    if len(xb) == 1 and isinstance(xb[0], Tensor) and xb[0].ndim == 3:
        xb = [xb[0].unsqueeze(0)]
    xb, size = _two_samples(xb), pixels(xb)
    with torch.no_grad(), evaluating(model), uncompiled(model), Hooks(names, note, detach=False):
        try:
            output = model(*xb)
        except TypeError as e:
            hint = "sample_input is what the model is called with, without labels: of a batch (x, y) give x"
            raise TypeError(f"{type(model).__name__}: {e}. {hint}") from e
    head = next((leaf for leaf in reversed(leaves) if not isinstance(leaf, nn.BatchNorm1d)), None)
    has_head = _has_head(model, head, [x for x in tensors(output) if x.ndim > 1])
    takes_patches = _projects_patches(next(filter(_has_weights, leaves), None))
    return Stages(layers.values(), has_head, names[head] if head is not None else "", takes_patches)


def pooled_layer(model: nn.Module, sample_input: tuple[Any, ...]) -> str:
    "The layer whose average over positions is the model's embedding: the last map, or its output if it has no head."
    stages = find_stages(model, sample_input)
    if not stages.has_head:
        return OUTPUT
    if stages.last is None:
        raise ValueError(
            f"the student, a {type(unwrap(model)).__name__}, has no feature map whose average could learn the "
            "embeddings: name the layer that is to, with distill(teacher, ..., loss=Cosine, activations_student="
            "'<its name>', activations_teacher='output', adapter='auto')"
        )
    return stages.last


def _has_head(model: nn.Module, last: nn.Module | None, outputs: list[Tensor]) -> bool:
    "Does it say how many classes it predicts? Else, does a linear layer run last, or for dense outputs a convolution?"
    classes = getattr(unwrap(model), "num_classes", None)
    if isinstance(classes, int) and (classes == 0 or any(classes in (x.shape[1], x.shape[-1]) for x in outputs)):
        return classes > 0
    is_dense = any(x.ndim > 2 for x in outputs)
    return last is not None and _has_weights(last) and (is_dense or hasattr(last, "out_features"))


def _where(layer: nn.Module, x: Tensor, size: Size | None, model: nn.Module) -> tuple[int, Size, bool] | None:
    "Channels, resolution, and whether it is a map with channels first; None for what is no feature map."
    if x.ndim not in (3, 4) or len(x) != 2 or _is_attention(x) or (not x.is_meta and torch.equal(x[0], x[1])):
        return None
    is_wide = has_width(layer, x.shape[-1])
    if x.ndim == 4:
        last = bool(is_channels_last(x, size, layer))
        if (last and not is_wide) or (not last and _is_partition(x, size, model)):
            return None
        channels, h, w = (x.shape[i] for i in ((3, 1, 2) if last else (1, 2, 3)))
        return channels, (h, w), not last
    grid = token_grid(x.shape[1], size, model) if size is not None and is_wide else None
    return None if grid is None else (x.shape[2], grid[0], False)


def _is_partition(x: Tensor, size: Size | None, model: nn.Module) -> bool:
    "(B, C, windows, positions), as attention in windows has it? It has not the images' proportions."
    if size is None or 0.5 < x.shape[2] * size[1] / (x.shape[3] * size[0]) < 2:
        return False
    return any("Attention" in type(m).__name__ for m in model.modules())


def _has_weights(leaf: nn.Module) -> bool:
    "Or does it only scale and shift, as a norm?"
    return any(p.ndim > 1 for p in leaf.parameters(recurse=False))


def _weights_in(layer: nn.Module) -> int:
    "How many leaves have weights."
    return sum(_has_weights(m) for m in layer.modules() if not any(True for _ in m.children()))


def _projects_patches(layer: nn.Module | None) -> bool:
    "A convolution whose windows do not overlap?"
    kernel = getattr(layer, "kernel_size", ())
    return isinstance(kernel, tuple) and max(kernel, default=1) > 1 and kernel == getattr(layer, "stride", None)


def _is_attention(x: Tensor) -> bool:
    "Weights whose rows sum to 1?"
    return not x.is_meta and x.shape[-1] > 1 and bool((x >= 0).all() & ((x.float().sum(-1) - 1).abs() < 1e-3).all())


def _two_samples(xb: list[Any]) -> list[Any]:
    "The first two, or the first and another that is made of it where they are equal, or it is the only one."
    two = [map_tensors(lambda x: x[:2] if x.ndim else x, x) for x in xb]
    differ = any(not x.is_meta and not torch.equal(x[0], x[-1]) for x in tensors(two) if x.ndim)
    return two if differ else [map_tensors(_with_another, x) for x in two]


def _with_another(x: Tensor) -> Tensor:
    "The first sample, and another that is made of it."
    if not x.ndim:
        return x
    x = x[:1]
    if not x.is_floating_point():
        return torch.cat([x, x.flip(-1)])
    return torch.cat([x, x + torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype)])


def _best(layers: Iterable[_Layer]) -> dict[Size, _Layer]:
    "Of each resolution the shallowest, of equally deep ones the one that runs last."
    best: dict[Size, _Layer] = {}
    for layer in layers:
        r = layer.resolution
        if r not in best or layer.depth <= best[r].depth:
            best[r] = layer
    return best


def _largest_group(layers: Iterable[_Layer]) -> list[_Layer]:
    "Of those with one parent, in the order in which they run."
    groups: dict[str, list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return max(groups.values(), key=len, default=[])
