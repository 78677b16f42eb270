"A teacher gets what it was trained on, and mistakes are named with their fix."

import contextlib
import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import Net, image
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.data.transforms import Categorize, Normalize
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.core import Categorify
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.text.data import LMDataLoader, Numericalize
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandomResizedCropGPU, Resize, aug_transforms
from fastai.vision.core import cifar_stats, imagenet_stats
from torch import nn

from fasterai_kd import *

works = pytest.mark.works
CPU = torch.device("cpu")
ANIMALS = ("ape", "bee", "cat", "dog")


def as_image(i):
    return TensorImage(image(i))


def animal(i):
    return ANIMALS[i % 4]


def data(tmp_path, *tfms, vocab=ANIMALS):
    blocks = [[as_image], [animal, Categorize(vocab=vocab, sort=False)]]
    dsets = Datasets(list(range(24)), blocks, splits=[range(16), range(16, 24)])
    return dsets.dataloaders(bs=4, num_workers=0, device=CPU, path=tmp_path, shuffle=False, after_batch=list(tfms))


def norm(stats):
    return Normalize.from_stats(*stats, cuda=False)


def learner(dls, model=None, **kwargs):
    learn = Learner(dls, model or Net(), loss_func=F.cross_entropy, **kwargs)
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


def inputs_of(model):
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    return seen


# --- normalization ---


@works("teachers", "a teacher Learner with another Normalize, or none: its inputs are renormalized")
@pytest.mark.parametrize("kind", ["learner", "exported", "ensemble"])
@pytest.mark.parametrize(
    ("theirs", "own"),
    [(imagenet_stats, cifar_stats), (None, cifar_stats), (imagenet_stats, None), (cifar_stats, cifar_stats)],
    ids=["other", "none", "student none", "same"],
)
def test_a_teacher_learner_sees_the_normalization_that_it_was_trained_with(tmp_path, capsys, kind, theirs, own):
    teacher = learner(data(tmp_path, *([norm(theirs)] if theirs else [])))
    student = learner(data(tmp_path, *([norm(own)] if own else [])))
    expected = next(iter(teacher.dls.train))[0]
    if kind == "exported":
        teacher.export()
        teacher = tmp_path / "export.pkl"
    kd = KnowledgeDistillationCallback([teacher, Net()] if kind == "ensemble" else teacher, SoftTarget)
    seen = inputs_of(kd._distiller.teacher.members[0].model)
    student.fit(1, 0.0, cbs=kd)
    torch.testing.assert_close(seen[0], expected.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().out
    assert said.count("the teacher's inputs are renormalized: mean (") == (theirs != own)


def test_a_tfm_that_is_given_is_left_alone(tmp_path, capsys):
    teacher, student = learner(data(tmp_path, norm(imagenet_stats))), learner(data(tmp_path, norm(cifar_stats)))
    seen = inputs_of(teacher.model)
    student.fit(1, 0.0, cbs=KnowledgeDistillationCallback(Teacher(teacher, tfm=lambda x: x * 2), SoftTarget))
    torch.testing.assert_close(seen[0], 2 * next(iter(student.dls.train))[0].as_subclass(torch.Tensor))
    assert capsys.readouterr().out == ""


def test_another_image_size_is_a_warning(tmp_path):
    teacher, student = (learner(data(tmp_path, *aug_transforms(size=size))) for size in (8, 16))
    with pytest.warns(UserWarning, match="trained on images of 8×8, the student's dataloaders give 16×16: if the"):
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


def test_timms_config_that_contradicts_the_dataloaders_is_a_warning_with_the_line_that_mends_it(tmp_path):
    model = Net()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    student = learner(data(tmp_path, norm(imagenet_stats)))
    with pytest.warns(UserWarning, match=r"pretrained_cfg says mean \(0\.5.* give Teacher\(model, tfm=renorm") as seen:
        student.fit(1, cbs=KnowledgeDistillationCallback(model, SoftTarget))
    line = str(seen[0].message).split("give ")[1]
    mended = eval(line, {"Teacher": Teacher, "renormalize": renormalize, "model": model})
    student.fit(1, cbs=KnowledgeDistillationCallback(mended, SoftTarget))
    model.pretrained_cfg = dict(zip(("mean", "std"), imagenet_stats, strict=True))
    student.fit(1, cbs=KnowledgeDistillationCallback(model, SoftTarget))
    with pytest.warns(UserWarning, match=r"the dataloaders normalize with mean \(0, 0, 0\), std \(1, 1, 1\)"):
        learner(data(tmp_path)).fit(1, cbs=KnowledgeDistillationCallback(model, SoftTarget))


def test_torchs_loaders_tell_nothing_and_nothing_is_changed(teacher, capsys):
    items = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, batch_size=4) for _ in range(2)))
    teacher.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    learner(dls).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert capsys.readouterr().out == ""


