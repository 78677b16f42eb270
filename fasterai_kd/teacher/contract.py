"What the teacher was trained on, held against the student's data: normalization, image size, words, tables."

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .._modules import unwrap
from ._notices import Notices
from .inputs import image_size, normalization, renormalize
from .vocab import Vocabularies, difference_of, vocabularies

__all__ = ["compare_inputs"]


def compare_inputs(
    model: nn.Module,
    theirs: Any,  # dataloaders of the teacher, if it came with some
    own: Any,  # the student's
    notices: Notices,
) -> Callable[..., Any] | None:
    "How the student's inputs become the teacher's, if they must; warnings where that cannot be told."
    if not hasattr(own, "after_batch"):  # torch's loaders do not tell
        _warn_of_unknown(normalization(theirs), notices)
        return None
    if theirs is None:
        _compare_config(model, normalization(own), notices)
        return None
    _compare_words(vocabularies(theirs), vocabularies(own), notices)
    _compare_tables(theirs, own, notices)
    _compare_sizes(image_size(theirs), image_size(own), notices)
    return _renormalized(normalization(own), normalization(theirs), notices)


def _compare_words(theirs: Vocabularies, own: Vocabularies, notices: Notices) -> None:
    "Of texts: a warning where the same number means another word."
    for a, b in zip(theirs.inputs, own.inputs, strict=False):
        if a is not None and b is not None and (difference := difference_of(a, b)):
            notices.warn(
                f"teacher and student have different vocabularies: {difference}. The teacher reads other words than "
                "the student: make the student's dataloaders with the teacher's words",
            )


def _compare_tables(theirs: Any, own: Any, notices: Notices) -> None:
    "Of fastai's tables: a warning where the same number means another category or value."
    difference = _table_difference(theirs, own) if hasattr(theirs, "cat_names") and hasattr(own, "cat_names") else None
    if difference:
        notices.warn(
            f"teacher and student process their tables differently: {difference}. Make the student's dataloaders from "
            "the teacher's: DataLoaders(teacher.dls.test_dl(train_df, shuffle=True), teacher.dls.test_dl(valid_df))",
        )


def _table_difference(theirs: Any, own: Any) -> str | None:
    "The first of columns, categories, means and standard deviations."
    for kind in ("cat_names", "cont_names"):
        a, b = list(getattr(theirs, kind)), list(getattr(own, kind))
        if a != b:
            return f"{kind} are {a} for the teacher and {b} for the student"
    for name in own.cat_names:
        codes = (list(_procs(dls, "classes").get(name, ())) for dls in (theirs, own))
        if difference := difference_of(*codes):
            return f"of the categories of {name!r}, {difference}"
    for name in own.cont_names:
        (mean, std), (own_mean, own_std) = _column_stats(theirs, name), _column_stats(own, name)
        if max(abs(mean - own_mean), abs(std - own_std)) > 0.1 * std:  # less is another random split
            stats = f"mean {mean:.3g}, std {std:.3g} for the teacher and {own_mean:.3g}, {own_std:.3g} for the student"
            return f"column {name!r} has {stats}"
    return None


def _column_stats(dls: Any, name: Any) -> tuple[float, float]:
    "With which Normalize changes it; 0 and 1 where there is none."
    return _procs(dls, "means").get(name, 0.0), _procs(dls, "stds").get(name, 1.0)


def _procs(dls: Any, kind: str) -> Mapping[Any, Any]:
    "What Categorify (`classes`) and Normalize (`means`, `stds`) keep of each column; nothing where there is none."
    kept = getattr(dls, kind, None)
    return kept if isinstance(kept, Mapping) else {}


def _compare_sizes(theirs: Any, own: Any, notices: Notices) -> None:
    if theirs is not None and own is not None and theirs != own:
        notices.warn(
            f"the teacher was trained on images of {_by(theirs)}, the student's dataloaders give {_by(own)}: if "
            "the teacher is worse on these, give Teacher(..., tfm=...) a function that resizes them",
        )


def _warn_of_unknown(theirs: Any, notices: Notices) -> None:
    "The teacher's dataloaders normalize; those of the student are torch's."
    if theirs is not None:
        notices.warn(
            f"the teacher was trained on inputs normalized with {_stats(theirs)}, torch's dataloaders of the student "
            "do not tell how theirs are: give Teacher(..., tfm=renormalize(student_stats, teacher_stats)) or, if they "
            "are the same, teacher.model in place of the Learner",
        )


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


def _close(a: Any, b: Any) -> bool:
    pairs = [(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=False)]
    return len(a[0]) == len(b[0]) and all(abs(x - y) < 1e-3 for x, y in pairs)


def _stats(stats: Any) -> str:
    mean, std = (", ".join(f"{x:.3g}" for x in xs) for xs in stats)
    return f"mean ({mean}), std ({std})"


def _by(size: Any) -> str:
    return "×".join(map(str, size))
