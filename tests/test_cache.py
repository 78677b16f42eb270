"A student that learns from stored outputs is the student that learns from the teacher."

import copy
import inspect
import shutil
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, IMAGES, PAIRS, Net, image, label, same, state
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai_kd import *
from fasterai_kd import _shelf

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
    kd = kwargs.pop("kd", None) or KnowledgeDistillationCallback(teacher, loss, *layers, **kwargs)
    set_seed(5)
    with learn.no_bar(), learn.no_logging():
        getattr(learn, how)(epochs, 0.05, cbs=[kd, *cbs])
    return learn, kd


def weights(*args, **kwargs):
    return state(distil(*args, **kwargs)[0].model)


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
    assert sum(calls) == 24 + 4  # each sample once, and a batch again with other samples, as a check


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
    learn.add_cb(KnowledgeDistillationCallback(teacher, SoftTarget, cache=True))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=9, show_plot=False)
        learn.fit(1, 0.01)
    assert sum(calls) == 28


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


def test_of_a_mixed_batch_the_teacher_sees_only_what_is_missing(teacher):
    kd = distil(teacher, dls=loader(n=8), epochs=1, cache=True)[1]
    calls, seen = counted(teacher), []

    def loss(pred, teacher_pred, **kwargs):
        seen.append(teacher_pred)
        return SoftTarget(pred, teacher_pred)

    other = KnowledgeDistillationCallback(teacher, loss, cache=kd.cache)
    new = torch.randn(4, 3, 16, 16)
    items = [(new[i // 4], label(i)) if i % 4 == 0 else (IMAGES[i], label(i)) for i in range(16)]
    dls = loader()
    dls.loaders[0] = DataLoader(items, bs=4, device=torch.device("cpu"))
    distil(teacher, dls=dls, epochs=2, kd=other)
    assert calls == [1, 1, 1, 1]
    xs = torch.stack([x for x, _ in items]).split(4)
    with torch.no_grad():
        for got, x in zip((*seen[:4], *seen[6:10]), (*xs, *xs), strict=True):
            torch.testing.assert_close(got, teacher(x), rtol=1e-6, atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=6), min_size=1, max_size=6), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_any_sequence_of_batches_gets_the_outputs_of_its_samples(batches, training):
    cache, x = TeacherCache(), torch.randn(12, 5)
    for batch in batches:
        got = cache([x[batch]], lambda xb: {"a": xb[0] * 2, "b": xb[0].long()}, "q", training)
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


def test_a_loss_on_layers_alone_stores_no_predictions_and_stops_the_teacher_early(teacher):
    ends = []
    layers = ["conv1"], ["conv1"]
    plain = weights(teacher, FitNet, layers)
    teacher.layer1.forward = (lambda f: lambda x: (ends.append(1), f(x))[1])(teacher.layer1.forward)
    learn, kd = distil(teacher, FitNet, layers, cache=True)
    assert same(plain, state(learn.model))
    assert len(ends) == 1
    assert kd.cache.used == 24 * (4 * 16 * 16 * 4 + 300)


def test_an_ensemble_is_stored_as_one(teacher):
    teachers = [teacher, Net().eval()]
    plain = weights(teachers)
    calls = counted(teachers[1])
    assert same(plain, weights(teachers, cache=True))
    assert sum(calls) == 28


def test_members_of_an_ensemble_run_in_the_precision_that_is_asked_for(teacher):
    seen = []
    teacher.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    distil([teacher, Net()], epochs=1, teacher_dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}


def test_images_of_several_sizes_share_a_cache(teacher):
    cache, xs = TeacherCache(), [torch.randn(2, 3, size, size) for size in (8, 16, 24)]
    for x in (*xs, *reversed(xs)):
        got = cache([x], lambda xb: {"a": teacher(xb[0]).detach()}, "q", True)
        torch.testing.assert_close(got["a"], teacher(x))
    assert len(cache) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.bool, torch.int64, torch.float64])