def test_torchs_loaders_beside_a_teacher_learner_that_normalizes_are_a_warning(tmp_path, teacher):
    items = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, batch_size=4) for _ in range(2)))
    normalized = learner(data(tmp_path, norm(imagenet_stats)))
    with pytest.warns(UserWarning, match=r"inputs normalized with mean \(0.485, .* torch's dataloaders .* tfm=renorm"):
        learner(dls).fit(1, cbs=KnowledgeDistillationCallback(normalized, SoftTarget))
    for source in (normalized.model, Teacher(normalized, tfm=lambda x: x * 2), learner(data(tmp_path)), learner(dls)):
        learner(dls).fit(1, cbs=KnowledgeDistillationCallback(source, SoftTarget))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = Net(), []

    def forward(self, *xb):
        self.seen.append([x.as_subclass(torch.Tensor) for x in xb])
        return self.net(xb[0]) + self.net(xb[1])


def two_images(tmp_path, *tfms):
    "And numbers, which are no images."
    blocks = [
        [as_image],
        [as_image, lambda x: x.flip(-1)],
        [lambda i: torch.full((3,), float(i))],
        [animal, Categorize()],
    ]
    dsets = Datasets(list(range(24)), blocks, splits=[range(16), range(16, 24)], n_inp=3)
    return dsets.dataloaders(bs=4, num_workers=0, device=CPU, path=tmp_path, shuffle=False, after_batch=list(tfms))


