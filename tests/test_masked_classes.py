"Classes that a mask rules out, by -inf or the least number of a dtype, count nothing."

import math
from functools import partial

import pytest
import torch
from fastai.callback.tracker import TerminateOnNaNCallback

from fasterai_kd import *

KEPT = [0, 2, 3, 5]
LOSSES = {
    "SoftTarget": SoftTarget,
    "SoftTarget at T=1": partial(SoftTarget, T=1),
    "SoftTarget of standardized logits": partial(SoftTarget, standardize=True),
    "Mutual": Mutual,
    "DecoupledKD": DecoupledKD,
    "DecoupledKD normalized": partial(DecoupledKD, normalize=True),
    "DecoupledKD of standardized logits": partial(DecoupledKD, standardize=True),
}
MASKS = {
    "-inf": (-math.inf, torch.float32),
    **{str(dtype)[6:]: (torch.finfo(dtype).min, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
masks = pytest.mark.parametrize(("value", "dtype"), MASKS.values(), ids=MASKS)


def logits(value, dtype, *whose):
    "Of student and teacher (4, 6), and labels among the classes kept; classes 1 and 4 are masked."
    pair = {who: torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).to(dtype) for i, who in enumerate("st")}
    for who in whose:
        pair[who][:, [1, 4]] = value
    return pair["s"].requires_grad_(), pair["t"], torch.tensor([0, 2, 5, 3])


def kept(x):
    return x.detach()[:, KEPT]


@masks
@losses
def test_masked_in_both_they_might_as_well_not_be_there(loss, value, dtype):
    s, t, y = logits(value, dtype, "s", "t")
    got = loss(s, t, target=y)
    got.backward()
    own = kept(s).requires_grad_()
    expected = loss(own, kept(t), target=torch.tensor([KEPT.index(i) for i in y]))
    expected.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(s.grad[:, KEPT], own.grad)
    assert not s.grad[:, [1, 4]].any()


@masks
@losses
def test_masked_by_the_teacher_alone_they_leave_a_finite_loss_with_finite_gradients(loss, value, dtype):
    s, t, y = logits(value, dtype, "t")
    loss(s, t, target=y).backward()
    assert s.grad.isfinite().all()
    assert s.grad[:, KEPT].any()
    p_t = t.float().softmax(1)
    log_p = [x.detach().float().log_softmax(1)[:, KEPT] for x in (s, t)]
    by_hand = (p_t[:, KEPT] * (log_p[1] - log_p[0])).sum(1).mean()
    torch.testing.assert_close(Mutual(s, t), by_hand)


@masks
def test_the_teachers_mask_does_not_change_how_the_others_are_standardized(value, dtype):
    s, t, _ = logits(value, dtype, "t")
    z_s, z_t = ((x - x.mean(1, True)) / x.std(1, keepdim=True) for x in (s.detach().float(), kept(t).float()))
    expected = (z_t.softmax(1) * (z_t.log_softmax(1) - z_s.log_softmax(1)[:, KEPT])).sum(1).mean()
    torch.testing.assert_close(SoftTarget(s, t, T=1, standardize=True), expected)


def test_a_class_that_the_student_alone_rules_out_is_an_infinite_mistake():
    s, t, _ = logits(-math.inf, torch.float32, "s")
    assert Mutual(s, t).item() == math.inf


@pytest.mark.parametrize("whose", ["t", "st"])
def test_raw_outputs_that_the_teacher_masks_count_0(whose):
    s, t, _ = logits(-math.inf, torch.float32, *whose)
    loss = Logits(s, t)
    loss.backward()
    torch.testing.assert_close(loss, Logits(kept(s), kept(t)) * 4 / 6)
    torch.testing.assert_close(s.grad[:, KEPT], 2 * (kept(s) - kept(t)) / s.numel())
    assert not s.grad[:, [1, 4]].any()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_label_that_is_masked_in_both_counts_nothing(normalize):
    s, t, y = logits(-math.inf, torch.float32, "s", "t")
    y[0] = 1
    loss = DecoupledKD(s, t, target=y, normalize=normalize)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


@losses
def test_a_sample_with_one_class_left_has_nothing_to_learn(loss):
    s, t, y = logits(-math.inf, torch.float32, "s", "t")
    with torch.no_grad():
        s[0, 1:] = t[0, 1:] = -math.inf
    rest = loss(s[1:], t[1:], target=y[1:]) * 3 / 4
    got = loss(s, t, target=y)
    torch.testing.assert_close(got, rest)
    got.backward()
    assert s.grad.isfinite().all()
    assert not s.grad[0].any()


def test_correlations_of_masked_outputs_are_finite():
    s, t, _ = logits(-math.inf, torch.float32, "s", "t")
    loss = DIST(s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


class Masked(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).index_fill(1, torch.tensor([3]), -math.inf)


def test_a_fit_on_masked_outputs_does_not_blame_the_teacher(make_learner, teacher, student):
    kd = KnowledgeDistillationCallback(Masked(teacher), SoftTarget, weight=1.0)
    learn = make_learner(Masked(student), loss_func=lambda pred, y: pred[:, :3].square().mean(), metrics=[])
    learn.fit(1, 0.1, cbs=kd)
    assert all(map(math.isfinite, kd.history["kd_loss"]))
    assert all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_diverges_beside_a_teacher_that_masks_is_not_blamed_on_the_teacher(make_learner, teacher, value):
    learn = make_learner()
    learn.model.head.weight.data.fill_(value)
    kd = KnowledgeDistillationCallback(Masked(teacher), SoftTarget)
    learn.fit(1, 0.1, cbs=[kd, TerminateOnNaNCallback()])
    assert len(kd.history["kd_loss"]) == 1


def test_a_teacher_that_masks_all_classes_of_a_sample_is_reported(make_learner, teacher):
    teacher.register_forward_hook(lambda model, xb, pred: pred.index_fill(0, torch.tensor([0]), -math.inf))
    with pytest.raises(FloatingPointError, match=r"the teacher gives nan or inf \(predictions\)"):
        make_learner().fit(1, 0.1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


def test_nan_of_the_teacher_is_reported_beside_a_student_that_masks(make_learner, teacher, student):
    teacher.register_forward_hook(lambda model, xb, pred: pred * math.nan)
    learn = make_learner(Masked(student), loss_func=lambda pred, y: pred[:, :3].square().mean(), metrics=[])
    with pytest.raises(FloatingPointError, match="the teacher gives nan or inf"):
        learn.fit(1, 0.1, cbs=KnowledgeDistillationCallback(Masked(teacher), SoftTarget))
