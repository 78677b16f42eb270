"Features of named layers of one model, taken by forward hooks."

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._tensors import only_tensor, plain

__all__ = ["FeatureCapture"]


class FeatureCapture:
    """Between `start` and `stop` keeps what the named layers of `model` last returned; `take` hands it over.

    A later operation may overwrite a layer's output in place (`bn → relu(inplace=True)`). The feature is the output
    as the layer returned it, so such an output is cloned. Which layers need that shows in the first forward, where
    all are cloned: a tensor's version counter moves when it is overwritten.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],  # layer names in the order of the pairs; a name may come twice
        whose: str,  # "student" or "teacher", for errors
    ):
        self.names, self.whose = list(names), whose
        self.layers = {name: self._find(model, name) for name in self.names}
        self.recording = True
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._watched: dict[str, tuple[Tensor, int, bool]] = {}  # output, its version then, training
        self._overwritten: dict[tuple[str, bool], bool] = {}  # by layer and training flag; absent: not known yet

    def start(self) -> None:
        "Hook the layers."
        self.stop()
        self._handles = [m.register_forward_hook(partial(self._keep, name)) for name, m in self.layers.items()]

    def stop(self) -> None:
        "Remove the hooks and forget the features."
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._features.clear()
        self._watched.clear()

    def take(self) -> dict[str, Tensor]:
        "The features by layer name, in the order given; a repeated name gets `#2`, `#3`, ... Then `stop`."
        for name in self.names:
            if name not in self._features:
                raise RuntimeError(f"layer {name!r} of the {self.whose} did not run in the forward pass: name another")
        for name, (output, version, training) in self._watched.items():
            self._learn_overwriting(name, output._version != version, training)
        features: dict[str, Tensor] = {}
        for name in self.names:
            features[self._key(name, features)] = plain(self._features[name])
        self.stop()
        return features

    def __enter__(self) -> "FeatureCapture":
        self.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self.recording:
            return
        output = only_tensor(output, f"layer {name!r} of the {self.whose}")
        overwritten = self._overwritten.get((name, module.training))
        if not overwritten:
            self._watched[name] = (output, output._version, module.training)
        self._features[name] = output if overwritten is False else output.clone()

    def _learn_overwriting(self, name: str, changed: bool, training: bool) -> None:
        if changed and self._overwritten.get((name, training)) is False:
            raise RuntimeError(
                f"the output of layer {name!r} of the {self.whose} was overwritten in place in this batch, "
                "but not in the first one, so its features are lost: name another layer"
            )
        self._overwritten[name, training] = changed

    @staticmethod
    def _key(name: str, taken: dict[str, Tensor]) -> str:
        key, n = name, 1
        while key in taken:
            n += 1
            key = f"{name}#{n}"
        return key

    def _find(self, model: nn.Module, name: str) -> nn.Module:
        try:
            return model.get_submodule(name)
        except AttributeError:
            near = get_close_matches(name, [n for n, _ in model.named_modules(remove_duplicate=False)], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "get_model_layers(model) lists them"
            raise ValueError(f"the {self.whose} has no layer {name!r}: {hint}") from None
