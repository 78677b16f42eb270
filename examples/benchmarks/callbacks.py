"Callbacks of the benchmark: the least that distilling needs, a clock, a count of what is saved for backward."

import time

from fastai.vision.all import *
from torch.autograd.graph import saved_tensors_hooks


class ByHand(Callback):
    "The least that distilling needs: the fastest step that this loss allows in fastai's loop."

    def __init__(self, teacher, loss, layers_s, layers_t):
        self.teacher, self.kd_loss, self._layers = teacher.eval(), loss, (layers_s, layers_t)

    def before_fit(self):
        self._seen, self._handles = ({}, {}), []
        for model, names, kept in zip((self.learn.model, self.teacher), self._layers, self._seen, strict=True):
            for name in names:
                hook = partial(self.keep, kept, name)
                self._handles.append(model.get_submodule(name).register_forward_hook(hook))

    def keep(self, kept, name, module, args, output):
        kept[name] = output

    def take(self):
        return [{name: kept.pop(name).float() for name in list(kept)} for kept in self._seen]

    def after_loss(self):
        with torch.no_grad():
            teacher_pred = self.teacher(self.x).float()
        fm_s, fm_t = self.take()
        with torch.autocast(self.x.device.type, enabled=False):
            kd = self.kd_loss(pred=self.pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=self.y)
        self.learn.loss_grad = torch.lerp(self.learn.loss_grad, kd, 0.5)
        self.learn.loss = self.learn.loss_grad.detach()

    def after_fit(self):
        for handle in self._handles:
            handle.remove()


class WithTorchdistill(ByHand):
    "The same with torchdistill's hooks."

    def before_fit(self):
        from torchdistill.core.forward_hook import ForwardHookManager

        self._managers = [ForwardHookManager(self.dls.device) for _ in self._layers]
        for manager, model, names in zip(self._managers, (self.learn.model, self.teacher), self._layers, strict=True):
            for name in names:
                manager.add_hook(model, name, requires_input=False, requires_output=True)

    def take(self):
        return [{name: io["output"].float() for name, io in m.pop_io_dict().items()} for m in self._managers]

    def after_fit(self):
        for manager in self._managers:
            manager.clear()


class Clock(Callback):
    "Seconds per step and peak memory of the last epoch, from the end of its first batch on."

    order = 1000

    def __init__(self, kind):
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def after_batch(self):
        if self.epoch < self.n_epoch - 1:
            return
        cuda = self.dls.device.type == "cuda"
        if cuda and self.iter in (0, self.n_iter - 1):
            torch.cuda.synchronize()
        if self.iter == 0:
            self.base = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self.start = self.now()
        elif self.iter == self.n_iter - 1:
            self.seconds = (self.now() - self.start) / (self.n_iter - 1)
            self.peak = torch.cuda.max_memory_allocated() - self.base if cuda else None


class Saved(Callback):
    "Bytes that the graph of the last step keeps for the backward pass, each storage once, without the weights."

    order = -1

    def __init__(self, *models):
        self.weights = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}

    def before_batch(self):
        self.kept = {}
        self.saving = saved_tensors_hooks(self.keep, noop)
        self.saving.__enter__()

    def keep(self, t):
        if t.untyped_storage().data_ptr() not in self.weights:
            self.kept[t.untyped_storage().data_ptr()] = t
        return t

    def before_backward(self):
        self.saving.__exit__()
        self.n_bytes = sum(t.untyped_storage().nbytes() for t in self.kept.values())
        self.kept = {}
