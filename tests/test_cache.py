"A student that learns from stored outputs is the student that learns from the teacher."

import contextlib
import copy
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, IMAGES, PAIRS, Net, image, label, same, state, table_and_dls
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fasttransform import Transform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai_kd import *
from fasterai_kd.teacher import cache as cache_module

works = pytest.mark.works


def loader(bs=4, n=16, **kwargs):
    "Of images for training and validation; `n` of 24 are for training. It draws its order from Python's seed."
    set_seed(4)
    dsets = Datasets(list(range(24)), [[image], [label]], splits=[range(n), range(n, 24)])
    return dsets.dataloaders(bs=bs, num_workers=0, device=torch.device("cpu"), drop_last=False, **kwargs)


def counted(teacher):
    "How many samples the teacher sees in each call."
    calls = []
    teacher.register_forward_hook(lambda m, xb, o: calls.append(len(xb[0])))
    return calls


def distil(teacher, loss=SoftTarget, layers=(), dls=None, epochs=3, cbs=(), model=None, how="fit", **kwargs):
    "A seeded fit; the learner and the callback."
    torch.manual_seed(2)
    learn = Learner(dls or loader(), model or Net(), loss_func=CrossEntropyLossFlat())
    options = {name: kwargs.pop(name) for name in ("cache", "dtype", "tfm") if name in kwargs}
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, **options)
    kd = kwargs.pop("kd", None) or KnowledgeDistillationCallback(teacher, loss, *layers, **kwargs)
    set_seed(5)
    with learn.no_bar(), learn.no_logging():
        getattr(learn, how)(epochs, 0.05, cbs=[kd, *cbs])
    return learn, kd


def weights(*args, **kwargs):
    return state(distil(*args, **kwargs)[0].model)


class Shift(Transform):
    "Random augmentation."

    split_idx = 0

    def encodes(self, x: torch.Tensor):
        return x + torch.rand(len(x), 1, 1, 1) if x.ndim == 4 else x


# --- the same student ---


def pooled(fm_s, fm_t, **kwargs):
    "For layers of any size."
    return sum(F.mse_loss(s.mean(), t.mean()) for s, t in zip(fm_s.values(), fm_t.values(), strict=True))


LOSSES = {
    "SoftTarget": (SoftTarget, ()),
    "DecoupledKD": (DecoupledKD, ()),
    "Attention": (Attention, PAIRS),
    "one layer twice": (pooled, (["conv1", "layer2"], ["layer2", "layer2"])),
}


@works("training features", "cache: the student is bit for bit the one without")
@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_student_is_the_one_without_a_cache_bit_for_bit(teacher, tmp_path, loss, shuffle, where):
    loss, layers = LOSSES[loss]
    plain = weights(teacher, loss, layers, loader(shuffle=shuffle))
    calls = counted(teacher)
    cache = True if where == "memory" else tmp_path / "outputs"
    cached = weights(teacher, loss, layers, loader(shuffle=shuffle), cache=cache)
    assert same(plain, cached)
    assert sum(calls) == 24 + 4  # each sample once, and the first batch that could be served, to look


@works("training features", "cache: fit_one_cycle, fit_flat_cos, fine_tune")
@pytest.mark.parametrize("how", ["fit_one_cycle", "fit_flat_cos", "fine_tune"])
def test_every_fit_may_use_it(teacher, how):
    plain = weights(teacher, how=how, epochs=2)
    calls = counted(teacher)
    assert same(plain, weights(teacher, how=how, epochs=2, cache=True))
    assert sum(calls) == 28


@works("training features", "cache: lr_find, then fit")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # fastai loads the weights back
def test_after_lr_find_a_fit_finds_what_was_stored(teacher):
    calls, learn = counted(teacher), Learner(loader(), Net(), loss_func=CrossEntropyLossFlat())
    learn.add_cb(KnowledgeDistillationCallback(Teacher(teacher, cache=True), SoftTarget))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=9, show_plot=False)
        learn.fit(1, 0.01)
    assert sum(calls) == 24 + 2 * 4  # a look in each


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # fastai loads the weights back
@pytest.mark.parametrize("before", ["lr_find", "Ctrl-C"])
def test_a_training_without_a_validation_does_not_count_as_an_epoch_of_the_next_fit(teacher, before):
    def stop(self):
        if before == "Ctrl-C" and self.training:
            raise KeyboardInterrupt

    dls = loader(after_batch=[Shift()])
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    learn.add_cb(KnowledgeDistillationCallback(Teacher(teacher, cache=True), SoftTarget, distill_valid=False))
    with learn.no_bar(), learn.no_logging():
        if before == "lr_find":
            learn.lr_find(num_it=6, show_plot=False)
        else:
            with pytest.raises(KeyboardInterrupt):
                learn.fit(1, cbs=Callback(after_batch=stop))
        calls = counted(teacher)
        learn.fit(6, 0.01, cbs=RepeatedViews(2))
    assert sum(calls) == 2 * 16 + 4  # each view once, and a look


