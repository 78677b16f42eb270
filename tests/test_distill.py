"`learn.distill`: what it chooses, that it says so, and that it is nothing but the callback and fit_one_cycle."

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, IMAGES, First, Net, Several, hooks, same, state
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import params
from torch import nn
from torchvision import models

from fasterai_kd import *
from fasterai_kd.losses._traits import name_of
from fasterai_kd.schedule import cos


def quiet(learn):
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


def dls_with(targets):
    items = list(zip(IMAGES, targets, strict=True))
    return DataLoaders.from_dsets(
        items[:16], items[16:], bs=4, shuffle=False, device=torch.device("cpu"), num_workers=0
    )


class Dense(nn.Module):
    "Logits for each pixel."

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())


One = partial(Net, classes=1)
classes = torch.arange(24) % CLASSES
pixels = (torch.arange(24 * 16 * 16) % CLASSES).view(24, 16, 16)
several = torch.nn.functional.one_hot(classes, CLASSES).float()
numbers = torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("net", "targets", "loss_func", "expected", "why"),
    [
        (Net, classes, CrossEntropyLossFlat(), SoftTarget, "both predict the same 4 classes"),
        (Dense, pixels, CrossEntropyLossFlat(axis=1), SoftTarget, "both predict the same 4 classes"),
        (Net, several, BCEWithLogitsLossFlat(), MultiLabel, "both predict the same independent classes, (4, 4)"),
        (Net, several, F.binary_cross_entropy_with_logits, MultiLabel, "both predict the same independent classes"),
        (One, several[:, :1], BCEWithLogitsLossFlat(), MultiLabel, "both predict the same independent classes, (4, 1)"),
        (Net, numbers, MSELossFlat(), Logits, "both predict the same numbers, (4, 4)"),
        (One, numbers[:, :1], MSELossFlat(), Logits, "both predict the same numbers, (4, 1)"),
    ],
    ids=["classes", "segmentation", "several labels", "function", "single logit", "regression", "one number"],
)
def test_the_loss_is_picked_by_what_both_predict_and_it_says_why(capsys, net, targets, loss_func, expected, why):
    learn = quiet(Learner(dls_with(targets), net(), loss_func=loss_func))
    kd = learn.distill(net(), 1, 1e-3)
    assert kd.loss is expected
    assert f"distill with {expected.__name__}, since {why}" in capsys.readouterr().out
    assert len(kd.history["kd_loss"]) == 4


def test_where_only_features_can_be_compared_it_pairs_the_layers(capsys, make_learner):
    learn = make_learner(Net())
    kd = learn.distill(Net(classes=7), 1, 1e-3)
    assert kd.loss is Attention
    assert kd.activations_student == ["conv1", "layer1", "layer2"]
    out = capsys.readouterr().out
    assert "since their predictions differ, (4, 4) and (4, 7)" in out
    assert "layer1       <-> layer1" in out


def test_where_nothing_can_be_compared_it_says_so(make_learner):
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    with pytest.raises(ValueError, match=r"are \(4, 4\) and \(4, 7\), and no resolution is shared"):
        make_learner(Net()).distill(other, 1)


