"The teacher answers in evaluation mode, without a graph, and is left as it was."

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGES, Net, hooks, image, same, state
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, Normalize
from fastai.learner import Learner
from fastai.vision.core import TensorImage, cifar_stats, imagenet_stats
from fastcore.foundation import L
from torch import nn

from fasterai_kd import *
from fasterai_kd._tensors import predictions
from fasterai_kd.teacher.output import TeacherOutput
from fasterai_kd.teacher.teacher import as_teacher


def test_the_teacher_answers_in_evaluation_mode_without_a_graph():
    model, x = Net().train(), torch.randn(4, 3, 16, 16)
    out = Teacher(model).forward([x]).output
    assert not out.requires_grad
    assert torch.equal(out, model.eval()(x))


def test_train_flags_weights_statistics_and_requires_grad_are_as_before_also_after_an_exception():
    model = Net().train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    before = state(model)
    Teacher(model).forward([torch.randn(4, 3, 16, 16)])
    with pytest.raises(RuntimeError):
        Teacher(model).forward([torch.randn(4, 1, 16, 16)])
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())


def test_what_the_teacher_gives_may_be_saved_for_backward():
    out = Teacher(nn.Linear(2, 2)).forward([torch.randn(3, 2)]).output
    (nn.Parameter(torch.randn(3, 2)) * out).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_in_another_precision_gets_inputs_in_it(dtype):
    model = nn.Linear(3, 2).to(dtype)
    assert Teacher(model).forward([torch.randn(4, 3)]).output.dtype == dtype


def test_integer_inputs_and_other_arguments_pass_as_they_are():
    class Tabular(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 2)

        def forward(self, cats, conts, name):
            assert name == "x"
            return self.emb(cats) + conts

    assert Teacher(Tabular()).forward([torch.tensor([1, 2]), torch.randn(2, 2), "x"]).output.shape == (2, 2)


def test_the_teacher_sees_plain_tensors():
    model = nn.Identity()
    assert type(Teacher(model).forward([TensorImage(torch.zeros(1, 2))]).output) is torch.Tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_teacher_moves_to_the_device_of_the_batch():
    assert Teacher(nn.Linear(3, 2)).forward([torch.randn(4, 3, device="cuda")]).output.is_cuda


def test_an_ensemble_gives_the_log_of_the_mean_probability():
    models, x = [Net().eval(), Net().eval(), Net().eval()], torch.randn(4, 3, 16, 16)
    mean = torch.stack([m(x).softmax(1) for m in models]).mean(0)
    out = Ensemble(models).forward([x]).pred
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
    with pytest.raises(TypeError, match=r"not an exported Learner .* create it with learn.export\(\), not"):
        as_teacher(path)


def test_members_of_an_ensemble_may_differ_in_precision():
    models, x = [Net().eval(), Net().eval().double()], torch.randn(4, 3, 16, 16)
    out = Ensemble(models).forward([x]).pred
    mean = (models[0](x).softmax(1) + models[1](x.double()).softmax(1)) / 2
    torch.testing.assert_close(out.exp().double(), mean, rtol=1e-5, atol=1e-6)


def test_an_ensemble_of_regressors_is_refused():
    with pytest.raises(ValueError, match=r"an ensemble is of classifiers \(B, C\), got \(4, 1\)"):
        Ensemble([Net(classes=1), Net(classes=1)]).forward([torch.randn(4, 3, 16, 16)])


@pytest.mark.parametrize("bad", [None, Net, [], 3, {"a": 1}], ids=repr)
def test_anything_else_is_refused(bad):
    with pytest.raises(TypeError, match="teacher must be a model"):
        as_teacher(bad)


def test_predictions_are_found_among_several_outputs():
    t, u = torch.zeros(1), torch.ones(1)
    assert predictions(t) is t
    assert predictions((t, u)) is t
    assert predictions({"out": t, "aux": u}) is t
    assert predictions({"logits": t, "hidden": u}) is t
    assert predictions({"anything": t}) is t
    with pytest.raises(TypeError, match="the teacher returns a dict with 2 tensors"):
        predictions({"a": t, "b": u})


# --- other inputs than the student's ---