@pytest.mark.parametrize("bs", [1, 3, 5, 7])
@pytest.mark.parametrize("loss", [SoftTarget, pooled])
def test_batches_of_any_size_with_a_smaller_last_one_agree(teacher, bs, loss):
    layers = PAIRS if loss is pooled else ()
    dls = partial(loader, bs=bs, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES)) if loss is SoftTarget else Net().eval()
    plain = weights(teacher, loss, layers, dls(), model=copy.deepcopy(model))
    cached = weights(teacher, loss, layers, dls(), model=copy.deepcopy(model), cache=True)
    for a, b in zip(plain.values(), cached.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_with_one_new_sample_runs_whole_so_that_rounding_never_depends_on_what_is_stored(teacher):
    mine = Teacher(teacher, cache=True)
    distil(mine, dls=loader(n=8), epochs=1)
    new = torch.randn(4, 3, 16, 16)
    items = [(new[i // 4], label(i)) if i % 4 == 0 else (IMAGES[i], label(i)) for i in range(16)]
    dls = loader()
    dls.loaders[0] = DataLoader(items, bs=4, device=torch.device("cpu"))
    plain, calls = weights(copy.deepcopy(teacher), dls=dls, epochs=2), counted(teacher)
    assert same(plain, weights(mine, dls=dls, epochs=2))
    assert calls == [4] * 5  # four whole batches, and one to look


@given(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=6), min_size=1, max_size=6), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_any_sequence_of_batches_gets_the_outputs_of_its_samples(batches, training):
    cache, x = TeacherCache(), torch.randn(12, 5)
    cache.begin_epoch(training)
    for batch in batches:
        xb = [x[batch]]
        got = cache.fetch(xb, lambda xb=xb: {"a": xb[0] * 2, "b": xb[0].long()}, "q")
        assert torch.equal(got["a"], x[batch] * 2)
        assert torch.equal(got["b"], x[batch].long())


def test_a_loss_that_writes_into_what_it_gets_spoils_nothing(teacher):
    def loss(pred, teacher_pred, fm_t, **kwargs):
        kd = SoftTarget(pred, teacher_pred.clone())
        teacher_pred.zero_()
        fm_t["layer1"].zero_()
        return kd

    layers = ["layer1"], ["layer1"]
    assert same(weights(teacher, SoftTarget), weights(teacher, loss, layers, cache=True))


def test_a_loss_on_layers_alone_stores_no_predictions(teacher):
    mine = Teacher(teacher, cache=True)
    distil(mine, FitNet, (["conv1"], ["conv1"]))
    assert mine.cache.used == 24 * (4 * 16 * 16 * 4 + 16 + cache_module.OVERHEAD)


def test_an_ensemble_is_stored_as_one(teacher):
    teachers = [teacher, Net().eval()]
    plain = weights(teachers)
    calls = counted(teachers[1])
    assert same(plain, weights(teachers, cache=True))
    assert sum(calls) == 28


def test_images_of_several_sizes_share_a_cache(teacher):
    cache, xs = TeacherCache(), [torch.randn(2, 3, size, size) for size in (8, 16, 24)]
    for x in (*xs, *reversed(xs)):
        got = cache.fetch([x], lambda x=x: {"a": teacher(x).detach()}, "q")
        torch.testing.assert_close(got["a"], teacher(x))
    assert len(cache) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.bool, torch.int64, torch.float64])
def test_inputs_of_any_dtype_are_told_apart(dtype):
    x = (torch.arange(60).view(12, 5) * 7 % 50).to(dtype)
    x[:, 0] = torch.arange(12) % 2
    cache = TeacherCache()
    for part in (x[1:6], x[4:9], x[::3], x.flip(0)):
        got = cache.fetch([part], lambda part=part: {"a": part.double() + 1}, "q")
        assert torch.equal(got["a"], part.double() + 1)
    assert len(cache) == len(torch.unique(x.double(), dim=0))


@works("tasks", "cache: tabular, with categorical and continuous inputs")
def test_a_tabular_teacher_with_two_inputs(tmp_path):
    from fastai.tabular.all import tabular_learner

    _, dls = table_and_dls(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's, of pandas
        teacher = tabular_learner(dls, layers=[8], n_out=2, y_range=(0, 9), loss_func=F.mse_loss).model
    dls.train.shuffle = False  # fastai's loader of tables may draw a row twice in an epoch
    calls, students = counted(teacher), []
    for cache in (False, True):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn = tabular_learner(dls, layers=[4], n_out=2, y_range=(0, 9), loss_func=lambda p, y: p.mean())
            set_seed(5)
            with learn.no_bar(), learn.no_logging():
                learn.fit(2, 0.01, cbs=KnowledgeDistillationCallback(Teacher(teacher, cache=cache), Logits))
        students.append(state(learn.model))
    assert same(*students)
    assert sum(calls) == 2 * 40 + 40 + 8


@works("training features", "cache: the schedule lets the teacher rest")
@pytest.mark.parametrize("start", [0.2, 0.3, 0.5])
def test_a_teacher_that_rests_at_first_is_no_sign_of_augmentation(teacher, start):
    schedule = lambda pct: float(pct >= start)  # noqa: E731
    kwargs = {"schedule": schedule, "epochs": 5, "dls": loader(bs=1, n=22, shuffle=True)}
    calls = counted(teacher)
    distil(teacher, cache=True, **kwargs)
    assert sum(calls) == 24 + 1


# --- what makes another key ---


def test_a_teacher_whose_weights_change_between_fits_is_asked_again(teacher):
    calls, mine = counted(teacher), Teacher(teacher, cache=True)
    distil(mine, epochs=1)
    distil(mine, epochs=1)
    assert sum(calls) == 24 + 4  # the second fit looks once
    with torch.no_grad():
        teacher.head.bias[0] += 1
    plain, calls[:] = weights(teacher, epochs=1), []
    assert same(plain, weights(mine, epochs=1))
    assert sum(calls) == 24
    assert len(mine.cache) == 24  # what was stored of the other weights is gone from memory


def in_place(m):
    with torch.no_grad():
        m.head.weight.mul_(0.5)


def by_data(m):
    m.head.weight.data.mul_(0.5)


def new_data(m):
    m.head.weight.data = m.head.weight.data * 0.5


def replaced(m):
    m.head = copy.deepcopy(m.head)
    m.head.weight.data *= 0.5


def loaded(m):
    m.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in m.state_dict().items()})