def test_of_several_inputs_all_images_are_renormalized_and_nothing_else(tmp_path):
    teacher = learner(two_images(tmp_path, norm(imagenet_stats)), Siamese())
    student = learner(two_images(tmp_path, norm(cifar_stats)), Siamese())
    expected = next(iter(teacher.dls.train))[:3]
    student.fit(1, 0.0, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    for got, x in zip(teacher.model.seen[0], expected, strict=True):
        torch.testing.assert_close(got, x.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalized", ["teacher", "student"])
def test_a_gray_teacher_of_a_student_in_color_is_an_error_that_says_what_to_give(tmp_path, normalized):
    gray = norm(([0.5], [0.2]))
    gray_data = Datasets(
        list(range(24)), [[lambda i: as_image(i)[:1]], [animal, Categorize()]], splits=[range(16), range(16, 24)]
    )
    make = partial(gray_data.dataloaders, bs=4, num_workers=0, device=CPU, path=tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), Net())
    teacher = learner(make(after_batch=[gray] if normalized == "teacher" else []), model)
    student = learner(data(tmp_path, *([norm(imagenet_stats)] if normalized == "student" else [])))
    with pytest.raises(
        (ValueError, RuntimeError),
        match=r"\(4, 3, 16, 16\): .*the student.* give Teacher\(\.\.\., tfm=\.\.\.\) a function",
    ):
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


# --- tfm ---


class Same(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("plain", [False, True])
def test_fastais_batch_transforms_act_as_a_tfm(plain):
    x = torch.rand(4, 3, 16, 16)
    given = x if plain else TensorImage(x)
    out = Teacher(Same(), tfm=norm(imagenet_stats)).forward((given,)).output
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in imagenet_stats)
    torch.testing.assert_close(out, (x - mean) / std)
    assert type(out) is torch.Tensor
    assert Teacher(Same(), tfm=RandomResizedCropGPU(8)).forward((given,)).output.shape == (4, 3, 8, 8)
    tfms = [*aug_transforms(size=8), norm(imagenet_stats)]
    ensemble_of_one = Teacher(Same(), tfm=tfms)
    assert ensemble_of_one.forward((given,)).output.shape == (4, 3, 8, 8)


def test_a_tfm_that_changes_nothing_is_pointed_out_once(teacher):
    source = Teacher(teacher, tfm=Resize(8))  # for items, not for batches
    with pytest.warns(UserWarning, match="tfm returns its inputs unchanged"):
        source.forward((torch.rand(2, 3, 16, 16),))
    source.forward((torch.rand(2, 3, 16, 16),))


def test_renormalize_takes_the_transforms_themselves():
    x = torch.randn(2, 3, 4, 4)
    expected = renormalize(imagenet_stats, cifar_stats)(x)
    torch.testing.assert_close(renormalize(norm(imagenet_stats), norm(cifar_stats))(x), expected)


# --- classes ---


@works("teachers", "classes in another order, or more of them: picked by name")
@pytest.mark.parametrize("kind", ["learner", "exported", "ensemble", "transformers"])
@pytest.mark.parametrize("cached", [False, True])
def test_predictions_are_picked_by_the_names_of_the_classes(tmp_path, capsys, kind, cached):
    names, seen = ("cat", "eel", "dog", "ape", "bee"), []
    teacher = learner(data(tmp_path, vocab=names), Net(classes=5))
    model = teacher.model.eval()
    if kind == "exported":
        teacher.export()
        teacher = tmp_path / "export.pkl"
    elif kind == "transformers":
        model.config = type("Config", (), {"id2label": dict(enumerate(names))})()
        teacher = model

    def loss(pred, teacher_pred, **kwargs):
        seen.append(teacher_pred)
        return SoftTarget(pred, teacher_pred)

    student = learner(data(tmp_path), metrics=[accuracy])
    source = Teacher([teacher] if kind == "ensemble" else teacher, cache=cached)
    for _ in range(2):
        student.fit(1, 0.0, cbs=KnowledgeDistillationCallback(source, loss))
    logits = model(torch.stack([image(i) for i in range(4)])).detach()
    expected = logits.log_softmax(1)[:, [3, 4, 0, 2]]
    for got in (seen[0], seen[6]):
        torch.testing.assert_close(got - got[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-5)
    assert "picked by the names of the classes: columns 3, 4, 0, 2 of 5" in capsys.readouterr().out


def other_order(tmp_path):
    "A student, and the same as a teacher with its classes the other way round."
    student, model = learner(data(tmp_path)), Net()
    model.load_state_dict(student.model.state_dict())
    for p in model.head.parameters():
        p.data = p.data.flip(0)
    return student, learner(data(tmp_path, vocab=ANIMALS[::-1]), model)


def test_classes_are_matched_for_metrics_also_where_layers_are_compared(tmp_path):
    student, teacher = other_order(tmp_path)
    kd = KnowledgeDistillationCallback(teacher, Attention, "layer1", "layer1")
    student.metrics = [kd.agreement]
    assert student.validate(cbs=kd)[1] == 1


def test_a_loss_of_ones_own_on_several_outputs_gets_the_teachers_classes_in_the_students_order(tmp_path):
    student, teacher = other_order(tmp_path)
    seen = []

    class Two(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            out = self.net(x)
            return out, out

    def own(pred, teacher_pred, **kwargs):
        seen.append(teacher_pred)
        return SoftTarget(pred[1], teacher_pred)

    student.model, student.loss_func = Two(student.model), lambda out, y: F.cross_entropy(out[0], y)
    student.add_cb(Callback(after_pred=lambda self: seen.append(self.pred[1])))
    student.validate(cbs=KnowledgeDistillationCallback(teacher, own))
    torch.testing.assert_close(seen[0], seen[1])
    kd = KnowledgeDistillationCallback(teacher, select(SoftTarget, student=1), task_weight=0.0, weight=1.0)
    assert student.validate(cbs=kd)[0] == pytest.approx(0, abs=1e-6)


def test_it_is_said_once_by_each_callback_also_by_a_copy(tmp_path, capsys):
    student, teacher = other_order(tmp_path)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    for cb in (kd, kd, copy.deepcopy(kd)):
        student.validate(cbs=cb)
    assert capsys.readouterr().out.count("picked by the names of the classes") == 2


def test_a_class_that_the_teacher_lacks_is_an_error(tmp_path):
    teacher = learner(data(tmp_path))
    blocks = [[as_image], [lambda i: ("ape", "emu")[i % 2], Categorize()]]
    student = learner(Datasets(list(range(8)), blocks).dataloaders(bs=4, num_workers=0, device=CPU), Net(classes=2))
    with pytest.raises(ValueError, match="does not know the student's class 'emu'; its classes are ape, bee, cat, dog"):
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


def test_classes_do_not_matter_where_layers_alone_are_compared(tmp_path, capsys):
    teacher = learner(data(tmp_path, vocab=("ape", "bee", "cat", "dog", "eel")), Net(classes=5))
    student = learner(data(tmp_path, vocab=("ape", "bee", "cat", "dog", "fox")), Net(classes=5))
    student.fit(1, cbs=KnowledgeDistillationCallback(teacher, Attention, "layer1", "layer1"))
    assert capsys.readouterr().out == ""


def test_made_up_labels_of_a_transformers_config_are_not_compared(tmp_path):
    model = Net()
    model.config = type("Config", (), {"id2label": {i: f"LABEL_{i}" for i in range(4)}})()
    learner(data(tmp_path)).fit(1, cbs=KnowledgeDistillationCallback(model, SoftTarget))


def test_one_output_for_two_classes_in_another_order_is_an_error_with_the_fix(tmp_path):
    names = ("no", "yes")
    learners = []
    for vocab in (names, names[::-1]):
        blocks = [[as_image], [lambda i: names[i % 2], Categorize(vocab=vocab, sort=False)]]
        dls = Datasets(list(range(8)), blocks).dataloaders(bs=4, num_workers=0, device=CPU)
        learners.append(learner(dls, Net(classes=1)))
        learners[-1].loss_func = BCEWithLogitsLossFlat()
    teacher, student = learners
    with pytest.raises(
        ValueError, match=r"the teacher gives 1 output, .* \(columns 1, 0\): .* with the teacher's vocab"
    ):
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, MultiLabel))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.other = Net(), nn.Linear(4, 4)

    def forward(self, x):
        x = self.net(x)
        return x, self.other(x)


def two_targets(tmp_path, first, second):
    blocks = [[as_image], *([animal, Categorize(vocab=vocab, sort=False)] for vocab in (first, second))]
    dsets = Datasets(list(range(24)), blocks, splits=[range(16), range(16, 24)], n_inp=1)
    dls = dsets.dataloaders(bs=4, num_workers=0, device=CPU, path=tmp_path, shuffle=False)
    learn = learner(dls, TwoHeads())
    learn.loss_func = lambda out, y, z: F.cross_entropy(out[0], y) + F.cross_entropy(out[1], z)
    return learn


def test_of_two_targets_the_first_names_the_predictions(tmp_path, capsys):
    other = ("dog", "cat", "bee", "ape")
    teacher, student = two_targets(tmp_path, ANIMALS, ANIMALS), two_targets(tmp_path, other, ANIMALS)
    student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert "picked by the names of the classes: columns 3, 2, 1, 0 of 4" in capsys.readouterr().out


def test_classes_of_a_second_target_pick_nothing_and_are_a_warning_where_they_differ(tmp_path, capsys):
    teacher, student = (two_targets(tmp_path, ANIMALS, vocab) for vocab in (ANIMALS, ANIMALS[::-1]))
    with pytest.warns(UserWarning, match="different classes for target 2: entry 0 is 'ape' for the teacher and 'dog'"):
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert capsys.readouterr().out == ""


def test_names_that_the_user_gives_to_the_dataloaders_are_those_of_the_classes(tmp_path, capsys):
    teacher, student = learner(data(tmp_path)), learner(data(tmp_path))
    student.dls.vocab = list(ANIMALS[::-1])
    student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert "columns 3, 2, 1, 0 of 4" in capsys.readouterr().out


# --- words ---

WORDS = ["the", "ape", "sat", "bee", "ran", "cat", "hid", "dog"]


class Reader(nn.Module):
    "Predictions for each word, or their mean."

    def __init__(self, classes, by_word):
        super().__init__()
        self.embedding, self.head, self.by_word = nn.Embedding(8, 4), nn.Linear(4, classes), by_word

    def forward(self, x):
        x = self.embedding(x)
        return self.head(x if self.by_word else x.mean(1))


def text_learner(tmp_path, words, classes=None, as_list=False):
    "Of a language model, without `classes`."
    tokens = [lambda i: [WORDS[(i + j) % 8] for j in range(6)], Numericalize(vocab=words)]
    if as_list:
        dsets = TfmdLists(list(range(24)), tokens, splits=[range(16), range(16, 24)])
    else:
        blocks = [tokens, [animal, Categorize(vocab=classes, sort=False)]] if classes else [tokens]
        dsets = Datasets(list(range(24)), blocks, splits=[range(16), range(16, 24)])
    kwargs = {} if classes else {"dl_type": LMDataLoader, "seq_len": 4}
    dls = dsets.dataloaders(bs=4, num_workers=0, device=CPU, path=tmp_path, shuffle=False, **kwargs)
    learn = learner(dls, Reader(len(classes or words), not classes))
    learn.loss_func = CrossEntropyLossFlat()
    return learn


@pytest.mark.parametrize(
    ("classes", "as_list"),
    [(None, False), (None, True), (ANIMALS, False)],
    ids=["language model", "language model of a list", "classifier"],
)
def test_other_words_are_a_warning_and_pick_no_predictions(tmp_path, capsys, classes, as_list):
    teacher, student = (text_learner(tmp_path, words, classes, as_list) for words in (WORDS, WORDS[::-1]))
    with pytest.warns(UserWarning, match="different vocabularies: entry 0 is 'the' for the teacher and 'dog' for the"):
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert capsys.readouterr().out == ""


def test_a_language_model_learns_from_one_of_the_same_words(tmp_path, capsys):
    teacher, student = (text_learner(tmp_path, WORDS) for _ in range(2))
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    student.fit(1, cbs=kd)
    assert all(k > 0 for k in kd.history["kd_loss"])
    assert capsys.readouterr().out == ""


def test_the_classes_of_texts_are_picked_by_name_where_the_words_are_the_same(tmp_path, capsys):
    teacher, student = (text_learner(tmp_path, WORDS, classes) for classes in (ANIMALS, ANIMALS[::-1]))
    student.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    assert "columns 3, 2, 1, 0 of 4" in capsys.readouterr().out


# --- tables ---


def table(shift=0.0, categories="abc", number="x", rows=60):
    kind, value = [categories[i % len(categories)] for i in range(rows)], np.arange(rows) % 7 + shift
    return pd.DataFrame({"kind": kind, number: value.astype(np.float32), "y": ["no", "yes"] * (rows // 2)})


def table_learner(dls):
    learn = tabular_learner(dls, [8], loss_func=CrossEntropyLossFlat(), n_out=2)
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


def table_data(frame, procs=(Categorify, Normalize)):
    number = frame.columns[1]
    return TabularDataLoaders.from_df(
        frame, procs=list(procs), cat_names=["kind"], cont_names=[number], y_names="y", bs=8, device="cpu",
        valid_idx=list(range(10)),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # of fastai's data
@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"shift": 50.0}, r"column 'x' has mean 3, std 1.98 for the teacher and 53, 1.98"),
        ({"categories": "bc"}, "of the categories of 'kind', entry 1 is 'a' for the teacher and 'b' for the student"),
        ({"categories": "abcd"}, "of the categories of 'kind', entry 4 is 'd' for the student, the teacher has 4"),
        ({"number": "z"}, r"cont_names are \['x'\] for the teacher and \['z'\] for the student"),
    ],
    ids=["mean", "codes", "category", "column"],
)
def test_a_table_processed_in_another_way_is_a_warning_with_the_fix(tmp_path, other, text):
    teacher, frame = table_learner(table_data(table())), table(**other)
    text = f"process their tables differently: {text}.* DataLoaders.teacher.dls.test_dl"
    with pytest.warns(UserWarning, match=text), contextlib.suppress(IndexError):  # of an unknown category
        table_learner(table_data(frame)).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("exported", [False, True])
def test_tables_processed_as_the_teachers_are_no_warning(tmp_path, exported):
    teacher, frame = table_learner(table_data(table())), table(shift=50.0, categories="bc")
    for near in (table(), table(shift=0.1)):
        table_learner(table_data(near)).fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    if exported:
        teacher.export(tmp_path / "teacher.pkl")
        teacher = load_learner(tmp_path / "teacher.pkl")
    dls = DataLoaders(teacher.dls.test_dl(frame[:40], shuffle=True), teacher.dls.test_dl(frame[40:]))  # the fix
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    table_learner(dls).fit(1, cbs=kd)
    assert len(kd.history["kd_loss"]) == 5


# --- mistakes ---


def test_probabilities_in_the_place_of_logits_are_pointed_out(make_learner, teacher):
    kd = KnowledgeDistillationCallback(nn.Sequential(teacher, nn.Softmax(1)), SoftTarget)
    for _ in range(2):  # in each fit
        with pytest.warns(UserWarning, match="the teacher's predictions are probabilities: .* without its softmax"):
            make_learner().fit(1, cbs=kd)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError])
