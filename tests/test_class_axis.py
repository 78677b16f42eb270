"Classes in the last dimension, as of language models, and labels with a dimension of size 1, as of tabular data."

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import same, state
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai_kd import *
from fasterai_kd._class_axis import as_rows, class_dim, index_labels
from fasterai_kd.losses.evaluate import LossEvaluator
from fasterai_kd.teacher.output import TeacherOutput

CLASSES = 5
OVER_CLASSES = [SoftTarget, DecoupledKD, Mutual, DIST]


class Tagger(nn.Module):
    "Words (B, T) → logits (B, T, C), or (B, C, T)."

    def __init__(self, width=4, last=True):
        super().__init__()
        self.embed, self.head, self.last = nn.Embedding(11, width), nn.Linear(width, CLASSES), last

    def forward(self, x):
        logits = self.head(self.embed(x).tanh())
        return logits if self.last else logits.transpose(1, 2)


def learner(length, last, seed=0, **kwargs):
    "Of a Tagger; the task loss takes its layout."
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(0)
    words = torch.randint(11, (12, length), generator=g)
    items = [(x, x % CLASSES) for x in words]
    dls = DataLoaders.from_dsets(items[:8], items[8:], bs=4, shuffle=False, device="cpu", num_workers=0)
    learn = Learner(dls, Tagger(last=last), loss_func=CrossEntropyLossFlat(axis=-1 if last else 1), **kwargs)
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


def fit(loss, length, last, **kwargs):
    "The losses and metrics of a fit, the student's weights, the callback."
    torch.manual_seed(1)
    teachers = [Tagger(8, last), Tagger(6, last)]
    kd = KnowledgeDistillationCallback(teachers if kwargs.pop("ensemble", False) else teachers[0], loss, **kwargs)
    learn = learner(length, last, metrics=[kd.agreement, kd.teacher_accuracy])
    learn.fit(2, 0.1, cbs=kd)
    return kd.history | {"metrics": list(learn.recorder.values[-1])}, state(learn.model), kd


