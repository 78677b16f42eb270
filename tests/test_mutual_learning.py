"Students that learn from each other."

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import First, Net, Several, hooks, same, state
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from torch import nn

from fasterai_kd import *

works = pytest.mark.works
SGD = partial(OptimWrapper, opt=torch.optim.SGD)


@pytest.fixture
def make_peer(make_learner):
    "A Learner of its own."
    return lambda width=8, **kwargs: make_learner(Net(width), **{"opt_func": SGD, "wd": 0.0, **kwargs})


@works("teachers", "MutualLearning: students that train together in one fit (deep mutual learning)")
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("loss", [Mutual, DecoupledKD], ids=lambda f: f.__name__)
def test_a_fit_gives_the_weights_of_a_hand_written_loop_bit_for_bit(make_learner, make_peer, dls, n, loss):
    learn, peers = make_learner(opt_func=SGD, wd=0.0), [make_peer() for _ in range(n)]
    models = [copy.deepcopy(x.model) for x in (learn, *peers)]
    set_seed(3)
    learn.fit(2, 0.1, cbs=MutualLearning(peers, loss, weight=0.7))

    set_seed(3)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for _ in range(2):
        for m in models:
            m.train()
        for x, y in dls.train:
            x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
            preds = [m(x) for m in models]
            tasks = [F.cross_entropy(p, y) for p in preds]
            for i, opt in enumerate(opts):
                others = [loss(preds[i], p.detach(), target=y) for j, p in enumerate(preds) if j != i]
                (tasks[i] + 0.7 * (sum(others) / n)).backward()
                opt.step()
                opt.zero_grad()
        for _ in dls.valid:
            pass
    for x, model in zip((learn, *peers), models, strict=True):
        assert same(state(x.model), state(model))


def test_without_weight_each_learns_alone(make_learner, make_peer):
    learn, peer = make_learner(Net().eval()), make_peer()
    for m in (*learn.model.modules(), *peer.model.modules()):
        m.p = 0.0  # no dropout: it would draw from one stream of numbers
    alone = copy.deepcopy(learn.model), copy.deepcopy(peer.model)
    learn.fit(2, 0.1, cbs=MutualLearning(peer, weight=0.0))
    make_learner(alone[0]).fit(2, 0.1)
    make_learner(alone[1], opt_func=SGD, wd=0.0).fit(2, 0.1)
    assert same(state(learn.model), state(alone[0]))
    assert same(state(peer.model), state(alone[1]))


def test_the_peers_learning_rate_and_momentum_follow_the_learners(make_learner, make_peer):
    learn, peer, seen = make_learner(), make_peer(opt_func=partial(OptimWrapper, opt=torch.optim.Adam)), []

    def look(self):
        seen.append([(o.hypers[-1]["lr"], o.hypers[-1]["mom"]) for o in (self.opt, peer.opt)])

    learn.fit_one_cycle(2, 1e-2, cbs=[MutualLearning(peer), Callback(before_step=look)])
    assert all(a == b for a, b in seen)
    assert len(set(seen[0] + seen[3] + seen[7])) == 3


def test_a_momentum_that_is_not_scheduled_stays_the_peers_own(make_learner, make_peer):
    peer = make_peer()
    make_learner().fit(1, 0.05, cbs=MutualLearning(peer))
    assert (peer.opt.hypers[-1]["lr"], peer.opt.hypers[-1]["mom"]) == (0.05, 0.0)


