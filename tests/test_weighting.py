"weight='auto': where it balances, and that it leaves everything else alone."

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import PAIRS, Net, same, state
from fastai.callback.core import Callback
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasterai_kd import Attention, EMATeacher, KnowledgeDistillationCallback, Logits, SoftTarget
from fasterai_kd.schedule import cos
from fasterai_kd.weighting import AutoWeight, Weighting


def two_losses(scale):
    "A student of two layers, of which the task loss reaches both and the other the first alone, `scale` times as hard."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    hidden = net[0](torch.randn(5, 3))
    return net, net[1](hidden).sum() + hidden.sum(), scale * hidden.sum()


@pytest.mark.parametrize("task_weight", [1.0, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_weighted_gradients_are_of_equal_norm_at_the_last_weights_that_both_reach(scale, task_weight):
    net, task, kd = two_losses(scale)
    auto = AutoWeight(task_weight, batches=1)
    auto.measure(task, kd, net)
    w = auto.weight
    g_task, g_kd = (torch.autograd.grad(loss, net[0].weight, retain_graph=True)[0].norm() for loss in (task, kd))
    torch.testing.assert_close(task_weight * g_task, w * g_kd, rtol=1e-4, atol=0)


def test_the_weight_is_of_the_geometric_mean_over_the_first_batches_and_then_stays():
    auto, ratios = AutoWeight(1.0, batches=3), []
    for scale in (0.5, 2.0, 4.0, 1000.0):
        net, task, kd = two_losses(scale)
        auto._at = ("0.weight", net[0].weight)  # of this net
        auto.measure(task, kd, net)
        g_task, g_kd = (torch.autograd.grad(loss, net[0].weight, retain_graph=True)[0].norm() for loss in (task, kd))
        ratios.append((g_task / g_kd).item())
    assert auto.weight == pytest.approx(math.prod(ratios[:3]) ** (1 / 3), rel=1e-5)


def test_weights_whose_gradient_is_0_are_no_place_to_balance():
    net, x, auto = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4), AutoWeight(1.0, batches=1)
    features, pred = (m := net[0](x)), net[1](m)
    auto.measure(pred.square().mean(), features.square().mean() + 0 * pred.sum(), net)
    assert auto._at[0] == "0.weight"
    assert 0 < auto.weight < math.inf


def test_losses_that_share_no_weights_are_refused():
    net = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    task, kd = (layer(torch.ones(1, 2)).sum() for layer in net)
    with pytest.raises(ValueError, match="no parameter of the student gets one from both: give a number"):
        AutoWeight(1.0).measure(task, kd, net)


def fit(make_learner, teacher, loss, *layers, n=3, **kwargs):
    torch.manual_seed(2)
    learn = make_learner(Net())
    kd = KnowledgeDistillationCallback(teacher, loss, *layers, **kwargs)
    torch.manual_seed(0)
    learn.fit(n, 0.01, cbs=kd)
    return learn, kd


@pytest.mark.parametrize(("loss", "layers"), [(SoftTarget, ()), (Attention, PAIRS)])
@pytest.mark.parametrize("task_weight", [None, 1.0])
def test_it_is_fixed_after_ten_batches_and_says_what_it_chose(make_learner, teacher, capsys, loss, layers, task_weight):
    _, kd = fit(make_learner, teacher, loss, *layers, weight="auto", task_weight=task_weight)
    weights = kd.history["weight"]
    assert len(set(weights[:10])) == 10
    assert len(set(weights[9:])) == 1
    assert kd.current_weight == weights[-1]
    where = "head.weight" if loss is SoftTarget else "layer2.0.weight"
    expected = f"weight='auto': {weights[-1]:.4g}, with task_weight={task_weight or 0.5:g}. In 10 batches"
    assert expected in (text := capsys.readouterr().out)
    assert text.rstrip().endswith(where)


def test_the_same_seed_gives_the_same_weights_and_student(make_learner, teacher):
    (a, kd_a), (b, kd_b) = (fit(make_learner, teacher, Attention, *PAIRS, weight="auto") for _ in range(2))
    assert kd_a.history["weight"] == kd_b.history["weight"]
    assert same(state(a.model), state(b.model))


def test_measuring_does_not_change_the_step(make_learner, teacher):
    learn, kd = fit(make_learner, teacher, SoftTarget, n=1, weight="auto")
    weights = iter(kd.history["weight"])
    again, _ = fit(
        make_learner, teacher, SoftTarget, n=1, weight=1.0, task_weight=0.5, schedule=lambda pct: next(weights, 0.0)
    )
    assert same(state(learn.model), state(again.model))


def test_a_schedule_is_a_factor_on_it(make_learner, teacher):
    _, plain = fit(make_learner, teacher, SoftTarget, n=4, weight="auto")
    _, moved = fit(make_learner, teacher, SoftTarget, n=4, weight="auto", schedule=lambda pct: 0.5)
    assert moved.history["weight"][0] == pytest.approx(plain.history["weight"][0] / 2)
    _, late = fit(make_learner, teacher, SoftTarget, n=4, weight="auto", schedule=cos)
    assert late.history["weight"][0] == 0
    assert late.history["weight"][-1] > 0


def test_a_frozen_body_is_not_where_it_balances(make_learner, teacher, capsys):
    learn = make_learner(Net())
    learn.model.head.requires_grad_(False)
    learn.fit(3, 0.01, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto"))
    assert capsys.readouterr().out.rstrip().endswith("layer2.0.weight")


def test_a_distillation_loss_without_any_gradient_is_refused(make_learner, teacher):
    learn = make_learner()
    learn.model.load_state_dict(teacher.state_dict())
    kd = KnowledgeDistillationCallback(teacher, lambda pred, **kwargs: (pred * 0).sum(), weight="auto")
    with pytest.raises(ValueError, match="no parameter of the student gets one from both"):
        learn.fit(3, 0.01, cbs=kd)
    assert len(kd.history["weight"]) == 9  # in the tenth batch


def test_a_teacher_that_agrees_at_first_is_no_mistake(make_learner):
    learn = make_learner(Net().eval())
    learn.model.layer2[1].p = 0.0
    kd = KnowledgeDistillationCallback(EMATeacher(0.5), Logits, weight="auto")
    learn.fit(3, 0.1, cbs=[kd, Still()])
    assert kd.history["kd_loss"][0] == 0
    assert kd.history["weight"][-1] != 0.5


class Still(Callback):
    "Without batch statistics."

    def before_train(self):
        self.learn.model.eval()


@pytest.mark.parametrize("schedule", [None, cos])
def test_auto_makes_a_sum_so_that_a_tiny_loss_does_not_shrink_the_gradient(make_learner, teacher, schedule):
    def tiny(pred, teacher_pred, **kwargs):
        return 1e-6 * SoftTarget(pred, teacher_pred)

    kd, seen = KnowledgeDistillationCallback(teacher, tiny, weight="auto", schedule=schedule), []

    def check(learn):
        task = F.cross_entropy(learn.pred, learn.y)
        torch.testing.assert_close(learn.loss, 0.5 * task + kd.current_weight * tiny(learn.pred, teacher(learn.x)))
        grads = [torch.autograd.grad(x, learn.pred, retain_graph=True)[0].norm() for x in (learn.loss_grad, task)]
        seen.append((grads[0] / grads[1]).item())

    watch = Callback(after_loss=lambda self: check(self.learn) if self.training else None)
    watch.order = 1
    make_learner().fit(1, 0.01, cbs=[kd, watch])
    assert min(seen) > 0.3


@pytest.mark.parametrize("layers", [(), PAIRS], ids=["predictions", "layers"])
def test_a_compiled_student_runs_uncompiled_while_it_is_measured(make_learner, teacher, layers):
    compiled, weights, start = [], [], Net()
    start.layer2[1].p = 0.0

    def backend(graph, inputs):
        return lambda *args: (compiled.append(1), graph.forward(*args))[1]

    for compile_it in (False, True):
        student = copy.deepcopy(start)
        learn = make_learner(torch.compile(student, backend=backend) if compile_it else student)
        kd = KnowledgeDistillationCallback(teacher, Attention if layers else SoftTarget, *layers, weight="auto")
        learn.fit(3, 0.01, cbs=kd)
        weights.append(kd.history["weight"])
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)
    assert len(compiled) == (0 if layers else 2 + 3 * 2)  # two batches of training after ten, and validation


@pytest.mark.filterwarnings("ignore:Skipping serialization")  # of torch 2.6, while it compiles
def test_a_student_of_the_default_backend_is_measured(make_learner, teacher):
    "Its backward pass gives buffers away, so it cannot run twice."
    student = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.ReLU(), nn.Linear(4, 4)))
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto")
    make_learner(student).fit(3, 0.01, cbs=kd)
    assert len(set(kd.history["weight"])) == 10


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in validation, by torch
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_student_with_checkpoints_is_measured(make_learner, teacher, use_reentrant, capsys):
    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(self.layer1, self.relu(self.bn1(self.conv1(x))), use_reentrant=use_reentrant)
            return self.head(self.layer2(x).mean((2, 3)))

    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto")
    make_learner(Checkpointed()).fit(1, 0.01, cbs=kd)
    assert capsys.readouterr().out.rstrip().endswith("head.weight")


