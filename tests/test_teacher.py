"The teacher answers in evaluation mode, without a graph, and is left as it was."

import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, image, same, state
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, Normalize
from fastai.learner import Learner
from fastai.vision.core import TensorImage, cifar_stats, imagenet_stats
from fastcore.foundation import L
from torch import nn

from fasterai_kd import Attention, KnowledgeDistillationCallback, SoftTarget, renormalize
from fasterai_kd.teacher import Ensemble, Teacher, as_teacher, logits


def test_the_teacher_answers_in_evaluation_mode_without_a_graph():
    model, x = Net().train(), torch.randn(4, 3, 16, 16)
    out = Teacher(model)([x])
    assert not out.requires_grad
    assert torch.equal(out, model.eval()(x))


def test_train_flags_weights_statistics_and_requires_grad_are_as_before_also_after_an_exception():
    model = Net().train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    before = state(model)
    Teacher(model)([torch.randn(4, 3, 16, 16)])
    with pytest.raises(RuntimeError):
        Teacher(model)([torch.randn(4, 1, 16, 16)])
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())


def test_what_the_teacher_gives_may_be_saved_for_backward():
    out = Teacher(nn.Linear(2, 2))([torch.randn(3, 2)])
    (nn.Parameter(torch.randn(3, 2)) * out).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_in_another_precision_gets_inputs_in_it(dtype):
    model = nn.Linear(3, 2).to(dtype)
    assert Teacher(model)([torch.randn(4, 3)]).dtype == dtype


def test_integer_inputs_and_other_arguments_pass_as_they_are():
    class Tabular(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 2)

        def forward(self, cats, conts, name):
            assert name == "x"
            return self.emb(cats) + conts

    assert Teacher(Tabular())([torch.tensor([1, 2]), torch.randn(2, 2), "x"]).shape == (2, 2)


def test_the_teacher_sees_plain_tensors():
    model = nn.Identity()
    assert type(Teacher(model)([TensorImage(torch.zeros(1, 2))])) is torch.Tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_teacher_moves_to_the_device_of_the_batch():
    assert Teacher(nn.Linear(3, 2))([torch.randn(4, 3, device="cuda")]).is_cuda


def test_an_ensemble_gives_the_log_of_the_mean_probability():
    models, x = [Net().eval(), Net().eval(), Net().eval()], torch.randn(4, 3, 16, 16)
    mean = torch.stack([m(x).softmax(1) for m in models]).mean(0)
    out = Ensemble([Teacher(m) for m in models])([x])
    torch.testing.assert_close(out.softmax(1), mean)
    torch.testing.assert_close(out, mean.log())


def test_a_teacher_may_be_a_model_a_learner_an_exported_learner_or_a_list(make_learner, teacher):
    learn = make_learner(teacher)
    learn.export("t.pkl")
    assert as_teacher(teacher).model is teacher
    assert as_teacher(learn).model is teacher
    for path in (learn.path / "t.pkl", str(learn.path / "t.pkl")):
        assert same(state(as_teacher(path).model), state(teacher))
    assert list(as_teacher([teacher, learn]).model) == [teacher, teacher]


def test_saved_weights_are_no_teacher(make_learner, teacher):
    path = make_learner(teacher).save("weights")
    with pytest.raises(TypeError, match=r"no exported Learner .* write it with learn.export\(\), not learn.save\(\)"):
        as_teacher(path)


def test_members_of_an_ensemble_may_differ_in_precision():
    models, x = [Net().eval(), Net().eval().double()], torch.randn(4, 3, 16, 16)
    out = Ensemble([Teacher(m) for m in models])([x])
    mean = (models[0](x).softmax(1) + models[1](x.double()).softmax(1)) / 2
    torch.testing.assert_close(out.exp().double(), mean, rtol=1e-5, atol=1e-6)


def test_an_ensemble_of_regressors_is_refused():
    with pytest.raises(ValueError, match=r"an ensemble is of classifiers \(B, C\), got \(4, 1\)"):
        Ensemble([Teacher(Net(classes=1)), Teacher(Net(classes=1))])([torch.randn(4, 3, 16, 16)])


@pytest.mark.parametrize("bad", [None, Net, [], 3, {"a": 1}], ids=repr)
def test_anything_else_is_refused(bad):
    with pytest.raises(TypeError, match="teacher must be a model"):
        as_teacher(bad)


def test_predictions_are_found_among_several_outputs():
    t, u = torch.zeros(1), torch.ones(1)
    assert logits(t) is t
    assert logits((t, u)) is t
    assert logits({"out": t, "aux": u}) is t
    assert logits({"logits": t, "hidden": u}) is t
    assert logits({"anything": t}) is t
    with pytest.raises(TypeError, match="the teacher returns a dict with 2 tensors"):
        logits({"a": t, "b": u})


# --- other inputs than the student's ---