@pytest.mark.parametrize("how", ["fit", "fit_one_cycle", "fit_flat_cos", "fine_tune"])
def test_it_is_a_callback_for_every_fit(make_learner, make_peer, how):
    learn, peer = make_learner(), make_peer()
    before = state(peer.model)
    getattr(learn, how)(1, cbs=MutualLearning(peer))
    assert not same(before, state(peer.model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # fastai loads the weights back
def test_lr_find_trains_alone(make_learner, make_peer):
    peer = make_peer()
    before = state(peer.model)
    make_learner(cbs=MutualLearning(peer)).lr_find(num_it=5, show_plot=False)
    assert same(before, state(peer.model))


def test_metrics_show_the_peers_loss_and_its_own_metrics(make_learner, make_peer, dls):
    peer = make_peer(metrics=[accuracy, error_rate])
    mutual = MutualLearning(peer)
    learn = make_learner(metrics=[accuracy, *mutual.metrics])
    learn.fit(2, 0.1, cbs=mutual)
    assert learn.recorder.metric_names[-5:-1] == ["accuracy", "peer_loss", "peer_accuracy", "peer_error_rate"]
    values = list(learn.recorder.values[-1])
    assert values[3:] == pytest.approx(list(peer.validate()), rel=1e-5)
    alone = list(learn.validate())
    assert values[1:3] == pytest.approx(alone[:2])  # the plain task loss
    assert all(x != x for x in alone[2:])


def test_metrics_of_several_peers_have_numbers_and_the_peers_run_in_validation_only_for_them(make_learner, make_peer):
    peers, calls = [make_peer(), make_peer()], []
    for p in peers:
        p.model.register_forward_hook(lambda m, *_: calls.append(m.training))
    mutual = MutualLearning(peers)
    make_learner().fit(1, 0.1, cbs=mutual)
    assert calls == [True] * 8
    learn = make_learner(metrics=mutual.metrics)
    learn.fit(1, 0.1, cbs=mutual)
    assert calls[8:] == [True] * 8 + [False] * 4
    assert learn.recorder.metric_names[3:7] == ["peer1_loss", "peer1_accuracy", "peer2_loss", "peer2_accuracy"]


@works("teachers", "MutualLearning with MixUp and CutMix: the peer's task loss is mixed as the student's")
@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_mixed_samples_are_mixed_for_the_peer_too(make_learner, make_peer, mix):
    mix, seen = mix(), []
    peer = make_peer()
    loss = peer.loss_func

    class Spy:
        reduction, y_int = "mean", True

        def __call__(self, pred, y):
            seen.append((loss.__class__(reduction=self.reduction)(pred, y), y))
            return seen[-1][0]

    peer.loss_func = Spy()
    make_learner().fit(1, 0.1, cbs=[mix, MutualLearning(peer)])
    training = seen[:8]
    assert all(x.shape == (4,) for x, _ in training)  # of each sample, for both labels
    assert torch.equal(training[-2][1], mix.yb1[0])
    assert mix.old_lf is not peer.loss_func


def test_it_goes_with_a_distillation_callback(make_learner, make_peer, teacher):
    kd, seen = KnowledgeDistillationCallback(teacher, SoftTarget), []
    peer = make_peer()

    def look(self):
        if self.training:
            by_hand = torch.lerp(F.cross_entropy(self.pred, self.y), SoftTarget(self.pred, teacher(self.x)), 0.5)
            seen.append((self.loss - by_hand).item())

    class After(Callback):
        order = 2
        after_loss = look

    make_learner().fit(1, 0.1, cbs=[MutualLearning(peer), kd, After()])
    assert all(x > 0 for x in seen)
    assert len(seen) == 4


@pytest.mark.parametrize("where", ["peer", "student", "loss", "cancel"])
def test_whatever_ends_a_fit_nothing_is_left_behind(make_learner, make_peer, where):
    learn, peer = make_learner(), make_peer()
    peer.model.eval()
    peer.model.bn1.train()
    flags = [m.training for m in peer.model.modules()]

    def fail(*_):
        raise KeyboardInterrupt

    if where == "cancel":
        learn.fit(1, 0.1, cbs=[MutualLearning(peer), GradientClip()])
    else:
        model = {"peer": peer.model, "student": learn.model}.get(where)
        handle = model.register_forward_hook(fail) if model is not None else None
        bad = partial(_fail_in, fail)
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, 0.1, cbs=MutualLearning(peer, bad if where == "loss" else Mutual))
        if handle is not None:
            handle.remove()
    assert [m.training for m in peer.model.modules()] == flags
    assert hooks(peer.model) == hooks(learn.model) == 0
    assert all(p.grad is None or not p.grad.any() for p in peer.model.parameters())
    learn.fit(1, 0.1, cbs=MutualLearning(peer))


def _fail_in(fail, pred, teacher_pred, **kwargs):
    fail()


def test_predictions_do_not_run_the_peer(make_learner, make_peer):
    peer, calls = make_peer(), []
    mutual = MutualLearning(peer)
    learn = make_learner(cbs=mutual, metrics=mutual.metrics)
    peer.model.register_forward_hook(lambda *_: calls.append(1))
    learn.get_preds()
    assert not calls


def test_a_file_leaves_the_peers_out(make_learner, make_peer):
    learn = make_learner(cbs=MutualLearning(make_peer()))
    learn.export("m.pkl")
    loaded = load_learner(learn.path / "m.pkl")
    assert loaded.mutual_learning.peers == []
    loaded.dls = learn.dls
    with loaded.no_bar(), loaded.no_logging(), pytest.warns(UserWarning, match="without its peers"):
        loaded.fit(1, 0.1)


# --- what does not work says so ---


@pytest.mark.parametrize("bad", [None, [], Net(), [3]], ids=["None", "empty", "model", "number"])
def test_peers_are_learners(bad):
    with pytest.raises(TypeError, match="peers must be a Learner, or a list of Learners"):
        MutualLearning(bad)


def test_a_loss_on_layers_is_refused(make_peer):
    with pytest.raises(ValueError, match="compares predictions, this loss compares layers"):
        MutualLearning(make_peer(), Attention)


def test_the_same_model_twice_is_refused(make_learner, make_peer, student):
    peer = make_peer()
    for peers in (make_learner(student), [peer, peer]):
        with pytest.raises(ValueError, match="two of the students are the same model"):
            make_learner(student).fit(1, cbs=MutualLearning(peers))


def test_gradient_accumulation_and_data_parallel_are_refused(make_learner, make_peer):
    with pytest.raises(ValueError, match="remove GradientAccumulation"):
        make_learner().fit(1, cbs=[GradientAccumulation(8), MutualLearning(make_peer())])
    learn = make_learner()
    learn.model = nn.DataParallel(learn.model, device_ids=[])
    with pytest.raises(ValueError, match="one process on one device"):
        learn.fit(1, cbs=MutualLearning(make_peer()))


def test_float16_with_a_scaler_is_refused(make_learner, make_peer):
    class Scaler(Callback):
        def before_fit(self):
            self.learn.scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(ValueError, match="does not work with float16's GradScaler"):
        make_learner().fit(1, cbs=[Scaler(), MutualLearning(make_peer())])


def test_the_peer_runs_under_the_students_autocast(make_learner, make_peer):
    class HalfPrecision(Callback):
        "As MixedPrecision, on CPU."

        order = MixedPrecision.order

        def before_batch(self):
            self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
            self.autocast.__enter__()

        def after_loss(self):
            self.autocast.__exit__(None, None, None)

    peer, seen = make_peer(), []
    peer.model.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    learn = make_learner()
    learn.fit(1, 0.1, cbs=[HalfPrecision(), MutualLearning(peer)])
    assert seen == [torch.bfloat16] * 4
    assert all(p.isfinite().all() for p in peer.model.parameters())


def test_weights_are_checked(make_peer):
    with pytest.raises(ValueError, match="weight must be between 0 and inf, got -1"):
        MutualLearning(make_peer(), weight=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_peer_moves_to_the_students_device(dls):
    gpu = dls.to("cuda")
    learn, peer = (Learner(gpu, Net(), loss_func=F.cross_entropy) for _ in range(2))
    learn.fit(1, 0.1, cbs=[MutualLearning(peer), MixedPrecision("bf16")])
    assert next(peer.model.parameters()).is_cuda


def test_a_peers_predictions_are_the_first_of_several_outputs(make_learner, make_peer):
    learn, peer = make_learner(Several(), cbs=First()), make_learner(Several())
    before = state(peer.model)
    learn.fit(1, 0.01, cbs=MutualLearning(peer))
    assert not same(before, state(peer.model))


def test_what_cannot_be_mutual_is_refused_at_once(make_peer):
    with pytest.raises(TypeError, match="weight must be a number, got 'auto'"):
        MutualLearning(make_peer(), weight="auto")
    layers = {"student": ["layer1"], "teacher": ["layer1"]}
    with pytest.raises(ValueError, match="mutual learning compares predictions, this loss compares layers"):
        MutualLearning(make_peer(), combine((Mutual, 1.0), (Attention, 1.0, layers)))
    with pytest.raises(ValueError, match="mutual learning compares predictions, this loss compares layers"):
        MutualLearning(make_peer(), combine((Mutual, 1.0), (Attention, 1.0)))


def test_a_loss_that_is_a_module_may_have_parts_of_its_own(make_learner, make_peer):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Identity()])

        def forward(self, pred, teacher_pred, **kwargs):
            return (self.parts[0](pred) - teacher_pred).square().mean()

    make_learner().fit(1, 0.01, cbs=MutualLearning(make_peer(), Own()))


