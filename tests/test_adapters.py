"`adapter='auto'`: features of unequal channels, compared through modules that learn with the student."

import contextlib
import copy
import gc
import os
import pickle
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import cloudpickle
import pytest
import torch
from conftest import Net, hooks, same, state
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, Lookahead, OptimWrapper, RAdam
from fastai.torch_core import params, set_seed
from torch import nn

from fasterai_kd import *

works = pytest.mark.works
EQUAL = [FitNet, ActivationBoundaries, CWD]
KEY = "layer2->layer2"
OPTS = {
    "SGD": partial(SGD, mom=0.9),
    "Adam": Adam,
    "Lookahead": lambda p, lr: Lookahead(RAdam(p, lr=lr), k=2),
    "torch SGD": partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9),
    "torch AdamW": partial(OptimWrapper, opt=torch.optim.AdamW),
}


@pytest.fixture
def wide():
    torch.manual_seed(1)
    return Net(width=6).eval()


def auto(teacher, loss=FitNet, student="layer2", of_teacher="layer2", adapter="auto", **kwargs):
    return KnowledgeDistillationCallback(teacher, loss, student, of_teacher, adapter=adapter, **kwargs)


def plain_adapter(c_s, c_t):
    return nn.Conv2d(c_s, c_t, 1, bias=False)


def groups(model):
    return [params(model.conv1) + params(model.bn1), params(model.layer1) + params(model.layer2) + params(model.head)]


def contents(opt):
    "Lists, the parameters in them, and those with a state."
    states = [opt.state, getattr(vars(opt).get("opt"), "state", {})]
    return [[*map(id, pg)] for pg in opt.param_lists], [{id(p) for p in s} for s in states]


class Call(Callback):
    "Calls `f(learn)` at an event; order 5 is within the optimizer's step."

    def __init__(self, order=1, **events):
        self.order = order
        for event, f in events.items():
            setattr(self, event, partial(self.call, f))

    def call(self, f):
        f(self.learn)


# --- right values ---


