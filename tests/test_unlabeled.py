"Inputs without labels beside the labeled ones, and none with labels at all."

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, IMAGES, PAIRS, Net, Several, hooks, image, label, same, state, table_and_dls
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import CategoryBlock, ImageBlock
from fasttransform import Transform
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from fasterai_kd import *
from fasterai_kd.schedule import cos, dsd, lin, one_shot

works = pytest.mark.works
EXTRA = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def extra(bs=4, **kwargs):
    "A loader of images, with labels that nobody may see."
    items = [(x, torch.tensor(-100)) for x in EXTRA]
    return DataLoader(items, bs=bs, device=torch.device("cpu"), **kwargs)


class Watch(Callback):
    order = 1

    def __init__(self, f):
        self.f = f

    def after_loss(self):
        self.f(self.learn)


class Still(Callback):
    "Batch statistics and dropout would differ."

    def before_train(self):
        self.learn.model.eval()


def watched(model):
    "The inputs of each forward."
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    return seen


# --- what the student sees ---


@works("training features", "unlabeled=: images without labels in each training batch")
def test_each_training_batch_has_an_unlabeled_one_beside_it_in_one_forward(make_learner, teacher):
    learn, inner = make_learner(), []
    learn.model.conv1.register_forward_pre_hook(lambda m, args: inner.append(args[0]))
    asked = watched(teacher)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra())
    learn.fit(1, 0.01, cbs=kd)
    assert [len(x) for x in inner] == [8] * 2 + [6] + [8] + [4] * 2  # the third unlabeled batch has two
    for x, t in zip(inner, asked, strict=True):
        assert torch.equal(x, t)
    assert torch.equal(inner[0][4:], EXTRA[:4])
    assert torch.equal(inner[3][4:], EXTRA[:4])  # drawn anew
    assert len(kd.history["kd_loss"]) == 4


def test_task_loss_metrics_and_predictions_are_of_the_labeled_part_the_distillation_loss_of_both(make_learner, teacher):
    seen = []

    def check(learn):
        assert len(learn.pred) == len(learn.y) == len(learn.xb[0]) == 4
        if learn.training:
            x = torch.cat([learn.x, EXTRA[4 * learn.iter :][:4]])
            pred = learn.model(x)
            task, kd_loss = F.cross_entropy(learn.pred, learn.y), SoftTarget(pred, teacher(x))
            if learn.iter < 3:
                torch.testing.assert_close(learn.loss, torch.lerp(task, kd_loss, 0.5))
                torch.testing.assert_close(learn.pred, pred[:4])
            seen.append(task.item())

    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra())
    make_learner(metrics=[accuracy, *kd.metrics]).fit(1, 0.01, cbs=[kd, Still(), Watch(check)])
    assert kd.history["task_loss"] == pytest.approx(seen)


@pytest.mark.parametrize("loss", [SoftTarget, Attention, FitNet, Similarity], ids=lambda f: f.__name__)
def test_a_fit_is_that_of_a_hand_written_loop_bit_for_bit(make_learner, dls, teacher, loss):
    layers = () if loss is SoftTarget else PAIRS
    learn = make_learner(opt_func=SGD, wd=0.0)
    model = copy.deepcopy(learn.model)
    set_seed(3)
    kd = KnowledgeDistillationCallback(teacher, loss, *layers, unlabeled=extra(bs=5))
    learn.fit(2, 0.1, cbs=[kd, Still()])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    drawn = iter([EXTRA[:5], EXTRA[5:]] * 4)
    for _ in range(2):
        for x, y in dls.train:
            both, kept = torch.cat([x.as_subclass(torch.Tensor), next(drawn)]), [{}, {}]
            handles = [
                m.get_submodule(n).register_forward_hook(lambda m, i, o, k=k, n=n: k.update({n: o.clone()}))
                for m, k in zip((model, teacher), kept, strict=True)
                for n in PAIRS[0]
            ]
            pred, t = model(both), teacher(both).detach()
            for handle in handles:
                handle.remove()
            kd_loss = loss(pred=pred, teacher_pred=t, fm_s=kept[0], fm_t={n: f.detach() for n, f in kept[1].items()})
            torch.lerp(F.cross_entropy(pred[:4], y.as_subclass(torch.Tensor)), kd_loss, 0.5).backward()
            opt.step()
            opt.zero_grad()
    for a, b in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_loss_on_labels_sees_the_labeled_part_alone(make_learner, teacher):
    seen = []

    def on_labels(pred, teacher_pred, target, **kwargs):
        seen.append((len(pred), len(teacher_pred), len(target)))
        return SoftTarget(pred, teacher_pred)

    kd = KnowledgeDistillationCallback(teacher, combine((on_labels, 1.0), (DecoupledKD, 1.0)), unlabeled=extra())
    make_learner().fit(1, 0.01, cbs=kd)
    assert set(seen) == {(4, 4, 4)}