@pytest.mark.parametrize("change", [in_place, by_data, new_data, replaced, loaded])
@pytest.mark.parametrize("often", [False, True])
def test_a_teacher_that_changes_during_the_fit_gives_its_outputs_of_the_moment(teacher, change, often, tmp_path):
    def train(cache):
        mine = copy.deepcopy(teacher)
        step = Callback(before_epoch=lambda self: self.epoch and change(mine))
        if often:
            step = Callback(before_batch=lambda self: change(mine))
        return weights(mine, cbs=[step], cache=cache)

    plain = train(None)
    with pytest.warns(UserWarning, match="the teacher changed during this fit"):
        cached = train(tmp_path / "outputs")
    assert same(plain, cached)
    assert list(tmp_path.glob("outputs/*")) == []  # nothing under the name of weights that may be others


def test_writing_the_same_weights_again_or_moving_them_changes_nothing(teacher):
    calls, step = counted(teacher), Callback(before_batch=lambda self: teacher.load_state_dict(teacher.state_dict()))
    distil(teacher, cbs=[step], cache=True)
    assert sum(calls) == 28


class Scaled(nn.Module):
    "Divides its logits by what no tensor holds."

    def __init__(self, net):
        super().__init__()
        self.net, self.cfg = net, {"T": 1.0}

    def forward(self, x):
        return self.net(x) / self.cfg["T"]


def by_attribute(m):
    m.cfg = {"T": 10.0}


def by_hook(m):
    m.net.register_forward_hook(lambda module, args, output: output / 10)


def by_method(m):
    m.forward = lambda x: m.net(x) / 10


@works("faults", "cache: a teacher that differs in what no hash sees: an attribute, a hook, code")
@pytest.mark.parametrize("change", [by_attribute, by_hook, by_method])
@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_what_no_hash_sees_is_found_by_looking(teacher, change, where, tmp_path, epochs):
    model = Scaled(teacher)
    mine = Teacher(model, cache=True if where == "memory" else tmp_path / "outputs")
    distil(mine)
    change(model)
    with pytest.warns(UserWarning, match="left aside in this fit: the teacher gives other outputs than were stored"):
        cached = weights(mine, epochs=epochs)
    assert same(cached, weights(model, epochs=epochs))
    if where == "memory":  # begins anew
        weights(mine)
        calls = counted(model)
        assert same(weights(mine), weights(model))
        assert sum(calls) == 4 + 3 * 24


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:Converting a tensor")
def test_another_model_of_the_same_weights_does_not_get_the_others_outputs(teacher, tmp_path):
    other = copy.deepcopy(teacher)
    other.relu = nn.GELU()
    distil(teacher, cache=tmp_path)
    assert same(weights(other, cache=tmp_path), weights(other))
    traced = torch.jit.trace(Scaled(teacher), torch.zeros(4, 3, 16, 16), check_trace=False)
    hot = Scaled(teacher)
    hot.cfg = {"T": 10.0}
    distil(traced, cache=tmp_path)
    with pytest.warns(UserWarning, match="left aside"):
        cached = weights(torch.jit.trace(hot, torch.zeros(4, 3, 16, 16), check_trace=False), cache=tmp_path)
    assert same(cached, weights(hot))


@pytest.mark.parametrize(
    "other",
    [
        {"loss": Attention, "layers": PAIRS},
        {"loss": pooled, "layers": (["conv1"], ["bn1"])},
        {"dtype": torch.bfloat16},
    ],
    ids=["loss", "layers", "precision"],
)
def test_a_folder_for_other_losses_layers_and_precisions_mixes_nothing(teacher, tmp_path, other):
    plain = [weights(teacher), weights(teacher, **other)]
    for _ in range(2):
        assert same(plain[0], weights(teacher, cache=tmp_path))
        assert same(plain[1], weights(teacher, cache=tmp_path, **other))


