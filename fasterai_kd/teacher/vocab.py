"What the numbers in a batch mean to teacher and student: words of texts, classes."

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .._modules import unwrap
from ._notices import Notices

__all__ = ["Vocabularies", "class_columns", "difference_of", "student_columns", "vocabularies"]


class Vocabularies(NamedTuple):
    "What the numbers in a batch mean, for each input and each target; None for what is no list of names."

    inputs: list[list[Any] | None]  # of texts the words
    targets: list[list[Any] | None]  # the classes

    @property
    def classes(self) -> list[Any] | None:
        "Of the predictions, which are for the first target."
        return self.targets[0] if self.targets else None


def vocabularies(dls: Any) -> Vocabularies:
    "fastai's `Datasets` have one for each input and target; any other data have that of the classes."
    given = _names(getattr(dls, "__dict__", {}).get("vocab"))  # by the user, `dls.vocab = [...]`
    parts = getattr(dls, "tls", None)
    if given is None and parts is not None:
        names = [_names(getattr(part, "vocab", None)) for part in parts]
        return Vocabularies(names[: dls.n_inp], names[dls.n_inp :])
    names = [_names(getattr(dls, "vocab", None)) if given is None else given]
    is_text = hasattr(dls, "seq_len")  # of a language model, whose targets are words too
    return Vocabularies(names, []) if is_text else Vocabularies([], names)


def student_columns(
    theirs: Any,  # dataloaders of the teacher, if it came with some
    model: nn.Module,
    own: Any,  # the student's
    notices: Notices,
) -> list[int] | None:
    "Of the teacher's predictions, where the classes of both are known; None: all."
    known, students = vocabularies(theirs), vocabularies(own)
    _compare_other_targets(known, students, notices)
    names, sure = _names_of_classes(known.classes, model)
    if names is None or students.classes is None:
        return None
    return class_columns(names, students.classes, sure, notices)


def _names_of_classes(own: list[Any] | None, model: nn.Module) -> tuple[list[Any] | None, bool]:
    "As the teacher numbers them, and whether they are of its data: a transformers model has made-up ones too."
    if own is not None:
        return own, True
    labels = getattr(getattr(unwrap(model), "config", None), "id2label", None)
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
    notices.say(
        f"the teacher's predictions are picked by the names of the classes: columns {_some(columns)} of {len(theirs)}"
    )
    return columns


def _compare_other_targets(theirs: Vocabularies, own: Vocabularies, notices: Notices) -> None:
    "A warning where the classes of a second target differ, whose predictions are not picked."
    for i, (a, b) in enumerate(zip(theirs.targets[1:], own.targets[1:], strict=False), 2):
        if a is not None and b is not None and (difference := difference_of(a, b)):
            notices.warn(
                f"teacher and student have different classes for target {i}: {difference}. Only the predictions for "
                "the first target are picked by name: make the student's dataloaders with the teacher's vocab",
            )


def difference_of(theirs: Sequence[Any], own: Sequence[Any]) -> str | None:
    "The first number that means something else; the teacher may know more."
    for i, name in enumerate(own):
        if i >= len(theirs):
            return f"entry {i} is {name!r} for the student, the teacher has {len(theirs)}"
        if theirs[i] != name:
            return f"entry {i} is {theirs[i]!r} for the teacher and {name!r} for the student"
    return None


def _names(vocab: Any) -> list[Any] | None:
    "As they are numbered; None for what is no list of names."
    if vocab is None or isinstance(vocab, (str, Mapping)) or not isinstance(vocab, Iterable):
        return None
    names = list(vocab)
    is_nested = bool(names) and all(isinstance(v, Iterable) and not isinstance(v, str) for v in names)
    return None if is_nested else names


def _some(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:10])) + (", ..." if len(items) > 10 else "")