@pytest.mark.works("tasks", "predictions (B, T, C) of language models and taggers: classes in the last dimension")
@pytest.mark.parametrize("ensemble", [False, True], ids=["one teacher", "ensemble"])
@pytest.mark.parametrize("length", [7, CLASSES], ids=["7 words", "as many words as classes"])
@pytest.mark.parametrize("loss", OVER_CLASSES, ids=lambda f: f.__name__)
def test_a_fit_with_classes_last_is_the_fit_with_classes_first(loss, length, ensemble):
    numbers, weights, _ = fit(loss, length, last=True, ensemble=ensemble)
    expected, their_weights, _ = fit(loss, length, last=False, ensemble=ensemble)
    assert numbers.keys() == expected.keys()
    for name, values in expected.items():
        assert numbers[name] == pytest.approx(values, rel=1e-4), name
    for a, b in zip(weights.values(), their_weights.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_loss_of_ones_own_gets_predictions_as_the_models_give_them():
    shapes = set()

    def own(pred, teacher_pred, target, **kwargs):
        shapes.update(tuple(x.shape) for x in (pred, teacher_pred, target))
        return F.mse_loss(pred, teacher_pred)

    fit(combine((own, 1.0), (SoftTarget, 1.0)), 7, last=True)
    assert shapes == {(4, 7, CLASSES), (4, 7)}


def test_mutual_learning_and_distill_know_where_the_classes_are(capsys):
    def together(last):
        learn, peer = learner(7, last), learner(7, last, seed=1)
        learn.fit(2, 0.1, cbs=MutualLearning(peer, SoftTarget))
        return [*state(learn.model).values(), *state(peer.model).values()]

    for a, b in zip(together(True), together(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    for last in (True, False):
        learner(7, last).distill(Tagger(8, last), 1)
        assert f"distill with SoftTarget, since both predict the same {CLASSES} classes" in capsys.readouterr().out


x = torch.zeros
ints = lambda *shape: torch.zeros(shape, dtype=torch.long)  # noqa: E731


@pytest.mark.parametrize(
    ("pred", "y", "loss_func", "dim"),
    [
        (x(4, 7), ints(4), None, 1),
        (x(4, 7, 3), ints(4, 7), None, 2),
        (x(4, 3, 7), ints(4, 7), None, 1),
        (x(4, 3, 8, 8), ints(4, 8, 8), CrossEntropyLossFlat(axis=1), 1),
        (x(4, 8, 8, 3), ints(4, 8, 8), None, 3),
        (x(4, 7, 7), ints(4, 7), nn.CrossEntropyLoss(), 1),  # both fit: as torch has it,
        (x(4, 7, 7), ints(4, 7), CrossEntropyLossFlat(), 2),  # unless the task loss says otherwise
        (x(4, 7, 7), ints(4, 7), lambda pred, y: 0, 1),
        (x(4, 7, 3), x(4, 7), None, 1),  # no classes
        (x(4, 7, 3), ints(4), None, 1),
        ((x(4, 7, 3),), ints(4, 7), None, 1),
        (x(4, 7, 3), None, CrossEntropyLossFlat(), 2),  # without labels the task loss tells
        (x(4, 7, 3), None, nn.CrossEntropyLoss(), 1),
        (x(4, 7), None, CrossEntropyLossFlat(), 1),
        (x(4, 3, 8, 8), None, CrossEntropyLossFlat(), 1),
    ],
)
def test_labels_tell_where_the_classes_are(pred, y, loss_func, dim):
    assert class_dim(pred, y, loss_func) == dim


def test_where_both_fit_the_task_loss_tells_also_inside_mixup():
    mix = MixUp()
    mix.old_lf = CrossEntropyLossFlat()
    assert class_dim(x(4, 7, 7), ints(4, 7), mix.lf) == 2


def test_where_both_fit_the_last_batch_tells_if_the_task_loss_does_not():
    assert class_dim(x(4, 7, 7), ints(4, 7), None, otherwise=2) == 2
    assert class_dim(x(4, 7, 7), ints(4, 7), CrossEntropyLossFlat(axis=1), otherwise=2) == 1


def test_a_batch_of_as_many_words_as_classes_is_read_as_those_before_it():
    class Short(Callback):
        order = -5

        def before_batch(self):
            if self.iter:
                self.learn.xb, self.learn.yb = (self.x[:, :CLASSES],), (self.y[:, :CLASSES],)

    def weights(axis):
        learn = learner(7, last=True)
        loss_func = CrossEntropyLossFlat()
        learn.loss_func = loss_func if axis else lambda pred, y: loss_func(pred, y)
        torch.manual_seed(1)
        learn.fit(1, 0.1, cbs=[Short(), KnowledgeDistillationCallback(Tagger(8), SoftTarget)])
        return state(learn.model)

    assert same(weights(axis=True), weights(axis=False))


@pytest.mark.works("tasks", "labels (B, 1), as fastai's tabular learner has them")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_labels_with_a_dimension_of_one_are_class_indices(make_learner, dls, teacher, capsys, dtype):
    class Column(Callback):
        order = -5

        def before_batch(self):
            self.learn.yb = (self.y[:, None].to(dtype),)

    def student_after(*cbs):
        torch.manual_seed(0)
        learn = make_learner(loss_func=lambda pred, y: F.cross_entropy(pred, y.flatten().long()), metrics=[])
        kd = KnowledgeDistillationCallback(teacher, DecoupledKD)
        before = state(learn.model)
        learn.metrics = [kd.teacher_accuracy]
        learn.fit(1, 0.01, cbs=[kd, *cbs])
        weights = state(learn.model)
        learn.model.load_state_dict(before)
        return weights, kd.history, learn.recorder.values[-1][-1]

    (weights, history, share), (theirs, their_history, their_share) = student_after(Column()), student_after()
    assert same(weights, theirs)
    assert history == their_history
    assert share == their_share

    items = [(x, y[None].to(dtype)) for x, y in zip(*map(torch.cat, zip(*dls.valid, strict=True)), strict=True)]
    columns = DataLoaders.from_dsets(items, items, bs=4, device="cpu", num_workers=0)
    learn = Learner(columns, make_learner().model, loss_func=lambda p, y: F.cross_entropy(p, y.flatten().long()))
    learn.logger = lambda *_: None
    with learn.no_bar():
        learn.distill(teacher, 1)
    assert "distill with SoftTarget, since both predict the same 4 classes" in capsys.readouterr().out


# Void


@pytest.mark.parametrize("normalize", [False, True])
def test_ignored_positions_are_as_if_they_were_not_there(normalize):
    s, t = torch.randn(2, 6, 4, dtype=torch.float64)
    y = torch.tensor([0, 255, 3, 1, 255, 2])
    kept = y != 255
    expected = DecoupledKD(s[kept], t[kept], target=y[kept], normalize=normalize)
    torch.testing.assert_close(DecoupledKD(s, t, target=y, normalize=normalize, ignore_index=255), expected)
    dense = [z.T.reshape(1, 4, 2, 3) for z in (s, t)]
    got = DecoupledKD(*dense, target=y.view(1, 2, 3), normalize=normalize, ignore_index=255)
    torch.testing.assert_close(got, expected)
    turned = y.view(1, 2, 3).transpose(1, 2)
    got = DecoupledKD(*(z.transpose(2, 3) for z in dense), target=turned, normalize=normalize, ignore_index=255)
    torch.testing.assert_close(got, expected)
    each = DecoupledKD(s, t, target=y, normalize=normalize, ignore_index=255, reduction="none")
    torch.testing.assert_close(each[kept].mean(), expected)
    assert not each[~kept].any()
    assert DecoupledKD(s, t, target=torch.full_like(y, 255), ignore_index=255) == 0


def test_ignored_positions_have_no_gradient():
    s, t = torch.randn(2, 3, 4, dtype=torch.float64)
    s.requires_grad_()
    DecoupledKD(s, t, target=torch.tensor([0, 255, 3]), ignore_index=255).backward()
    assert [bool(g.any()) for g in s.grad] == [True, False, True]


class Mask(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.head(x)


@pytest.mark.works("tasks", "segmentation with void pixels: DecoupledKD's `ignore_index`")
def test_void_pixels_count_neither_in_decoupled_kd_nor_in_the_teachers_accuracy():
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, 4, 4, generator=g), torch.randint(4, (4, 4), generator=g)) for _ in range(8)]
    for _, y in items:
        y[0] = 255
    dls = DataLoaders.from_dsets(items, items, bs=4, shuffle=False, device="cpu", num_workers=0)
    teacher = Mask()

    def learner(**kwargs):
        loss_func = CrossEntropyLossFlat(axis=1, ignore_index=255)
        kd = KnowledgeDistillationCallback(teacher, partial(DecoupledKD, **kwargs))
        learn = Learner(dls, Mask(), loss_func=loss_func, metrics=kd.teacher_accuracy)
        learn.logger = lambda *_: None
        return learn, kd

    learn, kd = learner(ignore_index=255)
    with learn.no_bar():
        learn.fit(1, cbs=kd)
    x, y = (torch.stack(z) for z in zip(*items, strict=True))
    predicted = teacher(x).argmax(1)[:, 1:]
    assert learn.recorder.values[-1][-1] == pytest.approx((predicted == y[:, 1:]).float().mean().item())
    learn, kd = learner()
    with pytest.raises(RuntimeError, match=r"out of bounds.*void ones are left out with ignore_index"):
        learn.fit(1, cbs=kd)


def test_agreement_and_accuracy_are_shares_of_all_that_counts_also_where_batches_have_unequal_void():
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, 4, 4, generator=g), torch.randint(4, (4, 4), generator=g)) for _ in range(12)]
    for i, (_, y) in enumerate(items):
        y[: i // 2] = 255  # none in the first two, all in the last four
    dls = DataLoaders.from_dsets(items, items, bs=4, shuffle=False, device="cpu", num_workers=0)
    teacher = Mask()
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = Learner(dls, Mask(), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), lr=0.0)
    learn.metrics, learn.logger = [kd.agreement, kd.teacher_accuracy], lambda *_: None
    learn.add_cb(kd)
    with learn.no_bar():
        _, agreement, accuracy = learn.validate()
    x, y = (torch.stack(z) for z in zip(*items, strict=True))
    student, theirs, counts = learn.model(x).argmax(1), teacher(x).argmax(1), y != 255
    assert agreement == pytest.approx((student == theirs)[counts].float().mean().item())
    assert accuracy == pytest.approx((theirs == y)[counts].float().mean().item())


