"What the teacher was trained on, held against the student's data: normalization, image size, classes."

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastai.torch_core import rank_distrib
from torch import nn

from .._modules import unwrap
from .inputs import image_size, normalization, renormalize

__all__ = ["Notices", "class_columns", "compare_inputs", "compare_words", "names_of_classes"]


class Notices:
    "What is printed or warned of once, though several fits start with the same data."

    def __init__(self) -> None:
        self._given: set[str] = set()

    def say(self, text: str) -> None:
        if self._is_new(text) and rank_distrib() == 0:
            print(text)

    def warn(self, text: str) -> None:
        if self._is_new(text):
            warnings.warn(text, stacklevel=3)

    def _is_new(self, text: str) -> bool:
        is_new = text not in self._given
        self._given.add(text)
        return is_new


def compare_inputs(
    model: nn.Module,
    theirs: Any,  # dataloaders of the teacher, if it came with some
    own: Any,  # the student's
    notices: Notices,
) -> Callable[..., Any] | None:
    "How the student's inputs become the teacher's, if they must; warnings where that cannot be told."
    if not hasattr(own, "after_batch"):  # torch's loaders do not tell
        return None
    if theirs is None:
        _compare_config(model, normalization(own), notices)
        return None
    sizes = image_size(theirs), image_size(own)
    if None not in sizes and sizes[0] != sizes[1]:
        notices.warn(
            f"the teacher was trained on images of {_by(sizes[0])}, the student's dataloaders give {_by(sizes[1])}: if "
            "the teacher is worse on these, give Teacher(..., tfm=...) a function that resizes them",
        )
    return _renormalized(normalization(own), normalization(theirs), notices)


def compare_words(theirs: Any, own: Any, notices: Notices) -> None:
    "Of texts: a warning where the same number means another word."
    words = [_flat(next(iter(v))) if _is_nested(v) else None for v in (theirs, own)]
    if words[0] is not None and words[1] is not None and words[0] != words[1]:
        i = next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), None)
        if i is not None:
            notices.warn(
                f"teacher and student have different vocabularies: entry {i} is {words[0][i]!r} for the teacher and "
                f"{words[1][i]!r} for the student. Make the student's dataloaders with the teacher's words",
            )


def names_of_classes(vocab: Any, model: nn.Module | None = None) -> tuple[list[Any] | None, bool]:
    "As they are numbered, and whether they were the teacher's own words: a transformers model has made-up ones too."
    names = _flat(vocab)
    if names is not None:
        return names, True
    labels = getattr(getattr(unwrap(model), "config", None), "id2label", None) if model is not None else None
    return ([labels[i] for i in sorted(labels)] if isinstance(labels, Mapping) else None), False


def class_columns(
    theirs: Sequence[Any],  # classes of the teacher
    own: Sequence[Any],  # of the student
    sure: bool,  # do both mean the same by a name?
    notices: Notices,
) -> list[int] | None:
    "Which of the teacher's predictions the student's classes are; ValueError for a class that the teacher lacks."
    if list(theirs) == list(own):
        return None
    missing = [name for name in own if name not in theirs]
    if missing and not sure:
        return None
    if missing:
        raise ValueError(
            f"the teacher does not know the student's class {missing[0]!r}; its classes are {_some(theirs)}. If they "
            "are the same under other names, and in the same order, give teacher.model in place of the Learner"
        )
    columns = [list(theirs).index(name) for name in own]
    picked = f"columns {_some(columns)} of {len(theirs)}"
    notices.say(f"the teacher's predictions are picked by the names of the classes: {picked}")
    return columns


def _renormalized(own: Any, theirs: Any, notices: Notices) -> Callable[..., Any] | None:
    if own == theirs or (own and theirs and _close(own, theirs)):
        return None
    channels = len((own or theirs)[0])
    none = [0.0] * channels, [1.0] * channels
    own, theirs = own or none, theirs or none
    if len(own[0]) != len(theirs[0]):
        notices.warn(
            f"the teacher was normalized with {len(theirs[0])} channels, the student's images with {len(own[0])}: give "
            "Teacher(..., tfm=...) a function that makes its inputs",
        )
        return None
    notices.say(f"the teacher's inputs are renormalized: {_stats(own)} become {_stats(theirs)}")
    return renormalize(own, theirs)


def _compare_config(model: nn.Module, own: Any, notices: Notices) -> None:
    "timm's models say what their published weights were trained with."
    config = getattr(unwrap(model), "pretrained_cfg", None)
    if not isinstance(config, Mapping) or config.get("mean") is None:
        return
    theirs = list(config["mean"]), list(config["std"])
    own = own or ([0.0] * len(theirs[0]), [1.0] * len(theirs[0]))
    if len(theirs[0]) == len(own[0]) and not _close(own, theirs):
        notices.warn(
            f"the teacher's pretrained_cfg says {_stats(theirs)}, the dataloaders normalize with {_stats(own)}. If it "
            f"has these weights, give Teacher(model, tfm=renormalize({own}, {theirs}))",
        )


def _flat(vocab: Any) -> list[Any] | None:
    "The names of the classes; text has a list of words before that of the classes."
    if vocab is None or isinstance(vocab, (str, Mapping)) or not isinstance(vocab, Iterable):
        return None
    return _flat(list(vocab)[-1]) if _is_nested(vocab) else list(vocab)


def _is_nested(vocab: Any) -> bool:
    if vocab is None or isinstance(vocab, (str, Mapping)) or not isinstance(vocab, Iterable):
        return False
    names = list(vocab)
    return bool(names) and all(isinstance(v, Iterable) and not isinstance(v, str) for v in names)


def _close(a: Any, b: Any) -> bool:
    pairs = [(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=False)]
    return len(a[0]) == len(b[0]) and all(abs(x - y) < 1e-3 for x, y in pairs)


def _some(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:10])) + (", ..." if len(items) > 10 else "")


def _stats(stats: Any) -> str:
    mean, std = (", ".join(f"{x:.3g}" for x in xs) for xs in stats)
    return f"mean ({mean}), std ({std})"


def _by(size: Any) -> str:
    return "×".join(map(str, size))
