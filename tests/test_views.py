"Augmentation that repeats itself, so that a teacher's stored outputs are found."

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import Net, image, label, same, state
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import aug_transforms
from fasttransform import Transform
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from fasterai_kd import *

works = pytest.mark.works


class Jitter(Transform):
    "An item transform that draws from each library."

    split_idx = 0

    def encodes(self, x: TensorImage):
        return x + random.random() + np.random.rand() + torch.rand(())


def as_image(i):
    return TensorImage(image(i))


def loaders(workers=0, batch_tfms=True, **kwargs):
    dsets = Datasets(list(range(24)), [[as_image], [label]], splits=[range(16), range(16, 24)])
    tfms = aug_transforms(size=16, max_rotate=20) if batch_tfms else []
    return dsets.dataloaders(
        bs=4, num_workers=workers, device=torch.device("cpu"), after_item=[Jitter()], after_batch=tfms, **kwargs
    )


class Seen(Callback):
    "The inputs of each training batch, and what the model drew."

    order = 99

    def __init__(self):
        self.epochs, self.drawn = [], []

    def before_train(self):
        self.epochs.append([])

    def before_batch(self):
        if self.training:
            self.epochs[-1].append(self.x.as_subclass(torch.Tensor).clone())

    def after_pred(self):
        if self.training:
            self.drawn.append(torch.rand(()).item())
            random.random(), np.random.rand()


def fit(dls, *cbs, model=None, epochs=5):
    learn, seen = Learner(dls, model or Net(), loss_func=CrossEntropyLossFlat()), Seen()
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 0.01, cbs=[seen, *cbs])
    return learn, seen


@works("training features", "RepeatedViews: order, item and batch transforms, workers, MixUp and CutMix repeat")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mix", [None, MixUp, CutMix])
def test_order_and_augmentation_repeat_after_k_epochs(workers, mix):
    if workers and mix is CutMix:
        pytest.skip("as MixUp")
    _, seen = fit(loaders(workers), RepeatedViews(2), *([mix()] if mix else []))
    first, second, third, fourth, fifth = (torch.cat(batches) for batches in seen.epochs)
    assert torch.equal(first, third)
    assert torch.equal(first, fifth)
    assert torch.equal(second, fourth)
    assert not torch.allclose(first.sort(0).values, second.sort(0).values)


def test_what_the_model_draws_does_not_repeat():
    _, seen = fit(loaders(), RepeatedViews(1))
    assert torch.equal(torch.cat(seen.epochs[0]), torch.cat(seen.epochs[1]))
    assert len(set(seen.drawn)) == len(seen.drawn) == 20


def test_the_random_numbers_after_a_fit_are_not_those_of_the_views():
    after = []
    for seed in (1, 2):
        set_seed(seed)
        fit(loaders(), RepeatedViews(1), epochs=1)
        after.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert all(a != b for a, b in zip(*after, strict=True))


def test_the_seed_is_another_series_of_views():
    views = [torch.cat(fit(loaders(), RepeatedViews(1, seed=s), epochs=1)[1].epochs[0]) for s in (0, 0, 5)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def without_and_with_cache(teacher, k, unlabeled=lambda: None):
    "The student and what it saw, of each; and how many samples the teacher saw with the cache."
    fits, calls = [], []
    teacher.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    for cache in (None, True):
        calls.clear()
        torch.manual_seed(2)
        model, mine = nn.Sequential(Net()), Teacher(teacher, cache=cache)
        kd = KnowledgeDistillationCallback(mine, SoftTarget, distill_valid=False, unlabeled=unlabeled())
        set_seed(3)
        learn, seen = fit(loaders(), kd, RepeatedViews(k), model=model)
        fits.append((state(learn.model), seen))
    return *zip(*fits, strict=True), sum(calls)


@works("training features", "RepeatedViews: the cache hits from epoch k on")
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_cache_hits_from_epoch_k_on_and_the_student_is_the_one_without_it(teacher, k):
    students, _, samples = without_and_with_cache(teacher, k)
    assert same(*students)
    assert samples == 16 * k + 4  # one batch more, to look


UNLABELED = {
    "items": lambda: list(range(16, 24)) * 3,
    "fastai": lambda: loaders().train,
    "torch": lambda: TorchDataLoader([as_image(i) for i in range(24)], batch_size=4, shuffle=True),
    "fewer than an epoch": lambda: list(range(16, 24)),
    "a generator": lambda: TorchDataLoader(
        [as_image(i) for i in range(24)], batch_size=4, shuffle=True, generator=torch.Generator()
    ),
}


@pytest.mark.parametrize("unlabeled", UNLABELED)
def test_unlabeled_images_repeat_with_the_views(teacher, unlabeled):
    students, seen, samples = without_and_with_cache(teacher, 2, UNLABELED[unlabeled])
    for inputs in seen:
        assert all(map(torch.equal, inputs.epochs[0], inputs.epochs[2]))
    assert same(*students)
    assert samples == 2 * 32 + 8  # each view of an image with a label and of one without, and a look


def test_unlabeled_images_do_not_change_the_views_of_labeled_ones(teacher):
    views = []
    for unlabeled in (None, UNLABELED["items"]()):
        kd = KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=unlabeled)
        views.append(torch.cat(fit(loaders(), kd, RepeatedViews(1), epochs=1)[1].epochs[0]))
    assert torch.equal(*views)


