"Faults at every event of a fit, killed and competing writers of a cache, thousands of steps."

import contextlib
import gc
import math
import os
import random
import signal
import time
import warnings
import weakref

import pytest
import torch
from conftest import hooks, same, state
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    event,
)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai_kd import *
from fasterai_kd.teacher import cache as cache_module

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
ITEMS = [(x, torch.tensor(i % 3)) for i, x in enumerate(X)]


class Small(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def learner(width=4, n=8, **kwargs):
    "Two batches of training, by default, and one of validation."
    torch.manual_seed(width)
    dls = DataLoaders(*(DataLoader(items, bs=4, device=CPU) for items in (ITEMS[:n], ITEMS[16:])))
    learn = Learner(dls, Small(width), loss_func=CrossEntropyLossFlat(), **kwargs)
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


# --- whatever ends a fit, the next one is right ---

LAYERS = ("body", "body")
KINDS = {
    "plain": lambda t: KnowledgeDistillationCallback(t(4), SoftTarget),
    "layers": lambda t: KnowledgeDistillationCallback(t(4), FitNet, *LAYERS),
    "adapter": lambda t: KnowledgeDistillationCallback(t(6), FitNet, *LAYERS, adapter="auto"),
    "cache": lambda t: KnowledgeDistillationCallback(Teacher(t(4), cache=True), SoftTarget),
    "EMA": lambda t: KnowledgeDistillationCallback(EMATeacher(0.5), SoftTarget),
    "mutual": lambda t: MutualLearning(learner(5)),
    "unlabeled": lambda t: KnowledgeDistillationCallback(t(4), SoftTarget, unlabeled=DataLoader(X[8:16], bs=4)),
}
CANCELS = {
    "batch": (CancelBatchException, "after_loss"),
    "step": (CancelStepException, "before_step"),
    "backward": (CancelBackwardException, "before_backward"),
    "train": (CancelTrainException, "after_batch"),
    "validate": (CancelValidException, "before_validate"),
    "epoch": (CancelEpochException, "before_train"),
    "fit": (CancelFitException, "before_epoch"),
}
ERRORS = [ValueError, KeyboardInterrupt, *(error for error, _ in CANCELS.values())]
EVENTS = [e for e in vars(event) if e.startswith(("before_", "after_")) and e != "after_create"]


class Fault(Callback):
    "Raises at the second time of an event, or the only one; for `after_cancel_...` it cancels before."

    def __init__(self, at, error, order):
        self.order, self.n, self.fired = order, 0, False
        only = not any(name in at for name in ("batch", "pred", "loss", "backward", "step"))

        def fail():
            self.n += 1
            if self.n == 2 or (only and self.n == 1):
                self.fired = True
                raise error("x")

        def cancel():
            raise cancels()

        if at.startswith("after_cancel_"):
            cancels, where = CANCELS[at.removeprefix("after_cancel_")]
            setattr(self, where, cancel)
        setattr(self, at, fail)


def left_behind(learn, teachers, loss_func):
    "What should not be."
    found = ["hooks of the student"] * (hooks(learn.model) > 0)
    found += ["hooks of the teacher"] * any(hooks(t) > 0 for t in teachers)
    found += ["mode of the teacher"] * any(t.training for t in teachers)
    found += ["forward"] * ("forward" in vars(learn.model))
    return found + ["loss function"] * (learn.loss_func is not loss_func)


def run(kind, attached, fault=None):
    "A fit with a fault, then one without: what was left behind, and the student of the second."
    teachers, kept = [], []

    def teacher(width):
        torch.manual_seed(9)
        teachers.append(Small(width).eval())
        return teachers[-1]

    cb = KINDS[kind](teacher)
    learn = learner(cbs=[cb] if attached else [])
    loss_func, models = learn.loss_func, [learn.model, *(p.model for p in getattr(cb, "peers", ()))]
    before = [state(m) for m in models]
    found = []
    if fault is not None:
        watch = Callback(after_pred=lambda self: kept.append(weakref.ref(self.learn.pred)))
        try:
            learn.fit(1, 0.05, cbs=[fault, watch] + ([] if attached else [cb]))
        except (Exception, KeyboardInterrupt) as e:  # also of fastai's Recorder, whose events are left out
            found += [str(e)] * (f"in `{type(cb).__name__}`" in str(e))
        if attached:
            learn.validate()  # the learner's next use
        found += left_behind(learn, teachers, loss_func)
        learn._end_cleanup()
        learn.loss_grad = None
        gc.collect()
        found += ["predictions"] * any(r() is not None for r in kept)
    for model, weights in zip(models, before, strict=True):
        model.load_state_dict(weights)
        model.zero_grad()  # fastai leaves those of a batch that was not finished
    for each in (learn, *getattr(cb, "peers", ())):
        each.opt = None
    if isinstance(cb, KnowledgeDistillationCallback):
        cb.adapters.clear()
    torch.manual_seed(3)
    learn.fit(1, 0.05, cbs=[] if attached else cb)
    found += left_behind(learn, teachers, loss_func)
    return found, learn.model


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_ends_a_fit_at_any_event_nothing_is_left_and_the_next_is_right(kind, attached):
    "The fault comes before and after the callback, in turn."
    gc.collect()
    gc.freeze()  # what is there already is not looked at again and again
    expected, wrong, fired = state(run(kind, attached)[1]), [], set()
    for i, (at, error) in enumerate((at, error) for at in EVENTS for error in ERRORS):
        fault = Fault(at, error, order=(-5, 5)[i % 2])
        found, model = run(kind, attached, fault)
        fired |= {at} if fault.fired else set()
        if found or not same(state(model), expected):
            wrong.append((at, error.__name__, fault.order, found))
    gc.unfreeze()
    assert wrong == []
    assert fired == set(EVENTS)


# --- a cache's folder ---


def fork(f, *args):
    "The id of a process that runs `f`; it ends with 1 if that fails."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which these tests start none
        pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            f(*args)
            code = 0
        os._exit(code)
    return pid


def fit(folder, epochs=2):
    torch.manual_seed(9)
    teacher, calls = Small(6).eval(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    learn = learner(n=16)
    learn.fit(epochs, 0.05, cbs=KnowledgeDistillationCallback(Teacher(teacher, cache=folder), SoftTarget))
    return state(learn.model), len(calls)


def fit_for_ever(folder):
    while True:
        fit(folder, 1)
        for path in folder.glob("*.npy"):
            path.unlink()


def test_a_writer_that_is_killed_leaves_only_whole_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH", 0)  # it writes all the time
    rng, plain = random.Random(0), fit(None)[0]
    for _ in range(20):
        pid = fork(fit_for_ever, tmp_path)
        time.sleep(rng.uniform(0.05, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert same(fit(tmp_path)[0], plain)
    assert fit(tmp_path)[1] == 1  # one batch to look, all others are stored


def test_two_writers_at_once_train_the_student_of_none(tmp_path, monkeypatch):
    plain = fit(None)[0]

    def check(folder):
        assert same(fit(folder)[0], plain)

    for i in range(20):
        monkeypatch.setattr(cache_module, "FLUSH", 2**20 * (i % 2))
        folder = tmp_path / str(i)
        pids = [fork(check, folder) for _ in range(2)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
        assert fit(folder)[1] == 1


# --- thousands of steps ---


@pytest.mark.works("long runs", "3,000 steps with cache, adapter and unlabeled inputs: live tensors are constant")
def test_thousands_of_steps_with_everything_keep_no_tensor():
    torch.manual_seed(9)
    teacher, seen = Teacher(Small(6).eval(), cache=True), []
    loss = combine((SoftTarget, 1.0), (FitNet, 1.0, {"student": ["body"], "teacher": ["body"]}))
    more = DataLoader(X[:8], bs=4, device=CPU)
    kd = KnowledgeDistillationCallback(teacher, loss, weight="auto", adapter="auto", unlabeled=more)
    learn = learner(n=16, metrics=[*kd.metrics, kd.agreement])

    def count(self):
        if self.epoch % 150 == 120:
            self.learn.recorder.losses.clear()  # fastai keeps them all
            gc.collect()
            seen.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))

    learn.fit(750, 1e-3, cbs=[kd, Callback(after_epoch=count)])
    assert len(kd.history["kd_loss"]) == 3000
    assert all(map(math.isfinite, kd.history["kd_loss"]))
    assert len(seen) == 5
    assert seen[-1] <= seen[0]