class Opposite(Teacher):
    "A teacher of another kind."

    def predict(self, x):
        return -self.model(x)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t, t]], ids=["alone", "in an ensemble"])
def test_another_kind_of_teacher_does_not_get_the_others_outputs(teacher, tmp_path, wrap):
    for kind in (Teacher, Opposite, Teacher):
        source = wrap(kind(teacher))
        plain = Teacher(source) if isinstance(source, list) else kind(teacher)
        stored = Teacher(source, cache=tmp_path) if isinstance(source, list) else kind(teacher, cache=tmp_path)
        for x in (IMAGES[:4], IMAGES[4:8]):  # the first is looked at
            stored.begin_fit(Net())
            expected = plain.forward((x,)).pred
            assert torch.equal(stored.forward((x,)).pred, expected)
            assert torch.equal(stored.forward((x,)).pred, expected)
            stored.end_fit()


def test_by_hand_other_weights_give_other_outputs(teacher):
    mine, x = Teacher(teacher, cache=True), IMAGES[:4]
    distil(mine, epochs=1)
    for scale in (1, 2, 1):
        in_place_by(teacher, scale)
        for _ in range(3):
            assert torch.equal(mine.forward((x,)).pred, teacher(x))


def in_place_by(model, scale):
    with torch.no_grad():
        model.head.weight.mul_(scale)


