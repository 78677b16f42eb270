"The same numbers as `fasterai`, in values and gradients, where it is right; and the same call."

import copy
import inspect
import warnings
from functools import cache

import pytest
import torch
import torchvision.models as tv
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import fasterai_kd.all as ours
import fasterai_kd.schedule as our_schedules

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peer = pytest.importorskip("fasterai.distill.all")
    peer_schedules = pytest.importorskip("fasterai.core.schedule")

law = settings(deadline=None, derandomize=True, max_examples=40)
LOSSES = ["SoftTarget", "Logits", "Mutual", "DecoupledKD", "Attention", "Similarity", "FitNet", "ActivationBoundaries"]


def same_value_and_gradient(name, inputs, of, **args):
    "`of` names the student tensors within `inputs`."
    results = []
    for module in (ours, peer):
        s = [x.clone().requires_grad_() for x in of]
        value = getattr(module, name)(**inputs(s), **args)
        results.append((value.detach(), *torch.autograd.grad(value, s)))
    assert_close(*results, msg=lambda m: f"{name}({args}): {m}")


seeds = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def randn(rng, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=rng, dtype=torch.float64)


@law
@given(
    seeds,
    st.integers(1, 5),
    st.integers(2, 8),
    st.floats(0.1, 3),
    st.floats(1, 20),
    st.floats(0, 10),
    st.floats(0, 10),
)
def test_output_losses_have_the_peers_value_and_gradient(rng, n, classes, scale, T, alpha, beta):
    s, t = (randn(rng, n, classes, scale=scale) for _ in "st")
    y = torch.randint(classes, (n,), generator=rng)

    def inputs(s):
        return {"pred": s[0], "teacher_pred": t, "target": y}

    for name in ("SoftTarget", "Logits", "Mutual", "DecoupledKD"):
        same_value_and_gradient(name, inputs, [s])
    same_value_and_gradient("SoftTarget", inputs, [s], T=T)
    same_value_and_gradient("DecoupledKD", inputs, [s], T=T, alpha=alpha, beta=beta)


@law
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.floats(0, 4), st.sampled_from([1, 2, 3]))
def test_intermediate_losses_have_the_peers_value_and_gradient(rng, n, pairs, channels, m, p):
    shapes = [(n, channels + i, 3 - i, 2 + i) for i in range(pairs)]
    fm = [[randn(rng, *shape) for shape in shapes] for _ in "st"]
    wide = [randn(rng, n, 2 * channels, *shape[2:]) for shape in shapes]

    def inputs(t):
        return lambda s: {"fm_s": dict(enumerate(s)), "fm_t": dict(enumerate(t)), "pred": None}

    for t in (fm[1], wide):
        same_value_and_gradient("Attention", inputs(t), fm[0])
        same_value_and_gradient("Attention", inputs(t), fm[0], p=4)
        same_value_and_gradient("Similarity", inputs(t), fm[0])
        same_value_and_gradient("Similarity", inputs(t), fm[0], p=p)
    same_value_and_gradient("FitNet", inputs(fm[1]), fm[0])
    same_value_and_gradient("ActivationBoundaries", inputs(fm[1]), fm[0])
    same_value_and_gradient("ActivationBoundaries", inputs(fm[1]), fm[0], m=m)


ARCHS = ["resnet18", "resnet34", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "densenet121"]


@cache
def model(arch):
    return getattr(tv, arch)(weights=None, num_classes=2).eval()


@pytest.mark.parametrize("teacher", ARCHS[1:])
def test_match_feature_layers_finds_the_peers_pairs(teacher):
    x = torch.zeros(1, 3, 64, 64)
    for s, t in ((model(ARCHS[0]), model(teacher)), (model(teacher), model(ARCHS[0]))):
        expected = peer.match_feature_layers(s, t, x)
        assert len(expected["student"]) >= 4
        assert ours.match_feature_layers(s, t, x) == expected


class Shared(nn.Module):
    "One layer under two names, and an empty place."

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.b, self.c = self.a[0], None


