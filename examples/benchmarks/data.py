"""Data, models and recipes of benchmark_losses.py: all that does not depend on the loss.

Each `Task` has three loaders: training, 'tune' for choices, 'test' for what is reported. Digits, Fashion-MNIST and
CIFAR-100 are kept in memory and cut into batches by index, as small models wait for their images otherwise.
"""

import gzip
import re
from collections.abc import Callable
from typing import NamedTuple

from fastai.vision.all import *
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


class Recipe(NamedTuple):
    "How a model is trained."

    images: int | None  # labeled images, None: all
    draws: int | None  # images in an epoch, each about draws / images times; None: each once
    epochs: int
    bs: int
    lr: float
    steps: bool = False  # SGD whose lr drops in steps, instead of fit_one_cycle


class Task(NamedTuple):
    teacher: Recipe
    student: Recipe
    dls: Callable  # Recipe, seed → DataLoaders: training, tune, test
    model: Callable  # name → model
    sample: Tensor  # a batch of one
    make_teacher: Callable | None = None  # dls, name → Learner; None: of `model`


def get_task(args) -> Task:
    tasks = {"digits": digits, "fashion-mnist": fashion_mnist, "fashion-mnist-all": fashion_mnist_all}
    return {**tasks, "pets": pets, "cifar100": cifar100}[args.data](args)


def digits(args):
    x, y = load_digits(return_X_y=True)
    x, y = tensor(x).float().view(-1, 1, 8, 8), tensor(y)
    rest, test = train_test_split(range(len(y)), test_size=700, stratify=y, random_state=0)
    train, tune = train_test_split(rest, test_size=300, stratify=y[rest], random_state=0)
    return Task(
        Recipe(None, 4000, 4, 32, 5e-3),
        Recipe(100, 4000, 3, 32, 2e-2),
        in_memory(x, y, train, tune, test, partial(jitter, pixels=1)),
        lambda width: cnn(int(width), stride=1),
        x[:1],
    )


def fashion_mnist(args):
    x, y, n = read_fashion_mnist(args.folder)
    train, tune = train_test_split(range(n), test_size=n // 12, stratify=y[:n], random_state=0)
    return Task(
        Recipe(40000, 40000, 2, 64, 1e-2),
        Recipe(1000, 5000, 4, 64, 2e-2),
        in_memory(x, y, train, tune, range(n, len(y)), partial(jitter, pixels=1, flip=True)),
        lambda width: cnn(int(width), stride=2),
        torch.zeros(1, 1, 28, 28),
    )


def fashion_mnist_all(args):
    "Teacher and student have the same images: all for training."
    teacher, student = Recipe(None, None, 6, 64, 1e-2), Recipe(None, None, 3, 64, 2e-2)
    return fashion_mnist(args)._replace(teacher=teacher, student=student)


def cifar100(args):
    "The papers' recipe, without a tune split: nothing is chosen."
    x, y, n = read_cifar100(args.folder)
    recipe = Recipe(None, None, 240, 64, 0.05, steps=True)
    return Task(
        recipe,
        recipe,
        in_memory(x, y, list(range(n)), [], range(n, len(y)), partial(jitter, pixels=4, flip=True)),
        partial(cifar_resnet, classes=100),
        torch.zeros(1, 3, 32, 32),
    )


def pets(args):
    "Cats against dogs, as in losses_guide.py, but with a tune and a test split."
    files = get_image_files(untar_data(URLs.PETS) / "images").sorted()
    cat = [f.name[0].isupper() for f in files]  # in Pets only the names of cats' breeds start with a capital
    rest, test = train_test_split(range(len(files)), test_size=0.2, stratify=cat, random_state=0)
    train, tune = train_test_split(rest, test_size=0.125, stratify=[cat[i] for i in rest], random_state=0)

    def dls(recipe, seed):
        chosen = subset(tensor(cat).long(), train, recipe.images, seed)
        block = DataBlock(
            (ImageBlock, CategoryBlock),
            get_y=lambda file: file.name[0].isupper(),
            splitter=IndexSplitter(range(len(chosen), len(chosen) + len(tune))),
            item_tfms=Resize(args.size),
        )
        files_of = partial(map, files.__getitem__)
        kwargs = {"bs": min(recipe.bs, max(2, len(chosen) // 2)), "num_workers": args.workers}
        loaders = block.dataloaders([*files_of(chosen), *files_of(tune)], **kwargs)
        return DataLoaders(*loaders.loaders, loaders.test_dl(list(files_of(test)), with_labels=True))

    return Task(
        Recipe(None, None, 5, 64, 1e-3),
        Recipe(None, None, 10, 64, 1e-3),
        dls,
        lambda name: globals()[name](num_classes=2),
        torch.zeros(1, 3, args.size, args.size),
        lambda dls, name: vision_learner(dls, globals()[name], n_out=2, metrics=accuracy, pretrained=args.pretrained),
    )


# Images in memory


def in_memory(x, y, train, tune, test, augment):
    "`dls` of a Task; inputs get the mean 0 and the standard deviation 1 that the first training images have."
    some = x[train[:1000]].float()
    mean, std = some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True)

    def loader(idxs, bs, augment=noop, **kwargs):
        def batch(i):
            return (augment(x[i].float()) - mean) / std, y[i]

        return DataLoader(idxs, bs=min(bs, len(idxs)), create_batch=batch, retain=lambda res, b: res, **kwargs)

    def dls(recipe, seed):
        chosen = subset(y, train, recipe.images, seed)
        draws = chosen * max(1, (recipe.draws or 0) // len(chosen))
        loaders = [loader(draws, recipe.bs, augment, shuffle=True, drop_last=True)]
        loaders += [loader(list(idxs), 1000) for idxs in (tune, test) if len(idxs)]
        return DataLoaders(*loaders, device=default_device())

    return dls


def subset(y, train, n, seed):
    "`n` of the training images, each class as often as in all; which, depends on the seed."
    if n is None or n >= len(train):
        return list(train)
    return train_test_split(train, train_size=n, stratify=y[train], random_state=seed)[0]


def jitter(x, pixels, flip=False):
    "Move each image by up to so many pixels, mirror half of them."
    h, w, n = *x.shape[-2:], 2 * pixels + 1
    moved = F.pad(x, [pixels] * 4).unfold(2, h, 1).unfold(3, w, 1)  # (B, C, n, n, H, W): all shifts, as a view
    row, col = torch.randint(n, (2, len(x)))
    x = moved[torch.arange(len(x)), :, row, col]
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x) if flip else x


def read_fashion_mnist(folder):
    "Images (N, 1, 28, 28), labels, and how many of them are the training set. From Debian's package, or downloaded."
    folder = DEBIAN if folder is None else Path(folder)
    if (folder / "train-images-idx3-ubyte.gz").exists():
        parts = [[read_idx(folder / f"{who}-{what}-ubyte.gz") for who in ("train", "t10k")] for what in IDX]
    else:
        from torchvision.datasets import FashionMNIST

        sets = [FashionMNIST(fastai_path("data"), train, download=True) for train in (True, False)]
        parts = [[s.data for s in sets], [s.targets for s in sets]]
    (x, x_test), (y, y_test) = parts
    return torch.cat([x, x_test]).view(-1, 1, 28, 28), torch.cat([y, y_test]).long(), len(x)


IDX = ("images-idx3", "labels-idx1")


def read_idx(file):
    "Bytes after a header: two zeros, the type, the number of dimensions, then their sizes in four bytes each."
    raw = gzip.decompress(file.read_bytes())
    n = raw[3]
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(n)]
    return tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * n).reshape(sizes).copy())