def test_an_error_in_the_teacher_says_whose_it_is_and_what_it_got(make_learner, teacher, error):
    def fail(*args):
        raise error("bad size")

    teacher.conv1.register_forward_pre_hook(fail)
    with pytest.raises(error, match=r"the teacher, a Net, failed on inputs of \(4, 3, 16, 16\): bad size\. .*tfm="):
        make_learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda t: (t.state_dict(), SoftTarget), TypeError, r"got a OrderedDict of \d+ entries: if it is a state dict"),
        (lambda t: ("nowhere.pkl", SoftTarget), FileNotFoundError, "there is no file 'nowhere.pkl'"),
        (lambda t: (SoftTarget, t), TypeError, "are `teacher` and `loss` in each other's place"),
        (lambda t: (t, SoftTarget(T=4)), TypeError, r"got no predictions: .* give partial\(SoftTarget, T=4\)"),
        (lambda t: (t, partial(SoftTarget, temperature=4)), TypeError, "no argument 'temperature': It has T, standard"),
        (lambda t: (t, [SoftTarget, Attention]), TypeError, r"for several losses use combine\(\(SoftTarget, 1\.0\),"),
        (lambda t: (t, {"a": SoftTarget}), TypeError, "for several losses use combine"),
        (
            lambda t: (t, SoftTarget, None, None, 0.5, SchedCos(0, 3)),
            ValueError,
            r"got 1\.\d+ at .* where the schedule",
        ),
    ],
)
def test_mistakes_are_named_at_once_with_the_fix(teacher, make, error, text):
    with pytest.raises(error, match=text):
        KnowledgeDistillationCallback(*make(teacher))