@pytest.mark.parametrize("stats", [(imagenet_stats, cifar_stats), (([0.5], [0.25]), imagenet_stats)])
def test_renormalize_gives_what_the_teachers_own_normalisation_would(stats):
    raw = torch.rand(4, len(stats[0][0]), 5, 6)

    def normalised(mean, std):
        return (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    tfm = pickle.loads(pickle.dumps(renormalize(*stats)))  # survives `learn.export()`
    out = tfm(normalised(*stats[0]))
    torch.testing.assert_close(out, normalised(*stats[1]), rtol=1e-4, atol=1e-5)
    assert out.shape == (4, 3, 5, 6)
    assert tfm(normalised(*stats[0]).half()).dtype == torch.float16


def test_renormalize_takes_the_statistics_of_a_normalize_transform():
    norm = Normalize.from_stats(*imagenet_stats, cuda=False)
    x = torch.randn(2, 3, 4, 4)
    out = renormalize((norm.mean, norm.std), cifar_stats)(x)
    torch.testing.assert_close(out, renormalize(imagenet_stats, cifar_stats)(x))


@pytest.mark.parametrize(
    ("stats", "match"),
    [
        ((([0.0], [1.0, 1.0]), imagenet_stats), "of one length, got lengths"),
        ((imagenet_stats, ([0.0] * 4, [1.0] * 4)), "of one length, got lengths"),
        ((imagenet_stats, ([0.0] * 3, [1.0, 0.0, 1.0])), "must be positive"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(stats, match):
    with pytest.raises(ValueError, match=match):
        renormalize(*stats)


def test_renormalize_says_which_images_it_expects():
    with pytest.raises(ValueError, match=r"expects images \(B, 3, H, W\), got \(4, 1, 8, 8\)"):
        renormalize(imagenet_stats, cifar_stats)(torch.zeros(4, 1, 8, 8))


# Vocabularies


def animal(i):
    return ("ape", "bee", "cat", "dog")[i % 4]


def animals(tmp_path, *vocab):
    "Data whose classes are in this order."
    dsets = Datasets(list(range(8)), [[image], [animal, Categorize(vocab=vocab, sort=False)]])
    return dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"), path=tmp_path)


@pytest.mark.parametrize("kind", ["learner", "exported", "ensemble"])
def test_classes_in_another_order_are_refused_before_the_first_batch(tmp_path, kind):
    teacher = Learner(animals(tmp_path, "cat", "dog", "ape", "bee"), Net(), loss_func=F.cross_entropy)
    if kind == "exported":
        teacher.export()
        teacher = tmp_path / "export.pkl"
    kd = KnowledgeDistillationCallback([teacher, Net()] if kind == "ensemble" else teacher, SoftTarget)
    learn = Learner(animals(tmp_path, "ape", "bee", "cat", "dog"), Net(), loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match=r"entry 0 is 'cat' for the teacher and 'ape' for the student\. Make"):
        learn.fit(1, cbs=kd)
    if kind != "ensemble":  # a loss that compares no classes
        kd = KnowledgeDistillationCallback(teacher, Attention, "conv1", "conv1")
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=kd)


def test_a_loss_that_does_not_name_the_teachers_predictions_does_not_need_its_classes(tmp_path):
    def own(fm_s, fm_t, **kwargs):
        return Attention(fm_s, fm_t)

    teacher = Learner(animals(tmp_path, "cat", "dog", "ape", "bee"), Net(), loss_func=F.cross_entropy)
    learn = Learner(animals(tmp_path, "ape", "bee", "cat", "dog"), Net(), loss_func=F.cross_entropy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, own, "conv1", "conv1"))
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher.model, SoftTarget))


def test_a_teacher_without_data_has_no_classes_to_compare(make_learner):
    teacher = Learner(DataLoaders(), Net(), loss_func=F.cross_entropy)
    make_learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


def test_other_words_for_the_classes_give_a_warning_and_the_same_none(make_learner, dls):
    dls.vocab = [["xxunk", "the"], ["neg", "pos"]]  # of words and of classes
    kd = KnowledgeDistillationCallback(make_learner(Net()), SoftTarget)
    make_learner().fit(1, cbs=kd)
    dls.vocab = (L("xxunk", "the"), ["neg", "positive"])
    with pytest.warns(UserWarning, match="entry 1 is 'pos' for the teacher and 'positive' for the student. Do they"):
        make_learner().fit(1, cbs=kd)
    for none in (None, {"a": 1}, 5):
        dls.vocab = none
        make_learner().fit(1, cbs=kd)


# Nested inputs


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, batch):
        return self.net(batch["images"][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_in_dicts_and_lists_get_the_teachers_precision_too(dtype):
    x = TensorImage(torch.randn(4, 3, 16, 16))
    out = Teacher(OfDict().to(dtype))([{"images": [x], "name": "a"}])
    assert out.dtype == dtype
    assert type(out) is torch.Tensor


def test_a_teacher_tfm_may_return_a_dict(make_learner):
    kd = KnowledgeDistillationCallback(OfDict(), SoftTarget, teacher_tfm=lambda x: {"images": (x,)})
    make_learner().fit(1, cbs=kd)
    assert torch.tensor(kd.history["kd_loss"]).isfinite().all()
