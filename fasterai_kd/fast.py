"Copies of a teacher that give the same outputs sooner."

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ._modes import is_compiled, keeps_state
from ._tensors import only_tensor, unwrap

__all__ = [
    "compile_with_features",
    "fast_copy",
    "fold_batchnorm",
    "has_hooks",
    "private_copy",
    "use_channels_last",
    "why_no_copy",
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


def why_no_copy(model: nn.Module) -> str:
    "Why no copy may run in the place of `model`; '' if one may."
    if has_hooks(model):
        return "it has hooks, which must run"
    if is_compiled(model):
        return "it is compiled already"
    if keeps_state(model):
        return "it keeps a state between batches"
    if any("forward" in vars(m) for m in model.modules()):  # may be bound to the original
        return "a forward method was replaced"
    return ""


def fast_copy(
    model: nn.Module,  # in floating point of 32 bits or more
    layers: Sequence[str],  # whose outputs will be looked at
) -> tuple[nn.Module | None, int]:
    """A copy with each BatchNorm folded into the Conv or Linear before it, and how many were.

    Tensors that do not change are shared. The copy is None where this cannot be done with certainty: for the reasons
    of `why_no_copy`, and for a model in half precision or that cannot be copied, or traced by torch.fx.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if why_no_copy(model) or any(p.element_size() < 4 for p in floats):
        return None, 0
    try:
        fast = private_copy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fast, fold_batchnorm(unwrap(fast), layers)
    except Exception:  # what a forward pass may raise when it is traced, or a module when it is copied, is its own
        return None, 0


def fold_batchnorm(model: nn.Module, layers: Sequence[str]) -> int:
    """Fold each BatchNorm whose only input is a Conv's or Linear's output into it, in place; how many there were.

    In a BatchNorm's place an Identity stays, so that its name still gives its output; not folded is a Conv whose own
    output is looked at.
    """
    graph = fx.Tracer().trace(private_copy(model))  # which may keep what it was traced with
    modules = dict(model.named_modules())
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    folded = 0
    for first, bn in _followed_by_batchnorm(graph):
        pair = modules.get(first), modules.get(bn)
        fuse = _FUSE.get((type(pair[0]), type(pair[1])))  # type: ignore[arg-type]
        once = all(calls[n] == 1 and names[id(m)] == 1 for n, m in zip((first, bn), pair, strict=True))
        if fuse is None or not once or not _fit(*pair) or _is_seen(first, bn, layers):
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


def _fit(first: Any, bn: Any) -> bool:
    "Has the BatchNorm fixed statistics, one for each output of `first`?"
    return bn.running_mean is not None and len(first.weight) == bn.num_features


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
    model: nn.Module,  # a private copy: its layers are changed
    layers: Sequence[str],
    reads_output: bool,  # if not, what comes after the last layer is left out
    **options: Any,  # for torch.compile
) -> Callable[..., Any]:
    "`model` compiled; with `layers` it returns (output, features by name)."
    features: dict[str, Tensor] = {}

    def run(*xb: Any) -> Any:
        features.clear()
        output = model(*xb)
        kept = dict(features)
        features.clear()
        return (output if reads_output else None, kept) if layers else output

    for name in dict.fromkeys(layers):
        _keep_output(unwrap(model).get_submodule(name), name, features)
    run.__code__ = run.__code__.replace()  # torch.compile limits how often it compiles one code object
    return torch.compile(run, **options)


def _keep_output(layer: nn.Module, name: str, features: dict[str, Tensor]) -> None:
    # by a class of its own: torch.compile looks at the class before it uses compiled code again, not at hooks
    own: Any = type(layer)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = own.forward(self, *args, **kwargs)
        features[name] = only_tensor(output, f"layer {name!r} of the teacher").clone()
        return output

    layer.__class__ = type(own)(own.__name__, (own,), {"forward": forward})