@pytest.mark.parametrize("loss", EQUAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("layer_s", "layer_t"), [("layer2", "layer2"), ("conv1", "layer1"), ("layer2", "conv1"), ("layer1", "layer1")]
)
def test_the_loss_compares_batch_normalized_1x1_convolutions_of_maps_pooled_to_the_smaller(
    make_learner, wide, loss, layer_s, layer_t
):
    kept, seen = {}, []

    def check(learn):
        s, t = kept["s"], kept["t"]
        n = min(s.shape[-1], t.shape[-1])
        s, t = (f.reshape(*f.shape[:2], n, f.shape[-1] // n, n, f.shape[-1] // n).mean((3, 5)) for f in (s, t))
        conv, bn = kd.adapters[f"{layer_s}->{layer_t}"]
        s = torch.einsum("bihw,oi->bohw", s, conv.weight[:, :, 0, 0])
        if learn.training:
            mean, var = s.mean((0, 2, 3)), s.var((0, 2, 3), unbiased=False)
        else:
            mean, var = bn.running_mean, bn.running_var
        s = (s - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        torch.testing.assert_close(kd._history._last["kd_loss"], loss({"": s}, {"": t}).detach(), rtol=1e-4, atol=1e-5)
        seen.append(learn.training)

    kd, learn = auto(wide, loss, layer_s, layer_t), make_learner()
    learn.model.get_submodule(layer_s).register_forward_hook(lambda m, i, o: kept.update(s=o.detach().clone()))
    wide.get_submodule(layer_t).register_forward_hook(lambda m, i, o: kept.update(t=o.detach().clone()))
    learn.fit(1, 0.0, cbs=[kd, Call(after_loss=check)])
    assert seen == [True] * 4 + [False] * 2


class Whole(nn.Module):
    "A student with the adapter as a part of it, which any Learner trains."

    def __init__(self, net, adapter):
        super().__init__()
        self.net, self.adapter = net, adapter

    def forward(self, x):
        return self.net(x)

    def loss(self, fm_s, fm_t, **kwargs):
        return FitNet({"": self.adapter(fm_s["net.layer2"])}, fm_t)


def both(make_learner, teacher, train, wd=0.1, cbs=lambda: [], **kwargs):
    "Weights of student and adapter after `train(learn, cbs)` of a Whole, and of a student with adapter='auto'."
    whole = Whole(Net(), nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)))
    net, kd, ends = copy.deepcopy(whole.net), auto(teacher, weight=0.9), []
    splitter = lambda m: [p + params(m.adapter) * i for i, p in enumerate(groups(m.net))]  # noqa: E731
    learn = make_learner(whole, splitter=splitter, wd=wd, **kwargs)
    own = KnowledgeDistillationCallback(teacher, whole.loss, "net.layer2", "layer2", weight=0.9)
    learner = make_learner(net, splitter=groups, wd=wd, **kwargs)
    learner.validate(cbs=kd)
    kd.adapters[KEY].load_state_dict(whole.adapter.state_dict())
    start = state(whole)
    for each, cb in ((learn, own), (learner, kd)):
        set_seed(3)
        train(each, [cb, *cbs()])
    ends = [state(whole.net), state(net)], [state(whole.adapter), state(kd.adapters[KEY])]
    assert not torch.equal(start["adapter.0.weight"], ends[1][1]["0.weight"])
    for a, b in ends:
        for k in a:
            torch.testing.assert_close(b[k], a[k], msg=lambda text, k=k: f"{k}: {text}")


def one_cycle(learn, cbs):
    learn.fit_one_cycle(2, slice(1e-3, 1e-1), cbs=cbs)


@works("training features", "adapters of unequal channels train as a part of the student, by every optimizer")
@pytest.mark.parametrize("opt", OPTS)
def test_an_adapter_trains_as_if_it_were_a_part_of_the_student_by_any_optimizer(make_learner, wide, opt):
    both(make_learner, wide, one_cycle, opt_func=OPTS[opt])


def frozen_first(learn, cbs):
    learn.freeze()
    learn.fit_one_cycle(1, slice(1e-2), cbs=cbs)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3, 1e-2), cbs=cbs)


WAYS = {
    "fit": lambda learn, cbs: learn.fit(2, 0.1, wd=0.2, cbs=cbs),
    "fine_tune": lambda learn, cbs: learn.fine_tune(1, 0.1, freeze_epochs=1, cbs=cbs),
    "freeze, unfreeze": frozen_first,
    "reset_opt": lambda learn, cbs: [learn.fit(1, 0.1, cbs=cbs), learn.fit(1, 0.1, cbs=cbs, reset_opt=True)],
}


@works("training features", "adapters: fine_tune, freeze, unfreeze, reset_opt, discriminative rates, weight decay")
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_follows_the_last_group_through_rates_decay_and_freezing(make_learner, wide, way):
    both(make_learner, wide, WAYS[way], opt_func=OPTS["SGD"])  # Adam makes steps of rounding errors


@pytest.mark.parametrize("wd_bn_bias", [True, False])
def test_weight_decay_of_batch_norm_is_the_learners(make_learner, wide, wd_bn_bias):
    both(make_learner, wide, one_cycle, wd=5.0, wd_bn_bias=wd_bn_bias)


class CPUPrecision(MixedPrecision):
    def before_fit(self):
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", init_scale=2.0**10), []


CBS = {
    "GradientAccumulation": lambda: [GradientAccumulation(8)],
    "MixedPrecision": lambda: [CPUPrecision()],
    "MixedPrecision, GradientAccumulation": lambda: [CPUPrecision(), GradientAccumulation(8)],
    "skipped batches and steps": lambda: [
        Call(before_step=skip(CancelStepException, 1), after_backward=skip(CancelBatchException, 2))
    ],
}


def skip(what, i):
    def at(learn):
        if learn.iter == i:
            raise what()

    return at