def test_a_loss_on_labels_has_no_value_for_unlabeled_images_of_another_size(make_learner, teacher):
    small, losses = DataLoader([(x[:, ::2, ::2],) for x in EXTRA], bs=4, device=torch.device("cpu")), []
    model = Net()
    for unlabeled in (None, small):
        kd = KnowledgeDistillationCallback(teacher, DecoupledKD, unlabeled=unlabeled)
        make_learner(copy.deepcopy(model), opt_func=SGD).fit(1, 0.0, cbs=[kd, Still()])
        losses.append(kd.history["kd_loss"])
    assert losses[1] == pytest.approx(losses[0])


def test_labels_are_ignored_in_the_labeled_part_alone_where_images_have_another_size(make_learner, teacher):
    small, model = DataLoader([(x[:, ::2, ::2],) for x in EXTRA], bs=3, device=torch.device("cpu")), Net().eval()
    loss, seen = partial(SoftTarget, ignore_index=2), []
    watch = Callback(after_pred=lambda self: seen.append((self.x, self.y)))
    kd = KnowledgeDistillationCallback(teacher, loss, unlabeled=small)
    learn = make_learner(copy.deepcopy(model), opt_func=SGD)
    learn.fit(1, 0.0, cbs=[kd, Still(), watch])
    (x, y), u = seen[0], next(iter(small))[0]
    labeled, unlabeled = (loss(model(z), teacher(z), target=t).item() for z, t in ((x, y), (u, y[:0])))
    assert kd.history["kd_loss"][0] == pytest.approx((4 * labeled + 3 * unlabeled) / 7)


@pytest.mark.parametrize("own", [{"unlabeled": True}, {"activations_student": "conv1", "activations_teacher": "conv1"}])
def test_of_two_callbacks_that_hook_the_student_one_with_unlabeled_images_is_refused(make_learner, teacher, own):
    own = {**own, **({"unlabeled": extra()} if "unlabeled" in own else {})}
    loss = Attention if "activations_student" in own else SoftTarget
    one = KnowledgeDistillationCallback(teacher, Logits, unlabeled=extra())
    for cbs in ([one, KnowledgeDistillationCallback(Net(), loss, **own)],) * 2:
        with pytest.raises(ValueError, match=r"do not go together with .* another: give one callback combine\("):
            make_learner().fit(1, cbs=cbs[::-1])


@pytest.mark.parametrize("layers", [(), PAIRS], ids=["predictions", "layers"])
def test_a_callback_that_looks_at_the_batch_first_changes_nothing(make_learner, teacher, layers):
    class Look(Callback):
        order = 5

        def before_batch(self):
            with torch.no_grad(), torch.random.fork_rng([]):
                self.learn.model(*self.xb)

    weights, model = [], Net().eval()
    for cbs in ([], [Look()]):
        kd = KnowledgeDistillationCallback(teacher, FitNet if layers else SoftTarget, *layers, unlabeled=extra())
        learn = make_learner(copy.deepcopy(model))
        learn.fit(1, 0.01, cbs=[kd, Still(), *cbs])
        weights.append(state(learn.model))
    assert same(*weights)


@pytest.mark.parametrize("layers", [(), PAIRS], ids=["predictions", "layers"])
def test_hooks_of_the_users_own_on_the_student_see_the_labeled_part_and_may_change_inputs(
    make_learner, teacher, layers
):
    learn, seen = make_learner(), []
    learn.model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    learn.model.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    kd = KnowledgeDistillationCallback(teacher, FitNet if layers else SoftTarget, *layers, unlabeled=extra())
    learn.fit(1, 0.01, cbs=kd)
    assert set(seen) == {4}
    assert len(kd.history["kd_loss"]) == 4


def test_a_loss_on_labels_sees_the_labeled_part_of_several_outputs(make_learner):
    seen = []

    def on_labels(pred, teacher_pred, target, **kwargs):
        seen.append(tuple(map(len, (*pred, *teacher_pred, target))))
        return SoftTarget(pred[0], teacher_pred[0])

    learn = make_learner(Several(), loss_func=lambda out, y: F.cross_entropy(out[0], y), metrics=[])
    learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(Several(), on_labels, unlabeled=extra()))
    assert set(seen) == {(4,) * 7}


