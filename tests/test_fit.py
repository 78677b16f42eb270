"Distillation inside real fastai training."

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGES, PAIRS, Net, hooks, image, label, same, state
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedCos, SchedLin, SchedPoly, combine_scheds
from fastai.callback.training import GradientAccumulation
from fastai.data.core import Datasets
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed
from torch import nn

from fasterai_kd import *
from fasterai_kd.schedule import cos, lin, one_shot, sched_lin, sched_oneshot

works = pytest.mark.works
OUTPUT = [SoftTarget, Logits, Mutual, DecoupledKD]
FEATURE = [Attention, Similarity, FitNet, ActivationBoundaries]


def kd_for(teacher, loss, **kwargs):
    layers = PAIRS if getattr(loss, "func", loss) in FEATURE else ()
    return KnowledgeDistillationCallback(teacher, loss, *layers, **kwargs)


class Watch(Callback):
    "Calls `f(learn)` after each loss, when everything of the batch is there."

    order = 1

    def __init__(self, f):
        self.f = f

    def after_loss(self):
        self.f(self.learn)


# --- right values ---


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", OUTPUT + FEATURE, ids=lambda f: f.__name__)
def test_a_fit_gives_the_weights_of_a_hand_written_loop_bit_for_bit(make_learner, dls, teacher, loss, weight):
    learn = make_learner(
        opt_func=partial(OptimWrapper, opt=torch.optim.SGD), wd=0.0, cbs=kd_for(teacher, loss, weight=weight)
    )
    model = copy.deepcopy(learn.model)
    set_seed(3)
    learn.fit(2, 0.1)

    set_seed(3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        for x, y in dls.train:
            x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
            kept_s, kept_t = {}, {}

            def keep(to, name):
                return lambda m, i, o: to.update({name: o.clone()})

            handles = [model.get_submodule(n).register_forward_hook(keep(kept_s, n)) for n in PAIRS[0]]
            handles += [teacher.get_submodule(n).register_forward_hook(keep(kept_t, n)) for n in PAIRS[1]]
            pred = model(x)
            with torch.no_grad():
                teacher_pred = teacher(x)
            for h in handles:
                h.remove()
            kd = loss(pred=pred, teacher_pred=teacher_pred, fm_s=kept_s, fm_t=kept_t, target=y)
            torch.lerp(F.cross_entropy(pred, y), kd, weight).backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        for _ in dls.valid:  # draws what fastai draws
            pass
    assert same(state(learn.model), state(model))


def test_weight_0_is_plain_training_bit_for_bit(make_learner, teacher):
    plain = make_learner(copy.deepcopy(Net()))
    distilled = make_learner(copy.deepcopy(plain.model))
    set_seed(0)
    plain.fit(2, 0.1)
    set_seed(0)
    distilled.fit(2, 0.1, cbs=kd_for(teacher, Attention, weight=0))
    assert same(state(plain.model), state(distilled.model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "weights", [{"weight": 0.3}, {"weight": 1000.0, "task_weight": 1.0}, {"weight": 2, "task_weight": 0}]
)
def test_the_total_is_the_blend_of_task_and_distillation_loss(make_learner, teacher, training, weights):
    seen = []

    def check(learn):
        if learn.training != training:
            return
        task = F.cross_entropy(learn.pred, learn.y)
        kd = SoftTarget(learn.pred, teacher(learn.x))
        w, tw = weights["weight"], weights.get("task_weight", 1 - weights["weight"])
        torch.testing.assert_close(learn.loss, tw * task + w * kd)
        torch.testing.assert_close(learn.loss_grad, learn.loss)
        seen.append(1)

    make_learner().fit(1, 0.1, cbs=[kd_for(teacher, SoftTarget, **weights), Watch(check)])
    assert len(seen) == (4 if training else 2)


def test_valid_loss_is_the_blended_loss_and_validate_says_the_same(make_learner, teacher, dls):
    learn = make_learner(cbs=kd_for(teacher, SoftTarget, weight=0.5))
    learn.fit(1, 0.1)
    blended = [
        torch.lerp(F.cross_entropy(learn.model(x), y), SoftTarget(learn.model(x), teacher(x)), 0.5)
        for x, y in dls.valid
    ]
    expected = torch.stack(blended).mean().item()
    assert learn.recorder.values[-1][1] == pytest.approx(expected, rel=1e-5)
    assert learn.validate()[0] == pytest.approx(expected, rel=1e-5)


def test_without_distill_valid_validation_is_the_plain_task_loss_without_the_teacher(make_learner, teacher, dls):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    learn = make_learner(cbs=kd_for(teacher, SoftTarget, distill_valid=False))
    learn.fit(1, 0.1)
    plain = torch.stack([F.cross_entropy(learn.model(x), y) for x, y in dls.valid]).mean().item()
    assert learn.recorder.values[-1][1] == pytest.approx(plain, rel=1e-5)
    assert len(calls) == 4


def test_weight_1_is_pure_distillation(make_learner, teacher):
    seen, kd = [], kd_for(teacher, SoftTarget, weight=1)
    learn = make_learner(loss_func=lambda pred, y: (pred * 0).sum() + 1e6)
    learn.fit(1, 0.01, cbs=[kd, Watch(lambda learn: seen.append(learn.loss.item()))])
    assert seen[:4] == kd.history["kd_loss"]


def test_pairs_are_matched_by_position_in_any_order(make_learner, teacher):
    seen = []

    def loss(fm_s, fm_t, **kwargs):
        seen.append((list(fm_s), list(fm_t)))
        return Attention(fm_s, fm_t)

    layers = ["layer2", "conv1", "layer2"], ["layer1", "conv1", "conv1"]
    make_learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, loss, *layers))
    assert seen[0] == (["layer2", "conv1", "layer2#2"], ["layer1", "conv1", "conv1#2"])


