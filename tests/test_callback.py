"The arguments of the callback, checked before any training, and what one batch costs."

import copy
import inspect
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import PAIRS, Net, same, state
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fasterai_kd import *
from fasterai_kd.losses._traits import REGISTRY
from fasterai_kd.schedule import sched_lin


def test_the_first_six_arguments_may_be_positional_the_others_not():
    kinds = {n: p.kind.name for n, p in inspect.signature(KnowledgeDistillationCallback).parameters.items()}
    positional = ["teacher", "loss", "activations_student", "activations_teacher", "weight", "schedule"]
    assert [n for n, k in kinds.items() if k == "POSITIONAL_OR_KEYWORD"] == positional
    assert {k for n, k in kinds.items() if n not in positional} == {"KEYWORD_ONLY"}


def test_arguments_can_be_read_back(teacher):
    kd = KnowledgeDistillationCallback(teacher, Attention, "conv1", ("layer1",), 0.7, None)
    assert (kd.teacher, kd.loss, kd.weight, kd.schedule) == (teacher, Attention, 0.7, None)
    assert (kd.activations_student, kd.activations_teacher) == (["conv1"], ["layer1"])
    assert kd.name == "knowledge_distillation"


BAD = [
    (TypeError, "teacher must be a model", lambda t: (Net, SoftTarget)),
    (TypeError, "teacher must be a model", lambda t: (SoftTarget, t)),
    (TypeError, "loss must be a function", lambda t: (t, "SoftTarget")),
    (TypeError, r"mine\(a, b\) cannot be called as loss\(pred=", lambda t: (t, mine)),
    (ValueError, "has no layer 'layr1': did you mean 'layer1'", lambda t: (t, Attention, ["layer1"], ["layr1"])),
    (
        ValueError,
        "activations_student has 2 .* activations_teacher 1",
        lambda t: (t, Attention, ["conv1", "bn1"], "bn1"),
    ),
    (ValueError, "activations_student has 1 .* activations_teacher 0", lambda t: (t, Attention, "conv1")),
    (ValueError, "activations_student has 0 .* activations_teacher 1", lambda t: (t, Attention, None, "conv1")),
    (ValueError, "this loss compares layers: give", lambda t: (t, Attention)),
    (ValueError, "this loss compares layers: give", lambda t: (t, partial(FitNet), [], [])),
    (ValueError, "this loss compares layers: give", lambda t: (t, lambda fm_s, fm_t, **_: 0)),
    (TypeError, "layers are given by name", lambda t: (t, Attention, [t.conv1], [t.conv1])),
    (ValueError, "weight must be between 0 and 1, got 1.5; for a larger", lambda t: (t, SoftTarget, None, None, 1.5)),
    (ValueError, "weight must be between 0 and 1, got -0.1", lambda t: (t, SoftTarget, None, None, -0.1)),
    (ValueError, "weight must be between 0 and 1, got nan", lambda t: (t, SoftTarget, None, None, float("nan"))),
    (TypeError, "schedule must be a Schedule or a function", lambda t: (t, SoftTarget, None, None, 0.5, "cos")),
    (TypeError, r"schedule must be .* such as SchedCos\(0, 1\)", lambda t: (t, SoftTarget, None, None, 0.5, SchedCos)),
    (
        ValueError,
        r"got 1\.008 at 12% of the",
        lambda t: (t, SoftTarget, None, None, 0.9, Schedule(sched_lin, start_val=1, end_val=2)),
    ),
    (TypeError, "weight must be a number, got None", lambda t: (t, SoftTarget, None, None, None)),
    (
        TypeError,
        "SoftTarget has no argument 'temperature': It has T, standardize",
        lambda t: (t, partial(SoftTarget, temperature=2)),
    ),
    (TypeError, "no argument 'aplha': did you mean 'alpha'", lambda t: (t, partial(DecoupledKD, aplha=2))),
    (TypeError, "RKD has no argument 'wd': did you mean 'w_d'", lambda t: (t, combine((partial(RKD, wd=2), 1.0)))),
    (
        ValueError,
        "an ensemble gives log-probabilities, but the loss needs the outputs as they are",
        lambda t: ([t, Net()], partial(Logits)),
    ),
    (
        ValueError,
        "an ensemble gives log-probabilities, but the loss needs the outputs as they are",
        lambda t: ([t, Net()], MultiLabel),
    ),
    (ValueError, "an ensemble has no common layers", lambda t: ([t, Net()], Attention, "conv1", "conv1")),
]