SCHEDULES = [None, "cos", "one_cycle"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_training_has_the_peers_losses_and_accuracy(name, schedule):
    g = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 3, 12, 12, generator=g), torch.arange(24) % 4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 4))
    teacher, values = copy.deepcopy(net).eval(), []
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    for callback, losses, schedules in (
        (ours.KnowledgeDistillationCallback, ours, our_schedules),
        (peer.KnowledgeDistillationCallback, peer, peer_schedules),
    ):
        loaders = [torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)]
        learn = Learner(DataLoaders(*loaders), copy.deepcopy(net), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
        layers = (["0", "2"], ["0", "2"]) if name in LOSSES[4:] else ()
        how = {"schedule": getattr(schedules, schedule)} if schedule else {}
        kd = callback(copy.deepcopy(teacher), getattr(losses, name), *layers, weight=0.4, **how)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(2, 0.01, cbs=kd)
        values.append([*learn.recorder.losses, *learn.recorder.values[0], *learn.recorder.values[1]])
    assert_close(*(torch.tensor(v) for v in values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", [*ARCHS, "shared"])
def test_layers_have_the_peers_names_and_representations(net):
    net = Shared() if net == "shared" else model(net)
    names = peer.get_model_layers(net)
    assert ours.get_model_layers(net) == names
    assert list(ours.get_model_layers(net, True).items()) == list(
        peer.get_model_layers(net, get_layer_repr=True).items()
    )
    for name in [*names, "a.9", "no.such.layer"]:
        assert ours.get_module_by_name(net, name) is peer.get_module_by_name(net, name)


PCTS = [i / 100 for i in range(101)]


def assert_same_progress(a, b):
    assert [a.progress(pct) for pct in PCTS] == pytest.approx([b.progress(pct) for pct in PCTS], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd"])
@pytest.mark.parametrize("args", [None, {}, {"start_pct": 0.3, "end_pct": 0.7, "start_val": 2.0, "end_val": -1.0}])
def test_schedules_have_the_peers_values(name, args):
    a, b = getattr(our_schedules, name), getattr(peer_schedules, name)
    if args is not None:
        a, b = our_schedules.Schedule(a.sched_func, **args), peer_schedules.Schedule(b.sched_func, **args)
    assert_same_progress(a, b)


def test_schedules_of_the_two_packages_take_each_others_functions():
    def square(start, end, pos):
        return start + (end - start) * pos**2

    assert_same_progress(
        our_schedules.Schedule(square, 0.1, 0.8, 0.5, 2), peer_schedules.Schedule(square, 0.1, 0.8, 0.5, 2)
    )
    assert our_schedules.available_schedules() == peer_schedules.available_schedules()


# The call


SCHEDULE_FUNCS = ["Schedule", "sched_oneshot", "sched_iterative", "sched_agp", "sched_onecycle", "sched_dsd"]
PUBLIC = [
    *[(ours, peer, name) for name in LOSSES],
    *[(ours, peer, name) for name in ("get_model_layers", "get_module_by_name", "match_feature_layers")],
    (ours, peer, "KnowledgeDistillationCallback"),
    *[(our_schedules, peer_schedules, name) for name in (*SCHEDULE_FUNCS, "available_schedules")],
]


@pytest.mark.parametrize(("mine", "theirs", "name"), PUBLIC, ids=[name for *_, name in PUBLIC])
def test_arguments_have_the_peers_names_order_and_defaults(mine, theirs, name):
    "Further arguments are keyword-only; a default may be given where the peer has none."
    mine, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (mine, theirs))
    mine = [p for p in mine if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.kind) for p in mine] == [(p.name, p.kind) for p in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert b.default in (a.default, b.empty)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("fasterai_kd.all", "fasterai.distill.losses"),
        ("fasterai_kd.all", "fasterai.distill.distillation_callback"),
        ("fasterai_kd.losses", "fasterai.distill.losses"),
        ("fasterai_kd.distillation_callback", "fasterai.distill.distillation_callback"),
        ("fasterai_kd.schedule", "fasterai.core.schedule"),
    ],
)
def test_every_public_name_of_the_peer_is_found_after_the_import_is_changed(mine, theirs):
    names = pytest.importorskip(theirs).__all__
    found: dict[str, object] = {}
    exec(f"from {mine} import *", found)
    assert set(names) <= found.keys()