@works("training features", "adapters: GradientAccumulation, mixed precision, skipped steps")
@pytest.mark.parametrize("cbs", CBS)
def test_an_adapter_keeps_and_drops_gradients_as_the_student_does(make_learner, wide, cbs):
    both(make_learner, wide, one_cycle, opt_func=OPTS["SGD"], cbs=CBS[cbs])


def test_gradient_clip_clips_the_student_as_ever(make_learner, wide):
    learn, norms = make_learner(), []
    norm = lambda learn: norms.append(nn.utils.get_total_norm([p.grad for p in learn.model.parameters()]))  # noqa: E731
    learn.fit(1, 0.1, cbs=[auto(wide, weight=1), GradientClip(0.01), Call(order=20, before_step=norm)])
    assert all(n <= 0.0101 for n in norms)


def test_the_gradient_reaches_adapter_and_student_and_not_the_teacher(make_learner, wide):
    learn, kd, seen = make_learner(), auto(wide, weight=1), []

    def check(learn):
        seen.append(all(p.grad.norm() > 0 for p in [*kd.adapters.parameters(), learn.model.layer2[0].weight]))
        assert all(p.grad is None for p in wide.parameters())

    learn.fit(1, 0.1, cbs=[kd, Call(after_backward=check)])
    assert seen == [True] * 4


# --- when and for whom ---


def test_without_adapter_the_error_names_it(make_learner, wide):
    with pytest.raises(ValueError, match=r"\(4, 8, 4, 4\) and \(4, 12, 4, 4\).*give the callback adapter='auto'"):
        make_learner().fit(1, cbs=auto(wide, adapter=None))


@pytest.mark.parametrize("loss", EQUAL, ids=lambda f: f.__name__)
def test_where_all_channels_match_the_fit_is_that_without_adapter_bit_for_bit(make_learner, teacher, loss):
    states, start = [], Net()
    for adapter in (None, "auto"):
        learn, kd = make_learner(copy.deepcopy(start)), auto(teacher, loss, adapter=adapter)
        set_seed(0)
        learn.fit_one_cycle(2, 0.1, cbs=kd)
        states.append(state(learn.model) | {"rng": torch.get_rng_state()})
    assert same(*states)
    assert len(kd.adapters) == 0


def test_making_adapters_draws_none_of_the_students_random_numbers(make_learner, wide):
    states, start = [], Net()
    for cbs in ([], [auto(wide, weight=0.0)]):
        learn = make_learner(copy.deepcopy(start))
        set_seed(0)
        learn.fit(2, 0.1, cbs=cbs)
        states.append(state(learn.model) | {"rng": torch.get_rng_state()})
    assert same(*states)


def test_the_same_seed_gives_the_same_adapter_and_student(make_learner, wide):
    states = []
    for _ in range(2):
        set_seed(5)
        learn, kd = make_learner(Net()), auto(wide)
        learn.fit(1, 0.1, cbs=kd)
        states.append(state(nn.ModuleList([learn.model, kd.adapters])))
    assert same(*states)


def test_in_a_combined_loss_only_parts_that_need_equal_shapes_are_adapted_and_each_pair_once(make_learner, wide):
    seen, pair = [], {"student": ["layer1", "layer1"], "teacher": ["layer1", "conv1"]}

    def attention(fm_s, fm_t, **kwargs):
        seen.append([f.shape[1] for f in (*fm_s.values(), *fm_t.values())])
        return Attention(fm_s, fm_t)

    attention.same_shape = False
    loss = combine((SoftTarget, 1), (FitNet, 1), (partial(CWD, T=2.0), 1), (attention, 1), (Similarity, 1, pair))
    kd = auto(wide, loss)
    make_learner().fit(1, 0.1, cbs=kd)
    assert list(kd.adapters) == [KEY]
    assert kd.adapters[KEY][1].num_batches_tracked == 4
    assert seen == [[8, 12]] * 6
    kd = auto(wide, combine((FitNet, 1, pair)))
    make_learner().fit(1, 0.1, cbs=kd)
    assert list(kd.adapters) == ["layer1->layer1", "layer1->conv1"]