def test_features_are_those_of_the_batch_the_student_sees(make_learner, teacher):
    def loss(pred, teacher_pred, fm_s, fm_t, **kwargs):
        pooled = fm_t["layer2"].mean((2, 3))
        torch.testing.assert_close(teacher.head(pooled), teacher_pred)
        return FitNet(fm_s, fm_t)

    make_learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, loss, "layer2", "layer2"))


# --- schedules ---


@pytest.mark.parametrize(
    "schedule",
    [
        cos,
        lin,
        one_shot,
        SchedCos(0, 1),
        combine_scheds([0.5, 0.5], [SchedCos(0, 1), SchedCos(1, 0.2)]),
        lambda pct: pct**2,
    ],
    ids=["cos", "lin", "one_shot", "SchedCos", "combine_scheds", "function"],
)
def test_the_weight_follows_the_schedule(make_learner, teacher, schedule):
    learn, kd = make_learner(), kd_for(teacher, SoftTarget, weight=0.8, schedule=schedule)
    learn.fit(2, 0.01, cbs=kd)
    f = getattr(schedule, "progress", schedule)
    assert kd.history["weight"] == pytest.approx([0.8 * f(i / 8) for i in range(8)])


def test_the_teacher_rests_while_the_schedule_keeps_the_weight_at_0_but_mistakes_show_in_the_first_batch(
    make_learner, teacher
):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    kd = kd_for(teacher, SoftTarget, schedule=Schedule(sched_oneshot, start_pct=0.6))
    make_learner().fit(2, 0.01, cbs=kd)
    assert len(calls) == 1 + 0 + 3 + 2
    assert [k == k for k in kd.history["kd_loss"]] == [True] + 4 * [False] + 3 * [True]


def test_validate_outside_a_fit_blends_as_at_its_end(make_learner, teacher):
    learn = make_learner(cbs=kd_for(teacher, SoftTarget, weight=0.8, schedule=cos))
    learn.fit(1, 0.01)
    inside = learn.recorder.values[-1][1]
    for _ in range(2):
        assert learn.validate()[0] == pytest.approx(inside)


def test_validate_and_predictions_do_not_lose_the_history(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget)
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.01)
    before = copy.deepcopy(kd.history)
    learn.validate()
    learn.get_preds()
    assert kd.history == before


def test_a_schedule_that_leaves_the_allowed_range_is_an_error_not_a_negative_task_weight(make_learner, teacher):
    with pytest.raises(ValueError, match=r"weight must be between 0 and 1, got 1\.008 at 63%"):
        kd_for(teacher, SoftTarget, weight=0.8, schedule=Schedule(sched_lin, end_val=2))
    kd = kd_for(teacher, SoftTarget, weight=0.8)
    kd.schedule = Schedule(sched_lin, end_val=2)
    with pytest.raises(ValueError, match="got 1"):
        make_learner().fit(1, 0.01, cbs=kd)
    assert not kd.history["weight"]  # before the first batch
    kd = kd_for(teacher, SoftTarget, weight=0.8, task_weight=1, schedule=Schedule(sched_lin, end_val=2))
    make_learner().fit(1, 0.01, cbs=kd)


@pytest.mark.parametrize("make", [lambda: SchedLin(0, 1), lambda: SchedLin(1, 0), lambda: SchedPoly(0, 1, 2)])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_schedule_may_end_at_an_end_of_the_range_although_fastais_share_comes_to_more_than_1(teacher, make, weight):
    dsets = Datasets(list(range(24)) * 2, [[image], [label]], splits=[range(36), range(36, 44)])
    dls = dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"))
    learn, kd = (
        Learner(dls, Net(), loss_func=F.cross_entropy),
        kd_for(teacher, SoftTarget, weight=weight, schedule=make()),
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01, cbs=kd)
    assert learn.pct_train > 1  # nine times 1/9
    assert len(kd.history["weight"]) == 9


