"`learn.distill`: what it chooses, that it says so, and that it is nothing but the callback and fit_one_cycle."

from functools import partial

import pytest
import torch
from conftest import CLASSES, IMAGES, First, Net, Several, hooks, same, state
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import params
from torch import nn

from fasterai_kd import Attention, EMATeacher, FitNet, KnowledgeDistillationCallback, Logits, SoftTarget
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


classes = torch.arange(24) % CLASSES
pixels = (torch.arange(24 * 16 * 16) % CLASSES).view(24, 16, 16)
several = torch.nn.functional.one_hot(classes, CLASSES).float()
numbers = torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("net", "targets", "loss_func", "expected", "why"),
    [
        (Net, classes, CrossEntropyLossFlat(), SoftTarget, "both predict the same 4 classes"),
        (Dense, pixels, CrossEntropyLossFlat(axis=1), SoftTarget, "both predict the same 4 classes"),
        (Net, several, BCEWithLogitsLossFlat(), Logits, "both predict the same numbers, (4, 4)"),
        (Net, numbers, MSELossFlat(), Logits, "both predict the same numbers, (4, 4)"),
    ],
    ids=["classes", "segmentation", "several labels", "regression"],
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


def test_an_average_that_has_yet_to_be_made_is_refused(make_learner):
    with pytest.raises(TypeError, match="an average of the student has yet to be made"):
        make_learner().distill(EMATeacher(), 1)


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