def test_an_ensemble_in_an_ensemble_has_its_classes_where_the_outer_one_has_them():
    torch.manual_seed(0)
    a, b, c = (Tagger(width).eval() for width in (4, 6, 8))
    words = torch.randint(11, (4, 7))
    p = [model(words).softmax(2) for model in (a, b, c)]
    got = Teacher([[a, b], c]).forward((words,), class_dim=2).pred
    torch.testing.assert_close(got.exp(), ((p[0] + p[1]) / 2 + p[2]) / 2)


@pytest.mark.parametrize("loss", [DecoupledKD, SoftTarget], ids=lambda f: f.__name__)
def test_labels_are_mixed_with_classes_last_as_with_classes_first(loss):
    torch.manual_seed(0)
    s, t = torch.randn(4, 7, CLASSES), torch.randn(4, 7, CLASSES)
    y, mix = torch.randint(CLASSES, (4, 7)), MixUp()
    mix.yb1, mix.lam = (torch.randint(CLASSES, (4, 7)),), torch.tensor([0.1, 0.9, 0.5, 0.7])
    evaluator = LossEvaluator(loss, [], [])
    values = []
    for dim in (2, 1):
        out = TeacherOutput(t.movedim(2, dim), {})
        values.append(evaluator.evaluate(s.movedim(2, dim), out, {}, y, mix, 0.5, class_dim=dim)[loss.__name__])
    torch.testing.assert_close(*values)
    if loss is DecoupledKD:
        two = [DecoupledKD(s.movedim(2, 1), t.movedim(2, 1), target=z, reduction="none") for z in (y, mix.yb1[0])]
        torch.testing.assert_close(values[0], (mix.lam * two[0] + (1 - mix.lam) * two[1]).mean())


def test_every_position_is_a_row_and_a_label_of_one_logit_stays_as_it_is():
    assert as_rows(torch.zeros(2, 3, 4, 5)).shape == (24, 5)
    assert index_labels(torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1)).shape == (4, 1)


def test_an_ensemble_of_taggers_takes_texts_of_one_word():
    taggers = [Tagger(4).eval(), Tagger(6).eval()]
    assert Teacher(taggers).forward((torch.randint(11, (4, 1)),), class_dim=2).pred.shape == (4, 1, CLASSES)
