"Several losses as one: values, gradients, layers of each part, names, and what is refused."

from functools import partial

import numpy as np
import pytest
import torch
from conftest import CLASSES, PAIRS, Net, same, state
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.metrics import accuracy
from torch import nn

from fasterai_kd import (
    Attention,
    DecoupledKD,
    FitNet,
    KnowledgeDistillationCallback,
    Logits,
    MutualLearning,
    Schedule,
    Similarity,
    SoftTarget,
    combine,
)
from fasterai_kd.schedule import lin, one_shot, sched_lin

LAYER1 = {"student": ["layer1"], "teacher": ["layer1"]}
LAYER2 = {"student": ["layer2"], "teacher": ["layer2"]}
CROSSED = {"student": ["layer1", "layer1"], "teacher": ["layer1", "bn1"]}


def features(*names):
    return {name: torch.randn(4, 3, 5, 5, requires_grad=True) for name in names}


@pytest.fixture
def outputs():
    fm_s, fm_t = features("a", "b"), features("c", "d")
    pred, teacher_pred = torch.randn(4, CLASSES, requires_grad=True), torch.randn(4, CLASSES)
    return {"pred": pred, "teacher_pred": teacher_pred, "fm_s": fm_s, "fm_t": fm_t, "target": torch.arange(4)}


def test_value_and_gradient_are_those_of_the_weighted_sum(outputs):
    pairs = {"student": ["b"], "teacher": ["c"]}
    loss = combine((SoftTarget, 0.9), (Attention, 1000.0, pairs), (partial(DecoupledKD, beta=2.0), 3))
    leaves = [outputs["pred"], outputs["fm_s"]["b"]]
    got = loss(**outputs)
    s, t = outputs["fm_s"]["b"], outputs["fm_t"]["c"]
    expected = 0.9 * SoftTarget(**outputs) + 1000 * Attention({"b": s}, {"c": t}) + 3 * DecoupledKD(**outputs, beta=2.0)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_part_without_pairs_compares_all_features_that_are_given(outputs):
    got = combine((FitNet, 2.0), (SoftTarget, 1.0))(**outputs)
    torch.testing.assert_close(got, 2 * FitNet(**outputs) + SoftTarget(**outputs))


def test_a_layer_may_be_in_several_parts_and_several_times_in_one(outputs):
    pairs = {"student": ["a", "a"], "teacher": ["c", "d"]}
    got = combine((FitNet, 1.0, pairs), (FitNet, 1.0, {"student": ["a"], "teacher": ["c"]}))(**outputs)
    a, (c, d) = outputs["fm_s"]["a"], outputs["fm_t"].values()
    mse = nn.functional.mse_loss
    torch.testing.assert_close(got, 2 * mse(a, c) + mse(a, d))


def test_a_schedule_moves_one_part(outputs):
    loss = combine((SoftTarget, 1.0), (Logits, 4.0, None, lin))
    for pct in (0.0, 0.25, 1.0):
        torch.testing.assert_close(loss(**outputs, pct=pct), SoftTarget(**outputs) + 4 * pct * Logits(**outputs))


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (((SoftTarget, 1.0), (Attention, 1.0)), ["SoftTarget", "Attention"]),
        (
            ((SoftTarget, 1.0), (partial(SoftTarget, T=2), 1.0), (SoftTarget,)),
            ["SoftTarget", "SoftTarget_2", "SoftTarget_3"],
        ),
        (({"soft": (SoftTarget, 1.0), "where": (Attention, 9.0, LAYER1)},), ["soft", "where"]),
        (({"soft": SoftTarget},), ["soft"]),
    ],
)
def test_parts_have_names(parts, names):
    loss = combine(*parts)
    assert [p.name for p in loss.parts] == names
    assert all(name in repr(loss) for name in names)


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ((), ValueError, "at least one part"),
        (((0.9, SoftTarget),), TypeError, r"a part of a combined loss is \(loss, weight\)"),
        (((SoftTarget, -1.0),), ValueError, "the weight of SoftTarget must be 0 or more, got -1"),
        (((SoftTarget, float("inf")),), ValueError, "the weight of SoftTarget"),
        (((Attention, 1.0, ["layer1"]),), TypeError, "the pairs of Attention must be as from match_feature_layers"),
        (((SoftTarget, 1.0, None, None, None),), TypeError, "a part of a combined loss is"),
        (((combine((SoftTarget, 1.0)), 1.0),), TypeError, "give all parts at once"),
        (({"kd_loss": (SoftTarget, 1.0)},), ValueError, "cannot be called 'kd_loss'"),
        (({"weight": (SoftTarget, 1.0)},), ValueError, "cannot be called 'weight'"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, error, match):
    with pytest.raises(error, match=match):
        combine(*parts)


# --- in the callback ---