def test_a_student_that_is_the_teacher_is_not_balanced_by_rounding(make_learner, teacher):
    student = copy.deepcopy(teacher)
    for p in student.parameters():
        p.data += 1e-9 * torch.randn_like(p)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto")
    make_learner(student).fit(1, 0.0, cbs=[kd, Callback(before_train=lambda self: self.learn.model.eval())])
    assert set(kd.history["weight"]) == {0.5}


def test_another_word_is_refused(teacher):
    with pytest.raises(ValueError, match="weight must be a number or 'auto', got 'automatic'"):
        KnowledgeDistillationCallback(teacher, SoftTarget, weight="automatic")


def test_a_fit_of_few_batches_says_what_it_chose_at_its_end(make_learner, teacher, capsys):
    fit(make_learner, teacher, SoftTarget, n=1, weight="auto")
    out = capsys.readouterr().out
    assert out.count("weight='auto'") == 1
    assert "In 4 batches the gradient norm of the task loss was" in out


@pytest.mark.parametrize("kd", [None, torch.tensor(1.0), torch.tensor(math.inf)])
def test_where_the_schedule_is_0_the_task_loss_has_its_weight_and_nothing_else_counts(kd):
    weighting = Weighting(0.5, lambda pct: 0.0, task_weight=3.0)
    assert weighting.blend(torch.tensor(2.0), kd, weighting.at(0.5)) == 6
    assert Weighting(0.5, lambda pct: 0.0, None).blend(torch.tensor(2.0), kd, 0.0) == 2