def test_it_is_the_callback_with_balanced_weight_in_fit_one_cycle(make_learner, teacher):
    a, b = make_learner(Net()), make_learner(Net())
    b.model.load_state_dict(a.model.state_dict())
    torch.manual_seed(0)
    a.distill(teacher, 2, 1e-2)
    torch.manual_seed(0)
    b.fit_one_cycle(2, 1e-2, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto"))
    assert same(state(a.model), state(b.model))


def test_callbacks_and_arguments_of_fit_one_cycle_are_handed_on(make_learner, teacher):
    seen = []
    learn = make_learner(Net())
    learn.distill(teacher, 1, cbs=Callback(after_batch=lambda self: seen.append(1)), pct_start=0.5)
    assert seen
    assert learn.recorder.hps["lr"]


def test_options_of_the_callback_are_handed_on_and_unknown_ones_refused_before_anything_is_printed(
    make_learner, teacher, capsys
):
    learn = make_learner(Net())
    kd = learn.distill(teacher, 1, weight=0.3, schedule=cos, distill_valid=False, wd=0.1)
    assert (kd.weight, kd.schedule, kd.distill_valid) == (0.3, cos, False)
    capsys.readouterr()
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieght'"):
        learn.distill(teacher, 1, wieght=0.3)
    with pytest.raises(ValueError, match="weight must be between 0 and 1, got 3"):
        learn.distill(teacher, 1, weight=3)
    assert capsys.readouterr().out == ""


def test_a_loss_of_ones_choice_gets_the_layers_that_it_needs(make_learner, teacher, capsys):
    kd = make_learner(Net()).distill(teacher, 1, loss=FitNet)
    assert kd.activations_teacher == ["conv1", "layer1", "layer2"]
    kd = make_learner(Net()).distill(teacher, 1, loss=partial(SoftTarget, T=2), weight=0.5)
    assert kd.activations_student is None
    assert capsys.readouterr().out.splitlines()[-1] == "distill with SoftTarget"


def test_with_freeze_epochs_it_is_fine_tune(make_learner, teacher):
    def learner():
        torch.manual_seed(5)
        return make_learner(Net(), splitter=lambda m: [params(m.conv1), params(m.layer1), params(m.head)])

    a, b, kw = learner(), learner(), {"weight": 0.5}
    torch.manual_seed(0)
    a.distill(teacher, 2, 1e-2, freeze_epochs=1, **kw)
    torch.manual_seed(0)
    b.fine_tune(2, 1e-2, 1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, **kw))
    assert same(state(a.model), state(b.model))


def test_the_table_shows_task_and_distillation_loss_and_the_learner_keeps_its_metrics(make_learner, teacher):
    learn = make_learner(Net())
    before = list(learn.metrics)
    learn.distill(teacher, 1)
    assert learn.recorder.metric_names[3:-1] == ["accuracy", "task_loss", "kd_loss"]
    assert list(learn.metrics) == before


def test_unlabeled_images_are_handed_on(make_learner, teacher):
    learn, seen = make_learner(Net()), []
    teacher.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    loader = DataLoader([(x,) for x in IMAGES[:8]], bs=4, device=torch.device("cpu"))
    learn.distill(teacher, 1, unlabeled=loader)
    assert seen[1:5] == [8] * 4


def test_without_labels_the_teacher_alone_trains(teacher, capsys):
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=4) for _ in range(2)]
    learn = quiet(Learner(DataLoaders(*loaders), Net(), loss_func=CrossEntropyLossFlat()))
    kd = learn.distill(teacher, 1)
    assert (kd.loss, kd.weight) == (SoftTarget, 1.0)
    assert set(kd.history["task_loss"]) == {0.0}


