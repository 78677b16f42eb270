"Students that learn from each other while they learn."

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import nan
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.learner import AvgLoss, Learner, Metric, replacing_yield
from fastcore.basics import listify
from torch import Tensor, nn

from ._class_axis import class_dim
from ._modules import evaluating, in_training, unwrap
from ._tensors import plain, predictions
from .losses import Mutual
from .losses._checks import total
from .losses._traits import name_of, parameters_of
from .losses.combine import parts_of
from .losses.evaluate import LossEvaluator, mix_of
from .teacher.output import TeacherOutput
from .weighting import check_weights

__all__ = ["MutualLearning"]

_replacing = contextmanager(replacing_yield)


class MutualLearning(Callback):
    """Train the learner's model and its `peers` in one fit: `learn.fit_one_cycle(5, 1e-3, cbs=MutualLearning(peer))`.

    On each training batch all models run on the same inputs. The loss of each is its task loss + `weight` · the mean of
    `loss` over the others' predictions, without their graph. A peer is a Learner, of which its model, `loss_func`,
    optimizer and `wd` are used: its learning rate, and what else is scheduled, follow the learner's. MixUp and CutMix
    mix its task loss as the learner's; its own data and callbacks are not used. All models take their step from the
    same predictions; in the paper one model steps after the other. Validation shows the plain task loss, `lr_find`
    trains alone.

    Raises TypeError and ValueError, when made or when `fit` starts, for what is no peer and what does not work with it:
    GradientAccumulation, float16 with its GradScaler (bfloat16 does), DataParallel and several processes, trainable
    parameters that two models share, and a loss that has some.
    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018, section 3, for more than two its extension to larger
    cohorts.
    """

    peers: list[Learner]
    _outputs: list[tuple[Tensor, Tensor]]  # predictions and task loss of each peer, for metrics
    _stateattrs = ("peers",)  # a file leaves them out
    order = 1  # after a distillation callback; before GradientAccumulation and before MixedPrecision leaves autocast

    def __init__(
        self,
        peers: Learner | Sequence[Learner],  # each with a model of its own
        loss: Callable[..., Tensor] = Mutual,  # of predictions: any loss that needs no layers
        weight: float = 1.0,  # of `loss`
    ):
        if isinstance(weight, str):
            raise TypeError(f"weight must be a number, got {weight!r}")
        check_weights(weight, task_weight=1.0)
        self._init_state()
        self.peers = [peers] if isinstance(peers, Learner) else listify(peers)
        self.loss, self.weight = loss, weight
        if not self.peers or not all(isinstance(p, Learner) for p in self.peers):
            raise TypeError(f"peers must be a Learner, or a list of Learners, got {peers!r}")
        if any(p.pairs or any(parameters_of(p.loss).get(fm) for fm in ("fm_s", "fm_t")) for p in parts_of(loss)):
            raise ValueError("mutual learning compares predictions, this loss compares layers: give Mutual, SoftTarget")
        trained = [m for m in LossEvaluator(loss, [], []).modules if any(p.requires_grad for p in m.parameters())]
        if trained:
            raise TypeError(
                f"the loss {name_of(trained[0])} has parameters, which mutual learning does not train: freeze them"
            )
        self._shows = False

    def before_fit(self) -> None:
        "Check what can be checked, and make the peers ready."
        self._evaluator, self._outputs = LossEvaluator(self.loss, [], []), []
        self._evaluator.warn_of_independent_classes(self.learn.loss_func)
        if hasattr(self.learn, "lr_finder"):
            return
        models = [unwrap(m) for m in (self.learn.model, *(p.model for p in self.peers))]
        if len(set(map(id, models))) < len(models):
            raise ValueError("two of the students are the same model: give each Learner one of its own")
        _check_own_parameters(models)
        if any(isinstance(cb, GradientAccumulation) for cb in self.learn.cbs):
            raise ValueError("mutual learning makes a step on each batch: remove GradientAccumulation")
        if not self.peers:
            warnings.warn("MutualLearning was loaded from a file, without its peers, and does nothing", stacklevel=2)
        for peer in self.peers:
            self._make_ready(peer)

    def before_train(self) -> None:
        "Only now the model is wrapped, and it is known in which precision it runs."
        if isinstance(self.learn.model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError("mutual learning runs in one process on one device: no DataParallel, no distrib_ctx()")
        scaler = getattr(self.learn, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise ValueError("mutual learning does not work with float16's GradScaler: use learn.to_bf16()")
        self._reset()

    def before_validate(self) -> None:
        "A recurrent peer starts where the student does."
        self._reset()

    def before_batch(self) -> None:
        "Forget the last one."
        self._outputs = []

    def after_loss(self) -> None:
        "Add what the others say to the student's loss; the peers make their steps."
        if not self.peers or hasattr(self.learn, "lr_finder") or hasattr(self.learn, "gather_preds"):
            return
        if not len(self.yb):
            raise ValueError("mutual learning needs labels: without them all students would agree on anything")
        if self.training:
            self._learn_together()
        elif self._shows:
            for peer in self.peers:
                with evaluating(peer.model):
                    pred = self._predict(peer)
                    self._outputs.append((pred, self._task_loss(peer, pred)))

    def after_validate(self) -> None:
        "Forget the last batch."
        self._outputs = []

    @property
    def metrics(self) -> list[Metric]:
        """Columns of the progress table: `Learner(..., metrics=[accuracy, *mutual.metrics])`.

        The peer's task loss, `peer_loss`, and the metrics that it was made with, such as `peer_accuracy`; of several
        peers `peer1_loss` and so on.
        """
        self._shows, n = True, len(self.peers)
        names = ["peer"] if n == 1 else [f"peer{i + 1}" for i in range(n)]
        return [
            _PeerMetric(self, i, f"{name}_{m.name}", m)
            for i, (name, peer) in enumerate(zip(names, self.peers, strict=True))
            for m in (AvgLoss(), *peer.metrics)
        ]

    def _make_ready(self, peer: Learner) -> None:
        device = next(self.learn.model.parameters()).device
        peer.model.to(device)
        if isinstance(peer.loss_func, nn.Module) or hasattr(peer.loss_func, "to"):
            peer.loss_func.to(device)
        if peer.opt is None:
            peer.create_opt()
        if peer.wd is not None:
            peer.opt.set_hypers(wd=peer.wd)

    def _learn_together(self) -> None:
        preds = [plain(self.learn.pred)]
        for peer in self.peers:
            with in_training(peer.model):
                preds.append(self._predict(peer))
        losses = [self.learn.loss_grad, *map(self._task_loss, self.peers, preds[1:])]
        with torch.autocast(losses[0].device.type, enabled=False):
            shared = [self._mimicry(preds, i) for i in range(len(preds))]
            for i, peer in enumerate(self.peers, 1):
                self._step(peer, losses[i] + self.weight * shared[i])
        self._outputs = [(p.detach(), loss.detach()) for p, loss in zip(preds[1:], losses[1:], strict=True)]
        self.learn.loss_grad = self.learn.loss_grad + self.weight * shared[0]
        self.learn.loss = plain(self.learn.loss_grad.clone())

    def _mimicry(self, preds: Sequence[Tensor], i: int) -> Tensor:
        "The mean over the others."
        others = [p.detach() for j, p in enumerate(preds) if j != i]
        mix, pct = mix_of(self.learn), getattr(self, "pct_train", 1.0)
        dim = class_dim(preds[i], self.y, self.peers[i - 1].loss_func if i else self.learn.loss_func)
        values = [
            value
            for p in others
            for value in self._evaluator.evaluate(
                preds[i], TeacherOutput(p, {}), {}, self.y, mix, pct, class_dim=dim
            ).values()
        ]
        return total(iter(values)) / len(others) if values else preds[i].new_zeros(())

    def _predict(self, peer: Learner) -> Tensor:
        return plain(predictions(peer.model(*self.xb), "a peer"))

    def _task_loss(self, peer: Learner, pred: Tensor) -> Tensor:
        "By its own function; of mixed samples as fastai mixes the learner's."
        mix = mix_of(self.learn)
        if mix is None:
            return peer.loss_func(pred, *self.yb)
        with _replacing(mix, "old_lf", peer.loss_func):
            return self.learn.loss_func(pred, *self.yb)

    def _step(self, peer: Learner, loss: Tensor) -> None:
        scheduled = {name for cb in self.learn.cbs if isinstance(cb, ParamScheduler) for name in cb.scheds}
        for name in ({"lr"} | scheduled) & peer.opt.hypers[-1].keys():
            values = [h[name] for h in self.learn.opt.hypers]
            peer.opt.set_hyper(name, values if len(values) == len(peer.opt.hypers) else values[-1])
        try:
            loss.backward()  # type: ignore[no-untyped-call]
            peer.opt.step()
        finally:
            peer.opt.zero_grad()

    def _reset(self) -> None:
        for peer in self.peers:
            if callable(getattr(peer.model, "reset", None)):
                peer.model.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:  # the end of a fit with `cbs=mutual`, whatever ended it
            self._outputs = []
        super().__setattr__(name, value)

    def _init_state(self) -> None:
        "What is not saved."
        super()._init_state()
        self.peers, self._outputs = [], []


def _check_own_parameters(models: Sequence[nn.Module]) -> None:
    "ValueError where two would train the same."
    seen: set[int] = set()
    for model in models:
        own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        shared = next((name for key, name in own.items() if key in seen), None)
        if shared is not None:
            raise ValueError(f"two of the students share the trainable parameter {shared!r}: give each a copy")
        seen |= own.keys()


class _PeerMetric(Metric):
    "What `metric` says of a peer."

    def __init__(
        self,
        mutual: MutualLearning,
        i: int,  # of the peer
        name: str,
        metric: Metric,
    ):
        self._mutual, self._i, self._name, self._metric = mutual, i, name, deepcopy(metric)

    def reset(self) -> None:
        self._metric.reset()

    def accumulate(self, learn: Learner) -> None:
        if self._mutual._outputs:
            pred, loss = self._mutual._outputs[self._i]
            with _replacing(learn, "pred", pred), _replacing(learn, "loss", loss):
                self._metric.accumulate(learn)

    @property
    def value(self) -> Any:
        return nan if self._metric.value is None else self._metric.value

    @property
    def name(self) -> str:
        return self._name