def test_a_fit_whose_schedule_starts_at_0_begins_with_the_weighted_task_loss(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=lambda pct: float(pct > 0.4), task_weight=3.0)
    seen = []
    watch = Callback(after_batch=lambda self: seen.append(self.learn.loss.item()) if self.training else None)
    make_learner().fit(1, 0.01, cbs=[kd, watch])
    assert kd.history["weight"] == [0.0, 0.0, 0.5, 0.5]
    distilled = [0.0, 0.0, *(0.5 * x for x in kd.history["kd_loss"][2:])]
    assert seen == pytest.approx([3 * x + y for x, y in zip(kd.history["task_loss"], distilled, strict=True)])


@pytest.mark.parametrize("which", ["task", "kd"])
def test_a_batch_in_which_one_loss_has_no_gradient_does_not_count_for_the_balance(which):
    auto = AutoWeight(1.0, batches=3)
    net, task, kd = two_losses(2.0)
    auto.measure(task, kd, net)
    before = auto.weight
    auto.measure(task * (which != "task"), kd * (which != "kd"), net)
    assert auto.weight == before
    assert auto.measuring


def test_the_balance_is_measured_in_ten_batches(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto")
    make_learner().fit(4, 0.01, cbs=kd)
    weights = kd.history["weight"]
    assert len(set(weights[:10])) == 10
    assert len(set(weights[9:])) == 1


def test_rounding_of_weight_times_schedule_does_not_lead_out_of_the_range():
    assert Weighting(1.0, lambda pct: 1 + 1e-15, None).at(0.5) == 1


def test_all_batches_are_measured_at_the_weights_that_the_first_one_found():
    auto = AutoWeight(1.0, batches=3)
    net, task, kd = two_losses(2.0)
    auto.measure(task, kd, net)
    auto.measure(task, kd + task, net)  # reaches the last weights too
    assert auto._at[0] == "0.weight"


def test_what_it_chose_is_said_once_also_where_the_fit_goes_on(make_learner, teacher, capsys):
    make_learner().fit(4, 0.01, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto"))
    assert capsys.readouterr().out.count("weight='auto'") == 1
