"How a model runs: in evaluation or training mode, compiled."

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "in_training", "is_compiled", "keeps_state"]


@contextmanager
def evaluating(model: nn.Module, modules: list[nn.Module] | None = None) -> Iterator[None]:
    "`model` in evaluation mode; afterwards each of its `modules` has its own `training` flag back."
    training = [m for m in (model.modules() if modules is None else modules) if m.training]
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
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def keeps_state(model: nn.Module) -> bool:
    "From batch to batch, as fastai's recurrent models, which have a method `reset`? fastai gives DataParallel one too."
    own = (m for m in model.modules() if not isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)))
    return any(callable(getattr(m, "reset", None)) for m in own)
