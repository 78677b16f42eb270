"Which layer of the student goes with which layer of the teacher."

from collections import OrderedDict
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._stages import Stages, find_stages
from ._traits import unequal_losses

__all__ = ["LayerPair", "LayerPairs", "get_model_layers", "get_module_by_name", "match_feature_layers", "pair_stages"]

_Shapes = Mapping[str, tuple[int, ...]]


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
    teacher_model: nn.Module,  # or a Learner, or a `Teacher` of one model
    sample_input: Tensor | tuple[Tensor, ...],  # a batch as the models see it, one sample is enough
) -> "LayerPairs":
    """Pairs of layers whose feature maps have the same resolution, from large to small.

    Runs both models once in evaluation mode. Of the layers that give maps (B, C, H, W) of one resolution the
    shallowest in the tree of modules is taken, of equally deep ones the one that runs last. Activations, BatchNorm,
    Dropout and Identity do not count, nor do 1×1 maps. Both models are left as they were.

    Of a transformer the blocks count, never the embedding of the patches, a projection of the pixels. A plain vision
    transformer has one resolution, so its L blocks pair by relative depth: map i of n goes with block ⌈i·L/n⌉. Where a
    model has attention in windows, maps have the images' proportions, within a factor of 2.

    Returns `{"student": [names], "teacher": [names]}`, which prints as a table.
    Raises ValueError if no resolution is shared, TypeError for what is no model.
    """
    if hasattr(sample_input, "one_batch") or hasattr(sample_input, "train"):
        raise TypeError(
            f"sample_input is a batch as the models see it, got a {type(sample_input).__name__}: give "
            "dls.one_batch()[0]"
        )
    return pair_stages(*(find_stages(_model_of(m), sample_input) for m in (student_model, teacher_model)))


def pair_stages(student: Stages, teacher: Stages) -> "LayerPairs":
    "The pairs of layers, by resolution or relative depth; ValueError where there are none."
    names = _by_resolution(student, teacher) or _by_depth(student, teacher)
    if not names:
        raise ValueError(
            f"no resolution is shared: the student's maps are {student}, the teacher's {teacher}. "
            "Name layers by hand: Attention takes maps of any resolution, Similarity any features"
        )
    return LayerPairs([s for s, _ in names], [t for _, t in names], student.shapes, teacher.shapes)


def _model_of(source: Any) -> nn.Module:
    "The model of a Learner or `Teacher`."
    model = source if isinstance(source, nn.Module) else getattr(source, "model", None)
    if not isinstance(model, nn.Module) or isinstance(model, nn.ModuleList):
        raise TypeError(
            f"match_feature_layers takes a model, a Learner or a Teacher of one model, got a {type(source).__name__}"
        )
    return model


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
        rows = self.rows
        least = LayerPair(" " * 12, " " * 16, " " * 12, " " * 12)  # so wide at least
        w_s, w_t, w_res, w_ch = (max(len(row[i]) for row in (*rows, least)) for i in range(4))
        lines = [
            f"{'Student':<{w_s + 4}} {'Teacher':<{w_t}} {'resolution':<{w_res}} {'channels':<{w_ch}} losses that fit"
        ]
        for s, t, resolution, channels, fit in rows:
            lines += [f"{s:<{w_s}} <-> {t:<{w_t}} {resolution:<{w_res}} {channels:<{w_ch}} {fit}".rstrip()]
        if any(row.fit not in ("", "all") for row in rows):
            lines += ["The other losses fit unequal layers with adapter='auto'."]
        return "\n".join(lines)

    def _row(self, s: str, t: str) -> LayerPair:
        if s not in self._shapes_s or t not in self._shapes_t:  # named by hand
            return LayerPair(s, t)
        (c_s, *res_s), (c_t, *res_t) = self._shapes_s[s], self._shapes_t[t]
        sizes = ["x".join(map(str, res)) for res in ((res_s,) if res_s == res_t else (res_s, res_t))]
        fit = "all" if self._shapes_s[s] == self._shapes_t[t] else ", ".join(unequal_losses())
        return LayerPair(s, t, " <-> ".join(sizes), f"{c_s} <-> {c_t}", fit)


def _by_resolution(student: Stages, teacher: Stages) -> list[tuple[str, str]]:
    "None of those with one resolution, as vision transformers have."
    if student.is_isotropic or teacher.is_isotropic:
        return []
    s, t = student.by_resolution, teacher.by_resolution
    shared = sorted(s.keys() & t.keys(), key=lambda r: (r[0] * r[1], r[0]), reverse=True)
    return [(s[r], t[r]) for r in shared]


def _by_depth(student: Stages, teacher: Stages) -> list[tuple[str, str]]:
    "Of the longer list the layers that are relatively as deep as those of the shorter one."
    if not (student.is_transformer or teacher.is_transformer):
        return []
    s, t = student.in_order, teacher.in_order
    n = min(len(s), len(t))
    return [(s[-(-i * len(s) // n) - 1], t[-(-i * len(t) // n) - 1]) for i in range(1, n + 1)]