def read_cifar100(folder):
    "As read_fashion_mnist, (N, 3, 32, 32)."
    from torchvision.datasets import CIFAR100

    sets = [CIFAR100(folder or fastai_path("data"), train, download=True) for train in (True, False)]
    x, y = (np.concatenate([getattr(s, name) for s in sets]) for name in ("data", "targets"))
    return tensor(x).permute(0, 3, 1, 2), tensor(y), len(sets[0].data)


# Models


def cnn(width, stride, classes=10):
    "As in quickstart.py: three convolutions, the stride of the first given."
    return nn.Sequential(
        ConvLayer(1, width, stride=stride),
        ConvLayer(width, 2 * width, stride=2),
        ConvLayer(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        Flatten(),
        nn.Linear(4 * width, classes),
    )


class Block(nn.Module):
    "Two 3x3 convolutions and a shortcut."

    def __init__(self, ni, nf, stride):
        super().__init__()
        self.convs = nn.Sequential(
            ConvLayer(ni, nf, stride=stride, bias=False), ConvLayer(nf, nf, act_cls=None, bias=False)
        )
        same = stride == 1 and ni == nf
        self.shortcut = nn.Identity() if same else ConvLayer(ni, nf, 1, stride=stride, act_cls=None, bias=False)

    def forward(self, x):
        return F.relu(self.convs(x) + self.shortcut(x))


def cifar_resnet(name, classes):
    "ResNet for 32x32 (He et al. 2016, section 4.2): resnet20, resnet56; resnet8x4 and resnet32x4 are 4 times wider."
    depth, wider = re.fullmatch(r"resnet(\d+)(?:x(\d+))?", name).groups()
    n, stem, width = (int(depth) - 2) // 6, 32 if wider else 16, 16 * int(wider or 1)
    layers, ni = [("stem", ConvLayer(3, stem, bias=False))], stem
    for i, nf in enumerate((width, 2 * width, 4 * width)):
        blocks = [Block(nf if b else ni, nf, stride=2 if i and not b else 1) for b in range(n)]
        layers.append((f"layer{i + 1}", nn.Sequential(*blocks)))
        ni = nf
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(ni, classes))
    return nn.Sequential(OrderedDict([*layers, ("head", head)]))