def test_members_of_an_ensemble_predict_the_same_classes(make_learner, teacher):
    kd = KnowledgeDistillationCallback([teacher, Net(classes=5)], SoftTarget)
    with pytest.raises(ValueError, match=r"must predict the same classes, they give \(4, 4\), \(4, 5\)"):
        make_learner().fit(1, cbs=kd)


def test_layers_are_matched_on_a_batch_not_on_dataloaders(teacher, student, dls):
    with pytest.raises(TypeError, match=r"sample_input is a batch .* give dls\.one_batch\(\)\[0\]"):
        match_feature_layers(student, teacher, dls)


def test_a_list_among_the_metrics_is_an_error_before_the_first_batch(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    with pytest.raises(TypeError, match=r"holds a list: write metrics=\[accuracy, \*kd\.metrics\]"):
        make_learner(metrics=[kd.metrics]).fit(1, cbs=kd)


def test_metrics_of_a_callback_that_is_not_in_the_fit_are_pointed_out(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    with pytest.warns(UserWarning, match="metric kd_loss is of a distillation callback that is not in this fit"):
        make_learner(metrics=kd.metrics[1]).fit(1)


def test_the_same_teacher_and_loss_in_two_callbacks_is_pointed_out(make_learner, teacher):
    learn = make_learner(cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    with pytest.warns(UserWarning, match="two distillation callbacks with the same teacher and loss"):
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"activations_student": "conv1", "activations_teacher": "conv1"}, "SoftTarget reads no layers: those given"),
        ({"adapter": "auto"}, "no loss here compares features of equal shapes: the adapter is not used"),
    ],
)
def test_what_a_loss_does_not_use_is_pointed_out(teacher, kwargs, text):
    with pytest.warns(UserWarning, match=text):
        KnowledgeDistillationCallback(teacher, SoftTarget, **kwargs)