def fit(make_learner, teacher, loss, *layers, epochs=2, **kwargs):
    torch.manual_seed(2)
    learn = make_learner(Net())
    torch.manual_seed(0)
    kd = KnowledgeDistillationCallback(teacher, loss, *layers, **kwargs)
    learn.fit(epochs, 0.05, cbs=kd)
    return state(learn.model), kd


def by_hand(pred, teacher_pred, fm_s, fm_t, **kwargs):
    s, t = ({"1": fm["layer1"], "2": fm["layer2"]} for fm in (fm_s, fm_t))
    return (
        0.9 * SoftTarget(pred, teacher_pred) + 50.0 * Attention(s, t) + FitNet({"": fm_s["bn1"]}, {"": fm_t["conv1"]})
    )


def test_the_student_is_the_one_of_the_sum_written_by_hand(make_learner, teacher):
    both = {"student": ["layer1", "layer2"], "teacher": ["layer1", "layer2"]}
    early = {"student": ["bn1"], "teacher": ["conv1"]}
    weights = {"task_weight": 0.5, "weight": 1.0}
    a, _ = fit(
        make_learner, teacher, combine((SoftTarget, 0.9), (Attention, 50.0, both), (FitNet, 1.0, early)), **weights
    )
    layers = (["layer1", "layer2", "bn1"], ["layer1", "layer2", "conv1"])
    b, _ = fit(make_learner, teacher, by_hand, *layers, **weights)
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], msg=name)


def test_one_part_of_weight_one_is_the_loss_itself_bit_for_bit(make_learner, teacher):
    a, _ = fit(make_learner, teacher, Attention, *PAIRS)
    b, _ = fit(make_learner, teacher, combine((Attention, 1.0)), *PAIRS)
    c, _ = fit(make_learner, teacher, combine((Attention, 1.0, dict(zip(("student", "teacher"), PAIRS, strict=True)))))
    assert same(a, b)
    assert same(a, c)


def test_the_teacher_runs_once_a_batch(make_learner, teacher):
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    loss = combine((SoftTarget, 1.0), (Attention, 1.0, LAYER1), (Similarity, 1.0, LAYER2), (DecoupledKD, 1.0))
    fit(make_learner, teacher, loss, epochs=1)
    assert len(runs) == 4 + 2


def test_a_part_sees_its_own_layers_others_see_those_of_the_callback(make_learner, teacher):
    seen = {}

    def note(name):
        def loss(fm_s, fm_t, pred, **kwargs):
            seen[name] = list(fm_s), list(fm_t)
            return pred.sum() * 0

        return loss

    loss = combine(
        {"own": (note("own"), 1.0, CROSSED), "given": (note("given"), 1.0), "also": (note("also"), 1.0, LAYER1)}
    )
    fit(make_learner, teacher, loss, "layer2", "layer2", epochs=1)
    assert seen["own"] == (["layer1", "layer1#2"], ["layer1", "bn1"])
    assert seen["given"] == (["layer2"], ["layer2"])
    assert seen["also"] == (["layer1"], ["layer1"])


def test_the_history_has_the_share_of_each_part_and_they_add_up(make_learner, teacher):
    loss = combine((SoftTarget, 0.9), (Attention, 50.0, LAYER1), (FitNet, 0.1, LAYER2, lin))
    _, kd = fit(make_learner, teacher, loss)
    history = kd.history
    assert list(history) == ["task_loss", "kd_loss", "SoftTarget", "Attention", "FitNet", "weight"]
    parts = torch.tensor([history[name] for name in ("SoftTarget", "Attention", "FitNet")])
    torch.testing.assert_close(parts.sum(0), torch.tensor(history["kd_loss"]))
    assert history["FitNet"][0] == 0
    assert all(len(values) == 8 for values in history.values())


def test_parts_are_columns_of_the_progress_table(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, combine((SoftTarget, 1.0), (Attention, 5.0, LAYER1)))
    learn = make_learner(metrics=[accuracy, *kd.metrics])
    learn.fit(1, 0.01, cbs=kd)
    assert learn.recorder.metric_names[3:-1] == ["accuracy", "task_loss", "kd_loss", "SoftTarget", "Attention"]
    *_, kd_loss, soft, where = learn.recorder.values[-1]
    assert kd_loss == pytest.approx(soft + where, rel=1e-5)


def test_mixup_mixes_each_part_that_uses_labels(make_learner, teacher):
    def needs_labels(pred, target, **kwargs):
        return nn.functional.cross_entropy(pred, target)

    def student_after(loss):
        kd = KnowledgeDistillationCallback(teacher, loss, weight=1.0)
        torch.manual_seed(2)
        learn = make_learner(Net())
        torch.manual_seed(0)
        learn.fit(1, 0.05, cbs=[MixUp(), kd])
        return state(learn.model)

    assert same(student_after(combine((needs_labels, 1.0))), student_after(needs_labels))
    assert not same(
        student_after(combine((needs_labels, 1.0))), student_after(lambda **outputs: needs_labels(**outputs))
    )


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (combine((SoftTarget, 1.0), (Attention, 1.0)), "this loss compares layers"),
        (combine((Attention, 1.0, {"student": ["layer1"], "teacher": ["layer9"]})), "did you mean"),
    ],
)
def test_layers_of_the_parts_are_checked_at_once(teacher, loss, match):
    with pytest.raises(ValueError, match=match):
        KnowledgeDistillationCallback(teacher, loss)