class Scaled(nn.Module):
    "A loss with a parameter."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pred, teacher_pred, **kwargs):
        return (self.scale * pred - teacher_pred).square().mean()


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: combine((Mutual, 1.0), (f, 1.0))], ids=["alone", "combined"])
def test_a_loss_with_parameters_is_refused_since_nobody_would_train_them(make_learner, make_peer, wrap):
    with pytest.raises(TypeError, match="the loss Scaled has parameters, which mutual learning does not train"):
        MutualLearning(make_peer(), wrap(Scaled()))
    make_learner().fit(1, 0.01, cbs=MutualLearning(make_peer(), wrap(Scaled().requires_grad_(False))))


@pytest.mark.parametrize("who", ["the student", "another peer"])
def test_students_that_would_train_the_same_parameters_are_refused(make_learner, make_peer, who):
    learn, peers = make_learner(), [make_peer(4), make_peer(4)]
    peers[1].model.layer1 = (learn if who == "the student" else peers[0]).model.layer1
    before = state(learn.model)
    with pytest.raises(ValueError, match=r"two of the students share the trainable parameter 'layer1\.0\.weight'"):
        learn.fit(1, 0.01, cbs=MutualLearning(peers))
    assert same(before, state(learn.model))
    peers[1].model.layer1.requires_grad_(False)
    learn.fit(1, 0.01, cbs=MutualLearning(peers))