def test_an_ensemble_stores_its_softmax_by_the_axis_of_the_classes(teacher):
    mine, x = Teacher([teacher, Net().eval()], cache=True), torch.randn(4, 3, 16, 16)
    mine = Teacher([Square(), Square()], cache=True)
    by_dim = {dim: mine.forward([x], class_dim=dim).pred for dim in (1, 2, 1, 2, 1)}
    for dim in (1, 2):
        for _ in range(3):
            assert torch.equal(mine.forward([x], class_dim=dim).pred, by_dim[dim])
        torch.testing.assert_close(by_dim[dim].exp().sum(dim), torch.ones(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_teacher_in_half_precision_gives_may_differ_by_its_rounding(dtype):
    class Scaled(Net):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled().to(dtype).eval()
    mine = Teacher(model, cache=True)
    distil(mine, epochs=1)
    model.scale = 1.01
    with contextlib.nullcontext() if dtype == torch.bfloat16 else pytest.warns(UserWarning, match="left aside"):
        distil(mine, epochs=1)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x):
        return x[:, :, :3, 0] * self.scale


@pytest.mark.parametrize(
    "others",
    [
        [(FitNet, "layer1", "layer1"), (Attention, "layer2", "layer2")],
        [(Attention, "layer1", "layer1"), (combine((SoftTarget, 1.0), (Attention, 9.0)), "layer1", "layer1")],
    ],
    ids=["layers", "predictions"],
)
def test_callbacks_that_share_a_teacher_are_served_what_each_compares(teacher, others):
    states, calls = [], counted(teacher)
    for cache in (None, True):
        shared = Teacher(teacher, cache=cache)
        first, second = (KnowledgeDistillationCallback(shared, *args) for args in others)
        calls.clear()
        states.append(weights(shared, kd=first, cbs=[second]))
    assert same(*states)
    assert len(calls) == 2 * (6 + 1)  # the first epoch, and a look at what was stored


def test_an_output_of_several_tensors_is_not_taken_from_a_student_of_one(teacher):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            out = self.net(x)
            return out, out

    two = Teacher(Two().eval(), cache=True)
    distil(two, epochs=1)
    kd = KnowledgeDistillationCallback(two, lambda pred, **_: pred[0].mean())
    learn = Learner(loader(), Two(), loss_func=lambda pred, y: F.cross_entropy(pred[0], y))
    with (
        learn.no_bar(),
        learn.no_logging(),
        pytest.raises(TypeError, match="stores one tensor of predictions, not a tu"),
    ):
        learn.fit(1, cbs=kd)


# --- reuse ---


def test_the_next_student_and_the_next_process_find_all(teacher, tmp_path):
    mine = Teacher(teacher, cache=tmp_path / "outputs")
    distil(mine, epochs=1)
    plain, calls = weights(teacher, epochs=1), counted(teacher)
    assert same(plain, weights(mine, epochs=1))
    assert same(plain, weights(teacher, cache=tmp_path / "outputs", epochs=1))  # as another process opens it
    assert same(plain, weights(copy.deepcopy(teacher), cache=str(tmp_path / "outputs"), epochs=1))
    assert calls == [4] * 3  # each looks once


def test_several_students_share_a_cache_by_sharing_the_teacher(teacher):
    class Second(KnowledgeDistillationCallback):
        pass

    mine, calls = Teacher(teacher, cache=True), counted(teacher)
    cbs = [KnowledgeDistillationCallback(mine, SoftTarget), Second(mine, partial(SoftTarget, T=2), weight=0.1)]
    learn = Learner(loader(), Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 0.05, cbs=cbs)
    assert sum(calls) == 24 + 4
    assert len(mine.cache) == 24


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_two_callbacks_with_other_layers_store_each_output_once(teacher, tmp_path, where):
    class Second(KnowledgeDistillationCallback):
        pass

    mine, calls = Teacher(teacher, cache=True if where == "memory" else tmp_path / "outputs"), counted(teacher)
    cbs = [KnowledgeDistillationCallback(mine, SoftTarget), Second(mine, Attention, *PAIRS, weight=0.1)]
    used = []
    learn = Learner(loader(), Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 0.05, cbs=[*cbs, Callback(after_epoch=lambda self: used.append((len(mine.cache), sum(calls))))])
    assert used == [(48, 48), (48, 48 + 8), (48, 48 + 8), (48, 48 + 8)]
    if where == "folder":
        assert len(list((tmp_path / "outputs").iterdir())) == 4  # of training and validation, for each


def test_two_that_write_into_a_folder_at_once_find_each_others_rows_after_an_epoch(teacher, tmp_path):
    halves = []
    for part in (range(8), range(8, 16)):
        dls = loader()
        dls.loaders[0] = DataLoader([(image(i), label(i)) for i in part], bs=4, device=torch.device("cpu"))
        halves.append((Teacher(teacher, cache=tmp_path), dls))
    for mine, dls in halves:
        distil(mine, dls=dls, epochs=1)
    calls = counted(teacher)
    for mine, _ in halves:
        distil(mine, epochs=1)
    assert sum(calls) == 2 * 4


def test_a_cache_belongs_to_one_teacher(teacher):
    cache = TeacherCache()
    first = Teacher(teacher, cache=cache)
    Teacher(teacher, cache=cache)  # as when a cell of a notebook is run again
    with pytest.raises(ValueError, match="a cache belongs to one teacher: make another, or share the Teacher"):
        Teacher(Net(), cache=cache)
    assert first.cache is cache


# --- options ---


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"top_k": 3}])
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_smaller_storage_by_option_is_close(teacher, options, where, tmp_path):
    plain = weights(teacher)
    cached = weights(teacher, cache=TeacherCache(None if where == "memory" else tmp_path, **options))
    for a, b in zip(plain.values(), cached.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    assert not same(plain, cached)


def test_a_value_too_large_for_float16_is_refused_by_layer(teacher):
    with torch.no_grad():
        teacher.head.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"final predictions have values up to 1e\+05, too large for float16"):
        distil(teacher, cache=TeacherCache(dtype=torch.float16))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TeacherCache(size=0), ValueError, "size of the cache, in GiB, must be positive, got 0"),
        (lambda: TeacherCache(size=float("nan")), ValueError, "must be positive, got nan"),
        (lambda: TeacherCache(top_k=0), ValueError, "top_k must be 1 or more classes, got 0"),
        (lambda: TeacherCache(dtype=torch.int8), ValueError, "dtype must be torch.float16 or None, got torch.int8"),
        (lambda: TeacherCache(__file__), ValueError, "the cache is a folder, but .* is a file"),
        (lambda: _kd(cache=3), TypeError, "cache must be True, the path of a folder or a TeacherCache, got 3"),
        (
            lambda: _kd(loss=Logits, cache=TeacherCache(top_k=2)),
            ValueError,
            "the loss needs the outputs as they are",
        ),
        (
            lambda: _kd(loss=partial(Logits), cache=TeacherCache(top_k=2)),
            ValueError,
            "the loss needs the outputs as they are",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(make, error, text):
    with pytest.raises(error, match=text):
        make()


def _kd(loss=SoftTarget, **kwargs):
    return KnowledgeDistillationCallback(Teacher(Net(), **kwargs), loss)


# --- augmentation ---


class Noise(Callback):
    "A random augmentation of training batches."

    order = -1

    def before_batch(self):
        if self.training:
            self.learn.xb = (self.x + torch.rand(()),)


@works("training features", "cache: random augmentation, MixUp: off in training after an epoch, validation stays")
@pytest.mark.parametrize("cb", [Noise, MixUp])
def test_random_augmentation_turns_it_off_in_training_but_validation_still_hits(teacher, cb, tmp_path):
    plain = weights(teacher, cbs=[cb()], epochs=4)
    calls, mine = counted(teacher), Teacher(teacher, cache=tmp_path / "outputs")
    with pytest.warns(UserWarning, match="0 of 16 samples were found .*give `fit` the callback Rep") as caught:
        learn, _ = distil(mine, cbs=[cb()], epochs=4)
    assert same(plain, state(learn.model))
    assert len(caught) == 1
    assert sum(calls) == 4 * 16 + 8 + 4
    assert len(mine.cache) == 8  # what can never be found again is dropped
    assert len(list((tmp_path / "outputs").iterdir())) == 1


def test_a_second_fit_tries_again_without_a_second_warning(teacher):
    mine = Teacher(teacher, cache=True)
    with pytest.warns(UserWarning, match="were found"):
        distil(mine, cbs=[Noise()])
    distil(mine, cbs=[Noise()])
    calls = counted(teacher)
    distil(mine)
    assert sum(calls) == 16 + 4


def test_a_few_fixed_views_of_each_image_are_found(teacher):
    dls = loader()
    views = [(x, label(i)) for i in range(16) for x in (image(i), image(i).flip(2))]
    dls.loaders[0] = DataLoader(views, bs=4, shuffle=True, device=torch.device("cpu"))
    calls = counted(teacher)
    distil(teacher, dls=dls, epochs=4, cache=True)
    assert sum(calls) == 32 + 8 + 4


# --- budget ---


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_the_budget_is_kept_and_what_is_stored_is_used(teacher, tmp_path, where):
    row, n = CLASSES * 4 + 16 + cache_module.OVERHEAD, 12
    plain, size = weights(teacher, dls=loader(shuffle=False)), (n + 0.5) * row / 2**30
    calls = counted(teacher)
    mine = Teacher(teacher, cache=TeacherCache(None if where == "memory" else tmp_path / "outputs", size=size))
    with pytest.warns(UserWarning, match=r"cache is full \(12 samples\): give it a larger size") as caught:
        learn, _ = distil(mine, dls=loader(shuffle=False))
    assert len(caught) == 1
    assert mine.cache.used <= size * 2**30
    assert same(plain, state(learn.model))
    if where == "memory":
        assert len(mine.cache) == n
        assert sum(calls) == 24 + 2 * (24 - n) + 4


def test_a_cache_far_too_small_says_so(teacher):
    size = 0.9 * (CLASSES * 4 + 300) / 2**30
    with (
        pytest.warns(UserWarning, match="full"),
        pytest.warns(UserWarning, match="which is too small: give it a larger size"),
    ):
        distil(teacher, cache=TeacherCache(size=size))


def test_files_of_others_count_too(tmp_path):
    size = 200_000
    caches = [TeacherCache(tmp_path, size / 2**30) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(300):
            cache = caches[i % 3]
            x = torch.full((2, 5), float(i)) + torch.arange(2)[:, None] / 2
            got = cache.fetch([x], lambda x=x: {"a": x.repeat(1, 100)}, f"q{i % 2}")
            assert torch.equal(got["a"], x.repeat(1, 100))
            if i % 10 == 0:
                cache.settle(same=True, fitting=True)
    used = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert size / 2 < used <= size


def test_what_waits_is_written_when_there_is_enough(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH", 8 * (CLASSES * 4 + 16))
    seen = []
    step = Callback(after_batch=lambda self: seen.append(len(list(tmp_path.iterdir()))))
    step.order = 1
    plain = weights(copy.deepcopy(teacher))
    calls = counted(teacher)
    assert same(plain, weights(teacher, cbs=[step], cache=tmp_path))
    assert seen[:4] == [0, 0, 1, 1]
    assert sum(calls) == 28


def test_a_cache_without_a_limit(teacher):
    mine = Teacher(teacher, cache=TeacherCache(size=float("inf")))
    distil(mine, epochs=1)
    assert "inf" in repr(mine.cache)


# --- interruption and damage ---


@pytest.mark.parametrize("garbage", [b"", b"\x93NUMPY", b"no shard", None])
def test_files_that_are_cut_or_no_shards_are_passed_over(teacher, tmp_path, garbage):
    plain, folder = weights(teacher, epochs=1), tmp_path / "outputs"
    distil(teacher, epochs=1, cache=folder)
    rng, files = np.random.default_rng(0), {p: p.read_bytes() for p in folder.iterdir()}
    for _ in range(6):
        for path, data in files.items():
            path.write_bytes(data[: rng.integers(len(data))] if garbage is None else garbage)
        assert same(plain, weights(teacher, epochs=1, cache=folder))
        for path in set(folder.iterdir()) - set(files):
            path.unlink()


def test_a_file_cut_or_deleted_under_a_reader_is_a_miss(teacher, tmp_path):
    plain, epochs = weights(teacher, epochs=4), iter(range(4))

    def cut(self):
        shards = sorted(tmp_path.glob("*.npy"))
        epoch = next(epochs)
        if epoch == 3:
            shards[0].unlink()
        elif epoch:
            with shards[0].open("r+b") as f:
                f.truncate(shards[0].stat().st_size - 3)

    assert same(plain, weights(teacher, epochs=4, cbs=[Callback(before_validate=cut)], cache=tmp_path))


def each_epoch(f):
    return Callback(after_epoch=lambda self: f())


@pytest.mark.parametrize("delete", [lambda f: [p.unlink() for p in f.glob("*")], lambda f: shutil.rmtree(f)])
def test_a_folder_that_someone_deletes_between_epochs_is_begun_anew(teacher, tmp_path, delete):
    folder, plain = tmp_path / "outputs", weights(teacher, epochs=4)
    calls, ends = counted(teacher), iter([0, 1, 0, 0])
    step = each_epoch(lambda: next(ends) and delete(folder))
    assert same(plain, weights(teacher, epochs=4, cbs=[step], cache=folder))
    assert 28 < sum(calls) <= 28 + 24
    calls.clear()
    assert same(plain, weights(teacher, epochs=4, cache=folder))
    assert sum(calls) == 4


@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_fills_up_is_a_warning_and_the_student_the_same(teacher, tmp_path, monkeypatch, after):
    plain, calls, write = weights(teacher), [], np.lib.format.write_array

    def fills_up(f, records, **kwargs):
        calls.append(1)
        if len(calls) <= after:
            return write(f, records, **kwargs)
        f.write(b"some bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fills_up)
    with pytest.warns(UserWarning, match="nothing more is stored in the teacher's cache: .*No space left"):
        learn, _ = distil(teacher, cache=tmp_path / "outputs")
    assert len(calls) == after + 1
    assert len(list((tmp_path / "outputs").iterdir())) == after  # no half file
    assert same(plain, state(learn.model))


def test_a_folder_that_cannot_be_written_to_is_a_warning_and_is_still_read(teacher, tmp_path, monkeypatch):
    plain = weights(teacher)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr(cache_module, "write_shard", refuse)
        with pytest.warns(UserWarning, match="nothing more is stored .*Permission denied"):
            assert same(plain, weights(teacher, cache=tmp_path / "outputs"))
    distil(teacher, epochs=1, cache=tmp_path / "outputs")
    monkeypatch.setattr(cache_module, "write_shard", refuse)
    calls = counted(teacher)
    assert same(plain, weights(teacher, cache=tmp_path / "outputs"))
    assert calls == [4]


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_an_interrupted_fit_stores_nothing_wrong_and_loses_little(teacher, tmp_path, end):
    mine, calls = Teacher(teacher, cache=tmp_path), counted(teacher)

    def stop(self):
        if self.training and self.epoch == 1 and self.iter == 2:
            raise end("x")

    plain = weights(copy.deepcopy(teacher))
    with pytest.raises(end):
        distil(mine, cbs=[Callback(before_batch=stop)])
    calls.clear()
    assert same(plain, weights(mine))
    assert sum(calls) == 4


# --- refused, or left aside ---


class Odd(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.net, self.f = Net(), f

    def forward(self, x):
        return self.net(self.f(x))


DEPENDENT = {
    "BatchNorm without statistics": nn.BatchNorm2d(3, track_running_stats=False),
    "the mean of the batch": lambda x: x - x.mean(0),
    "the batch as time": lambda x: x.cumsum(0),
    "dropout": lambda x: F.dropout(x, 0.5),
    "rare dropout": lambda x: F.dropout(x, 1e-7),
    "noise": lambda x: x + 1e-6 * torch.randn_like(x),
}


@works("faults", "cache: a teacher that depends on the rest of the batch, or on chance, is left aside with a warning")
@pytest.mark.parametrize("bs", [2, 4])
@pytest.mark.parametrize("f", DEPENDENT)
def test_a_teacher_that_looks_at_the_rest_of_the_batch_or_throws_dice_is_left_aside(f, bs):
    teacher = Odd(DEPENDENT[f])
    mine = Teacher(teacher, cache=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"draw random numbers, or depend on the rest of the batch\?"):
            cached = weights(mine, dls=loader(bs=bs, shuffle=True))
        assert same(cached, weights(teacher, dls=loader(bs=bs, shuffle=True)))


@works("faults", "cache: a recurrent teacher is refused")
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m), lambda m: [m, Net()]])
def test_a_recurrent_teacher_is_refused_before_the_first_batch(wrap):
    recurrent = Odd(lambda x: x)
    recurrent.reset = lambda: None
    calls, teacher = counted(recurrent), wrap(recurrent)
    with pytest.raises(ValueError, match=r"has a method `reset`, so it is recurrent .* use no cache"):
        distil(teacher, cache=True)
    assert calls == []
    distil(teacher, epochs=1)


def test_outputs_that_are_not_one_row_a_sample_are_refused_with_their_shape():
    def loss(pred, fm_t, **kwargs):
        return pred.mean()

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.net = nn.Identity(), Net()

        def forward(self, x):
            self.inner(x.sum(0))
            return self.net(x)

    with pytest.raises(ValueError, match=r"the teacher's inner are \(3, 16, 16\) for 4 samples: .* use no cache"):
        distil(Summed(), loss, (["conv1"], ["inner"]), cache=True)


@pytest.mark.parametrize("xb", [[{"x": torch.zeros(2)}], [torch.zeros(2, 1), "text"], [torch.zeros(2), torch.zeros(3)]])
def test_inputs_that_are_no_batch_of_tensors_are_refused_by_number(xb):
    with pytest.raises((TypeError, ValueError), match=r"cannot be stored by sample \(input [01] is .*\): use no cache"):
        TeacherCache().fetch(xb, dict, "q")


def test_a_teacher_that_gives_nan_is_reported_as_such(teacher):
    with torch.no_grad():
        teacher.head.bias[0] = float("nan")
    mine = Teacher(teacher, cache=True)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="the teacher gives nan or inf"):
            distil(mine)


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["predictions", "features"])
def test_a_fault_of_the_teacher_is_not_stored(tmp_path, where, fault, what):
    class Once(Net):
        n = 0

        def forward(self, x):
            self.n += 1
            return super().forward(x * fault if self.n == 3 else x)

    mine = Teacher(Once().eval(), cache=True if where == "memory" else tmp_path)
    options = {} if what == "predictions" else {"loss": FitNet, "layers": (["conv1"], ["conv1"])}
    with pytest.raises(FloatingPointError, match="the teacher gives nan or inf"):
        distil(mine, **options)
    distil(mine, **options)
    assert len(mine.cache) == 24