def test_a_learner_that_distills_already_is_refused(make_learner, teacher):
    learn = make_learner(Net(), cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    with pytest.raises(ValueError, match="has a KnowledgeDistillationCallback already, and their losses would"):
        learn.distill(teacher, 1)


@pytest.mark.parametrize("kind", ["Learner", "list"])
def test_the_teacher_may_be_anything_that_the_callback_takes(make_learner, teacher, kind):
    kd = make_learner(Net()).distill(make_learner(teacher) if kind == "Learner" else [teacher, Net()], 1)
    assert kd.loss is SoftTarget


def test_choosing_leaves_student_and_teacher_as_they_were(make_learner, teacher):
    learn = make_learner(Net())
    before, teacher_before = state(learn.model), state(teacher)
    teacher.train()
    learn.distill(teacher, 1, lr=0.0, wd=0.0)
    assert same(teacher_before, state(teacher))
    assert teacher.training
    assert hooks(teacher) == hooks(learn.model) == 0
    assert torch.equal(before["conv1.weight"], learn.model.conv1.weight)


def test_predictions_are_the_first_of_several_outputs_as_of_text_models(make_learner, capsys):
    make_learner(Several(), cbs=First()).distill(Several(), 1)
    assert "distill with SoftTarget, since both predict the same 4 classes" in capsys.readouterr().out


def test_no_loss_is_picked_for_an_average_that_has_yet_to_be_made(make_learner):
    with pytest.raises(TypeError, match="distill cannot pick a loss for an EMATeacher"):
        make_learner().distill(EMATeacher(), 1)


@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
def test_an_average_of_the_student_teaches_by_a_loss_that_is_given(make_learner, loss):
    kd = make_learner().distill(EMATeacher(), 1, loss=loss, weight=0.5)
    assert len(kd.history["kd_loss"]) == 4


@pytest.mark.works("tasks", "torch's own DataLoaders in fastai's DataLoaders")
def test_loaders_of_torch_do_as_well(teacher, capsys):
    items = list(zip(IMAGES, classes, strict=True))
    loaders = [torch.utils.data.DataLoader(items[part], batch_size=4) for part in (slice(16), slice(16, 24))]
    ours = DataLoaders.from_dsets(items[:16], items[16:], bs=4, shuffle=False, device="cpu", num_workers=0)
    found = []
    for dls in (DataLoaders(*loaders), ours):
        torch.manual_seed(0)
        learn = quiet(Learner(dls, Net(), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
        learn.distill(teacher, 1)
        found.append(state(learn.model))
    assert same(*found)
    assert "distill with SoftTarget" in capsys.readouterr().out


# Encoders without a head


def encoder(width=6):
    net = Net(width)
    net.head = nn.Identity()
    return net


def test_an_encoder_without_a_head_teaches_by_its_embeddings(make_learner, capsys):
    kd = make_learner(Net()).distill(encoder(), 1, 1e-3)
    assert kd.loss is Cosine
    assert (kd.activations_student, kd.activations_teacher) == (["layer2"], ["output"])
    assert [m[0].weight.shape for m in kd.adapters.values()] == [(12, 8)]
    out = capsys.readouterr().out
    assert (
        "distill with Cosine, since the teacher is an encoder, whose embeddings (4, 12) the student is to give" in out
    )


def test_a_student_without_a_head_learns_the_embeddings_by_its_own(make_learner):
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=4) for _ in range(2)]
    learn = quiet(Learner(DataLoaders(*loaders), encoder(), loss_func=CrossEntropyLossFlat()))
    kd = learn.distill(encoder(), 2, 1e-2)
    assert (kd.loss, kd.activations_student, kd.weight) == (Cosine, ["output"], 1.0)
    assert sum(kd.history["kd_loss"][-4:]) < sum(kd.history["kd_loss"][:4])


@pytest.mark.parametrize("kind", ["method", "dict"])
def test_methods_and_dicts_of_embeddings_are_encoders_too(make_learner, kind):
    class Clip(Net):
        def encode_image(self, x):
            return self(x)

        def forward(self, x):
            return super().forward(x) if kind == "method" else {"pooler_output": super().forward(x)}

    net = Clip(classes=7)
    assert make_learner(Net()).distill(net.encode_image if kind == "method" else net, 1).loss is Cosine


def test_classifiers_of_other_classes_are_no_encoders(make_learner):
    timm = pytest.importorskip("timm")
    small = {"img_size": 16, "patch_size": 4, "depth": 4, "embed_dim": 12, "num_heads": 2}
    vit, distilled = (f"{name}_patch16_224" for name in ("vit_tiny", "deit_tiny_distilled"))
    for name, classes, loss in (
        (vit, 7, Attention),
        (distilled, 7, Attention),
        (vit, 0, Cosine),
        (vit, CLASSES, SoftTarget),
    ):
        net = timm.create_model(name, num_classes=classes, **small)
        net.pretrained_cfg = {}  # which says how its published weights were trained
        kd = make_learner(Net()).distill(net, 1)
        assert kd.loss is loss


class ConvHead(Net):
    "As SqueezeNet: the logits are the average of a map."

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.conv1(x)))).mean((2, 3))


