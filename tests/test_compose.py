"Distillation composes with the rest of fastai: each test marked `works` is a row of nbs/what_works.md."

import contextlib
import copy
import gc
import random
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import CLASSES, PAIRS, SIZE, Net, hooks, image, label, same, state
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import Datasets
from fastai.interpret import Interpretation
from fastai.learner import Learner
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.metrics import accuracy_multi, mse
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn

from fasterai_kd import *

works = pytest.mark.works


def attention(teacher, **kwargs):
    return KnowledgeDistillationCallback(teacher, Attention, *PAIRS, **kwargs)


def finite(kd):
    "Did every step distil?"
    losses = kd.history["kd_loss"]
    return len(losses) > 0 and all(0 < x < 1e6 for x in losses)


# --- training features ---

CALLBACKS = {
    "GradientClip": lambda: GradientClip(0.1),
    "GradientAccumulation": lambda: GradientAccumulation(8),
    "MixUp": MixUp,
    "CutMix": CutMix,
    "BnFreeze": BnFreeze,
    "ShortEpochCallback": lambda: ShortEpochCallback(0.5),
    "EarlyStoppingCallback": lambda: EarlyStoppingCallback(patience=1),
    "SaveModelCallback": SaveModelCallback,
    "ReduceLROnPlateau": lambda: ReduceLROnPlateau(patience=0),
    "TerminateOnNaNCallback": TerminateOnNaNCallback,
    "CSVLogger": CSVLogger,
    "ParamScheduler": lambda: ParamScheduler({"lr": SchedLin(0.01, 0.001)}),
    "ChannelsLast": ChannelsLast,
}
CB_ROWS = [pytest.param(cb, id=name, marks=works("training features", name)) for name, cb in CALLBACKS.items()]


