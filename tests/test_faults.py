"What goes wrong on the way: nan of the teacher, labels that are all ignored, interrupted fits, half precision."

import contextlib
import copy
import gc
import math
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, same, state
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from test_cache import distil, loader
from torch import nn

from fasterai_kd import *
from fasterai_kd import history as history_module

# --- nan of the teacher ---


def spoil(model, when):
    "The outputs are nan where `when(number of the call)` is true."
    calls = []

    def hook(module, xb, output):
        calls.append(1)
        return output * math.nan if when(len(calls)) else output

    model.register_forward_hook(hook)
    return calls


def test_nan_of_the_teacher_in_validation_is_reported_as_in_training(make_learner, teacher):
    calls = spoil(teacher, lambda n: n == 6)  # four batches of training, two of validation
    learn = make_learner()
    with pytest.raises(FloatingPointError, match=r"nan or inf \(predictions\) in validation batch 1 of epoch 0"):
        learn.fit(2, 0.01, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert len(calls) == 6


@pytest.mark.parametrize("fitted", [False, True])
def test_nan_of_the_teacher_is_reported_by_validate(make_learner, teacher, fitted):
    learn = make_learner(cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    if fitted:
        learn.fit(1, 0.01)
    spoil(teacher, lambda n: True)
    with pytest.raises(FloatingPointError, match="in validation batch 0"):
        learn.validate()


@pytest.mark.parametrize("layers", [(), ("layer1", "layer1")])
def test_a_fault_that_the_teacher_shows_once_is_reported_without_asking_it_again(make_learner, teacher, layers):
    calls = spoil(teacher.layer1 if layers else teacher, lambda n: n == 3)
    learn, steps = make_learner(), []
    kd = KnowledgeDistillationCallback(teacher, FitNet if layers else SoftTarget, *layers)
    with pytest.raises(FloatingPointError, match=rf"\({'layer1' if layers else 'predictions'}\) in training batch 2 "):
        learn.fit(1, 0.01, cbs=[kd, Callback(after_step=lambda self: steps.append(1))])
    assert len(calls) == 3
    assert len(steps) == 2


# --- the history ---


def test_agreement_counts_all_but_void_and_accuracy_only_labels_that_are_classes():
    history = history_module.LossHistory()
    history.begin_fit([history.share("agreement"), history.share("teacher_accuracy")])
    student, teacher = (torch.eye(3)[i] for i in ([0, 1, 2, 1, 0, 2], [0, 1, 1, 1, 2, 2]))
    history.compare(student, teacher, torch.tensor([0, 1, 1, 7, -1, 2]), ignored=1)
    shares = {name: (hits.item(), counted.item()) for name, (hits, counted) in history._compared.items()}
    assert shares == {"agreement": (3, 4), "teacher_accuracy": (2, 2)}


def test_few_tensors_of_the_history_live_at_a_time(make_learner, teacher, monkeypatch):
    monkeypatch.setattr(history_module, "CHUNK", 3)
    kd = KnowledgeDistillationCallback(teacher, combine((SoftTarget, 1.0), (Logits, 1.0)))
    live = []
    watch = Callback(after_batch=lambda self: live.append(sum(len(values) for values, _ in kd._history._steps)))
    make_learner().fit(2, 0.01, cbs=[kd, watch])
    assert max(live) == 2 * 4  # two steps of task loss, distillation loss and its two parts
    assert [len(v) for v in kd.history.values()] == [8] * 5


def test_the_history_is_the_same_whatever_it_is_kept_in(make_learner, teacher, monkeypatch):
    kept = []
    for chunk in (1, 3, 4, 256):
        monkeypatch.setattr(history_module, "CHUNK", chunk)
        set_seed(0)
        kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=lambda pct: pct)
        make_learner(Net()).fit(2, 0.01, cbs=kd)
        kept.append(kd.history)
    assert kept[0]["weight"] == [0.5 * i / 8 for i in range(8)]
    assert all(h == kept[0] for h in kept)


# --- labels that are all ignored ---


def ignored(pred, y):
    "nan, with a gradient of 0."
    return F.cross_entropy(pred, torch.full_like(y, -100))


@pytest.mark.parametrize("weights", [{"weight": 1.0}, {"weight": 0.5, "task_weight": 0.0}])
def test_labels_that_are_all_ignored_do_no_harm_where_the_task_loss_does_not_count(make_learner, teacher, weights):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, **weights)
    learn = make_learner(loss_func=ignored, metrics=[])
    learn.fit(1, 0.01, cbs=[kd, TerminateOnNaNCallback()])
    assert len(kd.history["kd_loss"]) == 4
    assert all(map(math.isnan, kd.history["task_loss"]))
    assert all(map(math.isfinite, learn.recorder.values[-1]))
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_a_task_loss_that_does_not_count_still_reaches_the_parameters_with_a_gradient_of_0(make_learner, teacher):
    seen = []
    watch = Callback(after_backward=lambda self: seen.append(self.model.head.weight.grad))
    kd = KnowledgeDistillationCallback(teacher, FitNet, "layer1", "layer1", weight=1.0)
    make_learner().fit(1, 0.01, cbs=[kd, watch])
    assert all(grad is not None and not grad.any() for grad in seen)


# --- half precision ---


class Bf16(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net().bfloat16()

    def forward(self, x):
        return self.net(x.bfloat16())


@pytest.mark.parametrize("weight", [0.5, "auto"])
def test_a_student_in_bfloat16_learns_and_is_shown(make_learner, teacher, weight):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight=weight)
    learn = make_learner(Bf16(), metrics=kd.metrics)
    before = state(learn.model)
    learn.fit(1, 0.01, cbs=kd)
    assert not same(before, state(learn.model))
    assert all(map(math.isfinite, learn.recorder.values[-1]))