def mine(a, b):
    return a


@pytest.mark.parametrize(("error", "match", "args"), BAD, ids=[b[1][:24] for b in BAD])
def test_arguments_that_cannot_work_are_refused_at_once(teacher, error, match, args):
    with pytest.raises(error, match=match):
        KnowledgeDistillationCallback(*args(teacher))


@pytest.mark.parametrize(("weight", "task_weight"), [(-1, 1), (float("inf"), 1), (1, -1), (1, float("inf"))])
def test_weights_of_a_sum_must_be_finite_and_not_negative(teacher, weight, task_weight):
    with pytest.raises(ValueError, match="weight must be"):
        KnowledgeDistillationCallback(teacher, SoftTarget, weight=weight, task_weight=task_weight)


@pytest.mark.parametrize("schedule", [math.sqrt, np.sqrt, SchedCos(0, 1), Schedule(sched_lin)])
def test_functions_of_all_kinds_are_schedules(make_learner, teacher, schedule):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=schedule)
    make_learner().fit(1, 0.01, cbs=kd)
    assert kd.history["weight"][0] == 0 < kd.history["weight"][-1]


def test_a_schedule_of_ones_own_is_called_for_batches_alone(make_learner, teacher):
    calls = []

    def schedule(pct):
        calls.append(len(kd.history["weight"]))  # reads what is there from the first batch on
        return 0.5

    kd = KnowledgeDistillationCallback(teacher, combine((SoftTarget, 1.0, None, schedule)), schedule=schedule)
    learn = make_learner()
    learn.fit(1, 0.01, cbs=kd)
    assert len(calls) == 2 * (4 + 2)  # of the whole and of the part, in training and in validation


def test_a_balance_with_no_task_loss_is_refused(teacher):
    with pytest.raises(ValueError, match=r"weight='auto' balances two losses, with task_weight=0 there is one"):
        KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto", task_weight=0.0)


def test_a_task_weight_that_is_no_number_is_refused(teacher):
    with pytest.raises(TypeError, match="task_weight must be a number, got 'auto'"):
        KnowledgeDistillationCallback(teacher, SoftTarget, task_weight="auto")


def test_keywords_of_a_loss_of_ones_own_are_its_own_business(make_learner, teacher):
    def own(pred, teacher_pred, **kwargs):
        return kwargs["scale"] * (pred - teacher_pred).square().mean()

    make_learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, partial(own, scale=2.0)))


BAD_FITS = [
    (ValueError, "student has no layer 'layr1': did you mean 'layer1'", lambda t: (t, Attention, "layr1", "layer1")),
    (ValueError, "SoftTarget needs outputs of one shape: the student gives .4, 4., the teacher .4, 7.",
     lambda t: (Net(classes=7), SoftTarget)),
    (ValueError, "FitNet needs features of one shape, but student layer 'conv1' and teacher layer 'conv1' give "
     r"\(4, 4, 16, 16\) and \(4, 8, 16, 16\)", lambda t: (Net(width=8), FitNet, "conv1", "conv1")),
    (ValueError, "Attention compares feature maps .* 'head'", lambda t: (t, Attention, "head", "head")),
    (ValueError, "same model", lambda t: (None, SoftTarget)),
    (TypeError, "must return a scalar tensor", lambda t: (t, lambda **_: 0.0)),
    (TypeError, r"a scalar tensor, got one of shape \(\d+, \d+\): take", lambda t: (t, lambda pred, **_: pred)),
    (ValueError, "DecoupledKD needs `target`", lambda t: (t, lambda target, **k: DecoupledKD(**k))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "args"), BAD_FITS, ids=[b[1][:24] for b in BAD_FITS])
def test_what_cannot_work_ends_the_fit_before_the_first_step(make_learner, teacher, student, error, match, args):
    t, *rest = args(teacher)
    before = state(student)
    kd = KnowledgeDistillationCallback(student if t is None else t, *rest)
    with pytest.raises(error, match=match):
        make_learner(student).fit(1, 0.1, cbs=kd)
    running = ("running_mean", "running_var", "num_batches_tracked")  # a forward may have moved these
    assert same(*({k: v for k, v in s.items() if not k.endswith(running)} for s in (before, state(student))))