@pytest.mark.parametrize("loss", [DecoupledKD, Attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cb", CB_ROWS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # SaveModelCallback loads weights
def test_fastais_callbacks_work_beside_it(make_learner, teacher, cb, loss):
    kd = attention(teacher) if loss is Attention else KnowledgeDistillationCallback(teacher, loss)
    learn = make_learner()
    learn.fit(2, 0.01, cbs=[kd, cb()])
    assert finite(kd)
    assert hooks(learn.model) == hooks(teacher) == 0


@works("training features", "GradientClip clips the blended gradient")
def test_gradient_clip_clips_the_blended_gradient(make_learner, teacher):
    norms = []
    watch = Callback(before_step=lambda self: norms.append(_grad_norm(self.model)))
    watch.order = GradientClip.order + 1
    make_learner().fit(1, 0.01, cbs=[attention(teacher, weight=1e4, task_weight=1), GradientClip(0.1), watch])
    assert norms == pytest.approx([0.1] * 4, rel=1e-3)


def _grad_norm(model):
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


LOSS_FUNCS = {
    "LabelSmoothingCrossEntropy": LabelSmoothingCrossEntropy,
    "LabelSmoothingCrossEntropyFlat": LabelSmoothingCrossEntropyFlat,
    "FocalLossFlat": FocalLossFlat,
}


@pytest.mark.parametrize(
    "loss_func", [pytest.param(f, id=n, marks=works("training features", n)) for n, f in LOSS_FUNCS.items()]
)
def test_other_task_losses_are_blended_as_they_are(make_learner, teacher, loss_func):
    seen, task = [], loss_func()

    def check(self):
        expected = torch.lerp(task(self.pred, self.y), SoftTarget(self.pred, teacher(self.x)), 0.5)
        torch.testing.assert_close(self.learn.loss, expected)
        seen.append(1)

    watch = Callback(after_loss=check)
    watch.order = 1
    make_learner(loss_func=loss_func()).fit(1, 0.01, cbs=[KnowledgeDistillationCallback(teacher, SoftTarget), watch])
    assert len(seen) == 6


@works("training features", "early stopping, best model and plateaus by kd_loss or valid_loss")
@pytest.mark.parametrize("monitor", ["kd_loss", "task_loss", "valid_loss"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trackers_may_monitor_the_parts_of_the_loss(make_learner, teacher, monitor):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = make_learner(metrics=kd.metrics)
    saver = SaveModelCallback(monitor=monitor)
    learn.fit(2, 0.01, cbs=[kd, saver, EarlyStoppingCallback(monitor=monitor)])
    assert saver.best in [row[list(learn.recorder.metric_names).index(monitor) - 1] for row in learn.recorder.values]


@works("training features", "freeze, unfreeze, discriminative learning rates")
def test_frozen_layers_stay_and_learning_rates_may_differ_by_layer(make_learner, teacher):
    learn = make_learner(
        splitter=lambda m: [list(m.conv1.parameters()), [*m.layer2.parameters(), *m.head.parameters()]]
    )
    before = state(learn.model)
    learn.freeze()
    learn.fit(1, 0.1, cbs=attention(teacher, weight=1))
    after = state(learn.model)
    assert torch.equal(after["conv1.weight"], before["conv1.weight"])
    assert not torch.equal(after["layer2.0.weight"], before["layer2.0.weight"])
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3, 1e-1), cbs=attention(teacher))
    assert not torch.equal(state(learn.model)["conv1.weight"], before["conv1.weight"])


class Checkpointed(Net):
    "Trades memory for time."

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        def stage(x):
            return self.layer1(self.relu(self.bn1(self.conv1(x))))

        x = torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=self.reentrant)
        return self.head(self.layer2(x).mean((2, 3)))


@works("training features", "torch.utils.checkpoint, not reentrant")
def test_checkpointed_layers_learn_as_plain_ones(make_learner, teacher):
    start, states = state(Net()), []
    for student in (Net(), Checkpointed(reentrant=False)):
        student.load_state_dict(start)
        learn = make_learner(student, opt_func=SGD)
        set_seed(0)
        learn.fit(1, 0.1, cbs=KnowledgeDistillationCallback(teacher, FitNet, "layer1", "layer1"))
        states.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


@works("faults", "compared layers that cannot learn, frozen or in a reentrant checkpoint: a warning")
@pytest.mark.parametrize("why", ["frozen", "checkpoint"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_cannot_learn_are_pointed_out(make_learner, teacher, why):
    student = Checkpointed(reentrant=True) if why == "checkpoint" else Net()
    if why == "frozen":
        for m in (student.conv1, student.bn1, student.layer1):
            m.requires_grad_(False)
    kd = KnowledgeDistillationCallback(teacher, FitNet, ["conv1", "layer1"], ["conv1", "layer1"])
    with pytest.warns(UserWarning, match="layers conv1, layer1 cannot learn from the teacher: they are frozen"):
        make_learner(student).fit(1, 0.01, cbs=kd)


@works("training features", "resuming with start_epoch")
def test_start_epoch_resumes_the_schedule_too(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=lambda pct: pct)
    make_learner().fit(3, 0.01, cbs=kd, start_epoch=2)
    assert kd.history["weight"] == pytest.approx([0.5 * (8 + i) / 12 for i in range(4)])


@works("training features", "autocast in bfloat16 and float16 on CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [SoftTarget, Similarity], ids=lambda f: f.__name__)
def test_autocast_around_student_and_teacher(make_learner, teacher, dtype, loss):
    kd = KnowledgeDistillationCallback(teacher, loss, *(PAIRS if loss is Similarity else ()))
    learn = make_learner()
    with torch.autocast("cpu", dtype=dtype):
        learn.fit(1, 0.01, cbs=kd)
    assert finite(kd)


@works("training features", "to_fp16, to_bf16 (CUDA)")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("how", ["to_fp16", "to_bf16"])
@pytest.mark.parametrize("loss", [SoftTarget, Similarity], ids=lambda f: f.__name__)
def test_mixed_precision_on_a_gpu(make_learner, teacher, how, loss):
    kd = KnowledgeDistillationCallback(teacher, loss, *(PAIRS if loss is Similarity else ()))
    learn = make_learner()
    learn.dls.to(torch.device("cuda"))
    getattr(learn, how)().fit(1, 0.01, cbs=kd)
    assert finite(kd)


class WeightEMA(Callback):
    "An exponential moving average of the student's weights."

    def before_fit(self):
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, avg_fn=lambda old, new, n: old.lerp(new, 0.1))

    def after_step(self):
        self.ema.update_parameters(self.model)


@works("training features", "EMA of the student's weights")
def test_an_ema_of_the_student_carries_no_hooks(make_learner, teacher):
    ema = WeightEMA()
    make_learner().fit(1, 0.01, cbs=[attention(teacher), ema])
    assert hooks(ema.ema) == 0


@works("training features", "ShowGraphCallback")
def test_show_graph_draws_the_blended_losses(make_learner, teacher, dls):
    kd = attention(teacher)
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    learn.fit(1, 0.01, cbs=[kd, ShowGraphCallback()])
    assert finite(kd)


@works("training features", "several distillation callbacks at once")
def test_two_teachers_with_two_callbacks(make_learner, teacher):
    a, b = KnowledgeDistillationCallback(teacher, SoftTarget), attention(Net().eval(), weight=0.2)
    learn = make_learner()
    learn.fit(1, 0.01, cbs=[a, b])
    assert finite(a)
    assert finite(b)
    assert hooks(learn.model) == 0


# --- other calls ---


@works("other calls", "validate, get_preds, predict, tta, summary, Interpretation, save and load")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_other_calls_of_a_learner_that_holds_the_callback(make_learner, teacher, dls):
    kd = attention(teacher)
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.01)
    valid = learn.validate()
    learn.save("s")
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    preds, targets = learn.get_preds()
    learn.predict(0)
    learn.tta(n=1)
    learn.summary()
    interp = Interpretation.from_learner(learn)
    assert len(interp.top_losses(3)[0]) == 3
    assert calls == []
    handle.remove()
    learn.fit(1, 0.1)
    learn.load("s")
    assert list(learn.validate()) == pytest.approx(list(valid))
    assert torch.equal(learn.get_preds()[0], preds)
    assert len(targets) == 8
    assert hooks(learn.model) == 0


@works("other calls", "show_results, on pictures with labels")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of fastai tensors in matplotlib
def test_show_results(tmp_path):
    from fastai.vision.data import ImageDataLoaders
    from pets import make_pets

    folder = make_pets(tmp_path, 16, 32)
    files = sorted(folder.glob("*.jpg"))
    dls = ImageDataLoaders.from_name_func(folder, files, str.isupper, bs=4, num_workers=0, device=torch.device("cpu"))
    kd = attention(Net(classes=2))
    learn = Learner(dls, Net(classes=2), cbs=kd)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
        learn.show_results(max_n=2)
    assert finite(kd)
    assert len(plt.gcf().axes) == 2


@works("other calls", "Interpretation: top losses are those of the task")
def test_interpretation_shows_the_task_loss_of_each_sample(make_learner, teacher, dls):
    learn = make_learner(cbs=attention(teacher))
    losses, _ = Interpretation.from_learner(learn).top_losses()
    preds = torch.cat([learn.model.eval()(x) for x, _ in dls.valid])
    expected = F.cross_entropy(preds, torch.arange(16, 24) % CLASSES, reduction="none")
    torch.testing.assert_close(losses, expected.sort(descending=True)[0].detach())


@works("other calls", "torch.save and load of the weights, deepcopy of the student")
def test_the_trained_student_is_a_plain_model(make_learner, teacher):
    learn = make_learner()
    learn.fit(1, 0.01, cbs=attention(teacher))
    other = Net()
    other.load_state_dict(learn.model.state_dict())
    assert same(state(other), state(copy.deepcopy(learn.model)))


# --- tasks ---


def learner_of(dsets, model, loss_func, metrics=None, **kwargs):
    dls = dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"), **kwargs)
    learn = Learner(dls, model, loss_func=loss_func, metrics=metrics)
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


def datasets(target):
    return Datasets(list(range(24)), [[image], [target]], splits=[range(16), range(16, 24)])


@works("tasks", "multi-label classification")
@pytest.mark.parametrize("loss", [Logits, Attention], ids=lambda f: f.__name__)
def test_multi_label(teacher, loss):
    kd = KnowledgeDistillationCallback(teacher, loss, *(PAIRS if loss is Attention else ()))
    targets = datasets(lambda i: F.one_hot(torch.tensor([i % 4, i // 6]), CLASSES).amax(0).float())
    learner_of(targets, Net(), BCEWithLogitsLossFlat(), accuracy_multi).fit(1, 0.01, cbs=[kd, MixUp()])
    assert finite(kd)


@works("tasks", "regression")
@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_regression_with_logits(shape):
    kd = KnowledgeDistillationCallback(Net(8, classes=shape[0]), Logits)
    learner_of(datasets(lambda i: torch.full(shape, i / 24)), Net(classes=shape[0]), MSELossFlat(), mse).fit(1, cbs=kd)
    assert finite(kd)


@works("tasks", "regression")
def test_regression_with_a_softmax_loss_is_refused():
    kd = KnowledgeDistillationCallback(Net(classes=1), SoftTarget)
    with pytest.raises(ValueError, match="for regression use Logits, for a single logit MultiLabel"):
        learner_of(datasets(lambda i: torch.ones(1)), Net(classes=1), MSELossFlat()).fit(1, cbs=kd)


@works("tasks", "segmentation: unet_learner, dense logits and features")
@pytest.mark.parametrize("loss", [SoftTarget, DecoupledKD, Attention], ids=lambda f: f.__name__)
def test_segmentation(loss):
    from fastai.vision.learner import create_unet_model
    from torchvision.models import resnet18

    def unet():
        return create_unet_model(resnet18, CLASSES, (32, 32), pretrained=False)

    student, teacher, x = unet(), unet(), torch.randn(4, 3, 32, 32)
    layers = ()
    if loss is Attention:
        pairs = match_feature_layers(student, teacher, x)
        layers = pairs["student"], pairs["teacher"]
    kd = KnowledgeDistillationCallback(teacher, loss, *layers)
    images, masks = torch.randn(8, 3, 32, 32), torch.randint(CLASSES, (8, 32, 32))
    tfms = [[lambda i: images[i].clone()], [lambda i: masks[i].clone()]]
    dsets = Datasets(list(range(8)), tfms, splits=[range(4), range(4, 8)])
    learner_of(dsets, student, CrossEntropyLossFlat(axis=1)).fit(1, 0.001, cbs=kd)
    assert finite(kd)
    assert hooks(student) == hooks(teacher)


@works("tasks", "tabular: TabularDataLoaders, xb = (cats, conts)")
@pytest.mark.parametrize("loss", [SoftTarget, Similarity], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # of fastai's data
def test_tabular(loss):
    import pandas as pd
    from fastai.tabular.core import Categorify, FillMissing, Normalize
    from fastai.tabular.data import TabularDataLoaders
    from fastai.tabular.learner import tabular_learner

    procs = [Categorify, FillMissing, Normalize]
    df = pd.DataFrame({"a": list("xyz") * 8, "b": torch.randn(24).numpy(), "y": list("pq") * 12})
    dls = TabularDataLoaders.from_df(
        df, y_names="y", cat_names=["a"], cont_names=["b"], bs=4, device="cpu", procs=procs
    )
    teacher, student = tabular_learner(dls, [16, 8]), tabular_learner(dls, [8])
    kd = KnowledgeDistillationCallback(teacher, loss, *(("layers.0", "layers.0") if loss is Similarity else ()))
    with student.no_bar(), student.no_logging():
        student.fit(1, 0.01, cbs=kd)
    assert finite(kd)


@works("tasks", "text classifier: tuple outputs, features of any rank with Similarity")
@pytest.mark.parametrize("loss", [SoftTarget, Similarity], ids=lambda f: f.__name__)
def test_text(loss):
    import fastai.text.all as text
    from fastai.text.learner import text_classifier_learner
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config

    dls = text.TextDataLoaders.from_df(
        text.pd.DataFrame({"text": ["good film", "bad film", "a good one", "a bad one"] * 4, "label": list("pn") * 8}),
        text_col="text", label_col="label", bs=4, seq_len=4, num_workers=0, device="cpu",
    )  # fmt: skip

    def learner(n_hid):
        config = {**awd_lstm_clas_config, "emb_sz": 8, "n_hid": n_hid, "n_layers": 2}
        return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False)

    student, teacher = learner(8), learner(16)
    kd = KnowledgeDistillationCallback(teacher, loss, *(("1.layers.0", "1.layers.0") if loss is Similarity else ()))
    with student.no_bar(), student.no_logging():
        student.fit(1, 0.01, cbs=kd)
    assert finite(kd)


class TwoInputs(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.extra = Net(width), nn.Linear(2, CLASSES)

    def forward(self, x, extra):
        return self.body(x) + self.extra(extra)


@works("tasks", "several inputs")
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
def test_several_inputs(loss):
    teacher, student = TwoInputs(8), TwoInputs(4)
    pairs = match_feature_layers(student, teacher, (torch.randn(2, 3, SIZE, SIZE), torch.randn(2, 2)))
    assert pairs["student"] == ["body.conv1", "body.layer1", "body.layer2"]
    kd = KnowledgeDistillationCallback(teacher, loss, *(pairs.values() if loss is Attention else ()))
    tfms = [[image], [lambda i: torch.tensor([i / 24, 1.0])], [label]]
    dsets = Datasets(list(range(24)), tfms, splits=[range(16), range(16, 24)], n_inp=2)
    learner_of(dsets, student, CrossEntropyLossFlat()).fit(1, 0.01, cbs=kd)
    assert finite(kd)


class Outputs(nn.Module):
    "A network with several outputs."

    def __init__(self, form, width=4):
        super().__init__()
        self.net, self.form = Net(width), form

    def forward(self, x):
        return self.form(self.net(x))


@works("tasks", "teachers with tuple or dict outputs")
@pytest.mark.parametrize(
    "form", [lambda y: (y, y + 1), lambda y: {"logits": y, "h": y}, lambda y: {"out": y, "aux": y}]
)
def test_the_predictions_of_a_teacher_with_several_outputs_are_its_logits(make_learner, teacher, form):
    outputs, plain = Outputs(form), make_learner(Net())
    outputs.net = teacher
    states = []
    for t in (teacher, outputs):
        set_seed(0)
        learn = make_learner(copy.deepcopy(plain.model))
        learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(t, SoftTarget))
        states.append(state(learn.model))
    assert same(*states)


@works("tasks", "students with tuple or dict outputs, with a loss of one's own")
def test_a_student_with_several_outputs_and_a_loss_that_takes_them(make_learner):
    def kd_loss(pred, teacher_pred, **kwargs):
        return SoftTarget(pred[0], teacher_pred[0]) + SoftTarget(pred[1], teacher_pred[1])

    student, teacher = (Outputs(lambda y: (y, 2 * y)) for _ in range(2))
    kd = KnowledgeDistillationCallback(teacher, kd_loss)
    loss_func = lambda pred, y: F.cross_entropy(pred[0], y) + F.cross_entropy(pred[1], y)  # noqa: E731
    make_learner(student, loss_func=loss_func, metrics=[]).fit(1, 0.01, cbs=kd)
    assert finite(kd)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)  # a loss of the library compares the first
    make_learner(student, loss_func=loss_func, metrics=[]).fit(1, cbs=kd)
    assert finite(kd)


@works("tasks", "CNN to MLP with Similarity")
def test_a_cnn_teaches_an_mlp(make_learner, teacher):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    kd = KnowledgeDistillationCallback(teacher, Similarity, ["1", "2"], ["layer1", "layer2"])
    make_learner(mlp).fit(1, 0.01, cbs=kd)
    assert finite(kd)


# --- compiled and unusual models ---


def compiled(model, how):
    "By `torch.compile(model)` or in place; Dynamo without code generation, which would take a minute."
    if how == "in place":
        model.compile(backend="eager")
        return model
    return torch.compile(model, backend="eager")


@works("faults", "torch.compile: two callbacks in one fit, an interrupted fit: nothing process-wide is left")
@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["student", "after_loss"])
def test_a_compiled_student_leaves_the_process_as_it_was(make_learner, teacher, where, end):
    class Second(KnowledgeDistillationCallback):
        pass

    def stop(*args):
        if end is not None:
            raise end("x")

    student = Net()
    cbs = [KnowledgeDistillationCallback(teacher, Attention, *PAIRS), Second(teacher, FitNet, *PAIRS)]
    learn = make_learner(torch.compile(student, backend="eager"), cbs=cbs)
    if where == "student":
        student.head.register_forward_hook(stop)
    else:
        learn.add_cb(Callback(after_loss=stop))
    with pytest.raises(end) if end else contextlib.nullcontext():
        learn.fit(1, 0.01)
    assert torch._dynamo.eval_frame._stance.stance == "default"


@works("training features", "torch.compile of student and teacher; runs uncompiled where layers are compared")
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_student_and_teacher_train_as_plain_ones(make_learner, teacher, loss, how):
    states, model = [], nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, CLASSES))
    layers = ("0", "layer1") if loss is Attention else ()
    for compile_them in (False, True):
        student, t = copy.deepcopy(model), copy.deepcopy(teacher)
        if compile_them:
            student(torch.randn(4, 3, SIZE, SIZE))
            student, t = compiled(student, how), compiled(t, how)
            student(torch.randn(4, 3, SIZE, SIZE))  # compiled without hooks, as by an earlier call
        kd = KnowledgeDistillationCallback(t, loss, *layers)
        learn = make_learner(student)
        if compile_them and layers and not hasattr(torch.compiler, "set_stance"):
            with pytest.raises(RuntimeError, match=r"layers of a compiled student need torch 2\.6"):
                learn.fit(1, 0.1, cbs=kd)
            return
        learn.fit(1, 0.1, cbs=kd)
        assert finite(kd)
        states.append([p.detach().clone() for p in student.parameters()])
    for plain, fast in zip(*states, strict=True):
        torch.testing.assert_close(fast, plain)
    if hasattr(torch.compiler, "set_stance"):
        assert torch._dynamo.eval_frame._stance.stance == "default"


ARCHS = ["mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "shufflenet_v2_x0_5", "vit_b_16"]


@works("tasks", "torchvision and timm: ViT, ConvNeXt, EfficientNet, MobileNet, RegNet as student or teacher")
@pytest.mark.parametrize("arch", ARCHS)
def test_torchvision_models_teach_and_learn(make_learner, arch):
    from torchvision import models

    kwargs = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    make = models.VisionTransformer if arch == "vit_b_16" else getattr(models, arch)
    other = make(num_classes=CLASSES, **(kwargs if arch == "vit_b_16" else {}))
    resnet = models.resnet18(num_classes=CLASSES)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % CLASSES
    dsets = Datasets(
        list(range(8)), [[lambda i: images[i].clone()], [lambda i: labels[i]]], splits=[range(4), range(4, 8)]
    )
    layers = ("encoder.layers", "layer2") if arch == "vit_b_16" else ("features", "layer2")
    if arch in ("regnet_y_400mf", "shufflenet_v2_x0_5"):
        layers = ("trunk_output" if arch.startswith("reg") else "stage4", "layer2")
    for student, teacher, pair in ((other, resnet, layers), (resnet, other, layers[::-1])):
        for loss, names in ((SoftTarget, ()), (Similarity, pair)):
            kd = KnowledgeDistillationCallback(teacher, loss, *names)
            learner_of(dsets, student, CrossEntropyLossFlat()).fit(1, 1e-3, cbs=kd)
            assert finite(kd)
    assert hooks(other) == hooks(resnet) == 0


@works("tasks", "torchvision and timm: ViT, ConvNeXt, EfficientNet, MobileNet, RegNet as student or teacher")
@pytest.mark.filterwarnings("ignore:the teacher's pretrained_cfg says")  # its weights are random
def test_a_timm_vit_teaches_a_cnn(make_learner, dls):
    timm = pytest.importorskip("timm")
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=4, depth=2, num_classes=CLASSES, pretrained=False
    )
    kd = KnowledgeDistillationCallback(vit, Similarity, ["layer1", "layer2"], ["blocks.0", "blocks.1"])
    make_learner().fit(1, 0.01, cbs=kd)
    assert finite(kd)


# --- many processes on one device ---


@works("many processes", "DataParallel with output losses; with layers on several GPUs one clear error")
def test_data_parallel(make_learner, teacher):
    import fastai.distributed  # noqa: F401

    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = make_learner()
    with learn.parallel_ctx():
        learn.fit(1, 0.01, cbs=kd)
    assert finite(kd)
    learn.model = nn.DataParallel(learn.model)
    learn.model.device_ids = [0, 1]
    with pytest.raises(ValueError, match="DataParallel's replicas"):
        learn.fit(1, 0.01, cbs=attention(teacher))


@works("many processes", "layers that a wrapper replaces when the fit starts, as SyncBatchNorm's conversion does")
def test_layers_replaced_in_before_fit_are_captured_from_their_replacements(make_learner, teacher):
    class Replace(Callback):
        order = 11  # as fastai's DistributedTrainer

        def before_fit(self):
            self.old, self.model.bn1 = self.model.bn1, nn.BatchNorm2d(4)

    def loss(fm_s, fm_t, **kwargs):
        seen.append(fm_s["bn1"].mean().item())
        return Attention(fm_s, fm_t)

    replace, seen = Replace(), []
    kd = KnowledgeDistillationCallback(teacher, loss, "bn1", "bn1")
    learn = make_learner()
    learn.model.bn1.bias.data.fill_(5.0)
    learn.fit(1, 0.0, cbs=[kd, replace])
    assert max(seen) < 1
    assert hooks(replace.old) == hooks(learn.model) == 0


# --- faults ---


@works("faults", "nan or inf in the teacher's outputs: reported with the batch, not trained on")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["predictions", "layer1"])
def test_a_teacher_that_gives_nan_is_reported_before_the_step(make_learner, teacher, where, value):
    def spoil(m, i, o):
        spoil.n += 1
        if spoil.n >= 3:
            return o * value

    spoil.n = 0
    (teacher if where == "predictions" else teacher.layer1).register_forward_hook(spoil)
    layers = ("layer1", "layer1") if where == "layer1" else ()
    kd = KnowledgeDistillationCallback(teacher, FitNet if layers else SoftTarget, *layers)
    learn, seen = make_learner(), []
    steps = Callback(after_step=lambda self: seen.append(1))
    with pytest.raises(FloatingPointError, match=rf"nan or inf \({where}\) in training batch 2 of epoch 0"):
        learn.fit(1, 0.01, cbs=[kd, steps])
    assert len(seen) == 2
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


@works("faults", "a student that diverges is left to TerminateOnNaNCallback")
def test_a_diverging_student_is_not_blamed_on_the_teacher(make_learner, teacher):
    learn = make_learner()
    learn.model.head.weight.data.fill_(float("nan"))
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn.fit(1, 0.01, cbs=[kd, TerminateOnNaNCallback()])
    assert len(kd.history["kd_loss"]) == 1


@works("faults", "teacher is the student: one clear error")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["same", "DataParallel", "compile"])
def test_a_student_cannot_teach_itself(make_learner, student, wrap):
    with pytest.raises(ValueError, match="teacher and student are the same model"):
        make_learner(student).fit(1, cbs=KnowledgeDistillationCallback(wrap(student), SoftTarget))


