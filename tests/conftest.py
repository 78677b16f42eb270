"Tiny models and loaders, once for all tests."

import os
import runpy
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of scripts and notebooks that the tests run, too
with warnings.catch_warnings():  # of fastai's own imports; everything else is an error
    warnings.simplefilter("ignore")
    import fastai.vision.all  # noqa: F401

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

torch.set_num_threads(1)  # the models are tiny, and machines are shared

SIZE, CLASSES = 16, 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session, items):
    "What is collected, before slow tests are left out."
    session.collected = list(items)


class Net(nn.Module):
    "Two stages and a head; `conv1` is overwritten in place by `relu`, as in a ResNet."

    def __init__(self, width: int = 4, classes: int = CLASSES):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


class Several(nn.Module):
    "As a text model: predictions, and what it gives besides."

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x), x, x


class First(Callback):
    "As fastai's callback for them."

    def after_pred(self):
        self.learn.pred = self.pred[0]


PAIRS = (["conv1", "layer1", "layer2"], ["conv1", "layer1", "layer2"])


@pytest.fixture(autouse=True)
def _seeded():
    set_seed(0)
    yield
    plt.close("all")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
    ]
)
def device(request):
    "Each that there is."
    return request.param


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture
def student():
    torch.manual_seed(2)
    return Net()


IMAGES = torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def image(i):
    return IMAGES[i].clone()


def label(i):
    return torch.tensor(i % CLASSES)


@pytest.fixture
def dls(tmp_path):
    "Four batches of four for training, two for validation, always in the same order."
    dsets = Datasets(list(range(24)), [[image], [label]], splits=[range(16), range(16, 24)])
    return dsets.dataloaders(bs=4, num_workers=0, device=torch.device("cpu"), path=tmp_path, shuffle=False)


@pytest.fixture
def make_learner(dls, student):
    "A quiet Learner on CPU; `make_learner(model, **kwargs)`."

    def make(model=None, **kwargs):
        kwargs = {"loss_func": CrossEntropyLossFlat(), "metrics": accuracy, **kwargs}
        learn = Learner(dls, student if model is None else model, **kwargs)
        learn.logger = lambda *_: None
        return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn

    return make


SCRIPTS = ("benchmarks", "benchmark_losses", "benchmark_unlabeled", "pictures", "quickstart")


@contextmanager
def example(name):
    "The names in a script of examples/, whose helpers can be imported meanwhile."
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries' imports, to compare with
        patch.syspath_prepend(script.parent)
        yield runpy.run_path(str(script))
    for name in [name for name in sys.modules if name.split(".")[0] in SCRIPTS]:
        del sys.modules[name]


@pytest.fixture
def no_training(monkeypatch):
    "From its call on every training is an error."

    def refuse(*args, **kwargs):
        raise AssertionError("this run is in the file already")

    return lambda: [monkeypatch.setattr(Learner, name, refuse) for name in ("fit", "fit_one_cycle")]


def table_and_dls(path, y_block=None):
    "40 rows with a category, a number and a label, the first 8 for validation."
    import pandas as pd
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.integers(0, 3, 40).astype(str), "b": rng.normal(size=40), "y": [0, 1] * 20})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's, of pandas
        dls = TabularDataLoaders.from_df(
            frame, procs=[Categorify, Normalize], cat_names="a", cont_names="b", y_names="y", y_block=y_block, bs=8,
            valid_idx=list(range(8)), device="cpu", path=path,
        )  # fmt: skip
    return frame, dls


def hooks(model):
    "How many hooks there are on the modules of `model`."
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model):
    "A copy of the weights and buffers."
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    "Are two states equal bit for bit?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
