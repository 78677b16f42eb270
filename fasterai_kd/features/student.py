"The student in the learner's own forward."

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._modules import is_compiled
from .._tensors import join, size_of, take_first
from .hooks import FeatureHooks

__all__ = ["StudentForward"]


class StudentForward:
    """The learner's own forward: features of layers, and inputs without labels beside the learner's.

    `start` before it, `end_forward` and `pop` after it. A pre-hook on the model that the learner calls knows the
    learner's inputs by identity, puts the layers' hooks on and adds the unlabeled inputs if they are of the same
    shapes; a forward hook takes the hooks off, also after an exception, and keeps the unlabeled part of the output to
    itself, so that nobody else sees it. Of several forwards of these inputs the last one counts: a callback may have
    looked at them first.
    """

    def __init__(self, names: Sequence[str]):
        self.hooks = FeatureHooks(names, "student")
        self._before: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._runs = False
        self._learn: Learner = None
        self._eager: _Eager | None = None
        self._extra: tuple[Any, ...] = ()  # unlabeled inputs
        self._joined: Any = None  # the learner's inputs and these, if the forward was of both
        self._output: Any = None  # for the unlabeled ones

    def start(
        self,
        learn: Learner,
        eager: bool = False,  # run a compiled student uncompiled, also without layers
        unlabeled: tuple[Any, ...] = (),  # inputs to join to the learner's
    ) -> None:
        "Wait for the learner's forward."
        self.stop()
        model = learn.model
        if self.hooks.names and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError("layers cannot be compared in DataParallel's replicas: use learn.distrib_ctx() instead")
        skips_hooks = model._compiled_call_impl is not None
        if is_compiled(model) and (self.hooks.names or eager or (unlabeled and skips_hooks)):
            self._eager = _Eager(model)
        if self.hooks.names or unlabeled:
            self._learn, self._extra = learn, unlabeled
            self._before = model.register_forward_pre_hook(self._before_forward, prepend=True)

    def end_forward(self) -> None:
        "What runs from here on is none of the learner's."
        self._take_off()

    def pop(self) -> tuple[dict[str, Tensor], Any, Any]:
        "Features by name; all inputs joined, and the output for the unlabeled ones: None where they were not joined."
        features, joined, output = self.hooks.pop(), self._joined, self._output
        self.stop()
        return features, joined, output

    def stop(self) -> None:
        "Remove the hooks and drop what they kept."
        self._take_off()
        self.hooks.clear()
        self._joined = self._output = None

    def __reduce__(self) -> tuple[Any, ...]:
        "A model copied or saved while it is hooked has hooks that do nothing."
        return StudentForward, ((),)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._learn is None or self._runs:  # an exception or Ctrl-C has ended the last one
            self.stop()
            return None
        xb = self._learn.xb
        if len(args) != len(xb) or any(a is not b for a, b in zip(args, xb, strict=True)):
            return None
        self._runs = True
        self.hooks.put_on(model)
        self._after = model.register_forward_hook(self._after_forward, prepend=True, always_call=True)
        self._joined = join(tuple(args), self._extra) if self._extra else None
        return self._joined

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._runs = False
        self.hooks.take_off()
        if output is None:  # an exception, during which torch lets no hook be removed
            self._learn, self._extra = None, ()
            return None
        if self._after is not None:
            self._after.remove()
        if self._joined is None:
            return None
        n, total = size_of(self._learn.xb), size_of(self._joined)
        self._output = take_first(output, -n, total)
        return take_first(output, n, total)

    def _take_off(self) -> None:
        for handle in filter(None, (self._before, self._after)):
            handle.remove()
        if self._eager is not None:
            self._eager.undo()
        self._before, self._after, self._runs = None, None, False
        self._learn, self._eager, self._extra = None, None, ()
        self.hooks.take_off()


class _Eager:
    """Lets a compiled model run uncompiled until `undo`.

    The process-wide stance of torch.compile is set within the forward alone, so no exception leaves it behind.
    """

    def __init__(self, model: nn.Module):
        self._model, self._call = model, model._compiled_call_impl
        self._own = vars(model).get("forward")  # of torch.compile(model)
        model._compiled_call_impl = None  # of model.compile()
        model.forward = partial(_run_eagerly, model.forward)

    def undo(self) -> None:
        self._model._compiled_call_impl = self._call
        if self._own is None:
            del self._model.forward
        else:
            self._model.forward = self._own


def _run_eagerly(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return forward(*args, **kwargs)