def test_validation_and_predictions_see_no_unlabeled_images(make_learner, teacher):
    learn = make_learner(cbs=KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra()))
    seen = watched(learn.model)
    learn.validate()
    preds, _ = learn.get_preds()
    assert {len(x) for x in seen} == {4}
    assert preds.shape == (8, CLASSES)


# --- with everything else ---


def train(make_learner, teacher, *cbs, loss=SoftTarget, layers=(), model=None, unlabeled=None, n=2, **kwargs):
    torch.manual_seed(2)
    learn = make_learner(Net() if model is None else model)
    kd = KnowledgeDistillationCallback(
        teacher, loss, *layers, unlabeled=extra() if unlabeled is None else unlabeled, **kwargs
    )
    before = hooks(learn.model), hooks(kd.teacher)
    set_seed(0)
    learn.fit(n, 0.05, cbs=[kd, *cbs])
    assert all(k == k for name in kd.history for k in kd.history[name])
    assert (hooks(learn.model), hooks(kd.teacher)) == before
    return learn, kd


class CPUPrecision(MixedPrecision):
    def before_fit(self):
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", enabled=False), []


@works("training features", "unlabeled= with MixUp, CutMix, accumulation, autocast, schedules, auto, combine, adapters")
@pytest.mark.parametrize(
    "how",
    [
        {"cbs": [MixUp]},
        {"cbs": [CutMix], "loss": DecoupledKD},
        {"cbs": [partial(GradientAccumulation, 8)]},
        {"cbs": [CPUPrecision], "loss": Attention, "layers": PAIRS},
        {"schedule": cos},
        {"weight": "auto", "loss": Attention, "layers": PAIRS},
        {"loss": combine((SoftTarget, 1.0), (Attention, 1.0, dict(zip(("student", "teacher"), PAIRS, strict=True))))},
        {"loss": FitNet, "layers": (["layer2"], ["layer1"]), "adapter": "auto"},
    ],
    ids=["MixUp", "CutMix", "accumulation", "autocast", "schedule", "auto", "combine", "adapter"],
)
def test_it_works_with_what_else_a_fit_may_have(make_learner, teacher, how, capsys):
    kwargs = {k: v for k, v in how.items() if k != "cbs"}
    _, kd = train(make_learner, teacher, *(make() for make in how.get("cbs", [])), **kwargs)
    assert len(kd.history["kd_loss"]) == 8


def test_mixup_mixes_the_labeled_part_alone(make_learner, teacher):
    asked = watched(teacher)
    train(make_learner, teacher, MixUp(), n=1)
    assert torch.equal(asked[0][4:], EXTRA[:4])
    assert not any(torch.equal(x, IMAGES[i]) for x in asked[0][:4] for i in range(16))


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compiled", "DP"])
def test_a_wrapped_student_sees_them_too(make_learner, teacher, wrap):
    plain, _ = train(make_learner, teacher)
    torch.manual_seed(2)
    student = Net()
    train(make_learner, teacher, model=wrap(student))
    for a, b in zip(plain.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_student_compiled_in_place_sees_them_too(make_learner, teacher):
    plain, _ = train(make_learner, teacher)
    torch.manual_seed(2)
    student = Net()
    student.compile(backend="eager")
    train(make_learner, teacher, model=student)
    for a, b in zip(plain.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_stored_outputs_serve_both_parts(make_learner, teacher):
    plain, _ = train(make_learner, teacher, unlabeled=extra(bs=5), n=4)
    asked = watched(teacher)
    cached, _ = train(make_learner, Teacher(teacher, cache=True), unlabeled=extra(bs=5), n=4)
    assert same(state(plain.model), state(cached.model))
    assert len(asked) == 4 + 2 + 1


# --- where the images come from ---


@pytest.fixture
def folder(tmp_path):
    "Twelve small pictures; the label is in the name."
    for i in range(12):
        pixels = torch.randint(0, 255, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        PILImage.create(pixels.numpy()).save(tmp_path / f"{'ab'[i % 2]}_{i}.png")
    return sorted(tmp_path.glob("*.png"))


def pictures(files, *blocks, **kwargs):
    block = DataBlock(
        blocks or (ImageBlock, CategoryBlock),
        get_y=None if blocks else lambda f: f.name[0],
        splitter=lambda items: (list(range(8)), list(range(8, len(items)))),
        item_tfms=Resize(16),
        batch_tfms=aug_transforms(size=16),
    )
    return block.dataloaders(files, **{"bs": 4, "num_workers": 0, "device": torch.device("cpu"), **kwargs})


@works("training features", "unlabeled=: a list of files, loaded with the training transforms")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_of_files_is_loaded_with_the_training_transforms(folder, workers):
    dls = pictures(folder[:10], num_workers=workers)
    teacher, learn = Net(classes=2).eval(), Learner(dls, Net(classes=2), metrics=accuracy)
    asked = watched(teacher)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=folder)
    set_seed(0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 0.01, cbs=kd)
    of_training = [x for x in asked if len(x) == 8]
    assert len(of_training) == 6
    assert len({x[4:].sum().item() for x in of_training}) == 6  # augmented: no batch twice
    assert of_training[0].shape == (8, 3, 16, 16)
    assert learn.dls.train.dataset.split_idx == 0


@pytest.mark.parametrize("where", ["dataset", "after_item", "after_batch"])
def test_a_list_goes_through_all_random_transforms_of_training_wherever_they_are(teacher, tmp_path, where):
    class Brighter(Transform):
        split_idx = 0  # in training

        def encodes(self, x: torch.Tensor):
            return x + 100 if x.ndim > 1 else x

    tfms = [image, Brighter()] if where == "dataset" else [image]
    dsets = Datasets(list(range(24)), [tfms, [label]], splits=[range(16), range(16, 24)])
    options = {} if where == "dataset" else {where: [Brighter()]}
    dls = dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"), path=tmp_path, **options)
    asked, learn = watched(teacher), Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=list(range(8, 16))))
    assert all(x.mean() > 50 for batch in asked[:4] for x in batch)
    assert all(x.mean() < 50 for batch in asked[4:] for x in batch)


