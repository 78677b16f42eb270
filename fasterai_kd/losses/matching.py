"Which layer of the student goes with which layer of the teacher."

from collections import OrderedDict
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from fastai.callback.hook import Hooks
from fastai.learner import Learner
from fastcore.basics import tuplify
from torch import Tensor, nn

from .._modules import evaluating
from .._tensors import map_tensors
from ._traits import unequal_losses

__all__ = ["LayerPair", "LayerPairs", "get_model_layers", "get_module_by_name", "match_feature_layers"]

_SKIPPED = (nn.ReLU, nn.ReLU6, nn.BatchNorm2d, nn.Dropout, nn.Identity)
_Shapes = dict[str, tuple[int, ...]]


def get_model_layers(
    model: nn.Module,  # any model
    get_layer_repr: bool = False,  # an OrderedDict of name → representation instead of a list of names
) -> list[str] | dict[str, str]:
    "The names of all layers of `model`, parents before children."
    layers = OrderedDict((name, m) for name, m in model.named_modules(remove_duplicate=False) if name)
    return OrderedDict((name, repr(m)) for name, m in layers.items()) if get_layer_repr else list(layers)


def get_module_by_name(
    module: Any,  # a model, or anything that holds one (a Learner)
    access_string: str,  # dotted path: "layer1.0.conv1"
) -> Any:
    "What is at that path, a layer or a parameter; None where nothing is."
    try:
        return attrgetter(access_string)(module)
    except AttributeError:
        return None


def match_feature_layers(
    student_model: nn.Module,  # or a Learner
    teacher_model: nn.Module,  # or a Learner
    sample_input: Tensor | tuple[Tensor, ...],  # a batch as the models see it, one sample is enough
) -> "LayerPairs":
    """Pairs of layers whose feature maps have the same resolution, from large to small.

    Runs both models once in evaluation mode. Of the layers that give maps (B, C, H, W) of one resolution the
    shallowest in the tree of modules is taken, of equally deep ones the one that runs last. Activations, BatchNorm,
    Dropout and Identity do not count, nor do 1×1 maps. Both models are left as they were.

    Returns `{"student": [names], "teacher": [names]}`, which prints as a table.
    Raises ValueError if no resolution is shared.
    """
    if hasattr(sample_input, "one_batch") or hasattr(sample_input, "train"):
        raise TypeError(
            f"sample_input is a batch as the models see it, got a {type(sample_input).__name__}: give "
            "dls.one_batch()[0]"
        )
    models = [m.model if isinstance(m, Learner) else m for m in (student_model, teacher_model)]
    student, teacher = (_map_shapes(m, sample_input) for m in models)
    by_res_s, by_res_t = _best_by_resolution(student), _best_by_resolution(teacher)
    shared = sorted(by_res_s.keys() & by_res_t.keys(), key=lambda r: (r[0] * r[1], r[0]), reverse=True)
    if not shared:
        raise ValueError(
            f"no resolution is shared: the student's maps are {_list(by_res_s)}, the teacher's {_list(by_res_t)}. "
            "Name layers by hand: Attention takes maps of any resolution, Similarity any features "
            "(of a vision transformer, say, where they are (B, tokens, channels))"
        )
    return LayerPairs([by_res_s[r] for r in shared], [by_res_t[r] for r in shared], student, teacher)


class LayerPair(NamedTuple):
    "A row of the table; of layers named by hand only the names may be known."

    student: str
    teacher: str
    resolution: str = ""  # "56x56", of unequal ones "56x56 <-> 28x28"
    channels: str = ""  # "64 <-> 128"
    fit: str = ""  # the losses that can compare them


class LayerPairs(dict[str, list[str]]):
    "`{'student': names, 'teacher': names}`, paired by position; prints as a table."

    def __init__(self, student: list[str], teacher: list[str], shapes_s: _Shapes, shapes_t: _Shapes):
        super().__init__(student=student, teacher=teacher)
        self._shapes_s, self._shapes_t = shapes_s, shapes_t

    @property
    def rows(self) -> list[LayerPair]:
        "What the table shows; ValueError if one side is longer."
        s, t = self["student"], self["teacher"]
        if len(s) != len(t):
            raise ValueError(f"layers pair by position, but the student has {len(s)} {s} and the teacher {len(t)} {t}")
        return [self._row(*names) for names in zip(s, t, strict=True)]

    def __repr__(self) -> str:
        if len(self["student"]) != len(self["teacher"]):  # being edited
            return super().__repr__()
        w_s, w_t = (max([w, *map(len, self[who])]) for w, who in ((12, "student"), (16, "teacher")))
        lines = [f"{'Student':<{w_s + 4}} {'Teacher':<{w_t}} {'resolution':<12} {'channels':<12} losses that fit"]
        for s, t, resolution, channels, fit in self.rows:
            lines += [f"{s:<{w_s}} <-> {t:<{w_t}} {resolution:<12} {channels:<12} {fit}".rstrip()]
        if any(row.fit not in ("", "all") for row in self.rows):
            lines += ["The other losses fit unequal layers with adapter='auto'."]
        return "\n".join(lines)

    def _row(self, s: str, t: str) -> LayerPair:
        if s not in self._shapes_s or t not in self._shapes_t:  # named by hand
            return LayerPair(s, t)
        (c_s, *res_s), (c_t, *res_t) = self._shapes_s[s], self._shapes_t[t]
        sizes = ["x".join(map(str, res)) for res in ((res_s,) if res_s == res_t else (res_s, res_t))]
        fit = "all" if self._shapes_s[s] == self._shapes_t[t] else ", ".join(unequal_losses())
        return LayerPair(s, t, " <-> ".join(sizes), f"{c_s} <-> {c_t}", fit)


def _map_shapes(model: nn.Module, sample_input: Tensor | tuple[Tensor, ...]) -> _Shapes:
    "(C, H, W) of each layer that gives maps, in the order in which the layers run."
    names = {m: name for name, m in model.named_modules() if name and not isinstance(m, _SKIPPED)}
    shapes: _Shapes = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            shapes[names[module]] = tuple(output.shape[1:])

    param = next(model.parameters(), torch.empty(0))
    xb = [map_tensors(lambda t: t.to(param.device), x) for x in tuplify(sample_input)]
    if len(xb) == 1 and isinstance(xb[0], Tensor) and xb[0].ndim == 3:
        xb = [xb[0].unsqueeze(0)]
    with torch.no_grad(), evaluating(model), Hooks(names, note, detach=False):
        try:
            model(*xb)
        except TypeError as e:
            hint = "sample_input is what the model is called with, without labels: of a batch (x, y) give x"
            raise TypeError(f"{type(model).__name__}: {e}. {hint}") from e
    return shapes


def _best_by_resolution(shapes: _Shapes) -> dict[tuple[int, ...], str]:
    best: dict[tuple[int, ...], str] = {}
    for name, (_, *res) in shapes.items():
        r = tuple(res)
        if r != (1, 1) and (r not in best or name.count(".") <= best[r].count(".")):
            best[r] = name
    return best


def _list(by_res: dict[tuple[int, ...], str]) -> str:
    return ", ".join(f"{h}x{w} ({name})" for (h, w), name in by_res.items()) or "none"