@pytest.mark.filterwarnings("ignore:no loss here compares", "ignore:.* reads no layers")
@pytest.mark.parametrize("loss", [Attention, Similarity, RKD, PKT, SoftTarget], ids=lambda f: f.__name__)
def test_a_loss_that_takes_unequal_channels_gets_no_adapter(make_learner, wide, loss):
    kd = auto(wide, loss)
    make_learner().fit(1, 0.1, cbs=kd)
    assert len(kd.adapters) == 0


@pytest.mark.filterwarnings("ignore:no loss here compares")
def test_a_loss_of_ones_own_gets_equal_shapes_unless_it_says_that_it_takes_others(make_learner, wide):
    seen = []

    class Own(nn.Module):
        def forward(self, fm_s, fm_t, **kwargs):
            seen.append([f.shape[1] for f in (*fm_s.values(), *fm_t.values())])
            return Similarity(fm_s, fm_t)

    own = Own()
    for needs, channels in ((None, [12, 12]), (True, [12, 12]), (False, [8, 12])):
        if needs is not None:
            own.same_shape = needs
        make_learner().fit(1, 0.1, cbs=auto(wide, own))
        assert seen.pop() == channels


def test_torchs_error_in_a_loss_of_ones_own_names_layers_shapes_and_the_adapter(make_learner, wide):
    def huber(pred, teacher_pred, fm_s, fm_t, **kwargs):
        return sum(nn.functional.huber_loss(s, t) for s, t in zip(fm_s.values(), fm_t.values(), strict=True))

    def logits(pred, teacher_pred, **kwargs):
        return (pred - teacher_pred).square().mean()

    expected = (
        r"huber: The size of tensor a \(8\) must match .* at non-singleton dimension 1\. It got pred \(4, 4\), "
        r"teacher_pred \(4, 4\), student layer 'layer2' \(4, 8, 4, 4\) and teacher layer 'layer2' \(4, 12, 4, 4\)\. "
        r"The callback's adapter='auto' brings layers to one shape$"
    )
    kd = KnowledgeDistillationCallback(wide, huber, "layer2", "layer2")
    with pytest.raises(RuntimeError, match=expected), pytest.warns(UserWarning, match="target size"):
        make_learner().fit(1, cbs=kd)
    kd = KnowledgeDistillationCallback(Net(classes=6), logits)
    with pytest.raises(RuntimeError, match=r"logits: .* It got pred \(4, 4\), teacher_pred \(4, 6\)$"):
        make_learner().fit(1, cbs=kd)


class Tokens(nn.Module):
    "(B, 3, 16, 16) → (B, tokens, width) → (B, width)."

    def __init__(self, width, tokens=16):
        super().__init__()
        self.tokens, self.embed, self.pool = tokens, nn.Linear(768 // tokens, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.pool(self.embed(x.reshape(len(x), self.tokens, -1)).mean(1))


@pytest.mark.parametrize("loss", EQUAL, ids=lambda f: f.__name__)
def test_tokens_are_brought_to_the_teachers_width_by_a_linear_layer_and_layer_norm(make_learner, loss):
    kd = auto(Tokens(6), loss, "embed", "embed")
    make_learner(Tokens(4)).fit(1, 0.1, cbs=kd)
    linear, norm = kd.adapters["embed->embed"]
    assert (type(linear), tuple(linear.weight.shape), norm.normalized_shape) == (nn.Linear, (6, 4), (6,))
    assert all(k == k for k in kd.history["kd_loss"])


def test_vectors_are_brought_to_the_teachers_width_by_a_linear_layer_and_batch_norm(make_learner, wide):
    student = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.ReLU(), nn.Linear(5, 4))
    kd = auto(wide, student="1", of_teacher="head")
    make_learner(student).fit(1, 0.1, cbs=kd)
    assert [type(m) for m in kd.adapters["1->head"]] == [nn.Linear, nn.BatchNorm1d]