class Stream(IterableDataset):
    "Images of which nobody knows how many there are."

    def __iter__(self):
        return iter(EXTRA)


@pytest.mark.parametrize(
    "make",
    [
        lambda: extra(),
        lambda: TorchDataLoader(Stream(), batch_size=4),
        lambda: TorchDataLoader(EXTRA, batch_size=4),
        lambda: TorchDataLoader(torch.utils.data.TensorDataset(EXTRA), batch_size=4),
        lambda: DataLoaders(extra(), extra()),
        lambda: extra(shuffle=True, num_workers=2),
    ],
    ids=["fastai", "stream", "tensors", "tuples", "DataLoaders", "workers"],
)
def test_any_loader_gives_its_inputs(make_learner, teacher, make):
    asked = watched(teacher)
    train(make_learner, teacher, unlabeled=make(), n=1)
    assert [len(x) for x in asked[:4]] == [8, 8, 6, 8]


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (3, TypeError, "unlabeled must be a DataLoader or a list of items, got a int"),
        ("folder", TypeError, "unlabeled must be a DataLoader or a list of items, got a str"),
        ([], ValueError, "unlabeled has no items"),
        (extra(bs=16, drop_last=True), ValueError, "gives no batch: has it fewer items than its batch size, and drop"),
        (TorchDataLoader(EXTRA, 16, drop_last=True), ValueError, "gives no batch: has it fewer items than its batch"),
    ],
)
def test_what_gives_no_images_is_refused_at_once(teacher, bad, error, text):
    with pytest.raises(error, match=text):
        KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=bad)


def test_a_list_is_drawn_in_random_order(make_learner, teacher):
    learn, seen = make_learner(), []
    learn.model.register_forward_pre_hook(lambda m, args: seen.append(args[0][4:]))
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=list(range(24))))
    order = [int((x == IMAGES).flatten(1).all(1).nonzero()) for x in torch.cat(seen)]
    assert len(set(order)) == 16
    assert order != sorted(order)


def test_a_list_needs_fastais_dataloaders(make_learner, teacher):
    learn = make_learner()
    learn.dls.loaders = [extra(), extra()]
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=[1, 2])
    with pytest.raises(ValueError, match="a list of unlabeled items needs dataloaders made by fastai"):
        learn.fit(1, cbs=kd)


def test_a_loader_that_gives_no_batch_is_an_error(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra(bs=8, drop_last=True))
    kd._distiller._unlabeled._source.dataset = kd._distiller._unlabeled._source.dataset[:1]
    kd._distiller._unlabeled._source.n = 1
    with pytest.raises(ValueError, match="gives no batch: has it fewer items than its batch size"):
        make_learner().fit(1, cbs=kd)