@works("faults", "teacher on the meta device: one clear error")
def test_a_teacher_without_weights_is_refused():
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match="the teacher has no weights, it is on the device 'meta'"):
        KnowledgeDistillationCallback(empty, SoftTarget)


@works("faults", "teacher on another device: it moves")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_teacher_on_the_cpu_moves_to_the_students_device(make_learner, teacher):
    learn, kd = make_learner(), attention(teacher)
    learn.dls.to(torch.device("cuda"))
    learn.fit(1, 0.01, cbs=kd)
    assert finite(kd)


@works("faults", "out of memory in the loss: nothing stays, the next fit is right")
def test_out_of_memory_in_the_loss(make_learner, teacher):
    def loss(pred, teacher_pred, fm_s, fm_t, **kwargs):
        if loss.full:
            loss.full = False
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Attention(fm_s, fm_t)

    loss.full = True
    kd = KnowledgeDistillationCallback(teacher, loss, *PAIRS)
    learn = make_learner(cbs=kd)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        learn.fit(1, 0.01)
    assert hooks(learn.model) == hooks(teacher) == 0
    learn.fit(1, 0.01)
    assert finite(kd)


# --- long runs ---


@works("long runs", "20 fits: no old teacher, student or batch is alive")
def test_after_twenty_fits_no_old_teacher_is_alive(make_learner):
    teachers, learn = [], make_learner()
    for _ in range(20):
        teacher = Net().eval()
        teachers.append(weakref.ref(teacher))
        learn.fit(1, 1e-3, cbs=attention(teacher))
        del teacher
    gc.collect()
    assert [t for t in teachers if t() is not None] == []


# --- reproducibility ---


@works("reproducibility", "the same seed gives the same student, with and without workers")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_student(teacher, workers):
    states = []
    for _ in range(2):
        set_seed(0, reproducible=True)
        dls = datasets(label).dataloaders(bs=4, num_workers=workers, device=torch.device("cpu"))
        learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 0.1, cbs=attention(teacher))
        states.append(state(learn.model))
    assert same(*states)


@works("reproducibility", "the random state after a fit is that of plain training: the teacher draws nothing")
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
def test_the_teacher_draws_no_random_numbers(make_learner, teacher, loss):
    model, drawn = Net(), []
    teacher.train()  # with dropout
    for cbs in ([], [KnowledgeDistillationCallback(teacher, loss, *(PAIRS if loss is Attention else ()))]):
        set_seed(0)
        make_learner(copy.deepcopy(model)).fit(1, 0.01, cbs=cbs)
        drawn.append((torch.rand(3), random.random(), np.random.rand()))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1:] == drawn[1][1:]
