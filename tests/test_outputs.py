"Models of several outputs: where the predictions are, and losses of one of the outputs."

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, IMAGES, Net, Several, same, state
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai_kd import *
from fasterai_kd._tensors import predictions

works = pytest.mark.works


class Heads(nn.Module):
    "Two heads, as a dict, a tuple, or what `wrap` makes of two tensors."

    def __init__(self, wrap=tuple, classes=(CLASSES, 3)):
        super().__init__()
        self.net, self.wrap = Net(), wrap
        self.net.head = nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(8, n) for n in classes])

    def forward(self, x):
        x = self.net(x)
        return self.wrap([head(x) for head in self.heads])


class Named(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor


def as_dict(outputs):
    return dict(zip(("species", "age"), outputs, strict=True))


def as_logits(outputs):
    return dict(zip(("loss", "logits"), outputs, strict=True))


def model_output(outputs):
    modeling = pytest.importorskip("transformers.modeling_outputs")
    return modeling.ImageClassifierOutput(logits=outputs[0], hidden_states=(outputs[1],))


def made(kind, *args, **kwargs):
    torch.manual_seed(5)
    return kind(*args, **kwargs).eval()


def first(output):
    "The task loss reads the first head."
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def task_loss(output, y):
    return F.cross_entropy(first(output), y)


def fit(make_learner, student, kd, **kwargs):
    torch.manual_seed(0)
    learn = make_learner(student, loss_func=task_loss, metrics=[], **kwargs)
    learn.fit(1, 0.01, cbs=kd)
    return learn


# Where the predictions are


@works("tasks", "students and teachers that return tuples, dicts or transformers' ModelOutput")
@pytest.mark.parametrize(
    "wrap", [tuple, lambda o: Named(*o), model_output], ids=["tuple", "named tuple", "ModelOutput"]
)
def test_predictions_are_found_in_what_student_and_teacher_return(make_learner, wrap):
    student, plain_student, teacher = made(Heads, wrap), made(Heads, lambda o: o[0]), made(Heads, wrap)
    kds = [KnowledgeDistillationCallback(teacher, SoftTarget) for _ in "ab"]
    fit(make_learner, student, kds[0])
    fit(make_learner, plain_student, kds[1])
    assert kds[0].history["kd_loss"] == kds[1].history["kd_loss"]
    assert same(state(student), state(plain_student))


def test_a_tensor_teacher_may_have_a_student_of_several_outputs_and_the_other_way_round(make_learner, teacher):
    for pair in ((made(Heads), teacher), (made(Net), made(Heads))):
        kd = KnowledgeDistillationCallback(pair[1], SoftTarget)
        fit(make_learner, pair[0], kd)
        assert all(k > 0 for k in kd.history["kd_loss"])


def test_a_loss_that_reads_features_alone_needs_no_predictions(make_learner):
    student, teacher = made(Heads, as_dict), made(Heads, as_dict)  # 'species' and 'age': none is the prediction
    kd = KnowledgeDistillationCallback(teacher, Attention, "net.layer2", "net.layer2")
    fit(make_learner, student, kd)
    assert len(kd.history["kd_loss"]) == 4
    with pytest.raises(TypeError, match="the student returns a dict with 2 tensors, expected one"):
        fit(make_learner, student, KnowledgeDistillationCallback(teacher, SoftTarget))


def test_a_loss_of_ones_own_gets_all_outputs(make_learner):
    def own(pred, teacher_pred, **kwargs):
        return sum(F.mse_loss(pred[k], teacher_pred[k]) for k in ("species", "age"))

    kd = KnowledgeDistillationCallback(made(Heads, as_dict), own)
    fit(make_learner, made(Heads, as_dict), kd)
    assert all(k > 0 for k in kd.history["kd_loss"])


@pytest.mark.parametrize("wrap", [tuple, model_output])
def test_distill_and_agreement_find_the_predictions_too(make_learner, wrap):
    student, teacher = made(Heads, wrap), made(Heads, wrap)
    kd = make_learner(student, loss_func=task_loss, metrics=[]).distill(teacher, 1)
    assert kd.loss is SoftTarget
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = make_learner(student, loss_func=task_loss, metrics=[kd.agreement])
    learn.fit(1, 0.01, cbs=kd)
    assert 0 <= learn.recorder.values[-1][-1] <= 1


# One of several


def test_select_is_the_loss_of_these_outputs(make_learner):
    student, teacher = made(Heads, as_dict), made(Heads, as_dict)
    with torch.no_grad():
        s, t = (made(Heads, as_dict)(IMAGES[:4])[k] for k in ("age", "age"))
    loss = select(partial(SoftTarget, T=2), "age", "age")
    assert loss({"species": None, "age": s}, {"age": t + 1.5 * torch.arange(3)}) == SoftTarget(
        s, t + 1.5 * torch.arange(3), T=2
    )
    kd = KnowledgeDistillationCallback(teacher, loss)
    fit(make_learner, student, kd)
    assert len(kd.history["kd_loss"]) == 4


@pytest.mark.parametrize("key", ["age", 1, lambda output: output["age"]], ids=["key", "index", "function"])
def test_outputs_are_picked_by_key_index_or_function(key):
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    outputs = [(None, x) if key == 1 else {"species": None, "age": x} for x in (s, t)]
    assert select(Logits, key, key)(*outputs) == Logits(s, t)


@works("losses", "`select`: one of several heads, in `combine` too")
def test_parts_of_a_combined_loss_may_each_read_another_head(make_learner):
    student, teacher = made(Heads, as_dict), made(Heads, as_dict)
    loss = combine(
        {
            "species": (select(SoftTarget, "species", "species"), 1.0),
            "age": (select(partial(SoftTarget, T=2), "age", "age"), 0.5),
            "maps": (Attention, 10.0, {"student": ["net.layer1"], "teacher": ["net.layer1"]}),
        }
    )
    kd = KnowledgeDistillationCallback(teacher, loss)
    fit(make_learner, student, kd)
    assert [k in kd.history for k in ("species", "age", "maps")] == [True] * 3
    parts = [sum(kd.history[k][i] for k in ("species", "age", "maps")) for i in range(4)]
    assert parts == pytest.approx(kd.history["kd_loss"], rel=1e-4)


def test_a_teacher_of_several_heads_teaches_a_student_of_one_by_the_selected_one(make_learner):
    teacher = made(Heads, as_dict, (7, CLASSES))
    kd = KnowledgeDistillationCallback(teacher, select(SoftTarget, teacher="age"))
    fit(make_learner, made(Net), kd)
    assert all(k > 0 for k in kd.history["kd_loss"])


def test_an_output_that_is_not_there_is_an_error_that_lists_those_that_are(make_learner):
    kd = KnowledgeDistillationCallback(made(Heads, as_dict), select(SoftTarget, "species", "sex"))
    with pytest.raises(ValueError, match=r"the teacher has no output 'sex': its outputs are \['species', 'age'\]"):
        fit(make_learner, made(Heads, as_dict), kd)
    with pytest.raises(ValueError, match="the student has no output 2: its outputs are 0 to 1"):
        select(Logits, 2)((IMAGES, IMAGES), IMAGES)


@pytest.mark.parametrize("bad", [combine((SoftTarget, 1.0)), select(SoftTarget, 1), "SoftTarget"])
def test_select_takes_one_loss(bad):
    with pytest.raises(TypeError, match="select takes one loss"):
        select(bad, 1)


def test_options_that_a_selected_loss_does_not_have_are_refused(teacher):
    with pytest.raises(TypeError, match="SoftTarget has no argument 'temperature'"):
        KnowledgeDistillationCallback(teacher, select(partial(SoftTarget, temperature=2), 1))


def test_a_selected_loss_of_labels_gets_them(make_learner):
    kd = KnowledgeDistillationCallback(made(Heads), select(DecoupledKD, 0, 0))
    same_loss = KnowledgeDistillationCallback(made(Heads), DecoupledKD)
    for callback in (kd, same_loss):
        fit(make_learner, made(Heads), callback)
    assert kd.history["kd_loss"] == same_loss.history["kd_loss"]


# A distillation token


class ClassToken(CrossEntropyLossFlat):
    "In training the model returns class and distillation token, in evaluation their mean."

    def __call__(self, output, y):
        return super().__call__(output[0] if isinstance(output, tuple) else output, y)


@works("tasks", "DeiT: the class token learns from the labels, the distillation token from the teacher")
@pytest.mark.parametrize("loss", [HardTarget, SoftTarget])
def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_the_labels(teacher, loss):
    timm = pytest.importorskip("timm")
    small = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2, "num_classes": CLASSES}
    student = timm.create_model("deit_tiny_distilled_patch16_224", **small)
    student.set_distilled_training(True)
    items = [(x, torch.tensor(i % CLASSES)) for i, x in enumerate(IMAGES)]
    dls = DataLoaders.from_dsets(items[:16], items[16:], bs=4, device=torch.device("cpu"), num_workers=0)
    learn = Learner(dls, student, loss_func=ClassToken())
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    kd = KnowledgeDistillationCallback(teacher, select(loss, student=1))
    before = state(student)
    learn.fit(1, 1e-3, cbs=kd)
    assert not any(torch.equal(before[name], state(student)[name]) for name in ("head.weight", "head_dist.weight"))

    xb, y = IMAGES[:4], torch.arange(4) % CLASSES
    student.train()
    for weight, head in ((1.0, "head_dist"), (0.0, "head")):
        student.zero_grad()
        out = student(xb)
        kd_loss = select(loss, student=1)(out, teacher(xb))
        ((1 - weight) * ClassToken()(out, y) + weight * kd_loss).backward()
        moved = {name for name in ("head", "head_dist") if getattr(student, name).weight.grad.abs().sum() > 0}
        assert moved == {head}


def test_several_outputs_of_a_student_in_training_and_one_in_validation_are_taken_as_they_are(make_learner):
    class Distilled(Several):
        def forward(self, x):
            pred = self.net(x)
            return (pred, 2 * pred) if self.training else pred

    kd = KnowledgeDistillationCallback(made(Net), select(Logits, 1))
    learn = fit(make_learner, made(Distilled), kd)
    assert len(kd.history["kd_loss"]) == 4
    assert learn.recorder.values[-1][1] > 0


def test_logits_come_before_other_outputs_of_a_dict():
    logits, other = torch.zeros(2, 3), torch.ones(2, 3)
    assert predictions({"out": other, "logits": logits}) is logits