def test_nothing_is_shadowed_and_no_warning_is_given(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, Attention, *PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_learner(cbs=kd).fit(1, 0.01)
    assert set(vars(kd)) & set(vars(kd.learn)) == {"loss"}  # set once, while there is no learner


# --- memory ---


class SavedForBackward(Callback):
    "Bytes that the graph of each training step keeps, from the forward pass to the total loss."

    order = -1

    def __init__(self):
        self.sizes, self.done = [], Callback(after_loss=lambda _: self.stop())
        self.done.order = 1

    def before_batch(self):
        if self.training:
            self.kept = {}
            self.context = saved_tensors_hooks(self.keep, lambda t: t)
            self.context.__enter__()

    def keep(self, t):
        self.kept[t.untyped_storage().data_ptr()] = t
        return t

    def stop(self):
        if self.training:
            self.context.__exit__(None, None, None)
            self.sizes.append(sum(t.untyped_storage().nbytes() for t in self.kept.values()))
            self.kept = {}


def saved_for_backward(learn, *cbs):
    saved = SavedForBackward()
    learn.fit(1, 0.01, cbs=[saved, *cbs, saved.done])
    return saved.sizes


@pytest.mark.filterwarnings("ignore:.* reads no layers")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("loss", REGISTRY.values())
def test_a_step_saves_for_backward_what_the_student_and_the_loss_need_and_nothing_of_the_teacher(
    make_learner, teacher, student, loss, frozen
):
    teacher.requires_grad_(not frozen)
    layers = ["layer1", "layer2"]
    kd = KnowledgeDistillationCallback(teacher, loss, layers, layers)
    own = []

    def alone(pred, teacher_pred, fm_s, fm_t, target):
        "The loss on leaves: what it saves is its own."
        kept = {}
        fm_s, pred = {k: v.detach().requires_grad_() for k, v in fm_s.items()}, pred.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.untyped_storage().data_ptr(): t}), print
        ):
            loss(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=target)
        own.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
        return Logits(pred, teacher_pred)

    plain = saved_for_backward(make_learner(copy.deepcopy(student)))
    distilling = saved_for_backward(make_learner(copy.deepcopy(student)), kd)
    make_learner(copy.deepcopy(student)).fit(1, cbs=KnowledgeDistillationCallback(teacher, alone, layers, layers))
    assert all(d <= p + o + 16 for d, p, o in zip(distilling[1:], plain[1:], own[1:4], strict=True))


def test_a_module_loss_is_moved_to_the_learners_device(make_learner, teacher):
    class Loss(nn.Module):
        def to(self, device):
            self.device = device
            return self

        def forward(self, pred, teacher_pred, **kwargs):
            return Logits(pred, teacher_pred)

    loss = Loss()
    make_learner().fit(1, 0.01, cbs=KnowledgeDistillationCallback(teacher, loss))
    assert loss.device == torch.device("cpu")


class Learned(nn.Module):
    "A loss with weights."

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, pred, teacher_pred, **kwargs):
        return (self.map(pred) - teacher_pred).square().mean()


@pytest.mark.parametrize("combined", [False, True])
def test_a_loss_that_is_a_module_is_trained_along_and_in_no_file(make_learner, teacher, combined):
    loss = Learned()
    before, learn = state(loss), make_learner()
    kd = KnowledgeDistillationCallback(teacher, combine((loss, 1.0), (SoftTarget, 1.0)) if combined else loss)
    learn.fit(1, 0.01, cbs=kd)
    assert not same(before, state(loss))
    assert all(p.grad is None for p in loss.parameters())
    assert {id(p) for group in learn.opt.param_lists for p in group} == {id(p) for p in learn.model.parameters()}
    after = state(loss.requires_grad_(False))
    learn.fit(1, 0.01, cbs=kd)
    assert same(after, state(loss))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # fastai loads the weights back
def test_lr_find_leaves_a_loss_with_weights_as_it_was(make_learner, teacher):
    loss = Learned()
    before = state(loss)
    make_learner(cbs=KnowledgeDistillationCallback(teacher, loss)).lr_find(num_it=4, show_plot=False)
    assert same(before, state(loss))


def test_a_loss_whose_weights_the_splitter_gives_to_the_learner_is_trained_once(make_learner, teacher):
    loss = Learned()
    learn = make_learner(splitter=lambda model: [[*model.parameters(), *loss.parameters()]])
    before = state(loss)
    learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(teacher, loss))
    assert not same(before, state(loss))
    assert all(p.grad is None or not p.grad.any() for p in loss.parameters())