def test_a_loss_without_a_gradient_is_pointed_out(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, lambda pred, **kwargs: pred.detach().mean())
    with pytest.warns(UserWarning, match="the distillation loss has no gradient"):
        make_learner().fit(1, cbs=kd)


# --- agreement ---


def test_agreement_of_unequal_classes_is_an_error(make_learner):
    kd = KnowledgeDistillationCallback(Net(classes=5), lambda pred, **kwargs: pred.mean())
    with pytest.raises(ValueError, match="agreement needs the same classes, the student has 4 and the teacher 5"):
        make_learner(metrics=kd.agreement).fit(1, cbs=kd)


def test_labels_that_the_task_loss_ignores_do_not_count(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = make_learner(loss_func=nn.CrossEntropyLoss(ignore_index=2), metrics=[kd.agreement, kd.teacher_accuracy])
    learn.fit(1, 0.0, cbs=kd)
    x, y = (torch.cat(z).as_subclass(torch.Tensor) for z in zip(*learn.dls.valid, strict=True))
    s, t = (m.eval()(x).argmax(1)[y != 2] for m in (learn.model, teacher))
    expected = [(s == t).float().mean().item(), (t == y[y != 2]).float().mean().item()]
    np.testing.assert_allclose(list(learn.recorder.values[-1])[2:], expected, rtol=1e-6)
