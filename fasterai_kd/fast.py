"Copies of a teacher that give the same outputs sooner."

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ._modes import is_compiled
from ._tensors import only_tensor

__all__ = [
    "compile_with_features",
    "fast_copy",
    "fold_batchnorm",
    "has_hooks",
    "private_copy",
    "use_channels_last",
]

_FUSE: dict[tuple[type[nn.Module], type[nn.Module]], Callable[..., nn.Module]] = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def private_copy(model: nn.Module) -> nn.Module:
    "A copy in evaluation mode that shares the tensors of `model`."
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in shared}).eval()


def has_hooks(model: nn.Module) -> bool:
    "Does any of its modules carry hooks of a forward pass?"
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def fast_copy(
    model: nn.Module,  # in floating point of 32 bits or more
    layers: Sequence[str],  # whose outputs will be looked at
) -> tuple[nn.Module | None, int]:
    """A copy with each BatchNorm folded into the Conv or Linear before it, and how many were.

    Tensors that do not change are shared. The copy is None where this cannot be done with certainty: a model that is
    compiled, carries hooks of its own, keeps a state between batches, is in half precision, or cannot be traced by
    torch.fx.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if has_hooks(model) or is_compiled(model) or hasattr(model, "reset") or any(p.element_size() < 4 for p in floats):
        return None, 0
    try:
        fast = private_copy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fast, fold_batchnorm(fast, layers)
    except Exception:  # what a forward pass may raise when it is traced, or a module when it is copied, is its own
        return None, 0


def fold_batchnorm(model: nn.Module, layers: Sequence[str]) -> int:
    """Fold each BatchNorm whose only input is a Conv's or Linear's output into it, in place; how many there were.

    In a BatchNorm's place an Identity stays, so that its name still gives its output; not folded is a Conv whose own
    output is looked at.
    """
    graph, modules = fx.Tracer().trace(model), dict(model.named_modules())
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    folded = 0
    for first, bn in _followed_by_batchnorm(graph):
        pair = modules.get(first), modules.get(bn)
        fuse = _FUSE.get((type(pair[0]), type(pair[1])))  # type: ignore[arg-type]
        once = all(calls[n] == 1 and names[id(m)] == 1 for n, m in zip((first, bn), pair, strict=True))
        if fuse is None or not once or pair[1].running_mean is None or _is_seen(first, bn, layers):  # type: ignore
            continue
        _replace(model, first, fuse(*pair).requires_grad_(False))
        _replace(model, bn, nn.Identity())
        folded += 1
    return folded


def _followed_by_batchnorm(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    "Names of two modules of which the second alone uses what the first gives."
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            yield str(before.target), str(node.target)


def _is_seen(first: str, bn: str, layers: Sequence[str]) -> bool:
    "Does a layer among `layers` give the output of `first`, before the BatchNorm?"
    return any(f"{first}.".startswith(f"{name}.") and not f"{bn}.".startswith(f"{name}.") for name in layers)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def use_channels_last(model: nn.Module) -> bool:
    "Give each Conv2d of `model` weights of its own in this format; were there any?"
    convs = [m for m in model.modules() if type(m) is nn.Conv2d]
    for conv in convs:
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        conv.weight = nn.Parameter(weight, requires_grad=False)
    return bool(convs)


def compile_with_features(
    model: nn.Module,
    layers: Sequence[str],
    reads_output: bool,  # if not, what comes after the last layer is left out
    **options: Any,  # for torch.compile
) -> Callable[..., Any]:
    "A compiled copy of `model`; with `layers` it returns (output, features by name)."
    model, features = private_copy(model), {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        features[name] = only_tensor(output, f"layer {name!r} of the teacher").clone()

    def run(*xb: Any) -> Any:
        features.clear()
        output = model(*xb)
        return (output if reads_output else None, dict(features)) if layers else output

    for name in dict.fromkeys(layers):
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    return torch.compile(run, **options)
