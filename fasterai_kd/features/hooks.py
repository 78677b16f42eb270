"Features of named layers of a model, taken by forward hooks."

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._modules import find_layer, is_output, uncompiled
from .._tensors import only_tensor, plain, predictions

__all__ = ["FeatureHooks", "warn_if_fixed"]


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
        "Hook the layers during a forward pass, in which a compiled model runs uncompiled."
        if not self.names:
            yield
            return
        self.put_on(model)
        try:
            with uncompiled(model):
                yield
        except BaseException:
            self.clear()
            raise
        finally:
            self.take_off()

    def put_on(self, model: nn.Module) -> None:
        "Hook the layers, for a new forward pass."
        self.take_off()
        self.clear()
        for name, layer in self.layers(model).items():
            find = predictions if is_output(model, name) else only_tensor
            self._handles += [layer.register_forward_hook(partial(self._keep, name, find))]

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

    def _keep(self, name: str, find: Any, layer: nn.Module, args: Any, output: Any) -> None:
        if name not in self.names:  # copied with its model
            return
        output, key = find(output, f"layer {name!r} of the {self.whose}"), (name, layer.training)
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


def warn_if_fixed(features: Mapping[str, Tensor]) -> bool:
    "Of the student: can none of its layers learn?"
    fixed = bool(features) and not any(fm.requires_grad for fm in features.values())
    if fixed:
        warnings.warn(
            f"the student's layers {', '.join(features)} cannot learn from the teacher: they are frozen, or inside "
            "torch.utils.checkpoint with use_reentrant=True (set it to False)",
            stacklevel=2,
        )
    return fixed
