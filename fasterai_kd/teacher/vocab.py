"Do teacher and student mean the same by the same number?"

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from .teacher import Teacher

__all__ = ["check_vocab"]


def check_vocab(
    source: Teacher,
    dls: Any,  # the student's
) -> None:
    "Do a teacher that was given as a Learner and the student number classes, or words, in the same order?"
    for teacher in source.members:
        for theirs, own in _vocabs(teacher.vocab, getattr(dls, "vocab", None)):
            i = next((i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), None)
            if i is None:
                continue
            text = (
                f"teacher and student have other vocabularies: entry {i} is {theirs[i]!r} for the teacher and "
                f"{own[i]!r} for the student"
            )
            if sorted(theirs, key=str) == sorted(own, key=str):
                raise ValueError(
                    f"{text}. Make the student's dataloaders with vocab=teacher.dls.vocab; if your loss brings them "
                    "together, give teacher.model"
                )
            warnings.warn(f"{text}. Do they mean the same?", stacklevel=2)


def _vocabs(theirs: Any, own: Any) -> list[tuple[list[Any], list[Any]]]:
    "Pairs of plain lists: text has one of words and one of classes."
    if any(v is None or isinstance(v, (str, Mapping)) or not isinstance(v, Iterable) for v in (theirs, own)):
        return []
    a, b = list(theirs), list(own)
    if a == b:
        return []
    nested = [isinstance(v, Iterable) and not isinstance(v, str) for v in (*a, *b)]
    return [pair for x, y in zip(a, b, strict=False) for pair in _vocabs(x, y)] if any(nested) else [(a, b)]
