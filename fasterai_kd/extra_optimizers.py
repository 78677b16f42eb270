"Optimizers of modules that are no part of the student: adapters, and losses with parameters."

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch.distributed as dist
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import norm_bias_params
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ExtraOptimizers"]


class ExtraOptimizers:
    """Trains each module by an optimizer of its own, with the learner's steps.

    The optimizer is made by `learn.opt_func` and takes the hyper-parameters of the learner's last group, which is the
    one that trains also when the others are frozen. The learner's own optimizer, groups and files never change.
    """

    def __init__(self) -> None:
        self._opts: dict[nn.Module, Any] = {}
        self._before_trial: list[tuple[nn.Module, dict[str, Any]]] = []

    def begin_fit(
        self,
        modules: Sequence[nn.Module],
        trial: bool,  # such as lr_find, which leaves them as they were
    ) -> None:
        "New optimizers."
        self.end_fit()
        for module in modules:  # a fit that an exception ended may have left gradients
            module.zero_grad()
        if trial:
            self._before_trial = [(m, deepcopy(m.state_dict())) for m in modules]

    def end_fit(self) -> None:
        "Drop the optimizers and gradients; after a trial also what it trained."
        for module in self._opts:
            module.zero_grad()
        for module, state in self._before_trial:
            module.load_state_dict(state)
        self._opts, self._before_trial = {}, []

    def after_step(
        self,
        learn: Learner,
        modules: Sequence[nn.Module],
        taken: bool,  # or was the learner's step left out?
    ) -> None:
        "A step of those that got gradients in this batch, under DDP the processes' mean; then drop all gradients."
        if taken:
            self._step(learn, modules)
        for module in modules:
            module.zero_grad()

    def __reduce__(self) -> tuple[Any, ...]:
        "Copies and files have none yet."
        return ExtraOptimizers, ()

    def _step(self, learn: Learner, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            if module not in self._opts:
                self._opts[module] = _new(learn, module)
            opt = self._opts[module]
            if opt is None or all(p.grad is None for group in opt.param_lists for p in group):
                continue
            _average(module, learn.model)
            for name, value in learn.opt.hypers[-1].items():
                if isinstance(value, (int, float)):
                    opt.set_hyper(name, float(value))
            scaler = getattr(learn, "scaler", None)
            if scaler is not None and scaler.is_enabled():
                scaler.step(opt)  # unscales the gradients, and leaves the step out where they overflow
            else:
                opt.step()


def _new(learn: Learner, module: nn.Module) -> Any:
    "None where the learner's optimizer has its parameters already, or it has none."
    if hasattr(learn, "non_native_mixed_precision"):
        raise ValueError("adapters do not work with NonNativeMixedPrecision: use learn.to_fp16()")
    known = {id(p) for group in learn.opt.param_lists for p in group}
    params = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    if not params:
        return None
    make = learn.opt_func
    if isinstance(make, OptimWrapper):  # an optimizer of torch that is made already
        return OptimWrapper(params, type(make.opt), **make.opt.defaults)
    opt = make([params], lr=learn.lr)
    if not learn.wd_bn_bias:
        for p in norm_bias_params(module):
            opt.state[p]["do_wd"] = False
    return opt


def _average(module: nn.Module, student: nn.Module) -> None:
    "Gradients and BatchNorm statistics, over the processes that train this student."
    if not isinstance(student, DistributedDataParallel):
        return
    averages: list[Tensor] = [b for b in module.buffers() if b.is_floating_point()]
    for x in [*averages, *(p.grad for p in module.parameters() if p.grad is not None)]:
        dist.all_reduce(x, group=student.process_group)
        x /= student.process_group.size()
