"The teacher: its outputs for a batch, without a graph and without a trace."

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from fastai.learner import Learner, load_learner
from torch import Tensor, nn

from ._modes import evaluating, keeps_state
from ._tensors import map_tensors, only_tensor, plain, shape_of, tensors

__all__ = ["Ensemble", "Teacher", "as_teacher", "channels_last", "device_of", "logits"]


class Teacher:
    """Answers `teacher(xb)`: the model in evaluation mode, without a graph, on the batch's device.

    Afterwards its train flags are as before; parameters, BatchNorm statistics, gradients and `requires_grad` are
    never touched. `runs` may be a copy that runs in the model's place, `precision` the dtype of an autocast for it.

    Raises ValueError for a model without weights (on the device 'meta').
    """

    precision: torch.dtype | None = None  # None: as the student
    is_fixed = True  # does it stay as it is during the fit?
    class_dim = 1  # where predictions have their classes
    vocab: Any = None  # of its data, if it came with them

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.refresh()
        if any(p.is_meta for p in model.parameters()):
            raise ValueError("the teacher has no weights, it is on the device 'meta': load it first")

    @property
    def members(self) -> "list[Teacher]":
        "Itself, or those of an ensemble."
        return [self]

    def refresh(self) -> None:
        "Look at the model again: the user may have changed it."
        self.runs: Any = self.model
        self.channels_last = False
        self._modules = list(self.model.modules())
        self._tensors = [*self.model.parameters(), *self.model.buffers()]
        self._param = next((p for p in self.model.parameters() if p.is_floating_point()), None)

    def check(self, student: nn.Module) -> None:
        "Is the teacher somebody else?"
        if any(m is student for m in self.model.modules()):
            raise ValueError("teacher and student are the same model: train a new one, e.g. a smaller one")

    def follow(self, student: nn.Module, anew: bool) -> None:
        "Before a batch, with `anew` the first of a fit: a teacher that is made of the student learns whom to follow."

    def after_step(self) -> None:
        "The student has changed."

    def reset(self) -> None:
        "Forget the state of a recurrent model, as fastai does for the student."
        reset = getattr(self.model, "reset", None)
        if callable(reset):
            reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        "Copies of a callback share its teacher."
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        "A callback that is saved, say by `learn.export()`, leaves its teacher out."
        return _no_teacher, ()

    def keeps_state(self) -> bool:
        "From batch to batch, as fastai's recurrent models?"
        return keeps_state(self.model)

    def stamp(self, closely: bool = False) -> tuple[Any, ...]:
        """Changes when a parameter, a buffer or a gradient is written to: fastai's optimizers write to `.data`.

        `closely`: also where nothing but `.data` is written to, or a tensor replaced by another.
        """
        versions = sum(t._version for t in self._tensors if not t.is_inference())
        versions += sum(1 + p.grad._version for p in self.model.parameters() if p.grad is not None)
        if not closely:
            return (versions,)
        now = [*self.model.parameters(), *self.model.buffers()]
        floats = [t.detach() for t in now if t.is_floating_point() and t.numel() and t.element_size() > 1]
        norms = torch._foreach_norm(floats) if floats else ()
        together = torch.stack([n.double().to(floats[0].device) for n in norms]).tolist() if norms else ()
        return versions, *map(id, now), *together

    def adopt(self, runs: Callable[..., Any], channels_last: bool = False) -> None:
        "Run this in the model's place, until `refresh`."
        self.runs, self.channels_last, self._modules = runs, channels_last, []

    @torch.no_grad()
    def __call__(self, xb: Sequence[Any]) -> Any:
        inputs = self.inputs(xb)
        with evaluating(self.model, self._modules), self._autocast(inputs):
            return self.runs(*inputs)

    def inputs(self, xb: Sequence[Any]) -> list[Any]:
        "The student's inputs in the teacher's precision; moves the teacher to them."
        inputs, p, device = [map_tensors(plain, x) for x in xb], self._param, device_of(xb)
        if p is None or device is None:
            return inputs
        if p.device != device:
            self.model.to(device)
            self._tensors = [*self.model.parameters(), *self.model.buffers()]
        inputs = [map_tensors(lambda x: x.to(p.dtype) if x.is_floating_point() else x, x) for x in inputs]
        return [channels_last(x) for x in inputs] if self.channels_last else inputs

    def _autocast(self, inputs: Sequence[Any]) -> Any:
        device, dtype = device_of(inputs), self.precision
        if dtype is None or device is None:
            return nullcontext()
        half = dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(device.type, dtype if half else None, enabled=half)


def device_of(xb: Sequence[Any]) -> torch.device | None:
    "Where the first tensor is."
    return next((x.device for x in tensors(xb)), None)


def channels_last(x: Any) -> Any:
    "Images in this memory format; anything else as it is."
    is_map = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def _no_teacher() -> None:
    "What is loaded in its place."


class Ensemble(Teacher):
    "Several classifiers as one: the mean of their probabilities, as log-probabilities."

    def __init__(self, members: Sequence[Teacher]):
        self._members = list(members)
        super().__init__(nn.ModuleList(t.model for t in members))

    def __call__(self, xb: Sequence[Any]) -> Tensor:
        dim = self.class_dim
        for teacher in self._members:
            teacher.class_dim = dim
        outputs = [plain(logits(teacher(xb))) for teacher in self._members]
        if outputs[0].ndim < 2 or outputs[0].shape[dim] < 2:
            raise ValueError(f"an ensemble is of classifiers (B, C), got {shape_of(outputs[0])}: give one teacher")
        return torch.stack([o.log_softmax(dim) for o in outputs]).exp().mean(0).log()

    @property
    def members(self) -> list[Teacher]:
        return [member for teacher in self._members for member in teacher.members]

    def refresh(self) -> None:
        self.runs = self.model
        for teacher in self._members:
            teacher.refresh()

    def stamp(self, closely: bool = False) -> tuple[Any, ...]:
        return tuple(teacher.stamp(closely) for teacher in self._members)

    def reset(self) -> None:
        for teacher in self._members:
            teacher.reset()


def as_teacher(
    teacher: Any,  # a module, a Learner, the path of an exported Learner, a list of these, or a `Teacher`
) -> Teacher:
    "The `Teacher` that the user means."
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    if isinstance(teacher, (str, Path)):
        teacher = _load(teacher)
    if isinstance(teacher, Learner):
        source = Teacher(teacher.model)
        source.vocab = getattr(teacher.dls, "vocab", None) if len(getattr(teacher.dls, "loaders", ())) else None
        return source
    if isinstance(teacher, (list, tuple)) and teacher:
        members = [as_teacher(t) for t in teacher]
        if not all(t.is_fixed for t in members):
            raise ValueError("an average of the student cannot be a member of an ensemble: give it alone")
        return Ensemble(members)
    raise TypeError(
        "teacher must be a model (nn.Module), a Learner, the path of an exported Learner, a list of these, "
        f"or EMATeacher(); got {teacher!r}"
    )


def _load(path: str | Path) -> Learner:
    try:
        learner = load_learner(path)
        _ = learner.model
        return learner
    except AttributeError as e:
        raise TypeError(f"{path} is no exported Learner ({e}): write it with learn.export(), not learn.save()") from e


def logits(
    output: Any,
    whose: str = "the teacher",  # for the error
) -> Tensor:
    "The predictions among several outputs: 'logits' or 'out' of a dict, the first of a tuple."
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out", output))
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        output = output[0]
    return only_tensor(output, whose)