class Lifted(Net):
    "`lift` gives (B, 2, 4, H, W)."

    def __init__(self):
        super().__init__()
        self.lift = nn.Unflatten(1, (2, 4))

    def forward(self, x):
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.head(self.lift(x).flatten(1, 2).mean((2, 3)))


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "message"),
    [
        (Net(), Lifted(), ("layer2", "lift"), r"'lift' give \(4, 8, 4, 4\) and \(4, 2, 4, 4, 4\): pair other layers"),
        (
            Tokens(4),
            Tokens(6, tokens=12),
            ("embed", "embed"),
            r"teacher gives \(4, 12, 6\) .* its 12 tokens are no grid",
        ),
    ],
    ids=["other dimensions", "tokens of no grid"],
)
def test_what_cannot_be_adapted_is_refused_with_names_and_shapes(make_learner, student, teacher, layers, message):
    with pytest.raises(ValueError, match=message):
        make_learner(student).fit(1, cbs=auto(teacher, FitNet, *layers))


def test_an_adapter_of_ones_own_is_made_of_the_channels(make_learner, wide):
    asked = []
    kd = auto(wide, student=["conv1", "layer1"], of_teacher=["layer1", "layer1"], adapter=lambda c_s, c_t: (
        asked.append((c_s, c_t)), nn.Sequential(plain_adapter(c_s, 9), plain_adapter(9, c_t)))[1])  # fmt: skip
    make_learner().fit(1, 0.1, cbs=kd)
    assert asked == [(4, 6)] * 2
    assert [len(m) for m in kd.adapters.values()] == [2, 2]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("conv", "or a function"), (nn.Conv2d(4, 8, 1), "or a function"), (lambda s, t: None, "must return an nn.Module")],
)
def test_a_wrong_adapter_is_refused(make_learner, wide, adapter, message):
    with pytest.raises(TypeError, match=message):
        make_learner().fit(1, cbs=auto(wide, adapter=adapter))


# --- one student's, as long as it is the student ---


def test_adapters_evaluate_in_validation_and_without_graph(make_learner, wide):
    kd, seen, learn = auto(wide), [], make_learner()

    def look(learn):
        seen.append((kd.adapters[KEY].training, int(kd.adapters[KEY][1].num_batches_tracked)))

    learn.fit(1, 0.1, cbs=[kd, Call(after_loss=look)])
    assert seen == [(True, 1), (True, 2), (True, 3), (True, 4), (False, 4), (False, 4)]


def test_validate_before_a_fit_makes_the_adapters_that_the_fit_trains(make_learner, wide):
    learn, kd = make_learner(cbs=auto(wide)), None
    kd = learn.knowledge_distillation
    assert learn.validate()[0] > 0
    made, before = kd.adapters[KEY], state(kd.adapters)
    learn.validate()
    assert same(before, state(kd.adapters))
    learn.fit(1, 0.1)
    assert kd.adapters[KEY] is made
    assert not same(before, state(kd.adapters))


def test_another_student_or_teacher_gets_new_adapters_and_the_same_ones_keep_them(make_learner, wide):
    kd, student = auto(wide), Net()
    learns = [make_learner(student), make_learner(student), make_learner(Net())]
    made = []
    for learn in learns:
        learn.fit(1, 0.1, cbs=kd)
        made.append(kd.adapters[KEY])
    kd.teacher = Net(width=6)
    learns[-1].fit(1, 0.1, cbs=kd)
    assert made[0] is made[1]
    assert len({id(m) for m in [*made, kd.adapters[KEY]]}) == 3