def test_after_a_cancelled_batch_or_epoch_the_views_go_on():
    from fastai.callback.core import CancelBatchException, CancelTrainException

    class Cancel(Callback):
        def __init__(self, order, what):
            self.order, self.what = order, what

        def before_batch(self):
            if self.training and self.iter == 2:
                raise self.what()

    plain = fit(loaders(), RepeatedViews(1))[1]
    for order in (-5, 97):
        for what in (CancelBatchException, CancelTrainException):
            _, seen = fit(loaders(), RepeatedViews(1), Cancel(order, what))
            for batches in seen.epochs:
                for i, x in enumerate(batches[:2]):
                    assert torch.equal(x, plain.epochs[0][i])


class Stop(Callback):
    "Ends the fit in a batch of the training."

    def __init__(self, event, order, what):
        self.order, self.what = order, what
        setattr(self, event, self.stop)

    def stop(self):
        if self.training and self.iter == 2:
            raise self.what


@pytest.mark.parametrize("what", [CancelFitException, KeyboardInterrupt])
@pytest.mark.parametrize(("event", "order"), [("before_batch", 0), ("after_batch", 99)])
@pytest.mark.parametrize("held", [False, True], ids=["cbs of the fit", "cbs of the learner"])
def test_whatever_ends_a_fit_the_random_numbers_after_it_are_not_those_of_the_views(what, event, order, held):
    after = []
    for seed in (1, 2):
        learn = Learner(loaders(), Net(), loss_func=CrossEntropyLossFlat())
        own = [RepeatedViews(2)]
        set_seed(seed)
        with learn.no_bar(), learn.no_logging(), suppress(KeyboardInterrupt):
            learn.add_cbs(own if held else [])
            learn.fit(1, 0.01, cbs=[Stop(event, order, what), *([] if held else own)])
        with learn.no_bar(), learn.no_logging():
            learn.validate()  # puts back what Ctrl-C left in a learner's own callback
        after.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert all(a != b for a, b in zip(*after, strict=True))


@pytest.mark.parametrize("what", [None, CancelFitException, KeyboardInterrupt])
def test_the_loader_has_its_own_random_state_back(what):
    dls = loaders()
    dls.train.generator, rng = torch.Generator(), dls.train.rng
    before, generator = rng.getstate(), dls.train.generator.get_state()
    with suppress(KeyboardInterrupt):
        fit(dls, RepeatedViews(1), *([Stop("before_batch", 0, what)] if what else []), epochs=1)
    assert dls.train.rng is rng
    assert rng.getstate() == before
    assert torch.equal(dls.train.generator.get_state(), generator)


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="RepeatedViews needs one view or more, got 0"):
        RepeatedViews(0)


def test_the_model_has_its_random_numbers_back_where_a_batch_ends_the_training():
    states = []

    def stop(self):
        if self.training:
            states.append(torch.get_rng_state())
            raise CancelTrainException

    last = Callback(after_train=lambda self: states.append(torch.get_rng_state()))
    last.order = 96
    fit(loaders(), RepeatedViews(1), Callback(after_pred=stop), last, epochs=1)
    assert torch.equal(*states)