def test_a_loss_that_is_inf_while_the_weight_is_0_does_no_harm(make_learner, teacher):
    def loss(pred, teacher_pred, **kwargs):
        return Logits(pred, teacher_pred) * float("inf")

    learn, kd = make_learner(), KnowledgeDistillationCallback(teacher, loss, weight=0)
    learn.fit(1, 0.01, cbs=kd)
    assert all(t == t for t in kd.history["task_loss"])


def test_the_weight_is_checked_also_if_it_is_set_later(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget)
    kd.weight = 3
    with pytest.raises(ValueError, match="weight must be between 0 and 1, got 3"):
        make_learner().fit(1, 0.01, cbs=kd)


# --- every way to train ---


@works("training features", "fit, fit_one_cycle, fit_flat_cos, fine_tune")
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["fit", "fit_one_cycle", "fit_flat_cos", "fine_tune"])
def test_the_callback_is_a_drop_in_for_every_fit(make_learner, teacher, how, loss):
    learn, kd = make_learner(), kd_for(teacher, loss)
    args = (1,) if how == "fine_tune" else (2,)
    getattr(learn, how)(*args, cbs=kd)
    assert all(k > 0 for k in kd.history["kd_loss"])
    assert hooks(learn.model) == hooks(teacher) == 0


@works("other calls", "lr_find")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # fastai loads the weights back
def test_lr_find_distills_and_leaves_no_trace(make_learner, teacher):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    learn = make_learner(cbs=kd_for(teacher, Attention))
    learn.lr_find(num_it=6, show_plot=False)
    assert len(calls) == 6
    assert hooks(learn.model) == 0
    assert hooks(teacher) == 1


@works("other calls", "the same callback for a second fit and another student")
def test_the_callback_serves_a_second_fit_and_another_student(make_learner, teacher):
    kd = kd_for(teacher, Attention)
    for model in (Net(), Net(width=8)):
        learn = make_learner(model)
        for _ in range(2):
            learn.fit(1, 0.1, cbs=kd)
            assert len(kd.history["kd_loss"]) == 4
    assert kd.learn is None