def test_adapters_keep_no_student_alive(make_learner, wide):
    kd, learn = auto(wide), make_learner(Net())
    learn.fit(1, 0.1, cbs=kd)
    gone = [weakref.ref(learn.model), weakref.ref(learn.opt)]
    del learn
    gc.collect()
    assert [r() for r in gone] == [None, None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lr_find_leaves_the_adapters_as_they_were(make_learner, wide):
    learn = make_learner(cbs=auto(wide))
    kd = learn.knowledge_distillation
    learn.lr_find(num_it=6, show_plot=False)
    assert len(kd.adapters) == 0
    learn.fit(1, 0.1)
    made, before = kd.adapters[KEY], state(kd.adapters)
    learn.lr_find(num_it=6, show_plot=False)
    assert kd.adapters[KEY] is made
    assert same(before, state(kd.adapters))


def test_adapters_that_diverged_with_their_student_are_made_anew(make_learner, wide):
    learn, kd = make_learner(), auto(wide)
    before = state(learn.model)
    learn.fit(1, float("inf"), cbs=kd)
    learn.model.load_state_dict(before)
    learn.fit(1, 0.01, cbs=kd, reset_opt=True)
    assert all(0 < k < 100 for k in kd.history["kd_loss"])


def test_a_batch_for_which_the_teacher_gives_nan_does_not_spoil_the_adapters(make_learner, wide):
    learn, kd = make_learner(), auto(wide)
    handle = wide.layer2.register_forward_hook(lambda m, i, o: o * float("nan"))
    with pytest.raises(FloatingPointError):
        learn.fit(1, 0.1, cbs=kd)
    handle.remove()
    learn.fit(1, 0.1, cbs=kd)
    assert all(k == k for k in kd.history["kd_loss"])


# --- nothing is left, nothing is saved ---

ENDS = [ValueError("x"), KeyboardInterrupt(), CancelFitException(), CancelBatchException(), CancelStepException()]
EVENTS = ["after_loss", "after_backward", "before_step", "after_step", "after_batch"]
FAULTS = [(e, w) for e in EVENTS for w in ENDS[:3]] + [("before_step", w) for w in ENDS[3:]]


@works("faults", "exceptions, Ctrl-C and Cancel exceptions leave no adapter in the optimizer")
@pytest.mark.parametrize("opt", ["Adam", "torch AdamW"])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(("event", "what"), FAULTS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_whatever_ends_a_fit_the_optimizer_is_the_students(make_learner, wide, opt, attached, event, what):
    def fail(learn):
        if armed and learn.training and learn.iter == 2:
            raise what

    armed, kd = [1], auto(wide)
    learn = make_learner(cbs=[kd] if attached else [], opt_func=OPTS[opt], splitter=groups)
    cbs = [] if attached else [kd]
    learn.create_opt()
    before, own = contents(learn.opt)[0], {id(p) for p in learn.model.parameters()}
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        learn.fit(1, 0.1, cbs=[*cbs, Call(order=5, **{event: fail})])
    if attached:
        learn.validate()  # with `cbs=kd` at once, in the Learner at its next use
    armed.clear()
    for _ in range(2):
        lists, states = contents(learn.opt)
        assert lists == before
        assert all(s <= own for s in states)
        learn.fit(1, 0.1, cbs=cbs)
        assert all(k == k for k in kd.history["kd_loss"])
    assert all(p.grad is None for p in kd.adapters.parameters())


def test_a_fit_leaves_the_optimizer_the_lists_that_it_had(make_learner, wide):
    for opt in OPTS.values():
        learn = make_learner(opt_func=opt, splitter=groups)
        learn.create_opt()
        lists = list(learn.opt.param_lists)
        learn.fit(1, 0.1, cbs=auto(wide))
        assert all(a is b for a, b in zip(lists, learn.opt.param_lists, strict=True))
        assert {len(learn.opt.hypers), len(lists)} == {2}


def test_two_callbacks_with_adapters_do_not_meet_in_the_optimizer(make_learner, wide):
    class Second(KnowledgeDistillationCallback):
        pass

    learn, kds = make_learner(), [auto(wide), Second(Net(width=3), CWD, "layer1", "layer1", adapter="auto")]
    learn.create_opt()
    before = contents(learn.opt)[0]
    starts = []
    learn.fit(1, 0.1, cbs=[*kds, Call(after_loss=lambda learn: starts.append([state(kd.adapters) for kd in kds]))])
    assert contents(learn.opt)[0] == before
    assert not any(same(a, state(kd.adapters)) for a, kd in zip(starts[0], kds, strict=True))


@works("other calls", "adapters are in no file: save, load, SaveModelCallback with_opt, export, pickle, state_dict")
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("opt", OPTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_files_with_the_optimizer_fit_learners_with_and_without_the_callback(make_learner, wide, opt, attached):
    kd, kwargs = auto(wide), {"opt_func": OPTS[opt], "splitter": groups}
    learn = make_learner(cbs=[kd] if attached else [], **kwargs)
    saver = SaveModelCallback(with_opt=True, every_epoch=False, fname="best")
    learn.fit(2, 0.01, cbs=[saver] if attached else [kd, saver])  # loads its file at the end, or warns
    learn.save("last", with_opt=True)
    for file in ("best", "last"):
        for cbs in ([], [auto(wide)]):
            other = make_learner(Net(), **kwargs)
            other.load(file, with_opt=True, weights_only=False)
            other.fit(1, 0.01, cbs=cbs)
        learn.load(file, with_opt=True, weights_only=False)
        learn.fit(1, 0.01, cbs=[] if attached else [kd])
        assert all(k == k for k in kd.history["kd_loss"])
    assert learn.model.state_dict().keys() == Net().state_dict().keys()


def test_export_pickle_and_deepcopy_leave_the_adapters_out(make_learner, wide):
    learn, kd = make_learner(), auto(wide)
    learn.fit(1, 0.1, cbs=kd)
    copies = [pickle.loads(pickle.dumps(kd)), copy.deepcopy(kd)]
    learn.add_cb(kd)
    learn.export("s.pkl")
    exported = load_learner(learn.path / "s.pkl").knowledge_distillation
    own = cloudpickle.loads(cloudpickle.dumps(auto(wide, adapter=lambda c_s, c_t: plain_adapter(c_s, c_t))))
    for other in [*copies, exported, copy.deepcopy(learn).knowledge_distillation, own]:
        assert len(other.adapters) == 0
        other.teacher = wide
        make_learner(Net()).fit(1, 0.1, cbs=other)
        assert len(other.adapters) == 1
    assert len(kd.adapters) == 1


# --- the rest of fastai ---


@works("training features", "adapters with torch.compile")
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
def test_a_compiled_student_learns_through_adapters(make_learner, wide):
    states, start = [], Net()
    for compiled in (False, True):
        student, kd = copy.deepcopy(start), auto(wide)
        set_seed(0)
        learn = make_learner(torch.compile(student, backend="eager") if compiled else student)
        learn.fit(2, 0.1, cbs=kd)
        states.append(state(nn.ModuleList([student, kd.adapters])))
        assert hooks(student) == 0
    assert same(*states)


def test_to_fp16_is_right_and_the_old_mixed_precision_is_refused(make_learner, wide):
    class NonNativeMixedPrecision(Callback):
        pass

    with pytest.raises(ValueError, match=r"use learn\.to_fp16"):
        make_learner().fit(1, cbs=[auto(wide), NonNativeMixedPrecision()])


SCRIPT = """
import contextlib, io, warnings
warnings.simplefilter("ignore")
from distributed import *  # patches fastai's broadcast, which knows GPUs only

torch.set_num_threads(1)
rank = rank_distrib()
images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
halves = torch.arange(32).view(2, -1, 4)

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.act, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.act(self.conv1(x)).mean((2, 3)))

def fit(world, adapter, cbs=()):
    order = halves.flatten() if world == 2 else halves.transpose(0, 1).flatten()
    dls = DataLoaders(*2 * [DataLoader([(images[i], tensor(i % 4)) for i in order], bs=8 // world, device="cpu")])
    torch.manual_seed(0)
    teacher, student = Net(6), Net(4)
    torch.manual_seed(0 if world == 1 else rank)  # adapters would differ
    kd = KnowledgeDistillationCallback(teacher, FitNet, "conv1", "conv1", adapter=adapter)
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=sgd, wd=0.1)
    with contextlib.redirect_stdout(io.StringIO()):
        with learn.distrib_ctx(sync_bn=False, cpu=True) if world == 2 else contextlib.nullcontext():
            learn.fit(2, 0.1, cbs=[kd, *cbs])
    assert type(learn.model) is Net and len(kd.adapters) == 1
    return [x.detach() for m in (learn.model, kd.adapters) for x in m.state_dict().values()]

def conv(c_s, c_t):
    return nn.Conv2d(c_s, c_t, 1, bias=False)

results = {}
for name, adapter, cbs in (("conv", conv, []), ("accumulated", conv, [GradientAccumulation(8)]), ("auto", "auto", [])):
    results[name] = fit(2, adapter, cbs), fit(1, adapter, [GradientAccumulation(16)] if cbs else [])
torch.save(results, f"{rank}.pt")
teardown_distrib()  # else torch sometimes aborts a process that ends
"""


@pytest.mark.slow
@works("many processes", "adapters: DDP on 2 processes gives the adapters of one process")
def test_two_processes_train_the_adapters_that_one_trains(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(SCRIPT)
    examples = Path(__file__).parents[1] / "examples"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(examples), str(examples.parent)])}
    env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(free.getsockname()[1])
    start = partial(subprocess.Popen, [sys.executable, "script.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    ranks = [start(env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for name, (two, one) in first.items():
        for a, b, c in zip(two, second[name][0], one, strict=True):
            assert torch.equal(a, b), name
            if name != "auto":  # whose batch statistics are those of half a batch
                torch.testing.assert_close(a, c)


def test_the_adapter_of_a_student_in_float64_is_so_too(make_learner, wide):
    to_double = Call(-1, before_batch=lambda learn: setattr(learn, "xb", (learn.x.double(),)))
    kd = auto(wide.double())
    make_learner(Net().double()).fit(1, 0.01, cbs=[kd, to_double])
    assert {p.dtype for p in kd.adapters.parameters()} == {torch.float64}


@pytest.mark.parametrize("event", ["after_backward", "before_step"])
def test_after_ctrl_c_the_adapters_have_no_gradient(make_learner, wide, event):
    def stop(learn):
        if learn.train_iter == 2:
            raise KeyboardInterrupt

    kd = auto(wide)
    with pytest.raises(KeyboardInterrupt):
        make_learner().fit(1, 0.01, cbs=[kd, Call(**{event: stop})])
    assert len(kd.adapters) == 1
    assert not any(p.grad is not None and p.grad.any() for p in kd.adapters.parameters())


def test_a_fit_begins_without_the_gradients_of_one_that_was_interrupted(make_learner, wide):
    def stop(learn):
        raise KeyboardInterrupt

    kd, grads = auto(wide), []
    learn = make_learner()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.01, cbs=[kd, Call(before_step=stop)])
    learn.opt.zero_grad()
    learn.fit(1, 0.01, cbs=[kd, Call(before_batch=lambda _: grads.append([p.grad for p in kd.adapters.parameters()]))])
    assert not any(grad is not None and grad.any() for grad in grads[0])


def test_a_loss_whose_parameters_the_learner_trains_already_is_not_trained_twice(make_learner, teacher):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, pred, teacher_pred, **kwargs):
            return self.w * SoftTarget(pred, teacher_pred)

    model = Net()
    model.scaled = Scaled()
    kd = KnowledgeDistillationCallback(teacher, model.scaled)
    make_learner(model, opt_func=SGD, wd=0.0).fit(1, 0.1, cbs=kd)
    w = 1.0
    for loss in kd.history["kd_loss"]:  # w times what it scales
        w -= 0.1 * 0.5 * loss / w
    assert model.scaled.w.item() == pytest.approx(w, rel=1e-4)