def saying(net, num_classes):
    net.num_classes = num_classes
    return net


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: saying(ConvHead(7), 7), Attention),
        (lambda: saying(Net(classes=7), 0), Cosine),
        (lambda: saying(encoder(), 1000), Cosine),
        (lambda: nn.Sequential(Net(classes=7), nn.BatchNorm1d(7)), Attention),
        (lambda: of_classes(ConvHead(7), "abcdefg"), Attention),
    ],
    ids=["head of a convolution", "attention pooling", "head taken off", "norm behind the head", "Learner"],
)
def test_a_model_or_its_data_tell_whether_it_is_an_encoder(make_learner, make, loss):
    assert make_learner(Net()).distill(make(), 1).loss is loss


def swin():
    return models.SwinTransformer([4, 4], 8, [1, 1, 1], [2, 2, 2], [2, 2], num_classes=CLASSES)


def test_the_logits_of_a_convolution_are_not_the_students_embedding(make_learner):
    kd = make_learner(saying(ConvHead(CLASSES), CLASSES)).distill(encoder(), 1)
    assert kd.activations_student == ["layer2"]


@pytest.mark.parametrize(
    ("make", "layer"), [(partial(models.resnet18, num_classes=CLASSES), "layer4"), (swin, "features.5")]
)
def test_the_last_stage_learns_the_embedding_although_it_has_one_pixel(make_learner, make, layer):
    student = make()
    before = state(student)
    kd = make_learner(student).distill(encoder(), 1, 1e-2, weight=1.0)
    assert kd.activations_student == [layer]
    learned = [name for name, x in student.named_parameters() if not torch.equal(x, before[name])]
    assert any(name.startswith(layer) and name.endswith("weight") for name in learned)


def test_a_student_of_vectors_must_be_told_which_layer_learns_the_embedding(make_learner):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    with pytest.raises(ValueError, match=r"the student, a Sequential, has no feature map .* activations_student="):
        make_learner(mlp).distill(encoder(), 1)
    layers = {"activations_student": "2", "activations_teacher": "output"}
    kd = make_learner(mlp).distill(encoder(), 1, loss=Cosine, adapter="auto", **layers)
    assert all(0 < k < 2 for k in kd.history["kd_loss"])


# Ensembles, and Learners of other classes


def of_classes(net, names):
    dls = dls_with(classes)
    dls.vocab = list(names)
    return quiet(Learner(dls, net, loss_func=CrossEntropyLossFlat()))


@pytest.mark.parametrize("names", ["xdycba", "dcba"], ids=["more", "another order"])
@pytest.mark.parametrize("freeze_epochs", [None, 1])
def test_a_teacher_of_more_classes_teaches_those_of_the_student_and_says_so_once(capsys, names, freeze_epochs):
    teacher, student = of_classes(Net(classes=len(names)), names), of_classes(Net(), "abcd")
    kd = student.distill(teacher, 1, freeze_epochs=freeze_epochs)
    assert kd.loss is SoftTarget
    assert capsys.readouterr().out.count("are picked by the names of the classes: columns ") == 1


def test_a_teacher_of_other_classes_is_compared_by_its_features(capsys):
    kd = of_classes(Net(), "abcd").distill(of_classes(Net(classes=6), "uvwxyz"), 1)
    assert kd.loss is Attention
    assert "are picked" not in capsys.readouterr().out


def test_a_warning_of_the_teachers_data_comes_once(make_learner, recwarn):
    teacher = Net()
    teacher.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        make_learner(Net()).distill(teacher, 1)
    assert sum("pretrained_cfg says" in str(w.message) for w in recwarn) == 1