def test_inputs_of_any_dtype_are_told_apart(dtype):
    x = (torch.arange(60).view(12, 5) * 7 % 50).to(dtype)
    x[:, 0] = torch.arange(12) % 2
    cache, calls = TeacherCache(), []

    def ask(xb):
        calls.append(len(xb[0]))
        return {"a": xb[0].double() + 1}

    for part in (x[1:6], x[4:9], x[::3], x.flip(0)):
        assert torch.equal(cache([part], ask, "q", True)["a"], part.double() + 1)
    distinct = len(torch.unique(x.double(), dim=0))
    assert len(cache) == distinct


@works("tasks", "cache: tabular, with categorical and continuous inputs")
def test_a_tabular_teacher_with_two_inputs(tmp_path):
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.integers(0, 3, 40).astype(str), "b": rng.normal(size=40), "y": [0, 1] * 20})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's, of pandas
        dls = TabularDataLoaders.from_df(
            frame, procs=[Categorify, Normalize], cat_names="a", cont_names="b", y_names="y", y_block=None, bs=8,
            valid_idx=list(range(8)), device="cpu", path=tmp_path,
        )  # fmt: skip
        teacher = tabular_learner(dls, layers=[8], n_out=2, y_range=(0, 9), loss_func=F.mse_loss).model
    calls, students = counted(teacher), []
    for cache in (False, True):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn = tabular_learner(dls, layers=[4], n_out=2, y_range=(0, 9), loss_func=lambda p, y: p.mean())
            set_seed(5)
            with learn.no_bar(), learn.no_logging():
                learn.fit(2, 0.01, cbs=KnowledgeDistillationCallback(teacher, Logits, cache=cache))
        students.append(state(learn.model))
    assert same(*students)
    assert sum(calls[:10]) == 2 * 40
    assert 0 < sum(calls[10:]) <= 40 + 8


@works("training features", "cache: the schedule lets the teacher rest")
@pytest.mark.parametrize("start", [0.2, 0.3, 0.5])
def test_a_teacher_that_rests_at_first_is_no_sign_of_augmentation(teacher, start):
    schedule = lambda pct: float(pct >= start)  # noqa: E731
    kwargs = {"schedule": schedule, "epochs": 5, "dls": loader(bs=1, n=22, shuffle=True)}
    calls = counted(teacher)
    distil(teacher, cache=True, **kwargs)
    assert sum(calls) == 24 + 2 * 2


# --- what makes another key ---


def test_a_teacher_whose_weights_change_between_fits_is_asked_again(teacher):
    calls = counted(teacher)
    _, kd = distil(teacher, epochs=1, cache=True)
    distil(teacher, epochs=1, kd=kd)
    assert sum(calls) == 28
    with torch.no_grad():
        teacher.head.bias[0] += 1
    plain, calls[:] = weights(teacher, epochs=1), []
    assert same(plain, weights(teacher, epochs=1, kd=kd))
    assert sum(calls) == 28


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

    plain = train(False)
    with pytest.warns(UserWarning, match="the teacher changed during the fit"):
        cached = train(tmp_path / "outputs")
    assert same(plain, cached)
    assert len(list((tmp_path / "outputs").iterdir())) <= 2  # no file for each state


def test_writing_the_same_weights_again_or_moving_them_changes_nothing(teacher):
    calls, step = counted(teacher), Callback(before_batch=lambda self: teacher.load_state_dict(teacher.state_dict()))
    distil(teacher, cbs=[step], cache=True)
    assert sum(calls) == 28


