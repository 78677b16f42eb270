"Where a teacher comes from: a model, a Learner, or a file with one."

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastai.learner import Learner, load_learner
from torch import nn

__all__ = ["Source", "load_source"]


class Source(NamedTuple):
    "A model, and what is known of the data that it was trained on."

    model: nn.Module
    dls: Any = None  # of its Learner


def load_source(
    source: Any,  # model, Learner, or path of an exported Learner
) -> Source:
    "TypeError for what is no teacher, FileNotFoundError for a path that does not exist."
    if isinstance(source, (str, Path)):
        source = _load(Path(source))
    if isinstance(source, Learner):
        return Source(source.model, source.dls)
    if isinstance(source, nn.Module):
        if any(p.is_meta for p in source.parameters()):
            raise ValueError("the teacher has no weights, it is on the device 'meta': load it first")
        return Source(source)
    if isinstance(source, Mapping):
        raise TypeError(
            f"teacher must be a model, got a {type(source).__name__} of {len(source)} entries: if it is a state dict, "
            "load it with `model.load_state_dict(...)` and give the model"
        )
    hint = (
        ": are `teacher` and `loss` in each other's place?" if callable(source) and not isinstance(source, type) else ""
    )
    raise TypeError(
        "teacher must be a model (nn.Module), a Learner, the path of an exported Learner, a list of these, a Teacher or "
        f"an EMATeacher, got a {type(source).__name__}{hint}"
    )


def _load(path: Path) -> Learner:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}: `learn.export()` writes to `learn.path/'export.pkl'`")
    try:
        learner = load_learner(path)
        _ = learner.model
        return learner
    except AttributeError as e:
        raise TypeError(
            f"{path} is not an exported Learner ({e}); create it with learn.export(), not learn.save()"
        ) from e