def test_a_recurrent_peer_forgets_its_state_where_the_student_does(make_learner, make_peer):
    events, peer = [], make_peer()
    peer.model.reset = lambda: events.append("reset")
    peer.model.register_forward_hook(lambda *_: events.append("batch"))
    mutual = MutualLearning(peer)
    make_learner(metrics=mutual.metrics).fit(1, 0.1, cbs=mutual)
    assert events == ["reset", *4 * ["batch"], "reset", *2 * ["batch"]]


def test_what_is_kept_of_a_batch_has_no_graph_and_weight_decay_is_the_peers(make_learner, make_peer):
    peer, graphs = make_peer(), []
    peer.wd = 0.3
    mutual = MutualLearning(peer)
    look = Callback(after_batch=lambda self: graphs.extend(x.requires_grad for pair in mutual._outputs for x in pair))
    look.order = 90
    make_learner(wd=0.1).fit(1, 0.01, cbs=[mutual, look])
    assert graphs
    assert not any(graphs)
    assert peer.opt.hypers[-1]["wd"] == 0.3


def test_independent_classes_are_pointed_out(make_learner, make_peer):
    learn = make_learner(loss_func=partial(F.binary_cross_entropy_with_logits))
    with (
        pytest.warns(UserWarning, match="is of independent classes.*but Mutual compares"),
        pytest.raises(ValueError, match="size"),
    ):
        learn.fit(1, cbs=MutualLearning(make_peer()))  # labels are class indices here


def test_without_labels_it_is_an_error(make_learner, make_peer):
    learn = make_learner()
    with pytest.raises(ValueError, match="mutual learning needs labels"):
        learn.fit(
            1, cbs=[MutualLearning(make_peer()), Callback(before_batch=lambda self: setattr(self.learn, "yb", ()))]
        )