@pytest.mark.parametrize(
    "other",
    [
        {"loss": Attention, "layers": PAIRS},
        {"loss": pooled, "layers": (["conv1"], ["bn1"])},
        {"teacher_dtype": torch.bfloat16},
        {"fast_teacher": True},
    ],
    ids=["loss", "layers", "precision", "fast"],
)
def test_one_cache_for_other_losses_layers_and_precisions_mixes_nothing(teacher, tmp_path, other):
    cache = TeacherCache(tmp_path / "outputs")
    plain = [weights(teacher), weights(teacher, **other)]
    for _ in range(2):
        cached = [weights(teacher, cache=cache), weights(teacher, cache=cache, **other)]
        for a, b in zip(plain, cached, strict=True):
            for x, y in zip(a.values(), b.values(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        assert same(plain[0], cached[0])


def test_an_output_of_several_tensors_is_not_taken_from_a_student_of_one(teacher):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            out = self.net(x)
            return out, out

    cache, two = TeacherCache(), Two().eval()
    distil(two, cache=cache, epochs=1)
    kd = KnowledgeDistillationCallback(two, lambda pred, **_: pred[0].mean(), cache=cache)
    learn = Learner(loader(), Two(), loss_func=lambda pred, y: F.cross_entropy(pred[0], y))
    with (
        learn.no_bar(),
        learn.no_logging(),
        pytest.raises(TypeError, match="stores one tensor of predictions, not a tu"),
    ):
        learn.fit(1, cbs=kd)


# --- reuse ---


def test_the_next_student_and_the_next_process_find_all(teacher, tmp_path):
    _, kd = distil(teacher, cache=tmp_path / "outputs", epochs=1)
    plain, calls = weights(teacher, epochs=1), counted(teacher)
    distil(teacher, kd=kd, epochs=1)
    distil(teacher, cache=kd.cache, epochs=1)
    assert same(plain, weights(teacher, cache=tmp_path / "outputs", epochs=1))  # as another process opens it
    assert same(plain, weights(copy.deepcopy(teacher), cache=str(tmp_path / "outputs"), epochs=1))
    assert calls == []


def test_two_that_write_into_a_folder_at_once_find_each_others_rows_after_an_epoch(tmp_path):
    a, b, x, calls = TeacherCache(tmp_path), TeacherCache(tmp_path), torch.arange(8.0).view(8, 1), []

    def ask(xb):
        calls.append(len(xb[0]))
        return {"a": xb[0] * 2}

    a([x[:4]], ask, "q", True), b([x[4:]], ask, "q", True)
    assert sum(calls) == 8 + 2 * 4
    a.end_epoch(), b.end_epoch()
    for cache in (a, b):
        assert torch.equal(cache([x], ask, "q", True)["a"], x * 2)
    assert sum(calls) == 16
    assert len(a) == len(b) == 8


def test_a_process_that_was_forked_writes_a_file_of_its_own(tmp_path, monkeypatch):
    cache, x = TeacherCache(tmp_path), torch.arange(8.0).view(8, 1)
    ask = lambda xb: {"a": xb[0] * 2}  # noqa: E731
    cache([x[:4]], ask, "q", True)
    monkeypatch.setattr("os.getpid", lambda: -1)
    cache([x[4:]], ask, "q", True)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(cache([x], ask, "q", True)["a"], x * 2)


# --- options ---


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"top_k": 3}])
def test_smaller_storage_by_option_is_close(teacher, options):
    plain, cached = weights(teacher), weights(teacher, cache=TeacherCache(**options))
    for a, b in zip(plain.values(), cached.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    assert not same(plain, cached)


def test_a_value_too_large_for_float16_is_refused_by_layer(teacher):
    with torch.no_grad():
        teacher.head.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"final predictions have values up to 1e\+05, too large for torch.float16"):
        distil(teacher, cache=TeacherCache(dtype=torch.float16))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TeacherCache(size=0), ValueError, "size of the cache, in GiB, must be positive, got 0"),
        (lambda: TeacherCache(size=float("nan")), ValueError, "must be positive, got nan"),
        (lambda: TeacherCache(top_k=0), ValueError, "top_k must be 1 or more classes, got 0"),
        (lambda: TeacherCache(dtype=torch.int8), ValueError, "dtype must be torch.float16, .* got torch.int8"),
        (lambda: TeacherCache(dtype=torch.float8_e4m3fn), ValueError, "dtype must be"),
        (lambda: TeacherCache(__file__), ValueError, "the cache is a folder, but .* is a file"),
        (lambda: _kd(cache=3), TypeError, "cache must be True, the path of a folder or a TeacherCache, got 3"),
        (lambda: _kd(cache_size=3), ValueError, "cache_size is for cache=True or a path"),
        (lambda: _kd(cache=TeacherCache(), cache_size=3), ValueError, "a TeacherCache has its own size"),
        (lambda: _kd(loss=Logits, cache=TeacherCache(top_k=2)), ValueError, "Logits compares raw outputs"),
        (lambda: _kd(loss=partial(Logits), cache=TeacherCache(top_k=2)), ValueError, "Logits compares raw outputs"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(make, error, text):
    with pytest.raises(error, match=text):
        make()


def _kd(loss=SoftTarget, **kwargs):
    return KnowledgeDistillationCallback(Net(), loss, **kwargs)


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
    calls = counted(teacher)
    with pytest.warns(UserWarning, match="0 of 16 samples were found .*deterministic transforms") as caught:
        learn, kd = distil(teacher, cbs=[cb()], epochs=4, cache=tmp_path / "outputs")
    assert same(plain, state(learn.model))
    assert len(caught) == 1
    assert sum(calls) == 4 * 16 + 8 + 4
    assert len(kd.cache) == 8  # what can never be found again is forgotten
    assert len(list((tmp_path / "outputs").iterdir())) == 1


def test_a_second_fit_tries_again_without_a_second_warning(teacher):
    with pytest.warns(UserWarning, match="were found"):
        kd = distil(teacher, cbs=[Noise()], cache=True)[1]
    distil(teacher, cbs=[Noise()], kd=kd)
    calls = counted(teacher)
    distil(teacher, kd=kd)
    assert sum(calls) == 16


def test_a_few_fixed_views_of_each_image_are_found(teacher):
    class Flip(Callback):
        def before_batch(self):
            if self.training and self.epoch % 2:
                self.learn.xb = (self.x.flip(3),)

    calls = counted(teacher)
    distil(teacher, cbs=[Flip()], epochs=1, cache=True)
    dls = loader()
    views = [(x, label(i)) for i in range(16) for x in (image(i), image(i).flip(2))]
    dls.loaders[0] = DataLoader(views, bs=4, shuffle=True, device=torch.device("cpu"))
    calls.clear()
    distil(teacher, dls=dls, epochs=4, cache=True)
    assert sum(calls) == 32 + 8 + 4


# --- budget ---


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_the_budget_is_kept_and_what_is_stored_is_used(teacher, tmp_path, where):
    row, n = CLASSES * 4 + 300, 10
    plain = weights(teacher)
    calls = counted(teacher)
    with pytest.warns(UserWarning, match=r"cache is full \(10 samples\): give a larger cache_size") as caught:
        learn, kd = distil(
            teacher, cache=True if where == "memory" else tmp_path / "outputs", cache_size=(n + 0.5) * row / 2**30
        )
    assert len(caught) == 1
    assert len(kd.cache) == n
    assert kd.cache.used <= kd.cache.size * 2**30
    assert sum(calls) == 3 * 24 - 2 * n + 4
    for a, b in zip(plain.values(), state(learn.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if where == "folder":
        assert sum(p.stat().st_size for p in (tmp_path / "outputs").iterdir()) <= kd.cache.used


def test_a_cache_far_too_small_says_so(teacher):
    size = 0.9 * (CLASSES * 4 + 300) / 2**30
    with (
        pytest.warns(UserWarning, match="full"),
        pytest.warns(UserWarning, match="which is too small: give a larger cache_size"),
    ):
        distil(teacher, cache=True, cache_size=size)


def test_files_of_others_count_also_those_that_come_during_the_epoch(tmp_path):
    size = 100_000
    caches = [TeacherCache(tmp_path, size / 2**30) for _ in range(3)]
    ask = lambda xb: {"a": xb[0].repeat(1, 100)}  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(200):
            cache = caches[i % 3]
            x = torch.full((2, 5), float(i)) + torch.arange(2)[:, None] / 2
            assert torch.equal(cache([x], ask, f"q{i % 2}", True)["a"], x.repeat(1, 100))
    used = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert size / 2 < used <= size


def test_a_cache_without_a_limit(teacher):
    assert "inf" in repr(distil(teacher, epochs=1, cache=True, cache_size=float("inf"))[1].cache)


def test_another_teacher_frees_the_memory_of_the_last(teacher):
    cache = TeacherCache()
    distil(teacher, cache=cache, epochs=1)
    used = cache.used
    distil(Net(), cache=cache, epochs=1)
    assert cache.used == used > 0
    assert len(cache) == 24


# --- interruption and damage ---


def test_a_folder_cut_or_damaged_anywhere_gives_the_same_student(teacher, tmp_path):
    plain = weights(teacher, epochs=1)
    folder = tmp_path / "outputs"
    distil(teacher, epochs=1, cache=folder)
    files = {p: p.read_bytes() for p in folder.iterdir()}
    rng = np.random.default_rng(0)
    for trial in range(12):
        for path in folder.iterdir():
            path.unlink()
        for path, data in files.items():
            at, damaged = rng.integers(len(data)), bytearray(data)
            damaged[at] ^= 1 << rng.integers(8)
            path.write_bytes(data[:at] if trial % 2 else damaged)
        got = weights(teacher, epochs=1, cache=folder)
        for a, b in zip(plain.values(), got.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def each_epoch(f):
    return Callback(after_epoch=lambda self: f())


@pytest.mark.parametrize("delete", [lambda f: [p.unlink() for p in f.glob("*")], lambda f: shutil.rmtree(f)])
def test_a_folder_that_someone_deletes_between_epochs_is_begun_anew(teacher, tmp_path, delete):
    folder, plain = tmp_path / "outputs", weights(teacher, epochs=4)
    calls, ends = counted(teacher), iter([1, 0, 1, 0])
    step = each_epoch(lambda: next(ends) and delete(folder))
    assert same(plain, weights(teacher, epochs=4, cbs=[step], cache=folder))
    assert 28 < sum(calls) <= 28 + 2 * 24
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(plain, weights(teacher, epochs=4, cache=folder))


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_fills_up_is_a_warning_and_the_student_the_same(teacher, tmp_path, monkeypatch, after):
    plain, calls, append = weights(teacher), [], _shelf.FileShelf.append

    def fills_up(self, keys, rows):
        calls.append(1)
        if len(calls) <= after:
            return append(self, keys, rows)
        with self.path.open("ab") as f:
            f.write(b"some bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_shelf.FileShelf, "append", fills_up)
    with pytest.warns(UserWarning, match="nothing more is stored in the teacher's cache: .*No space left"):
        learn, kd = distil(teacher, cache=tmp_path / "outputs")
    assert len(calls) == after + 1
    assert len(kd.cache) == 4 * after
    assert same(plain, state(learn.model))


def test_a_folder_that_cannot_be_written_to_is_a_warning_and_is_still_read(teacher, tmp_path, monkeypatch):
    plain = weights(teacher)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr(_shelf.FileShelf, "create", refuse)
        with pytest.warns(UserWarning, match="nothing more is stored .*Permission denied"):
            assert same(plain, weights(teacher, cache=tmp_path / "outputs"))
    distil(teacher, epochs=1, cache=tmp_path / "outputs")
    monkeypatch.setattr(_shelf.FileShelf, "create", refuse)
    calls = counted(teacher)
    assert same(plain, weights(teacher, cache=tmp_path / "outputs"))
    assert calls == []


def test_a_row_damaged_while_in_use_is_asked_for_again_once(tmp_path):
    x, calls = torch.randn(4, 3), []

    def ask(xb):
        calls.append(len(xb[0]))
        return {"a": xb[0] * 2}

    TeacherCache(tmp_path)([x], ask, "q", True)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cache = TeacherCache(tmp_path)
    calls.clear()
    for _ in range(3):
        assert torch.equal(cache([x], ask, "q", True)["a"], x * 2)
    assert calls == [1, 2, 2]  # the missing sample, and a check with others


# --- refused ---


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


@pytest.mark.parametrize("bs", [1, 2, 4, 16])
@pytest.mark.parametrize("f", DEPENDENT)
def test_a_teacher_that_looks_at_the_rest_of_the_batch_or_throws_dice_is_refused_each_time(f, bs):
    teacher, cache = Odd(DEPENDENT[f]), TeacherCache()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"depend on the rest of the batch, or on chance .* use no cache"):
            distil(teacher, dls=loader(bs=bs), cache=cache)
    assert len(cache) == 0


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
        TeacherCache()(xb, lambda xb: {}, "q", True)


def test_a_teacher_that_gives_nan_is_reported_as_such(teacher):
    with torch.no_grad():
        teacher.head.bias[0] = float("nan")
    for cache in (True, True):
        with pytest.raises(FloatingPointError, match="the teacher gives nan or inf"):
            distil(teacher, cache=cache)


def test_log_probabilities_of_minus_infinity_are_outputs_as_any(teacher):
    cache, x = TeacherCache(), torch.randn(4, 3)
    ask = lambda xb: {"a": xb[0].clamp(min=0).log()}  # noqa: E731
    for _ in range(2):
        assert torch.equal(cache([x], ask, "q", True)["a"], x.clamp(min=0).log())


# --- with the rest of fastai ---


def test_without_distill_valid_nothing_of_validation_is_stored(teacher):
    _, kd = distil(teacher, cache=True, distill_valid=False)
    assert len(kd.cache) == 16


def test_get_preds_and_validate_store_and_spoil_nothing(teacher):
    learn, kd = distil(teacher, cache=True)
    learn.add_cb(kd)
    calls, expected = counted(teacher), learn.model.eval()(IMAGES[16:])
    with learn.no_bar(), learn.no_logging():
        preds, _ = learn.get_preds(act=lambda x: x)
        learn.validate()
    torch.testing.assert_close(preds, expected.detach())
    assert calls == []


def test_export_and_copies_leave_the_stored_outputs_where_they_are(teacher, tmp_path):
    learn, kd = distil(teacher, epochs=1, cache=tmp_path / "outputs")
    assert copy.deepcopy(kd).cache is kd.cache
    learn.add_cb(kd)
    learn.path = tmp_path
    learn.dls.path = tmp_path
    learn.export("student.pkl")
    kept = {p: p.read_bytes() for p in (tmp_path / "outputs").iterdir()}
    for p in kept:
        p.unlink()
    (tmp_path / "outputs").rmdir()
    loaded = load_learner(tmp_path / "student.pkl")
    assert loaded.knowledge_distillation.cache.path == tmp_path / "outputs"
    assert not (tmp_path / "outputs").exists()  # another machine may have no such place


def test_the_cache_tells_its_size_and_place(teacher, tmp_path):
    cache = TeacherCache(tmp_path / "a", size=0.5)
    distil(teacher, epochs=1, cache=cache)
    assert repr(cache) == f"TeacherCache of 24 samples in {str(tmp_path / 'a')!r}, 0.0 of 512 MiB"
    assert repr(TeacherCache()) == "TeacherCache of 0 samples in memory, 0.0 of 4096 MiB"
    assert TeacherCache("~/a").path.is_absolute()
    assert "cache_size" in inspect.signature(KnowledgeDistillationCallback).parameters