def test_students_in_bfloat16_learn_from_each_other(make_learner):
    mutual = MutualLearning(make_learner(Bf16()))
    learn = make_learner(Bf16(), metrics=mutual.metrics)
    learn.fit(1, 0.01, cbs=mutual)
    assert all(map(math.isfinite, learn.recorder.values[-1]))


# --- the peers' predictions ---


@pytest.mark.parametrize("training", [True, False])
def test_an_interrupted_fit_keeps_no_predictions_of_the_peers(make_learner, training):
    peer, kept = make_learner(Net()), []

    def stop(self):
        if self.training is training and self.iter == 1:
            kept.extend(weakref.ref(pred) for pred, _ in mutual._outputs)
            raise KeyboardInterrupt

    mutual = MutualLearning(peer)
    learn = make_learner(metrics=mutual.metrics)
    end = Callback(after_loss=stop)
    end.order = 2
    with pytest.raises(KeyboardInterrupt) as info:
        learn.fit(1, 0.01, cbs=[mutual, end])
    del info
    gc.collect()
    assert kept
    assert [r for r in kept if r() is not None] == []


# --- interrupted fits, with stored outputs ---


class Stop(Callback):
    "Does `what(self)` in batch 2 of epoch 1, at one event."

    order = 5

    def __init__(self, event, what):
        setattr(self, event, lambda: what(self) if self.training and (self.epoch, self.iter) == (1, 2) else None)


def throw(error):
    def stop(self):
        raise error

    return stop


def delete_folder(self):
    shutil.rmtree(self.folder, ignore_errors=True)


def write_beside(self):
    "Another process stores the same images, and others."
    teacher = next(cb.teacher for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillationCallback))
    distil(Teacher(copy.deepcopy(teacher), cache=self.folder), dls=loader(bs=5, n=20, shuffle=False), epochs=1)


STOPS = {
    "CancelBatch after the loss": ("after_loss", throw(CancelBatchException())),
    "CancelBatch after the predictions": ("after_pred", throw(CancelBatchException())),
    "CancelEpoch": ("after_loss", throw(CancelEpochException())),
    "CancelFit": ("before_backward", throw(CancelFitException())),
    "Ctrl-C": ("after_loss", throw(KeyboardInterrupt())),
    "an exception": ("before_batch", throw(ValueError("x"))),
    "the folder deleted": ("before_batch", delete_folder),
    "a second writer": ("after_batch", write_beside),
}


def interrupted(teacher, cache, folder, stop, n, shuffle):
    "The student of a fit that something happens to, and of another fit after it."
    stopper = Stop(*STOPS[stop])
    stopper.folder = folder
    teacher = Teacher(copy.deepcopy(teacher), cache=cache)
    kd = KnowledgeDistillationCallback(teacher, combine((SoftTarget, 1.0), (FitNet, 1.0, PAIRED)))
    torch.manual_seed(2)
    learn = Learner(loader(n=n, shuffle=shuffle), Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        for epochs, cbs in ((3, [kd, stopper]), (1, kd)):
            set_seed(5)
            with contextlib.suppress(KeyboardInterrupt, ValueError):
                learn.fit(epochs, 0.05, cbs=cbs)
    return learn.model


PAIRED = {"student": ["conv1", "layer2"], "teacher": ["conv1", "layer2"]}


IN_MEMORY = [stop for stop in STOPS if stop not in ("the folder deleted", "a second writer")]
EITHER = [*((stop, "memory") for stop in IN_MEMORY), *((stop, "folder") for stop in STOPS)]


@pytest.mark.parametrize(("n", "shuffle"), [(16, True), (17, True)])
@pytest.mark.parametrize(("stop", "where"), EITHER)
def test_the_student_of_an_interrupted_fit_is_the_one_without_a_cache(teacher, tmp_path, stop, where, n, shuffle):
    folder = tmp_path / "outputs"
    plain = interrupted(teacher, None, tmp_path / "beside", stop, n, shuffle)
    cached = interrupted(teacher, folder if where == "folder" else True, folder, stop, n, shuffle)
    assert same(state(plain), state(cached))


@pytest.mark.parametrize("layers", [(), ("layer1", "layer1")])
def test_after_ctrl_c_in_the_students_forward_its_inputs_are_not_kept(make_learner, teacher, layers):
    learn, kept, more = make_learner(), [], torch.randn(8, 3, 16, 16)
    learn.model.register_forward_pre_hook(lambda m, xb: kept.append(weakref.ref(xb[0])))

    def stop(*_):
        if len(kept) == 3:
            raise KeyboardInterrupt

    learn.model.layer2.register_forward_hook(stop)
    unlabeled = DataLoader(more, bs=4, device=torch.device("cpu"))
    kd = KnowledgeDistillationCallback(teacher, FitNet if layers else SoftTarget, *layers, unlabeled=unlabeled)
    with pytest.raises(KeyboardInterrupt) as info:
        learn.fit(1, 0.01, cbs=kd)
    del info
    learn._end_cleanup()
    gc.collect()
    assert len(kept) == 3
    assert [r for r in kept if r() is not None] == []


def test_a_share_of_the_training_above_1_is_1(make_learner, teacher):
    "fastai adds up shares, and their sum may be a little more."

    def overshoot(self):
        self.learn.pct_train = 1.25

    early, seen = Callback(before_batch=overshoot), []
    early.order = -5
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=lambda pct: seen.append(pct) or 1.0)
    make_learner().fit(1, 0.01, cbs=[kd, early])
    assert seen
    assert set(seen) == {1.0}