@pytest.mark.parametrize("loss", [None, FitNet])
def test_features_of_an_ensemble_are_an_error_that_says_what_to_give(make_learner, loss):
    with pytest.raises(ValueError, match=r"an ensemble has no common layers .*: give one teacher, or a loss"):
        make_learner(Net()).distill([Net(classes=7), Net(classes=7)], 1, loss=loss)


def test_a_list_of_one_teacher_is_that_teacher(make_learner):
    kd = make_learner(Net()).distill([encoder()], 1)
    assert (kd.loss, kd.activations_teacher) == (Cosine, ["output"])


# Numbers and independent classes


def test_without_labels_a_regression_stays_one(capsys):
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=4) for _ in range(2)]
    learn = quiet(Learner(DataLoaders(*loaders), Net(), loss_func=MSELossFlat()))
    assert learn.distill(Net(), 1).loss is Logits


@pytest.mark.parametrize(
    "loss", [SoftTarget, DIST, Mutual, HardTarget, combine((SoftTarget, 1.0), (Logits, 1.0))], ids=name_of
)
def test_softmax_losses_warn_where_classes_are_independent_and_name_the_loss_for_them(loss):
    learn = quiet(Learner(dls_with(several), Net(), loss_func=BCEWithLogitsLossFlat()))
    with pytest.warns(UserWarning, match=r"BCEWithLogitsLoss is of independent classes.* use MultiLabel"):
        learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(Net(), loss))


@pytest.mark.parametrize("loss", [MultiLabel, Logits])
def test_losses_for_independent_classes_do_not_warn(loss):
    learn = quiet(Learner(dls_with(several), Net(), loss_func=BCEWithLogitsLossFlat()))
    learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(Net(), loss))


def test_multi_label_sees_a_constant_added_to_all_logits_which_soft_target_ignores():
    s = torch.randn(4, 3)
    assert SoftTarget(s, s + 2).item() == pytest.approx(0, abs=1e-6)
    assert MultiLabel(s, s + 2) > 0.1


# Labels that do not count


@pytest.mark.parametrize("loss", [SoftTarget, DIST])
def test_void_pixels_are_left_out_of_a_training(loss):
    y = pixels.clone()
    y[:, :8] = 255
    found = []
    for how in ("ignored", "cut"):
        torch.manual_seed(4)
        student, teacher = Dense(), Dense()
        targets = CrossEntropyLossFlat(axis=1, ignore_index=255)
        learn = quiet(Learner(dls_with(y), student, loss_func=targets))
        chosen = partial(loss, ignore_index=255) if how == "ignored" else lower_half(loss)
        kd = KnowledgeDistillationCallback(teacher, chosen)
        learn.fit(1, 0.01, cbs=kd)
        found.append(kd.history["kd_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def lower_half(loss):
    def own(pred, teacher_pred, **kwargs):
        return loss(pred[:, :, 8:], teacher_pred[:, :, 8:])

    return own


def test_unlabeled_images_count_beside_ignored_labels():
    y = classes.clone()
    y[::2] = 255
    found = []
    for loss in (partial(SoftTarget, ignore_index=255), SoftTarget):
        torch.manual_seed(4)
        learn = quiet(Learner(dls_with(y), Net(), loss_func=CrossEntropyLossFlat(ignore_index=255)))
        loader = DataLoader([(x,) for x in IMAGES[:8]], bs=4, device=torch.device("cpu"))
        kd = KnowledgeDistillationCallback(Net(), loss, unlabeled=loader)
        learn.fit(1, 0.01, cbs=kd)
        found.append(kd.history["kd_loss"][0])
    assert found[0] > 0
    assert found[0] != found[1]


@pytest.mark.parametrize("head", [True, False])
def test_a_teacher_that_needs_other_inputs_is_looked_at_with_its_own(make_learner, head):
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 12, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7 if head else 0, **small)
    vit.pretrained_cfg = {}
    teacher = Teacher(vit, tfm=lambda x: F.interpolate(x, size=32))
    kd = make_learner(Net()).distill(teacher, 1)
    assert kd.loss is (Attention if head else Cosine)
