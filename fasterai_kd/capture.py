"Features of named layers of a model, taken by forward hooks."

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._modes import is_compiled
from ._tensors import by_position, only_tensor, unwrap

__all__ = ["Enough", "FeatureCapture"]


class Enough(BaseException):  # not an Exception: no forward pass may catch it by accident
    "Ends a forward pass when all layers have run."


class FeatureCapture:
    """From `start` to `take` or `stop`, keeps what the named layers of one model return.

    A layer that runs several times in a forward pass counts with its last output. A later operation may overwrite an
    output in place (`bn → relu(inplace=True)`); the feature is what the layer returned, so such an output is cloned.
    Which ones need it shows in a layer's first forward, where all are cloned: the version counter of a tensor moves
    when it is overwritten. Compiled code skips hooks: a model that is compiled runs uncompiled meanwhile.

    With `may_stop` a forward pass ends, by raising `Enough`, as soon as each layer has run; not the first one, which
    shows whether each runs just once.
    """

    def __init__(
        self,
        names: Sequence[str],  # layers in the order of the pairs; one may come twice
        whose: str,  # "student" or "teacher", for errors
    ):
        self.names, self.whose, self.recording = list(names), whose, False
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._outputs: dict[tuple[str, bool], tuple[Tensor, int]] = {}  # by layer and its mode, with version
        self._overwritten: dict[tuple[str, bool], bool] = {}  # likewise, once known
        self._runs: dict[str, int] = {}  # how often each layer ran in this forward
        self._stops, self._run_once = False, False
        self._compiled: bool | None = None  # once known
        self._stance: Any = None

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        "The named layers of `model`, or of what it wraps; ValueError for a name that it does not have."
        return {name: self._find(unwrap(model), name) for name in self.names}

    def start(self, model: nn.Module, may_stop: bool = False) -> "FeatureCapture":
        "Hook the layers of `model`; as a context manager, until its end."
        self.stop()
        self._stops = may_stop and self._run_once
        layers = self.layers(model)
        if layers and self._is_compiled(model):
            self._stance = torch.compiler.set_stance("force_eager")
        self._handles = [m.register_forward_hook(partial(self._keep, name)) for name, m in layers.items()]
        self.recording = True
        return self

    def stop(self) -> None:
        "Remove the hooks and forget the features."
        self.recording = False
        for handle in self._handles:
            handle.remove()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        self._handles, self._stance = [], None
        self._features.clear()
        self._outputs.clear()
        self._runs.clear()

    def take(self) -> dict[str, Tensor]:
        "Stop; the features by name in the order given, where a repeated name gets `#2`, `#3`, ..."
        self._run_once = max(self._runs.values(), default=0) == 1
        for key, (output, version) in self._outputs.items():
            self._note_overwriting(key, output._version != version)
        features = by_position(self.names, self._features, self.whose)
        self.stop()
        return features

    def __enter__(self) -> "FeatureCapture":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def __reduce__(self) -> tuple[Any, ...]:
        "A model copied or saved while it is hooked has hooks that do nothing."
        return FeatureCapture, (self.names, self.whose)

    def _keep(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if not self.recording:
            return
        output, key = only_tensor(output, f"layer {name!r} of the {self.whose}"), (name, layer.training)
        overwritten = self._overwritten.get(key)
        if not overwritten:
            self._outputs[key] = (output, output._version)
        self._features[name] = output if overwritten is False else output.clone()
        self._runs[name] = self._runs.get(name, 0) + 1
        if self._stops and len(self._runs) == len(set(self.names)):
            raise Enough

    def _note_overwriting(self, key: tuple[str, bool], overwritten: bool) -> None:
        if overwritten and self._overwritten.get(key) is False:
            raise RuntimeError(
                f"the output of layer {key[0]!r} of the {self.whose} was overwritten in place in this batch, "
                "but not in the first one, so its features are lost: name another layer"
            )
        self._overwritten[key] = overwritten

    def _is_compiled(self, model: nn.Module) -> bool:
        if self._compiled is None:
            self._compiled = is_compiled(model)
        if self._compiled and not hasattr(torch.compiler, "set_stance"):
            raise RuntimeError(f"layers of a compiled {self.whose} need torch 2.6 or newer: give the plain model")
        return self._compiled

    def _find(self, model: nn.Module, name: str) -> nn.Module:
        if self.whose == "student" and not hasattr(model, "model"):
            name = name.removeprefix("model.")  # fasterai takes names that start at the Learner
        try:
            return model.get_submodule(name)
        except AttributeError:
            names = [n for n, _ in model.named_modules(remove_duplicate=False)]
            near = get_close_matches(name, names, n=3, cutoff=0.75)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "get_model_layers(model) lists them"
            raise ValueError(f"the {self.whose} has no layer {name!r}: {hint}") from None