@pytest.mark.parametrize("make", [extra, lambda: list(range(8, 16))], ids=["loader", "items"])
def test_a_copy_of_the_callback_draws_the_same_inputs(make_learner, teacher, make):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=make())
    make_learner().fit(1, 0.01, cbs=kd)
    copied, asked = copy.deepcopy(kd), watched(teacher)
    make_learner().fit(1, 0.01, cbs=copied)
    assert [len(x) for x in asked[:4]] == ([8, 8, 6, 8] if make is extra else [8, 8, 8, 8])


class Words(nn.Module):
    "Recurrent: keeps a state, and is reset by fastai."

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(9, 4), nn.Linear(4, CLASSES)

    def reset(self):
        pass

    def forward(self, x):
        return self.head(self.emb(x).mean(1))


def test_inputs_of_other_lengths_get_a_forward_of_their_own(teacher):
    def tokens(i, n):
        return torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(i))

    dls = DataLoaders(
        *(DataLoader([(tokens(i, 6), label(i)) for i in range(8)], bs=4, device=torch.device("cpu")) for _ in range(2))
    )
    seen, words = [], Words().eval()
    learn = Learner(dls, Words(), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    start = copy.deepcopy(learn.model)
    unlabeled = DataLoader([(tokens(i, 9),) for i in range(6)], bs=6, device=torch.device("cpu"))
    kd = KnowledgeDistillationCallback(words, SoftTarget, unlabeled=unlabeled)
    learn.model.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.0, cbs=kd)
    assert seen == [(4, 6), (6, 9), (4, 6), (6, 9), (4, 6), (4, 6)]
    own, other = (torch.stack([tokens(i, n) for i in range(m)]) for n, m in ((6, 4), (9, 6)))
    losses = [SoftTarget(start(x), words(x)) for x in (own, other)]
    assert kd.history["kd_loss"][0] == pytest.approx(((4 * losses[0] + 6 * losses[1]) / 10).item(), rel=1e-5)


@works("tasks", "unlabeled= for tabular data")
def test_tables_have_unlabeled_rows_too(tmp_path):
    from fastai.tabular.all import tabular_learner

    frame, dls = table_and_dls(tmp_path, CategoryBlock())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's, of pandas
        teacher, learn = (tabular_learner(dls, layers=[n], loss_func=CrossEntropyLossFlat()) for n in (8, 4))
        more = dls.test_dl(frame.drop(columns="y"), bs=8)
    kd = KnowledgeDistillationCallback(teacher.model, SoftTarget, unlabeled=more)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(2, 0.01, cbs=kd)
    assert len(kd.history["kd_loss"]) == 8
    assert all(k == k for k in kd.history["kd_loss"])


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_an_interrupted_fit_leaves_nothing(make_learner, teacher, end):
    def stop(self):
        if self.training and self.iter == 1:
            raise end("x")

    learn, kd = make_learner(), KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra())
    loss_func = learn.loss_func
    for event in ("after_pred", "after_loss", "after_backward"):
        with pytest.raises(end):
            learn.fit(1, 0.01, cbs=[kd, Callback(**{event: stop})])
        assert hooks(learn.model) == 0
        assert learn.loss_func is loss_func
    learn.fit(1, 0.01, cbs=kd)
    assert len(kd.history["kd_loss"]) == 4


def test_export_leaves_the_images_out(make_learner, teacher):
    learn = make_learner(cbs=KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra()))
    learn.fit(1, 0.01)
    learn.export("s.pkl")
    assert (learn.path / "s.pkl").stat().st_size < 60_000


# --- no labels at all ---


def without_labels(tmp_path):
    dsets = Datasets(list(range(24)), [[image]], n_inp=1, splits=[range(16), range(16, 24)])
    return dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"), path=tmp_path, shuffle=False)


@works("training features", "dataloaders without labels: the teacher alone trains")
@pytest.mark.parametrize("kind", ["Datasets", "DataBlock", "torch"])
@pytest.mark.parametrize("loss", [SoftTarget, Attention], ids=lambda f: f.__name__)
def test_without_any_labels_the_teacher_alone_trains(tmp_path, folder, teacher, kind, loss):
    if kind == "DataBlock":
        dls = pictures(folder, ImageBlock)
    elif kind == "torch":
        data = torch.utils.data.TensorDataset(IMAGES)
        dls = DataLoaders(*(TorchDataLoader(data, batch_size=4) for _ in range(2)))
    else:
        dls = without_labels(tmp_path)
    kd = KnowledgeDistillationCallback(teacher, loss, *(() if loss is SoftTarget else PAIRS), weight=1.0)
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), metrics=kd.metrics)
    loss_func, before = learn.loss_func, state(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01, cbs=kd)
    assert not same(before, state(learn.model))
    assert set(kd.history["task_loss"]) == {0.0}
    assert all(k > 0 for k in kd.history["kd_loss"])
    train_loss, valid_loss, task, kd_loss = learn.recorder.values[-1]
    assert (task, valid_loss) == (0, pytest.approx(kd_loss))
    assert train_loss > 0
    assert learn.loss_func is loss_func