@works("training features", "GradientAccumulation makes the update of the large batch")
def test_gradient_accumulation_makes_the_update_of_the_large_batch(make_learner, teacher, dls):
    class Still(Callback):
        "Batch statistics and dropout would differ."

        def before_train(self):
            self.learn.model.eval()

    model, states = Net(), []
    for bs in (4, 16):
        learn = make_learner(copy.deepcopy(model), opt_func=SGD, wd=0.0)
        learn.dls.loaders = [dl.new(bs=bs) for dl in dls.loaders]
        learn.fit(1, 0.1, cbs=[Still(), kd_for(teacher, FitNet), GradientAccumulation(16)])
        states.append(state(learn.model))
    assert not same(states[0], state(model))
    for a, b in zip(*(s.values() for s in states), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_accumulation_divides_the_gradient_and_not_the_loss_shown(make_learner, teacher):
    seen = []
    watch = Callback(after_backward=lambda self: seen.append((self.loss.item(), self.loss_grad.item())))
    make_learner().fit(1, 0.1, cbs=[kd_for(teacher, FitNet), GradientAccumulation(16), watch])
    assert [loss for loss, _ in seen] == pytest.approx([4 * share for _, share in seen])  # batches of 4


@works("training features", "MixUp and CutMix mix a loss on labels as they mix the task loss")
@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_mixup_and_cutmix_mix_a_loss_on_labels_as_they_mix_the_task_loss(make_learner, teacher, mix):
    mix, seen = mix(), []

    def check(learn):
        if not learn.training:
            return
        t, each = teacher(learn.x), {"reduction": "none"}
        kd = DecoupledKD(learn.pred, t, target=learn.y, **each)
        kd1 = DecoupledKD(learn.pred, t, target=mix.yb1[0], **each)
        task = F.cross_entropy(learn.pred, learn.y, reduction="none")
        task1 = F.cross_entropy(learn.pred, mix.yb1[0], reduction="none")
        expected = 0.5 * torch.lerp(kd1, kd, mix.lam).mean() + 0.5 * torch.lerp(task1, task, mix.lam).mean()
        torch.testing.assert_close(learn.loss, expected)
        seen.append(1)

    make_learner().fit(1, 0.01, cbs=[kd_for(teacher, DecoupledKD), mix, Watch(check)])
    assert len(seen) == 4


def test_label_smoothing_smooths_the_task_loss_only(make_learner, teacher):
    learn, kd = make_learner(loss_func=LabelSmoothingCrossEntropy()), kd_for(teacher, DecoupledKD)
    learn.fit(1, 0.01, cbs=kd)
    assert len(kd.history["kd_loss"]) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_outside_autocast(make_learner, teacher, dtype):
    class CPUAutocast(MixedPrecision):
        def before_fit(self):
            self.autocast = torch.autocast("cpu", dtype=dtype)

        def before_backward(self):
            pass

        before_step = after_step = after_fit = before_backward

    seen = []

    def loss(pred, teacher_pred, fm_s, fm_t, **kwargs):
        seen.extend([pred, teacher_pred, *fm_s.values(), *fm_t.values()])
        assert not torch.is_autocast_enabled("cpu")
        return Similarity(fm_s, fm_t)

    make_learner().fit(1, 0.01, cbs=[CPUAutocast(), KnowledgeDistillationCallback(teacher, loss, *PAIRS)])
    assert len(seen) == 6 * 8
    assert {x.dtype for x in seen} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("loss", [SoftTarget, Similarity], ids=lambda f: f.__name__)
def test_to_fp16_on_a_gpu(make_learner, teacher, loss):
    learn, kd = make_learner(), kd_for(teacher, loss)
    learn.dls.to("cuda")
    learn.to_fp16().fit(1, 0.01, cbs=kd)
    assert all(k == k for k in kd.history["kd_loss"])


@works("faults", "a teacher in half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_teaches(make_learner, teacher, dtype):
    kd = kd_for(teacher.to(dtype), Attention)
    make_learner().fit(1, 0.01, cbs=kd)
    assert all(k > 0 for k in kd.history["kd_loss"])


# --- the loss is any function ---


def test_a_partial_a_function_a_lambda_and_a_module_are_losses(make_learner, teacher):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, pred, teacher_pred, **kwargs):
            return self.scale * Logits(pred, teacher_pred)

    for loss in (partial(SoftTarget, T=2), lambda pred, teacher_pred, **_: Logits(pred, teacher_pred), Scaled()):
        kd = KnowledgeDistillationCallback(teacher, loss)
        make_learner().fit(1, 0.01, cbs=kd)
        assert all(k > 0 for k in kd.history["kd_loss"])
        assert kd.loss is loss


def test_the_target_reaches_the_loss(make_learner, teacher):
    seen = []
    loss = lambda pred, teacher_pred, target, **_: (seen.append(target), Logits(pred, teacher_pred))[1]  # noqa: E731
    make_learner().fit(1, 0.01, cbs=KnowledgeDistillationCallback(teacher, loss))
    assert torch.equal(seen[0], torch.tensor([0, 1, 2, 3]))


# --- the teacher ---


def test_the_teacher_runs_once_a_batch_without_a_graph_and_is_left_as_it_was(make_learner, teacher):
    teacher.train()
    teacher.conv1.requires_grad_(False)
    calls, before = [], state(teacher)
    handle = teacher.register_forward_hook(lambda m, i, o: calls.append((m.training, o.requires_grad, o.grad_fn)))
    make_learner().fit(1, 0.1, cbs=kd_for(teacher, Attention))
    handle.remove()
    assert calls == [(False, False, None)] * 6
    assert same(before, state(teacher))
    assert all(m.training for m in teacher.modules())
    assert [n for n, p in teacher.named_parameters() if not p.requires_grad] == ["conv1.weight", "conv1.bias"]
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_may_be_a_learner_a_path_or_an_ensemble(make_learner, teacher):
    teacher_learn = make_learner(teacher)
    teacher_learn.export("teacher.pkl")
    for t in (teacher_learn, teacher_learn.path / "teacher.pkl", [teacher, Net().eval()]):
        kd = KnowledgeDistillationCallback(t, SoftTarget)
        make_learner(Net()).fit(1, 0.01, cbs=kd)
        assert all(k > 0 for k in kd.history["kd_loss"])


def test_the_same_seed_gives_the_same_student(make_learner, teacher):
    states = []
    for _ in range(2):
        set_seed(5)
        learn = make_learner(Net())
        learn.fit_one_cycle(2, 0.1, cbs=kd_for(teacher.train(), Attention))
        states.append(state(learn.model))
    assert same(*states)


# --- predictions, files, copies ---


@works("other calls", "get_preds, predict, summary without the teacher")
def test_the_teacher_does_not_run_for_predictions(make_learner, teacher, dls):
    learn = make_learner(cbs=kd_for(teacher, Attention))
    learn.fit(1, 0.01)
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    preds, _ = learn.get_preds()
    assert preds.shape == (8, 4)
    _, _, losses = learn.get_preds(with_loss=True)
    assert losses.shape == (8,)
    learn.get_preds(dl=dls.test_dl([1, 2, 3]))
    learn.predict(1)
    learn.summary()


@works("other calls", "export and load_learner, without the teacher")
def test_export_leaves_the_teacher_out_and_the_loaded_callback_says_so_when_fitted(make_learner, teacher, dls):
    kd = kd_for(teacher, SoftTarget)
    learn = make_learner(cbs=kd, metrics=[accuracy, *kd.metrics])
    learn.fit(1, 0.01)
    learn.export("s.pkl")
    assert kd.teacher is teacher
    loaded = load_learner(learn.path / "s.pkl")
    assert loaded.knowledge_distillation.teacher is None
    assert torch.equal(loaded.get_preds(dl=dls.valid)[0], learn.get_preds()[0])
    loaded.dls = dls
    with pytest.warns(UserWarning, match="without its teacher"):
        loaded.fit(1, 0.01)
    loaded.knowledge_distillation.teacher = teacher
    loaded.fit(1, 0.01)
    assert all(k > 0 for k in loaded.knowledge_distillation.history["kd_loss"])


@works("other calls", "pickling, deepcopy")
def test_a_pickled_callback_has_no_teacher_and_a_deep_copy_shares_it(make_learner, teacher):
    teacher = Net(width=64)  # 500 kB
    kd = kd_for(teacher, Attention, weight=0.7)
    make_learner().fit(1, 0.01, cbs=kd)
    loaded, copied = pickle.loads(pickle.dumps(kd)), copy.deepcopy(kd)
    assert len(pickle.dumps(kd)) < 5000
    assert loaded.teacher is None
    assert copied.teacher is teacher
    for other in (loaded, copied):
        assert (other.weight, other.loss, other.activations_student) == (0.7, Attention, PAIRS[0])
        assert other.history == kd.history
    make_learner(Net()).fit(1, 0.01, cbs=copied)
    assert copied.history != kd.history


def test_a_deep_copied_learner_distils_with_metrics_of_its_own(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget)
    learn = make_learner(cbs=kd, metrics=kd.metrics)
    learn.fit(1, 0.01)
    other = copy.deepcopy(learn)
    other.fit(1, 0.1)
    assert other.knowledge_distillation.teacher is teacher
    assert other.recorder.values[-1][1:] != learn.recorder.values[-1][1:]


def test_a_copy_shares_the_teacher(teacher):
    assert copy.copy(kd_for(teacher, Attention)).teacher is teacher


def test_a_student_interrupted_in_its_forward_can_be_exported_copied_and_saved(make_learner, teacher, tmp_path):
    learn = make_learner(cbs=[kd_for(teacher, Attention), Fail("after_pred", KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.01)
    learn._end_cleanup()
    learn.loss_grad = None
    torch.save(learn.model, tmp_path / "model.pt")
    copied, loaded = copy.deepcopy(learn.model), torch.load(tmp_path / "model.pt", weights_only=False)
    learn.export("s.pkl")
    for model in (copied, loaded, load_learner(learn.path / "s.pkl").model):
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 4)
        assert not any(h.func.__self__._features for h in model.conv1._forward_hooks.values())


def test_a_recurrent_teacher_forgets_its_state_where_the_student_does(make_learner, teacher):
    events = []
    teacher.reset = lambda: events.append("reset")
    teacher.register_forward_hook(lambda *_: events.append("batch"))
    make_learner().fit(1, 0.01, cbs=kd_for(teacher, SoftTarget))
    assert events == ["reset", *4 * ["batch"], "reset", *2 * ["batch"]]


def test_a_student_in_the_ensemble_that_teaches_it_is_refused(make_learner, teacher, student):
    with pytest.raises(ValueError, match="teacher and student are the same"):
        make_learner(student).fit(1, cbs=kd_for([teacher, student], SoftTarget))


def test_the_same_callback_twice_is_refused(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget)
    with pytest.raises(ValueError, match="in the Learner already"):
        make_learner(cbs=kd).fit(1, 0.01, cbs=kd)


# --- what is seen ---


def test_metrics_show_both_parts_in_the_progress_table(make_learner, teacher, dls):
    kd = kd_for(teacher, SoftTarget, weight=0.25)
    learn = make_learner(metrics=[accuracy, *kd.metrics])
    learn.fit(1, 0.01, cbs=kd)
    assert list(learn.recorder.metric_names) == [
        "epoch", "train_loss", "valid_loss", "accuracy", "task_loss", "kd_loss", "time"
    ]  # fmt: skip
    _, valid_loss, _, task, kd_loss = learn.recorder.values[-1]
    outs = [(learn.model(x), teacher(x), y) for x, y in dls.valid]
    assert task == pytest.approx(sum(F.cross_entropy(p, y) for p, _, y in outs).item() / 2, rel=1e-5)
    assert kd_loss == pytest.approx(sum(SoftTarget(p, t) for p, t, _ in outs).item() / 2, rel=1e-5)
    assert valid_loss == pytest.approx(0.75 * task + 0.25 * kd_loss, rel=1e-5)


def test_metrics_work_on_the_training_set_and_show_nan_where_the_teacher_did_not_run(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget, distill_valid=False)
    learn = make_learner(metrics=kd.metrics)
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(train_metrics=True))
    learn.fit(1, 0.01, cbs=kd)
    _, task, kd_loss, _, valid_task, valid_kd = learn.recorder.values[-1]
    assert task == pytest.approx(sum(kd.history["task_loss"]) / 4, rel=1e-5)
    assert kd_loss == pytest.approx(sum(kd.history["kd_loss"]) / 4, rel=1e-5)
    assert valid_task > 0
    assert valid_kd != valid_kd


@pytest.mark.filterwarnings("ignore:the metric .* is of a distillation callback that is not in this fit")
def test_metrics_of_a_fit_without_the_callback_are_nan_not_those_of_the_last_fit_with_it(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget)
    learn = make_learner(metrics=kd.metrics)
    for cbs in (kd, None):
        learn.fit(1, 0.01, cbs=cbs)
        assert [v == v for v in learn.recorder.values[-1][2:]] == 2 * [cbs is kd]


def test_metrics_of_losses_per_sample_are_means(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget)
    learn = make_learner(metrics=kd.metrics, cbs=kd)
    learn.dls.loaders = [dl.new(bs=3) for dl in learn.dls.loaders]  # the last batch is shorter
    assert learn.get_preds(with_loss=True)[2].shape == (8,)


def test_history_is_that_of_the_last_fit_step_by_step(make_learner, teacher):
    seen, kd = [], kd_for(teacher, SoftTarget, weight=0.4)
    learn = make_learner()
    for epochs in (1, 2):
        seen.clear()
        learn.fit(
            epochs, 0.1, cbs=[kd, Watch(lambda learn: seen.append(learn.loss.item()) if learn.training else None)]
        )
        total = [0.6 * t + 0.4 * k for t, k in zip(kd.history["task_loss"], kd.history["kd_loss"], strict=True)]
        assert total == pytest.approx(seen)


# --- nothing is left behind ---


class Fail(Callback):
    "Raises `what` in the third batch, at one event."

    order = 5

    def __init__(self, event, what):
        self.what = what
        setattr(self, event, self.fail)

    def fail(self):
        if self.training and getattr(self, "iter", 0) == 2:
            raise self.what


EVENTS = ["before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "before_step", "after_batch"]


ENDS = [ValueError("x"), KeyboardInterrupt(), CancelFitException(), CancelBatchException()]
FAULTS = [(e, w) for e in EVENTS for w in ENDS if (e, type(w)) != ("after_batch", CancelBatchException)]


@works(
    "faults",
    "exceptions, Ctrl-C and Cancel exceptions at every event: no hook, no activation stays, the next fit is right",
)
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(("event", "what"), FAULTS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_whatever_ends_a_fit_no_hook_and_no_activation_stays(make_learner, teacher, dls, event, what, attached):
    kd, kept = kd_for(teacher, Attention), []
    learn = make_learner(cbs=[kd] if attached else [])
    learn.model.layer1.register_forward_hook(lambda m, i, o: kept.append(weakref.ref(o)))
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        learn.fit(1, 0.01, cbs=[Fail(event, what)] + ([] if attached else [kd]))
    if attached and event in ("before_batch", "after_pred"):
        learn.validate()  # the learner's next use
    elif attached:
        learn.model(next(iter(dls.valid))[0])  # a plain forward
    learn._end_cleanup()
    learn.loss_grad = None
    what.__traceback__ = None
    gc.collect()
    assert hooks(learn.model) == 1
    assert hooks(teacher) == 0
    assert [r for r in kept if r() is not None] == []
    assert teacher.training is False
    learn.fit(1, 0.01, cbs=[] if attached else kd)
    assert len(kd.history["kd_loss"]) == 4
    assert hooks(learn.model) == 1


@works("faults", "exceptions and Ctrl-C in student, teacher, distillation or task loss")
@pytest.mark.parametrize("where", ["student", "teacher", "loss", "task"])
@pytest.mark.parametrize("what", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_a_forward_or_a_loss_leaves_nothing(make_learner, teacher, dls, where, what):
    def bomb(*args, **kwargs):
        if bomb.armed:
            raise what("x")

    bomb.armed = True

    def loss(pred, teacher_pred, fm_s, fm_t, **kwargs):
        return bomb() if where == "loss" and bomb.armed else Attention(fm_s, fm_t)

    teacher.train()
    learn = make_learner(cbs=KnowledgeDistillationCallback(teacher, loss, *PAIRS))
    if where in ("student", "teacher"):
        (learn.model if where == "student" else teacher).head.register_forward_hook(bomb)
    elif where == "task":
        ce = learn.loss_func
        learn.loss_func = lambda pred, y: bomb() if bomb.armed else ce(pred, y)
    with pytest.raises(what):
        learn.fit(1, 0.01)
    assert teacher.training
    assert all(m.training for m in teacher.modules())
    bomb.armed = False
    learn.model(next(iter(dls.valid))[0])
    extra = {"student": (1, 0), "teacher": (0, 1)}.get(where, (0, 0))
    assert (hooks(learn.model), hooks(teacher)) == extra
    learn.fit(1, 0.01)
    assert (hooks(learn.model), hooks(teacher)) == extra


def test_another_forward_of_the_student_within_a_batch_is_not_captured(make_learner, teacher):
    class Consistency(Callback):
        "Runs the student on other inputs before and after its own forward."

        def before_batch(self):
            self.learn.model(self.x + 1)

        after_pred = before_batch

    seen = []

    def loss(fm_s, fm_t, **kwargs):
        seen.append(fm_s["conv1"])
        return Attention(fm_s, fm_t)

    learn = make_learner()
    own = []
    kd = KnowledgeDistillationCallback(teacher, loss, "conv1", "conv1")
    learn.fit(1, 0.0, cbs=[kd, Consistency(), Watch(lambda learn: own.append(learn.model.conv1(learn.x)))])
    assert len(seen) == 6
    for s, o in zip(seen, own, strict=True):
        assert torch.equal(s, o)


def test_a_fit_with_many_batches_holds_no_batch(make_learner, teacher):
    kept = []
    teacher.layer1.register_forward_hook(lambda m, i, o: kept.append(weakref.ref(o)))
    alive = []
    learn = make_learner()
    counter = Callback(after_batch=lambda self: alive.append(sum(r() is not None for r in kept)))
    counter.order = 1
    learn.fit(2, 0.01, cbs=[kd_for(teacher, Attention), counter])
    assert max(alive) <= 1


def test_errors_of_the_callback_carry_their_text(make_learner, teacher):
    with pytest.raises(ValueError, match="SoftTarget needs outputs of one shape"):
        make_learner(Net(classes=5)).fit(1, cbs=kd_for(teacher, SoftTarget))


def test_a_student_with_attributes_named_like_ours_trains_without_warnings(make_learner, teacher):
    model = Net()
    model.weight, model.teacher, model.history, model.schedule = nn.Parameter(torch.ones(1)), 1, 2, 3
    kd = kd_for(teacher, SoftTarget)
    make_learner(model).fit(1, 0.01, cbs=kd)
    assert len(kd.history["kd_loss"]) == 4


def test_learner_is_the_only_fastai_object_the_callback_needs(dls, teacher, student):
    learn = Learner(dls, student, loss_func=F.cross_entropy, cbs=kd_for(teacher, SoftTarget), default_cbs=True)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert len(learn.knowledge_distillation.history["kd_loss"]) == 4


# --- a teacher with other inputs ---


@works("teachers", "Teacher(tfm=): a teacher with another normalization, size or number of channels")
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
def test_a_teacher_of_other_inputs_teaches_what_it_would_say_to_them(make_learner, loss):
    other = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 16, 4))

    def small_and_grey(x):
        assert not torch.is_grad_enabled()
        return F.interpolate(x.mean(1, keepdim=True), size=8)

    def check(learn):
        with torch.no_grad():
            x = small_and_grey(learn.x)
            fm_s = {
                "layer2": learn.model.layer2(learn.model.layer1(learn.model.bn1(learn.model.conv1(learn.x)).relu()))
            }
            kd = SoftTarget(learn.pred, other(x)) if loss is SoftTarget else Attention(fm_s, {"0": other[0](x)})
        seen.append(1)
        if not learn.training:  # dropout rests
            torch.testing.assert_close(learn.loss, torch.lerp(F.cross_entropy(learn.pred, learn.y), kd, 0.5))

    seen, layers = [], ("layer2", "0") if loss is Attention else ()
    kd = KnowledgeDistillationCallback(Teacher(other, tfm=small_and_grey), loss, *layers)
    make_learner().fit(1, 0.1, cbs=[kd, Watch(check)])
    assert len(seen) == 6


def test_the_student_keeps_its_inputs_and_a_teacher_may_take_several(make_learner, student):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, scale):
            return self.net(x * scale)

    seen = []
    student.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    kd = KnowledgeDistillationCallback(Teacher(Two(), tfm=lambda x: (2 * x, torch.tensor(0.5))), SoftTarget)
    make_learner(student).fit(1, 0.1, cbs=kd)
    assert torch.equal(seen[0].as_subclass(torch.Tensor), torch.stack([image(i) for i in range(4)]))
    assert all(x > 0 for x in kd.history["kd_loss"])


@pytest.mark.parametrize("random", [False, True])
def test_stored_outputs_are_those_of_the_inputs_that_the_teacher_sees(make_learner, teacher, random):
    calls, scale = [], [1.0]

    def tfm(x):
        return x + torch.rand(()) if random else x * scale[0]

    teacher.register_forward_hook(lambda *_: calls.append(1))
    kd = KnowledgeDistillationCallback(Teacher(teacher, tfm=tfm, cache=True), SoftTarget)
    learn = make_learner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random inputs are never found again: the cache says so
        learn.fit(2, 0.01, cbs=kd)
    assert len(calls) == (6 + 6 if random else 6 + 1)  # each batch, and the first that could be served, to look
    scale[0] = 2.0
    pred_before = kd.history["kd_loss"]
    calls.clear()
    if not random:  # another function: nothing that was stored is of use
        learn.fit(1, 0.01, cbs=kd)
        assert len(calls) == 6
        assert kd.history["kd_loss"] != pred_before


@pytest.mark.parametrize("bad", [lambda x: None, lambda x: "x", lambda x: ()])
def test_a_tfm_that_gives_no_inputs_is_an_error(make_learner, teacher, bad):
    kd = KnowledgeDistillationCallback(Teacher(teacher, tfm=bad), SoftTarget)
    with pytest.raises(TypeError, match="tfm must return the teacher's inputs"):
        make_learner().fit(1, cbs=kd)


def test_a_tfm_is_a_function(teacher):
    with pytest.raises(TypeError, match="tfm must be a function"):
        Teacher(teacher, tfm=(0.5, 0.5))


def test_a_teacher_that_gives_nan_for_its_own_inputs_is_reported(make_learner, teacher):
    kd = KnowledgeDistillationCallback(Teacher(teacher, tfm=lambda x: x / 0), SoftTarget)
    with pytest.raises(FloatingPointError, match="the teacher gives nan or inf"):
        make_learner().fit(1, cbs=kd)
    assert kd._distiller._outs == []


# --- what the metrics say ---


@works("other calls", "agreement and teacher_accuracy as metrics")
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
def test_agreement_and_teacher_accuracy_are_shares_of_the_validation_samples_without_another_teacher_pass(
    make_learner, teacher, dls, loss
):
    calls, kd = [], kd_for(teacher, loss)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    learn = make_learner(metrics=[accuracy, kd.agreement, kd.teacher_accuracy])
    learn.fit(1, 0.1, cbs=kd)
    assert len(calls) == 6
    assert learn.recorder.metric_names[-4:-1] == ["accuracy", "agreement", "teacher_accuracy"]
    x, y = (torch.cat(z).as_subclass(torch.Tensor) for z in zip(*dls.valid, strict=True))
    s, t = (m.eval()(x).argmax(1) for m in (learn.model, teacher))
    assert list(learn.recorder.values[-1])[3:] == pytest.approx(
        [(s == t).float().mean().item(), (t == y).float().mean().item()]
    )


def test_a_copy_agrees_with_its_teacher_everywhere(make_learner, student):
    kd = kd_for(copy.deepcopy(student), SoftTarget)
    learn = make_learner(student, metrics=[accuracy, kd.teacher_accuracy, kd.agreement])
    _, student_accuracy, teacher_accuracy, agreement = learn.validate(cbs=kd)
    assert agreement == 1
    assert teacher_accuracy == student_accuracy


def test_without_the_teacher_in_validation_they_are_nan(make_learner, teacher):
    kd = kd_for(teacher, SoftTarget, distill_valid=False)
    learn = make_learner(metrics=[kd.agreement, kd.teacher_accuracy])
    learn.fit(1, 0.1, cbs=kd)
    assert all(x != x for x in learn.recorder.values[-1][2:])
    learn.fit(1, 0.1)  # without the callback at all
    assert all(x != x for x in learn.recorder.values[-1][2:])


def test_dense_outputs_agree_by_position(make_learner, teacher):
    class Dense(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x)

    def label_of(i):
        return (IMAGES[i, 0] > 0).long()

    dsets = Datasets(list(range(24)), [[image], [label_of]], splits=[range(16), range(16, 24)])
    dls = dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"), shuffle=False)
    kd = KnowledgeDistillationCallback(Dense(1), SoftTarget)
    learn = Learner(dls, Dense(2), loss_func=F.cross_entropy, metrics=[kd.agreement, kd.teacher_accuracy])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1, cbs=kd)
    s, t = (m(IMAGES[16:]).argmax(1) for m in (learn.model, kd.teacher))
    y = (IMAGES[16:, 0] > 0).long()
    expected = [(s == t).float().mean().item(), (t == y).float().mean().item()]
    assert list(learn.recorder.values[-1])[2:] == pytest.approx(expected)


def test_outputs_without_classes_cannot_agree(make_learner):
    kd = KnowledgeDistillationCallback(Net(classes=1), Logits)
    learn = make_learner(Net(classes=1), loss_func=lambda p, y: F.mse_loss(p[:, 0], y.float()), metrics=kd.agreement)
    with pytest.raises(ValueError, match=r"need classes \(B, C, ...\), but the student gives \(4, 1\)"):
        learn.fit(1, cbs=kd)