def test_a_teacher_that_always_gives_nan_is_not_taken_for_augmentation():
    class Half(Net):
        def forward(self, x):
            return torch.cat([super().forward(x), x.new_full((len(x), 1), torch.nan)], 1)

    def loss(pred, teacher_pred, **kwargs):
        return SoftTarget(pred, teacher_pred[:, :-1])

    with pytest.warns(UserWarning, match="which does not store the nan and inf that the teacher gives"):
        distil(Half().eval(), loss, cache=True)


def test_a_file_with_other_fields_is_passed_over(teacher, tmp_path):
    plain = weights(teacher)
    distil(copy.deepcopy(teacher), cache=tmp_path)
    for path in tmp_path.glob("*.npy"):
        records = np.load(path)
        records.dtype.names = (*records.dtype.names[:-1], "another")
        np.save(path, records)
    mine = Teacher(teacher, cache=tmp_path)
    assert same(plain, weights(mine))
    assert len(mine.cache) == 24
    calls = counted(teacher)
    assert same(plain, weights(mine))
    assert calls == [4]  # a look


def test_log_probabilities_of_minus_infinity_are_outputs_as_any():
    cache, x = TeacherCache(), torch.randn(4, 3)
    for _ in range(3):
        got = cache.fetch([x], lambda: {"a": x.clamp(min=0).log()}, "q")
        assert torch.equal(got["a"], x.clamp(min=0).log())