def test_a_part_that_does_not_fit_shows_in_the_first_batch_also_if_its_weight_starts_at_0(make_learner, teacher):
    pairs = {"student": ["layer1"], "teacher": ["layer2"]}
    loss = combine((SoftTarget, 1.0), (FitNet, 1.0, pairs, lin))
    with pytest.raises(ValueError, match="FitNet needs features of one shape"):
        fit(make_learner, teacher, loss)


def test_a_part_that_rests_is_computed_in_the_first_batch_alone(make_learner, teacher):
    calls = []

    def resting(pred, teacher_pred, **kwargs):
        calls.append(1)
        return SoftTarget(pred, teacher_pred)

    fit(make_learner, teacher, combine((SoftTarget, 1.0), (resting, 1.0, None, lambda pct: 0.0)))
    assert len(calls) == 1


def test_an_error_of_torch_that_has_a_type_of_its_own_keeps_it(make_learner, teacher):
    def full(**kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"\tout of memory$"):
        fit(make_learner, teacher, full)


@pytest.mark.parametrize(
    "parts",
    [
        [(SoftTarget, 1.0, None, lambda pct: float(pct < 0.3)), (Logits, 1.0, None, lambda pct: float(pct > 0.6))],
        [(SoftTarget, 1.0, None, one_shot), (Logits, 0.0)],
        [(SoftTarget, 0.0)],
    ],
    ids=["between two", "before the first", "weight 0"],
)
def test_where_no_part_is_due_the_distillation_loss_is_0(make_learner, teacher, parts):
    _, kd = fit(make_learner, teacher, combine(*parts), epochs=3)
    history = kd.history
    resting = [i for i, k in enumerate(history["kd_loss"]) if k == 0]
    assert resting
    for name in ("SoftTarget", "Logits")[: len(parts)]:
        assert all(history[name][i] == 0 for i in resting)
    peer = make_learner(Net())
    make_learner(Net()).fit(2, 0.01, cbs=MutualLearning(peer, combine(*parts)))


def test_a_balance_waits_for_a_loss_that_starts_at_0(make_learner, teacher, capsys):
    loss = combine((SoftTarget, 1.0, None, lin))
    _, kd = fit(make_learner, teacher, loss, weight="auto", epochs=3)
    assert "In 10 batches the gradient norm of the task loss was" in capsys.readouterr().out
    assert kd.history["kd_loss"][0] == 0


def test_a_part_of_weight_0_does_no_harm_also_if_it_is_infinite(make_learner, teacher):
    def infinite(pred, **kwargs):
        return pred.sum() * torch.inf

    _, kd = fit(make_learner, teacher, combine((SoftTarget, 1.0), (infinite, 0.0)))
    assert torch.tensor(kd.history["kd_loss"]).isfinite().all()


def test_layers_may_be_single_names_as_in_the_callback():
    loss = combine((Attention, np.float32(0.5), {"student": "layer1", "teacher": "layer2"}))
    assert loss.parts[0].pairs == {"student": ["layer1"], "teacher": ["layer2"]}
    assert loss.parts[0].weight == 0.5


def test_lists_of_unequal_length_are_refused_at_once():
    with pytest.raises(ValueError, match=r"layers pair by position, Attention has unequal numbers: \{'student'"):
        combine((Attention, 1.0, {"student": ["layer1"], "teacher": []}))


def test_a_schedule_of_a_part_that_falls_below_0_is_refused(teacher):
    loss = combine((SoftTarget, 1.0), (Logits, 1.0, None, Schedule(sched_lin, start_val=0.5, end_val=-0.5)))
    with pytest.raises(ValueError, match=r"factors must be 0 or more, the schedule of Logits gives -0\.01 at 51%"):
        KnowledgeDistillationCallback(teacher, loss)


def test_nothing_that_is_kept_of_the_parts_has_a_graph(make_learner, teacher):
    kd, graphs = KnowledgeDistillationCallback(teacher, combine((SoftTarget, 1.0), (Logits, 2.0))), []
    look = Callback(
        after_batch=lambda self: graphs.extend(
            x.requires_grad for x in (*kd._history._last.values(), *(v for step, _ in kd._history._steps for v in step))
        )
    )
    make_learner().fit(1, 0.01, cbs=[kd, look])
    assert graphs
    assert not any(graphs)
