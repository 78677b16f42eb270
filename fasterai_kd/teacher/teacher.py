"The teacher: its predictions and features for a batch."

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import evaluating, is_output, keeps_state
from .._tensors import pixels, plain, predictions, size_of
from ..features.hooks import FeatureHooks
from ._fingerprint import fingerprint
from ._notices import Notices
from ._packing import PREDICTIONS
from .cache import TeacherCache
from .contract import compare_inputs
from .inputs import HALF, InputTransform, autocast, autocast_dtype, prepared
from .output import TeacherOutput, warn_of_probabilities
from .source import as_cache, load_source, naming_the_teacher
from .vocab import student_columns

__all__ = ["Teacher"]


class Teacher:
    """Runs the teacher under `no_grad` in evaluation mode, and restores its state afterwards.

    Give it to `KnowledgeDistillationCallback` in the place of a model, to set an option; share it between callbacks to
    share its cache. By hand: `Teacher(model).forward((x,), ["layer4"])` gives `.pred` and `.features`. Parameters,
    BatchNorm statistics, gradients and train flags of the model are never changed; it moves to the batch's device.
    With a cache, the weights are looked at once an epoch in a fit, and at each call by hand.

    The path of an exported Learner is read with pickle, which runs code: load only files that you trust.

    To make another kind of teacher, override `predict`, which gets the prepared inputs of a batch:

        class Flipped(Teacher):
            def predict(self, x):
                return (self.model(x) + self.model(x.flip(-1))) / 2

    Raises TypeError for what is no teacher, ValueError for a model without weights (on the device 'meta'), for another
    dtype, and for a cache of a recurrent model.
    """

    is_fixed = True  # does it stay as it is during a fit?
    model: Any = None
    dls: Any = None  # its data, if it came with some
    method: Callable[..., Any] | None = None  # of the model, in the place of its forward
    dtype: torch.dtype | None = None
    cache: TeacherCache | None = None
    _columns: list[int] | None
    _checked = False  # has a batch shown what the predictions are?
    _tfm: Any = None
    _inputs = InputTransform(None)
    _of_lists: type[Teacher]

    def __init_subclass__(cls, of_lists: bool = False) -> None:
        if of_lists:
            Teacher._of_lists = cls

    def __new__(cls, source: Any = None, **kwargs: Any) -> Teacher:
        is_list = cls is Teacher and isinstance(source, (list, tuple))
        return super().__new__(cls._of_lists if is_list else cls)

    def __init__(
        self,
        source: Any,  # model, method of one, Learner, path of an exported Learner, or a list of these (an ensemble)
        *,
        tfm: Any = None,  # the student's inputs → the teacher's: a function, fastai's batch transforms, a list of them
        dtype: torch.dtype | None = None,  # autocast of the teacher alone; None: as the student
        cache: bool | str | Path | TeacherCache | None = None,  # store outputs by sample: True, or a folder's path
    ):
        if dtype not in (None, torch.float32, *HALF):
            raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        self.tfm, self.dtype = tfm, dtype
        self._init_state()
        self._take(source)
        self.cache = as_cache(cache, self.members[0].model)
        if self.cache is not None and keeps_state(self.model):
            raise ValueError(
                "the teacher has a method `reset`, so it is recurrent and keeps a state from batch to batch: its "
                "outputs cannot be stored by sample, use no cache"
            )

    def forward(
        self,
        xb: Sequence[Any],  # the student's inputs
        layers: Sequence[str] = (),  # whose features are wanted
        *,
        class_dim: int = 1,  # where predictions have their classes
        reads_predictions: bool = True,  # False: a cache stores features alone
        as_returned: bool = False,  # the model's output as a whole is wanted, not the predictions in it
    ) -> TeacherOutput:
        "Predictions and features of a batch, stored ones where the cache has all of them."
        xb = self.inputs(xb)
        if self.cache is None:
            output, features = self._run(xb, layers, class_dim)
        else:
            output, features = self._stored(self.cache, xb, layers, class_dim, reads_predictions, as_returned)
        if reads_predictions and not self._checked:
            self._checked = True
            warn_of_probabilities(output)
        return TeacherOutput(output, features, pixels(xb), self._columns, class_dim)

    def inputs(self, xb: Sequence[Any]) -> Sequence[Any]:
        "The student's inputs as the teacher gets them, by `tfm`."
        return self._inputs.apply(xb)

    @property
    def tfm(self) -> Any:
        "What makes the teacher's inputs from the student's, as given; None: nothing, or what `meet_data` finds."
        return self._tfm

    @tfm.setter
    def tfm(self, tfm: Any) -> None:
        self._tfm, self._inputs = tfm, InputTransform(tfm)

    def predict(self, *inputs: Any) -> Any:
        "The model's output for prepared inputs."
        return (self.model if self.method is None else self.method)(*inputs)

    # The course of a fit

    def begin_fit(
        self,
        student: nn.Module,
        views: int = 1,  # of each image, after which augmentation repeats itself
        trial: bool = False,  # `lr_find`, after which all is as before
    ) -> None:
        "Raise if teacher and student are one model, or train the same parameters."
        own = {id(m) for m in self.model.modules()} | {id(p) for p in self.model.parameters() if p.requires_grad}
        if id(student) in own:
            raise ValueError("teacher and student are the same model: train a new one, e.g. a smaller one")
        shared = next((name for name, p in student.named_parameters() if id(p) in own), None)
        if shared is not None:
            raise ValueError(f"teacher and student share the trainable parameter {shared!r}: give the student a copy")
        self._looked, self._checked, self._fits = False, False, True
        if self.cache is not None:
            self.cache.begin_fit(views)

    def meet_data(
        self,
        dls: Any,  # the student's
        compares_classes: bool,  # or layers alone?
    ) -> None:
        "The student's inputs and classes become the teacher's where their data tell how; a given `tfm` is left alone."
        if self.tfm is None:
            self._inputs = InputTransform(compare_inputs(self.model, self.dls, dls, self._notices))
        self._columns = student_columns(self.dls, self.model, dls, self._notices) if compares_classes else None

    def begin_epoch(self, training: bool) -> None:
        "A recurrent model forgets its state, as fastai resets the student's; are the weights still the same?"
        reset = getattr(self.model, "reset", None)
        if callable(reset):
            reset()
        self._fits = True  # `get_preds` in a fit has an end of its own
        if self.cache is not None:
            if training and self._looked:
                self._look_at_weights()
            self.cache.begin_epoch(training)

    def end_fit(self) -> None:
        "Write what is to be stored."
        if self.cache is not None and self._looked:
            self._look_at_weights()
        self._fits = False

    def follow(self, student: nn.Module, anew: bool) -> None:
        "Before a batch, with `anew` the first of a fit: a teacher that is made of the student learns whom to follow."

    def after_step(self) -> None:
        "The student has changed."

    @property
    def why_no_raw_outputs(self) -> str | None:
        "Why its predictions are log-probabilities, if they are."
        return "a cache with top_k keeps log-probabilities" if self.cache is not None and self.cache.top_k else None

    def find_layers(self, names: Sequence[str], student: nn.Module | None = None) -> None:
        "ValueError for a layer that the model, or the student of which one is to be made, does not have."
        model = self.model if self.model is not None else student
        if model is not None:
            FeatureHooks(names, "teacher").layers(model)

    @property
    def members(self) -> list[Teacher]:
        "Itself, or those of an ensemble."
        return [self]

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        "A copy of the callback has options of its own; it shares the model and the cache."
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._init_state()
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        "A callback that is saved, say by `learn.export()`, leaves its teacher out."
        return _no_teacher, ()

    def _init_state(self) -> None:
        self._hooks: dict[tuple[str, ...], FeatureHooks] = {}
        self._fingerprint, self._looked, self._fits, self._is_half = "", False, False, False
        self._columns, self._notices = None, Notices()  # of the predictions, for the student's classes
        self._checked = False

    def _take(self, source: Any) -> None:
        self.model, dls, self.method = load_source(source)
        self.dls = dls if len(getattr(dls, "loaders", ())) else None

    @torch.no_grad()
    def _run(self, xb: Sequence[Any], layers: Sequence[str], class_dim: int) -> tuple[Any, dict[str, Tensor]]:
        "What the model returns, and the features of the layers."
        names = [name for name in layers if not is_output(self.model, name)]
        hooks = self._hooks.setdefault(tuple(names), FeatureHooks(names, "teacher"))
        inputs = prepared(self.model, xb)
        with (
            evaluating(self.model),
            autocast(self.dtype, inputs),
            hooks.on(self.model),
            naming_the_teacher(self.model, inputs),
        ):
            output = self.predict(*inputs)
        features = hooks.pop()
        return output, {n: features[n] if n in names else plain(predictions(output)) for n in layers}

    def _stored(
        self,
        cache: TeacherCache,
        xb: Sequence[Any],
        layers: Sequence[str],
        class_dim: int,
        reads_predictions: bool,
        as_returned: bool,
    ) -> tuple[Any, dict[str, Tensor]]:
        "As `_run`, from the cache where it has all samples."

        def run() -> dict[str, Tensor]:
            output, features = self._run(xb, layers, class_dim)
            if not reads_predictions:
                return features
            if as_returned and not isinstance(output, Tensor):
                raise TypeError(
                    f"the cache stores one tensor of predictions, not a {type(output).__name__}: use no cache"
                )
            return {PREDICTIONS: plain(predictions(output)), **features}

        if not self._looked or not self._fits:
            self._look_at_weights(fitting=False)
        kinds = [(type(t).__module__, type(t).__qualname__, t.dtype) for t in (self, *self.members)]
        students = autocast_dtype(xb)
        alone = size_of(xb) == 1  # a product with one row rounds otherwise than with several
        method = getattr(self.method, "__name__", "")
        how = self._fingerprint, kinds, method, [*layers], class_dim, reads_predictions, as_returned, students, alone
        half = self._is_half or any(dtype in HALF for dtype in (students, *(dtype for _, _, dtype in kinds)))
        outputs = cache.fetch(xb, run, str(how), half)
        if cache.is_due:
            self._look_at_weights()
        return outputs.pop(PREDICTIONS, None), outputs

    def _look_at_weights(self, fitting: bool = True) -> None:
        "Are they those of the last look? Only then was what is pending stored under the right name."
        assert self.cache is not None
        before, self._fingerprint, self._looked = self._fingerprint, fingerprint(self.model), True
        self._is_half = any(p.dtype in HALF for p in self.model.parameters())
        self.cache.settle(not before or before == self._fingerprint, fitting)


def as_teacher(source: Any) -> Teacher:
    "A `Teacher` as it is, or one of a model, a Learner, a path or a list; a list of one is that one."
    if isinstance(source, (list, tuple)) and len(source) == 1:
        return as_teacher(source[0])
    return source if isinstance(source, Teacher) else Teacher(source)


def _no_teacher() -> None:
    "What is loaded in its place."