# --- with the rest of fastai ---


def test_without_distill_valid_nothing_of_validation_is_stored(teacher):
    mine = Teacher(teacher, cache=True)
    distil(mine, distill_valid=False)
    assert len(mine.cache) == 16


def test_get_preds_and_validate_store_and_spoil_nothing(teacher):
    mine = Teacher(teacher, cache=True)
    learn, kd = distil(mine)
    learn.add_cb(kd)
    calls, expected = counted(teacher), learn.model.eval()(IMAGES[16:])
    with learn.no_bar(), learn.no_logging():
        preds, _ = learn.get_preds(act=lambda x: x)
        learn.validate()
    torch.testing.assert_close(preds, expected.detach())
    assert calls == [4]  # a look
    assert len(mine.cache) == 24


def test_export_and_copies_leave_the_stored_outputs_where_they_are(teacher, tmp_path):
    mine = Teacher(teacher, cache=tmp_path / "outputs")
    learn, kd = distil(mine, epochs=1)
    assert copy.deepcopy(kd)._distiller.teacher.cache is mine.cache
    learn.add_cb(kd)
    learn.path = learn.dls.path = tmp_path
    learn.export("student.pkl")
    assert load_learner(tmp_path / "student.pkl").knowledge_distillation.teacher is None
    assert len(list((tmp_path / "outputs").iterdir())) == 2
    assert len(mine.cache) == 24


