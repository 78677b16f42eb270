"The teacher: its outputs for a batch, without a graph and without a trace."

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastai.learner import Learner, load_learner
from torch import Tensor, nn

from ._modes import evaluating
from ._tensors import only_tensor, plain

__all__ = ["Ensemble", "Teacher", "as_model", "logits"]


class Teacher:
    """Answers `teacher(xb)`: the model in evaluation mode, without a graph, on the batch's device.

    Afterwards its train flags are as before; parameters, BatchNorm statistics, gradients and `requires_grad` are
    never touched.

    Raises ValueError for a model without weights (on the device 'meta').
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._modules = list(model.modules())
        self._param = next((p for p in model.parameters() if p.is_floating_point()), None)
        if any(p.is_meta for p in model.parameters()):
            raise ValueError("the teacher has no weights, it is on the device 'meta': load it first")

    @torch.no_grad()
    def __call__(self, xb: Sequence[Any]) -> Any:
        with evaluating(self.model, self._modules):
            return self.model(*self._inputs(xb))

    def _inputs(self, xb: Sequence[Any]) -> list[Any]:
        "The student's inputs in the teacher's precision; moves the teacher to them."
        inputs, p = [plain(x) for x in xb], self._param
        device = next((x.device for x in inputs if isinstance(x, Tensor)), None)
        if p is None or device is None:
            return inputs
        if p.device != device:
            self.model.to(device)
        return [x.to(p.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


class Ensemble(nn.Module):
    "Several classifiers as one: the mean of their probabilities, as log-probabilities."

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *xb: Any) -> Tensor:
        log_probs = torch.stack([logits(m(*xb)).float().log_softmax(1) for m in self.models])
        return log_probs.logsumexp(0) - torch.tensor(len(self.models)).log()


def as_model(
    teacher: Any,  # a module, a Learner, the path of an exported Learner, or a list of these
) -> nn.Module:
    "The model that `teacher` stands for."
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, Learner):
        return teacher.model
    if isinstance(teacher, (str, Path)):
        return load_learner(teacher).model
    if isinstance(teacher, (list, tuple)) and teacher:
        return Ensemble([as_model(t) for t in teacher])
    raise TypeError(
        "teacher must be a model (nn.Module), a Learner, the path of an exported Learner, or a list of these; "
        f"got {teacher!r}"
    )


def logits(output: Any) -> Tensor:
    "The predictions among several outputs: 'logits' or 'out' of a dict, the first of a tuple."
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out", output))
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        output = output[0]
    return only_tensor(output, "the teacher")
