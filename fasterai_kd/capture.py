"Features of named layers of a model, taken by forward hooks."

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._modes import is_compiled
from ._tensors import only_tensor, plain, unwrap

__all__ = ["FeatureCapture"]


class FeatureCapture:
    """From `start` to `take` or `stop`, keeps what the named layers of one model return.

    A layer that runs several times in a forward pass counts with its last output. A later operation may overwrite an
    output in place (`bn → relu(inplace=True)`); the feature is what the layer returned, so such an output is cloned.
    Which ones need it shows in a layer's first forward, where all are cloned: the version counter of a tensor moves
    when it is overwritten. Compiled code skips hooks: a model that is compiled runs uncompiled meanwhile.
    """

    def __init__(
        self,
        names: Sequence[str],  # layers in the order of the pairs; one may come twice
        whose: str,  # "student" or "teacher", for errors
    ):
        self.names, self.whose, self.recording = list(names), whose, True
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._outputs: dict[str, tuple[nn.Module, bool, Tensor, int]] = {}  # layer, its mode, output, its version
        self._overwritten: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()  # by mode, if known
        self._compiled: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._stance: Any = None

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        "The named layers of `model`, or of what it wraps; ValueError for a name that it does not have."
        return {name: self._find(unwrap(model), name) for name in self.names}

    def start(self, model: nn.Module) -> "FeatureCapture":
        "Hook the layers of `model`; as a context manager, until its end."
        self.stop()
        layers = self.layers(model).items()
        if layers and self._is_compiled(model):
            self._stance = torch.compiler.set_stance("force_eager")
        self._handles = [layer.register_forward_hook(partial(self._keep, name)) for name, layer in layers]
        return self

    def stop(self) -> None:
        "Remove the hooks and forget the features."
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        self._features.clear()
        self._outputs.clear()

    def take(self) -> dict[str, Tensor]:
        "Stop; the features by name in the order given, where a repeated name gets `#2`, `#3`, ..."
        for name in self.names:
            if name not in self._features:
                raise RuntimeError(f"layer {name!r} of the {self.whose} did not run in the forward pass: name another")
        for name, (layer, mode, output, version) in self._outputs.items():
            self._note_overwriting(name, layer, mode, output._version != version)
        features: dict[str, Tensor] = {}
        for i, name in enumerate(self.names):
            n = self.names[:i].count(name) + 1
            features[name if n == 1 else f"{name}#{n}"] = plain(self._features[name])
        self.stop()
        return features

    def __enter__(self) -> "FeatureCapture":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def _keep(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if not self.recording:
            return
        output = only_tensor(output, f"layer {name!r} of the {self.whose}")
        overwritten = self._overwritten.get(layer, {}).get(layer.training)
        if not overwritten:
            self._outputs[name] = (layer, layer.training, output, output._version)
        self._features[name] = output if overwritten is False else output.clone()

    def _note_overwriting(self, name: str, layer: nn.Module, mode: bool, overwritten: bool) -> None:
        if overwritten and self._overwritten.get(layer, {}).get(mode) is False:
            raise RuntimeError(
                f"the output of layer {name!r} of the {self.whose} was overwritten in place in this batch, "
                "but not in the first one, so its features are lost: name another layer"
            )
        self._overwritten.setdefault(layer, {})[mode] = overwritten

    def _is_compiled(self, model: nn.Module) -> bool:
        if model not in self._compiled:
            self._compiled[model] = is_compiled(model)
            if self._compiled[model] and not hasattr(torch.compiler, "set_stance"):
                raise RuntimeError(f"layers of a compiled {self.whose} need torch 2.6 or newer: give the plain model")
        return self._compiled[model]

    def _find(self, model: nn.Module, name: str) -> nn.Module:
        if self.whose == "student" and not hasattr(model, "model"):
            name = name.removeprefix("model.")  # fasterai takes names that start at the Learner
        try:
            return model.get_submodule(name)
        except AttributeError:
            near = get_close_matches(
                name, [n for n, _ in model.named_modules(remove_duplicate=False)], n=3, cutoff=0.75
            )
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "get_model_layers(model) lists them"
            raise ValueError(f"the {self.whose} has no layer {name!r}: {hint}") from None