def test_the_cache_tells_its_size_and_place(teacher, tmp_path):
    cache = TeacherCache(tmp_path / "a", size=0.5)
    distil(teacher, epochs=1, cache=cache)
    assert repr(cache) == f"TeacherCache of 24 samples in {str(tmp_path / 'a')!r}, 0.0 of 512 MiB"
    assert repr(TeacherCache()) == "TeacherCache of 0 samples in memory, 0.0 of 4096 MiB"
    assert TeacherCache("~/a").path.is_absolute()


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"top_k": 2}], ids=["float16", "top_k"])
def test_a_folder_for_rows_packed_in_other_ways_mixes_nothing(teacher, tmp_path, options):
    def packed():
        return weights(copy.deepcopy(teacher), cache=TeacherCache(tmp_path, **options))

    plain, _ = weights(teacher), packed()  # the first fit learns from what it stores, before it is packed
    served = packed()
    assert same(plain, weights(copy.deepcopy(teacher), cache=tmp_path))
    assert same(served, packed())
    assert not same(served, plain)


def test_outputs_under_the_students_autocast_are_others(teacher):
    mine, x = Teacher(teacher, cache=True), IMAGES[:4]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            half = mine.forward((x,)).pred
        assert torch.equal(mine.forward((x,)).pred, teacher(x))
        assert not torch.equal(half, teacher(x))
    assert len(mine.cache) == 8


def test_a_sample_alone_and_among_others_are_two_rows(teacher):
    mine = Teacher(teacher, cache=True)
    for x in (IMAGES[:4], IMAGES[:1], IMAGES[:4], IMAGES[:1]):
        assert torch.equal(mine.forward((x,)).pred, teacher(x))
    assert len(mine.cache) == 5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_half_precision_may_round_other_batches_by_half_a_percent(dtype):
    class Rough(Net):
        n = 0

        def forward(self, x):
            self.n += 1
            return super().forward(x) * (1 + 0.005 * (self.n % 2))

    teacher = Teacher(Rough().eval(), cache=True, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distil(teacher, epochs=3)
    assert any("draw random numbers" in str(w.message) for w in caught) == (dtype is None)
