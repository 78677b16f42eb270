"Features of named layers of a model, taken by forward hooks."

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._modules import find_layer, is_compiled
from .._tensors import only_tensor, plain

__all__ = ["FeatureHooks", "StudentFeatures", "warn_if_fixed"]


class FeatureHooks:
    """Keeps what the named layers of one model return: `with hooks.on(model): model(x)`, then `hooks.pop()`.

    A layer that runs several times in a forward pass counts with its last output. A later operation may overwrite an
    output in place (`bn → relu(inplace=True)`); the feature is what the layer returned, so such an output is cloned.
    A layer's first forward shows which outputs need it, by the tensor's version counter; there all are cloned.
    """

    def __init__(
        self,
        names: Sequence[str],  # layers; one may come twice
        whose: str,  # "student" or "teacher", for errors
    ):
        self.names, self.whose = list(dict.fromkeys(names)), whose
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._outputs: dict[tuple[str, bool], tuple[Tensor, int]] = {}  # by layer and its mode, with version
        self._overwritten: dict[tuple[str, bool], bool] = {}  # likewise, once known

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        "The named layers of `model`, or of what it wraps; ValueError for a name that it does not have."
        return {name: find_layer(model, name, self.whose) for name in self.names}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        "Hook the layers during a forward pass; a compiled model runs uncompiled, since compiled code skips hooks."
        if not self.names:
            yield
            return
        self.put_on(model)
        try:
            if is_compiled(model):
                with torch.compiler.set_stance("force_eager"):
                    yield
            else:
                yield
        except BaseException:
            self.clear()
            raise
        finally:
            self.take_off()

    @property
    def are_on(self) -> bool:
        "Are the layers hooked?"
        return bool(self._handles)

    def put_on(self, model: nn.Module) -> None:
        "Hook the layers, for a new forward pass."
        self.take_off()
        self.clear()
        self._handles = [m.register_forward_hook(partial(self._keep, name)) for name, m in self.layers(model).items()]

    def take_off(self) -> None:
        "Remove the hooks."
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        "Drop the features."
        self._features, self._outputs = {}, {}

    def pop(self) -> dict[str, Tensor]:
        "The features by name, which are dropped here."
        for key, (output, version) in self._outputs.items():
            self._note_overwriting(key, output._version != version)
        features = {name: plain(self._features[name]) for name in self.names if name in self._features}
        self.clear()
        for name in self.names:
            if name not in features:
                raise RuntimeError(f"layer {name!r} of the {self.whose} did not run in the forward pass: name another")
        return features

    def __reduce__(self) -> tuple[Any, ...]:
        "A model copied or saved while it is hooked has hooks that keep nothing."
        return FeatureHooks, ((), self.whose)

    def _keep(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if name not in self.names:  # copied with its model
            return
        output, key = only_tensor(output, f"layer {name!r} of the {self.whose}"), (name, layer.training)
        overwritten = self._overwritten.get(key)
        if not overwritten:
            self._outputs[key] = (output, output._version)
        self._features[name] = output if overwritten is False else output.clone()

    def _note_overwriting(self, key: tuple[str, bool], overwritten: bool) -> None:
        if overwritten and self._overwritten.get(key) is False:
            self.clear()
            raise RuntimeError(
                f"the output of layer {key[0]!r} of the {self.whose} was overwritten in place in this batch, "
                "but not in the first one, so its features are lost: name another layer"
            )
        self._overwritten[key] = overwritten


class StudentFeatures:
    """Features of the student's layers in the learner's own forward: `start` before it, `pop` after it.

    A pre-hook on the model that the learner calls knows the learner's inputs by identity and puts the layers' hooks on;
    a forward hook takes them off, also after an exception. The two go with `pop`, `stop`, or the model's next forward.
    """

    def __init__(self, names: Sequence[str]):
        self.hooks = FeatureHooks(names, "student")
        self._handles: list[RemovableHandle] = []
        self._learn: Learner = None
        self._eager: _Eager | None = None

    def start(
        self,
        learn: Learner,
        eager: bool = False,  # run a compiled student uncompiled, also without layers
    ) -> None:
        "Wait for the learner's forward."
        self.stop()
        model = learn.model
        if self.hooks.names and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError("layers cannot be compared in DataParallel's replicas: use learn.distrib_ctx() instead")
        if (self.hooks.names or eager) and is_compiled(model):
            self._eager = _Eager(model)
        if self.hooks.names:
            self._learn = learn
            self._handles = [model.register_forward_pre_hook(self._before_forward)]

    def pop(self) -> dict[str, Tensor]:
        "The features by name."
        features = self.hooks.pop()
        self.stop()
        return features

    def stop(self) -> None:
        "Remove the hooks and drop the features."
        self._take_off()
        self.hooks.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        "A model copied or saved while it is hooked has hooks that do nothing."
        return StudentFeatures, ((),)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self.hooks.are_on:  # in a forward that Ctrl-C ended
            self.stop()
        elif self._learn is None:  # the learner's own forward is done
            self._take_off()
        elif len(args) == len(self._learn.xb) and all(a is b for a, b in zip(args, self._learn.xb, strict=True)):
            self.hooks.put_on(model)
            self._handles.append(model.register_forward_hook(self._after_forward, always_call=True))

    def _after_forward(self, *args: Any) -> None:
        self._learn = None
        self.hooks.take_off()

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._eager is not None:
            self._eager.undo()
        self._handles, self._learn, self._eager = [], None, None
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


def warn_if_fixed(features: Mapping[str, Tensor]) -> None:
    "Of the student: can any of its layers learn?"
    if features and not any(fm.requires_grad for fm in features.values()):
        warnings.warn(
            f"the student's layers {', '.join(features)} cannot learn from the teacher: they are frozen, or inside "
            "torch.utils.checkpoint with use_reentrant=True (set it to False)",
            stacklevel=2,
        )
