"Models: unwrapped, their layers by name, their mode."

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "OUTPUT",
    "evaluating",
    "find_layer",
    "in_training",
    "is_compiled",
    "is_output",
    "keeps_state",
    "uncompiled",
    "unwrap",
]

OUTPUT = "output"  # as the name of a layer: what the model returns
_WRAPPERS = (nn.DataParallel, DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    "The user's model inside DataParallel, DistributedDataParallel and torch.compile."
    while True:
        inner = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def find_layer(
    model: nn.Module,  # may be wrapped
    name: str,  # as `get_model_layers` prints it for the wrapped or the plain model, or from the Learner: "model.conv1"
    whose: str,  # "student" or "teacher", for the error
) -> nn.Module:
    "The layer of this name, for 'output' the model; ValueError with close names where there is none."
    inner = unwrap(model)
    if is_output(model, name):
        return inner
    for candidate, root in ((name, inner), (name, model), *((short, inner) for short in _shortened(name))):
        try:
            return root.get_submodule(candidate)
        except AttributeError:
            continue
    names = [n for n, _ in inner.named_modules(remove_duplicate=False)]
    near = get_close_matches(name, names, n=3, cutoff=0.75)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "get_model_layers(model) lists them"
    raise ValueError(f"the {whose} has no layer {name!r}: {hint}")


def is_output(model: nn.Module, name: str) -> bool:
    "Does `name` stand for what the model itself returns? A layer that is called 'output' comes first."
    short = name.removeprefix("model.")
    return short == OUTPUT and OUTPUT not in unwrap(model)._modules


def _shortened(name: str) -> Iterator[str]:
    "Without the names of wrappers, one after the other."
    while name.startswith(("module.", "_orig_mod.", "model.")):
        name = name.partition(".")[2]
        yield name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    "`model` in evaluation mode; afterwards each of its modules has its own `training` flag back."
    training = [m for m in model.modules() if m.training]
    if not training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    "`model` in training mode; afterwards each of its modules has its own `training` flag back."
    resting = [m for m in model.modules() if not m.training]
    model.train()
    try:
        yield
    finally:
        for m in resting:
            m.training = False


def is_compiled(model: nn.Module) -> bool:
    "By torch.compile, as a whole or in parts?"
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    "A compiled model runs uncompiled, since compiled code skips hooks."
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def keeps_state(model: nn.Module) -> bool:
    "From batch to batch, as fastai's recurrent models, which have a method `reset`? fastai gives DataParallel one too."
    return any(callable(getattr(m, "reset", None)) for m in model.modules() if not isinstance(m, _WRAPPERS))