@pytest.mark.parametrize("stats", [(imagenet_stats, cifar_stats), (([0.5], [0.25]), imagenet_stats)])
def test_renormalize_gives_what_the_teachers_own_normalization_would(stats):
    raw = torch.rand(4, len(stats[0][0]), 5, 6)

    def normalized(mean, std):
        return (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    tfm = pickle.loads(pickle.dumps(renormalize(*stats)))  # survives `learn.export()`
    out = tfm(normalized(*stats[0]))
    torch.testing.assert_close(out, normalized(*stats[1]), rtol=1e-4, atol=1e-5)
    assert out.shape == (4, 3, 5, 6)
    assert tfm(normalized(*stats[0]).half()).dtype == torch.float16


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


def test_what_is_no_list_of_names_is_no_vocabulary(make_learner, dls):
    teacher = make_learner(Net())
    teacher.dls = SimpleNamespace(vocab=["ape", "bee", "cat", "dog"], loaders=[1])
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    for none in (None, {"a": 1}, 5, "dog", (L("xxunk", "the"), ["dog", "cat", "bee", "ape"])):
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
    out = Teacher(OfDict().to(dtype)).forward([{"images": [x], "name": "a"}]).output
    assert out.dtype == dtype
    assert type(out) is torch.Tensor


def test_a_tfm_may_return_a_dict(make_learner):
    kd = KnowledgeDistillationCallback(Teacher(OfDict(), tfm=lambda x: {"images": (x,)}), SoftTarget)
    make_learner().fit(1, cbs=kd)
    assert torch.tensor(kd.history["kd_loss"]).isfinite().all()


# --- features ---


def test_the_features_of_a_batch_are_those_that_the_layers_return():
    model, x = Net().eval(), torch.randn(2, 3, 16, 16)
    out = Teacher(model).forward([x], ["layer1", "conv1"])
    assert torch.equal(out.features["conv1"], model.conv1(x))
    assert torch.equal(out.pred, model(x))
    assert not out.features["layer1"].requires_grad
    assert hooks(model) == 0


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compiled"])
def test_an_exception_in_the_teacher_leaves_no_hook_no_mode_and_no_stance(end, wrap):
    model = Net().train()

    def fail(*args):
        raise end

    model.head.register_forward_hook(fail)
    with pytest.raises(end):
        Teacher(wrap(model)).forward([torch.randn(2, 3, 16, 16)], ["conv1"])
    assert hooks(model) == 1
    assert all(m.training for m in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_another_kind_of_teacher_overrides_one_method(make_learner, teacher):
    class Flipped(Teacher):
        def predict(self, x):
            return (self.model(x) + self.model(x.flip(-1))) / 2

    x = torch.randn(2, 3, 16, 16)
    expected = (teacher(x) + teacher(x.flip(-1))) / 2
    torch.testing.assert_close(Flipped(teacher).forward([x]).pred, expected)
    kd = KnowledgeDistillationCallback(Flipped(teacher), SoftTarget)
    make_learner().fit(1, cbs=kd)
    assert all(x > 0 for x in kd.history["kd_loss"])


# --- options ---


def test_a_list_with_options_is_an_ensemble_of_which_each_member_may_have_its_own(teacher):
    x, other = torch.randn(2, 3, 16, 16), Net().eval()
    ensemble = Teacher([Teacher(teacher, tfm=lambda x: x * 2), other], dtype=torch.float32)
    assert type(ensemble) is Ensemble
    expected = (teacher(x * 2).softmax(1) + other(x).softmax(1)) / 2
    torch.testing.assert_close(ensemble.forward([x]).pred.exp(), expected)


@pytest.mark.parametrize("kind", ["teacher", "callback", "ensemble"])
def test_a_copy_has_options_of_its_own_and_shares_model_and_cache(teacher, kind):
    made = Teacher([teacher, Net()] if kind == "ensemble" else teacher, cache=True)
    copied = copy.deepcopy(made)
    if kind == "callback":
        copied = copy.deepcopy(KnowledgeDistillationCallback(made, SoftTarget))._distiller.teacher
    assert copied is not made
    assert copied.members[0].model is teacher
    assert copied.cache is made.cache
    copied.dtype, copied.members[0].tfm = torch.bfloat16, abs
    assert (made.dtype, made.members[0].tfm) == (None, None)


def test_options_may_be_set_later(teacher):
    mine, x = Teacher(teacher, tfm=lambda x: x * 2), IMAGES[:4]
    mine.tfm = lambda x: x * 3
    assert torch.equal(mine.forward((x,)).pred, teacher(x * 3))
    mine.tfm = None
    assert torch.equal(mine.forward((x,)).pred, teacher(x))
    with pytest.raises(TypeError, match="tfm must be a function"):
        mine.tfm = 3


def dtypes_of(model):
    "Fills up with the dtypes of what the module gives."
    dtypes = set()
    model.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    return dtypes


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_teachers_alone(make_learner, teacher, dtype, ensemble):
    student, seen = Net(), []

    def loss(pred, teacher_pred, **kwargs):
        seen.append(teacher_pred.dtype)
        return SoftTarget(pred, teacher_pred)

    of_teacher, of_student = dtypes_of(teacher.head), dtypes_of(student.head)
    source = Teacher([teacher, Net()] if ensemble else teacher, dtype=dtype)
    make_learner(student).fit(1, 0.01, cbs=KnowledgeDistillationCallback(source, loss))
    assert (of_teacher, of_student, set(seen)) == ({dtype}, {torch.float32}, {torch.float32})
    assert all(p.dtype == torch.float32 for p in teacher.parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)]
)
def test_beside_a_student_in_autocast_the_teacher_has_its_own_dtype_or_the_students(teacher, dtype, expected):
    seen, x = dtypes_of(teacher.head), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = Teacher(teacher, dtype=dtype).forward([x], ["conv1"])
    assert seen == {expected}
    assert out.features["conv1"].dtype == out.pred.dtype == torch.float32
    if dtype is torch.float32:
        assert torch.equal(out.pred, teacher(x))


