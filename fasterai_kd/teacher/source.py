"Where a teacher comes from: a model, a Learner, or a file with one."

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import ismethod
from pathlib import Path
from typing import Any, NamedTuple

from fastai.learner import Learner, load_learner
from torch import nn

from .._modules import unwrap
from .._tensors import shape_of, tensors
from .cache import TeacherCache

__all__ = ["Source", "as_cache", "load_source", "naming_the_teacher"]


class Source(NamedTuple):
    "A model, and what is known of the data that it was trained on."

    model: nn.Module
    dls: Any = None  # of its Learner
    method: Callable[..., Any] | None = None  # which makes the predictions or embeddings; None: its forward


def load_source(
    source: Any,  # model, method of one such as `clip.encode_image`, Learner, or path of an exported Learner
) -> Source:
    "TypeError for what is no teacher, FileNotFoundError for a path that does not exist."
    if ismethod(source) and isinstance(source.__self__, nn.Module):
        return load_source(source.__self__)._replace(method=None if source.__name__ == "forward" else source)
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
        "teacher must be a model (nn.Module), a method of one, a Learner, the path of an exported Learner, a list of "
        f"these, a Teacher or an EMATeacher, got a {type(source).__name__}{hint}"
    )


@contextmanager
def naming_the_teacher(model: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    "What goes wrong in its forward says whose it is, and what it got."
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as e:
        if type(e) not in (RuntimeError, ValueError, TypeError, IndexError, AssertionError) or not e.args:
            raise  # out of memory, say
        got = ", ".join(shape_of(x) for x in tensors(inputs))
        raise type(e)(
            f"the teacher, a {type(unwrap(model)).__name__}, failed on inputs of {got}: {e}. If it needs others than "
            "the student, give Teacher(..., tfm=...) a function that makes them"
        ) from e


def as_cache(
    cache: Any,  # True, the path of a folder, a TeacherCache; None or False
    model: nn.Module,  # the teacher's
) -> TeacherCache | None:
    "The cache that the user means; ValueError for one that belongs to another teacher."
    if cache is None or cache is False:
        return None
    if isinstance(cache, (bool, str, Path)):
        cache = TeacherCache(None if isinstance(cache, bool) else cache)
    if not isinstance(cache, TeacherCache):
        raise TypeError(f"cache must be True, the path of a folder or a TeacherCache, got {cache!r}")
    cache.belong_to(model)
    return cache


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