@pytest.mark.parametrize("schedule", [lin, cos, dsd, one_shot])
def test_without_labels_the_weight_may_start_at_0(tmp_path, teacher, schedule):
    learn = Learner(without_labels(tmp_path), Net(), loss_func=CrossEntropyLossFlat())
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight=1.0, schedule=schedule)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01, cbs=kd)
    assert kd.history["weight"][0] == 0 < max(kd.history["weight"])


def test_without_labels_a_fit_is_that_of_a_hand_written_loop(tmp_path, teacher):
    dls, model = without_labels(tmp_path), Net()
    learn = Learner(dls, copy.deepcopy(model), loss_func=CrossEntropyLossFlat(), opt_func=SGD, wd=0.0)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight=1.0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1, cbs=[kd, Still()])
    opt = torch.optim.SGD(model.eval().parameters(), lr=0.1)
    for (x,) in dls.train:
        SoftTarget(model(x), teacher(x).detach()).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_without_labels_a_loss_on_labels_is_an_error(tmp_path, teacher):
    learn = Learner(without_labels(tmp_path), Net(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match="DecoupledKD needs `target`, the labels; without labels use SoftTarget"):
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, DecoupledKD))


def test_without_labels_metrics_that_need_some_are_an_error(tmp_path, teacher):
    learn = Learner(without_labels(tmp_path), Net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with pytest.raises(
        ValueError, match="have no labels, which accuracy would need: give the Learner no other metrics"
    ):
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))


def test_inputs_keep_their_type_beside_unlabeled_ones(make_learner, teacher):
    seen, learn = [], make_learner()
    learn.model.register_forward_hook(lambda m, args, out: seen.append(type(args[0])))
    images = DataLoader([(TensorImage(x),) for x in EXTRA], bs=4, device=torch.device("cpu"))
    learn.fit(1, cbs=[KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=images)])
    assert set(seen) == {type(next(iter(learn.dls.train))[0])}


def test_without_labels_there_is_nothing_to_balance(tmp_path, teacher):
    learn = Learner(without_labels(tmp_path), Net(), loss_func=CrossEntropyLossFlat())
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight="auto")
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01, cbs=kd)
    assert set(kd.history["weight"]) == {0.5}


def test_ctrl_c_leaves_no_unlabeled_input(make_learner, teacher):
    def stop(self):
        raise KeyboardInterrupt

    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra())
    with pytest.raises(KeyboardInterrupt):
        make_learner().fit(1, 0.01, cbs=[kd, Callback(after_pred=stop)])
    assert kd._distiller._student._joined is kd._distiller._student._output is None


def test_nothing_of_a_cancelled_batch_is_kept_until_the_next(make_learner, teacher):
    def cancel(self):
        raise CancelBatchException

    def look(self):
        kept.append((kd._distiller._more, kd._distiller._student._joined))

    kd, kept = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra()), []
    last = Callback(after_batch=look)
    last.order = 1
    make_learner().fit(1, 0.01, cbs=[kd, Callback(after_pred=cancel), last])
    assert set(kept) == {((), None)}


def test_after_a_fit_no_loader_of_unlabeled_images_is_at_work(make_learner, teacher):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra())  # 2½ batches
    make_learner().fit(1, 0.01, cbs=kd)
    assert next(kd._distiller._unlabeled._batches, None) is None


def test_an_output_that_has_no_samples_is_not_split(make_learner, teacher):
    class Weighted(Net):
        def forward(self, x):
            return super().forward(x), torch.ones(3), torch.ones(())

    seen = []

    def loss_func(out, y):
        seen.append([x.shape for x in out])
        return F.cross_entropy(out[0], y)

    learn = make_learner(Weighted(), loss_func=loss_func, metrics=[])
    learn.fit(1, 0.01, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=extra()))
    assert all(shapes == [(4, CLASSES), (3,), ()] for shapes in seen)
