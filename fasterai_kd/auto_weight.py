"The weight at which task and distillation loss pull equally hard."

import math

import torch
import torch.distributed as dist
from fastai.torch_core import rank_distrib
from torch import Tensor, nn

from ._tensors import unwrap

__all__ = ["AutoWeight"]


class AutoWeight:
    """Balances the norms of the two losses' gradients at the last weights of the student that both reach.

    `measure` looks at the first batches; `weight` comes from the geometric mean of the ratios so far, so it is near
    from the first batch on, and fixed after the last of them. The idea of GradNorm (Chen et al., ICML 2018), measured
    once.
    """

    def __init__(
        self,
        task_weight: float | None,  # as the callback's: None for (1-w) · task + w · distillation
        batches: int = 10,  # of training
    ):
        self.task_weight, self.batches = task_weight, batches
        self._logs: list[float] = []
        self._at: tuple[str, Tensor] | None = None
        self._said = False

    @property
    def weight(self) -> float:
        "So far; with nothing measured as if both were equal."
        ratio = math.exp(sum(self._logs) / len(self._logs)) if self._logs else 1.0
        return ratio / (1 + ratio) if self.task_weight is None else self.task_weight * ratio

    def measure(self, task: Tensor, kd: Tensor, student: nn.Module) -> None:
        "In one batch, before its backward pass. Raises ValueError where no weights get a gradient from both."
        if len(self._logs) == self.batches:
            return
        _, param = self._at = self._at or _last_shared(task, kd, unwrap(student))
        norms = [torch.autograd.grad(loss, param, retain_graph=True)[0].float().norm() for loss in (task, kd)]
        ratio = (norms[0] / norms[1]).log()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(ratio)
            ratio /= dist.get_world_size()
        if not ratio.isfinite():  # one of them is 0, as where student and teacher agree
            return
        self._logs.append(ratio.item())
        if len(self._logs) == self.batches:
            self.say()

    def say(self) -> None:
        "Once, what was measured: at the end of a fit that had fewer batches too."
        if self._at is not None and self._logs and not self._said and rank_distrib() == 0:
            mean, n = math.exp(sum(self._logs) / len(self._logs)), len(self._logs)
            print(
                f"weight='auto': {self.weight:.4g}. In {n} batch{'es' * (n > 1)} the gradient of the task loss was "
                f"{mean:.3g} times that of the distillation loss, at {self._at[0]}"
            )
        self._said = True


def _last_shared(task: Tensor, kd: Tensor, student: nn.Module) -> tuple[str, Tensor]:
    "Name and tensor, in the order in which the student has them; a matrix or kernel rather than a bias."
    params = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(loss, [p for _, p in params], retain_graph=True, allow_unused=True) for loss in (task, kd)
    ]
    both = [at for at, *gs in zip(params, *grads, strict=True) if all(g is not None and g.any() for g in gs)]
    if not both:
        raise ValueError(
            "weight='auto' compares the gradients of task and distillation loss, but no parameter of the student gets "
            "one from both: give a number"
        )
    return ([at for at in both if at[1].ndim > 1] or both)[-1]