@pytest.mark.parametrize("bad", [torch.float64, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(teacher, bad):
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32, .* got "):
        Teacher(teacher, dtype=bad)


# --- several outputs ---


class Tuple(Net):
    def forward(self, x):
        y = super().forward(x)
        return y, {"half": y / 2}


@pytest.mark.parametrize("layers", [[], ["conv1", "layer1"]], ids=str)
def test_a_student_with_several_outputs_gets_the_teachers_as_they_are(make_learner, layers):
    seen = []

    def loss(pred, teacher_pred, **kwargs):
        seen.append(teacher_pred)
        return pred[0].square().mean()

    kd = KnowledgeDistillationCallback(Tuple(), loss, layers, layers)
    make_learner(Tuple(), loss_func=lambda pred, y: F.cross_entropy(pred[0], y), metrics=[]).fit(1, 0.01, cbs=kd)
    assert len(seen) == 6
    for output in seen:
        assert isinstance(output, tuple)
        torch.testing.assert_close(output[0] / 2, output[1]["half"])


def test_a_student_with_one_output_gets_the_predictions_among_the_teachers():
    assert Teacher(Tuple()).forward([torch.randn(2, 3, 16, 16)]).pred.shape == (2, 4)


# --- who is who ---


def test_a_student_that_would_train_the_teachers_parameters_is_refused(make_learner, teacher):
    student = Net()
    student.layer1 = teacher.layer1
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    with pytest.raises(ValueError, match=r"share the trainable parameter 'layer1\.0\.weight': give the student a copy"):
        make_learner(student).fit(1, cbs=kd)
    teacher.layer1.requires_grad_(False)
    make_learner(student).fit(1, cbs=kd)
    assert len(kd.history["kd_loss"]) == 4


def test_a_recurrent_member_of_an_ensemble_forgets_its_state_too():
    members, events = [Net().eval(), Net().eval()], []
    members[1].reset = lambda: events.append("reset")
    teacher = Teacher([members[0], [members[1]]])
    for training in (True, False):
        teacher.begin_epoch(training)
    assert events == ["reset", "reset"]


@pytest.mark.parametrize("dim", [1, 2])
def test_classes_are_picked_where_they_are(dim):
    pred = torch.randn(2, 5, 4)
    picked = TeacherOutput(pred, {}, columns=[3, 0], class_dim=dim).pred
    assert torch.equal(picked, pred[:, [3, 0]] if dim == 1 else pred[..., [3, 0]])


def test_an_ensemble_in_an_ensemble_has_all_members_and_ends_the_fit_of_each(monkeypatch):
    ended = []
    monkeypatch.setattr(Teacher, "end_fit", lambda self: ended.append(self))
    ensemble = Teacher([[Net(), Net()], Net()])
    assert [type(member) for member in ensemble.members] == [Teacher] * 3
    ensemble.end_fit()
    assert {id(member) for member in ensemble.members} < {id(t) for t in ended}
