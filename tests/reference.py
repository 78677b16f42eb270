"""The losses again, in numpy and float64, sample by sample as the papers write them: one row a loss.

`test_losses.py` compares each loss of the library with its row: values, gradients, a training. For a new loss add its
formula here, under `@row`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import rel_entr, softmax

Shape = tuple[int, ...]
Of = Literal["sample", "batch", "layers"]
REFERENCE: dict[str, "Row"] = {}  # by the name of the loss


@dataclass(frozen=True)
class Row:
    "What the tests know of a loss."

    formula: Callable[..., float]
    of: Of  # "sample": (s, t, y), of one sample or position; "batch": (s, t), a table; "layers": (s, t), of one pair
    shapes: list[tuple[Shape, Shape]]  # of student and teacher, with which it is tested
    variants: list[dict[str, Any]]  # options, with which it is tested too
    rel: float  # how close the loss comes in float64
    rel32: float  # and in float32

    @property
    def takes_unequal_shapes(self) -> bool:
        return any(s != t for s, t in self.shapes)

    def value(self, s: np.ndarray, t: np.ndarray, y: np.ndarray, **options: Any) -> float:
        "Of all samples and positions."
        if self.of == "layers":
            return self.formula(s, t, **options)
        s, t = table(s), table(t)
        if self.of == "batch":
            return self.formula(s, t, **options)
        return float(np.mean([self.formula(*sample, **options) for sample in zip(s, t, y.ravel(), strict=True)]))


def row(
    name: str,
    of: Of,
    shapes: Iterable[Shape | tuple[Shape, Shape]],  # (student's, teacher's), or one for both
    variants: Iterable[Mapping[str, Any]] = (),  # besides the default options
    rel: float = 1e-9,
    rel32: float = 1e-5,
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    "Makes the formula the row of this loss."

    def add(formula: Callable[..., float]) -> Callable[..., float]:
        pairs = [s if s and isinstance(s[0], tuple) else (s, s) for s in shapes]
        REFERENCE[name] = Row(formula, of, pairs, [{}, *map(dict, variants)], rel, rel32)
        return formula

    return add


def table(x: np.ndarray) -> np.ndarray:
    "One row for each sample or position."
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


# Of predictions: student logits, teacher logits, class

LOGITS = [(6, 5), (1, 2), (3, 4), (2, 3, 2, 2), (2, 4, 3, 2), (3, 3, 7), (2, 3, 2, 2, 2)]


def z_scores(*logits):
    return ((z - z.mean()) / (1e-7 + z.std(ddof=1)) for z in logits)


@row("SoftTarget", "sample", LOGITS, [{"T": 2}, {"standardize": True, "T": 2}])
def soft_target(s, t, y, T=5.0, standardize=False):
    if standardize:
        s, t = z_scores(s, t)
    return T**2 * rel_entr(softmax(t / T), softmax(s / T)).sum()


@row("Mutual", "sample", LOGITS)
def mutual(s, t, y):
    return np.sum(softmax(t) * np.log(softmax(t) / softmax(s)))


@row("Logits", "sample", LOGITS)
def logits(s, t, y):
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def others(z, y):
    p = softmax(z)
    return np.delete(p, y) / (1 - p[y])


@row(
    "DecoupledKD",
    "sample",
    LOGITS,
    [
        {"T": 1, "alpha": 0.5, "beta": 2},
        {"normalize": True},
        {"normalize": True, "T": 2, "alpha": 3, "beta": 0.5},
        {"standardize": True},
        {"standardize": True, "normalize": True},
    ],
)
def decoupled(s, t, y, T=4.0, alpha=1.0, beta=8.0, normalize=False, standardize=False):
    if standardize:
        s, t = z_scores(s, t)
    nckd = T**2 * rel_entr(others(t / T, y), others(s / T, y)).sum()
    if normalize:
        p_s, p_t = softmax(s)[y], softmax(t)[y]
        return alpha * p_t * np.log(p_t / p_s) + beta * nckd
    b_s, b_t = softmax(s / T)[y], softmax(t / T)[y]
    tckd = b_t * np.log(b_t / b_s) + (1 - b_t) * np.log((1 - b_t) / (1 - b_s))
    return T**2 * alpha * tckd + beta * nckd


@row("MultiLabel", "sample", [*LOGITS, (3, 1)], [{"T": 2}])
def multi_label(s, t, y, T=1.0):
    p_s, p_t = (1 / (1 + np.exp(-z / T)) for z in (s, t))
    return T**2 * np.mean(rel_entr(p_t, p_s) + rel_entr(1 - p_t, 1 - p_s))


@row("HardTarget", "sample", LOGITS)
def hard_target(s, t, y):
    return -np.log(softmax(s)[max(range(len(t)), key=lambda i: t[i])])


@row(
    "DIST",
    "batch",
    [(6, 5), (2, 2), (3, 4), (2, 3, 2, 2), (2, 4, 3, 2), (3, 3, 7), (1, 3, 4)],
    [{"beta": 0.5, "gamma": 2.0, "T": 4.0}],
)
def dist(s, t, beta=1.0, gamma=1.0, T=1.0):
    p_s, p_t = (softmax(z / T, axis=1) for z in (s, t))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)]
    return T**2 * (beta * (1 - np.mean(rows)) + gamma * (1 - np.mean(columns)))


# Of feature maps, of one pair of layers: student, teacher

MAPS = [(3, 4, 5, 6), (1, 2, 3, 3), (4, 1, 2, 7), (2, 3, 2, 2)]
CHANNELS = [((3, 4, 5, 5), (3, 7, 5, 5))]
TOKENS = [(3, 5, 4), (2, 7, 3)]
RANKS = [(3, 6), (3, 2, 7), (3, 2, 2, 2, 2)]


def channels_first(f):
    "Tokens (B, N, C) have them last."
    return np.moveaxis(f, -1, 1) if f.ndim == 3 else f


@row("Attention", "layers", [*MAPS, *CHANNELS, *TOKENS, ((3, 5, 4), (3, 5, 9))], [{"p": p} for p in (1, 3, 4, 2.5)])
def attention(s, t, p=2.0):
    maps = []
    for f in map(channels_first, (s, t)):
        energy = np.stack([sum(abs(channel) ** p for channel in sample).ravel() for sample in f])
        maps.append(energy / np.sqrt((energy**2).sum(1, keepdims=True)))
    return np.mean((maps[0] - maps[1]) ** 2)


@row("FitNet", "layers", MAPS + RANKS)
def fitnet(s, t):
    return sum((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)) / s.size


@row("ActivationBoundaries", "layers", MAPS + RANKS, [{"m": 0.5}])
def boundaries(s, t, m=2.0):
    total = 0.0
    for a, b in zip(s.flat, t.flat, strict=True):
        if b > 0:
            total += max(m - a, 0) ** 2
        else:
            total += max(a + m, 0) ** 2
    return total / s.size


@row("Cosine", "layers", [*MAPS, *TOKENS, (3, 6)])
def cosine(s, t):
    a, b = (np.moveaxis(channels_first(f), 1, -1).reshape(-1, channels_first(f).shape[1]) for f in (s, t))
    return np.mean([1 - u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(a, b, strict=True)])


@row("CWD", "layers", [*MAPS, *TOKENS, (2, 3, 2, 3, 4)], [{"T": 1}])
def cwd(s, t, T=4.0):
    total = 0.0
    s, t = map(channels_first, (s, t))
    for f, g in zip(s.reshape(-1, s[0, 0].size), t.reshape(-1, t[0, 0].size), strict=True):  # channel by channel
        q, p = np.exp(f / T) / np.exp(f / T).sum(), np.exp(g / T) / np.exp(g / T).sum()
        total += np.sum(p * np.log(p / q))
    return T**2 * total / (s.shape[0] * s.shape[1])


# Of relations between the samples of a batch, of one pair of layers: student, teacher

ANY = [*itertools.product([(3, 4, 5, 5), (3, 6), (3, 2, 7), (3,)], [(3, 2, 2, 8), (3, 1, 2, 3, 4)])]
FIVE = [*itertools.product([(5, 4, 3, 2), (5, 6), (5,)], [(5, 2, 2, 4), (5, 1, 2, 3, 2), (5, 3)])]
FEW = [((n, 2, 2, 2), (n, 3)) for n in (2, 3, 5)]
RELATIONS = [(5, 4, 3, 3), *FIVE, *FEW]


@row("Similarity", "layers", MAPS + CHANNELS + ANY, [{"p": 1}, {"p": math.inf}])
def similarity(s, t, p=2.0):
    def rows(f):
        for a in f:
            row = np.array([np.vdot(a, b) for b in f])
            yield row / np.linalg.norm(row, ord=p)

    return np.mean([(a - b) ** 2 for a, b in zip(rows(s), rows(t), strict=True)])


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


@row("RKD", "layers", RELATIONS, [{"w_d": 2, "w_a": 0}, {"w_d": 0, "w_a": 3}], rel32=1e-4)
def rkd(s, t, w_d=25.0, w_a=50.0):
    s, t = (f.reshape(len(f), -1) for f in (s, t))
    n = range(len(s))

    def unit(v):
        return v / np.linalg.norm(v) if v.any() else v

    def distances(f):
        d = np.array([[np.linalg.norm(a - b) for b in f] for a in f])
        apart = [d[i, j] for i in n for j in n if i != j]
        return d / np.mean(apart) if any(apart) else d

    def cosine(f, i, j, k):
        return unit(f[i] - f[j]) @ unit(f[k] - f[j])

    far = [huber(x) for x in (distances(s) - distances(t)).flat]
    turned = [huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in itertools.product(n, repeat=3)]
    return w_d * np.mean(far) + w_a * np.mean(turned)


@row("PKT", "layers", RELATIONS, rel32=1e-4)
def pkt(s, t):
    def near(f):
        f = f.reshape(len(f), -1)
        for a in f:
            row = [(a @ b / np.sqrt((a @ a) * (b @ b)) + 1) / 2 if a.any() and b.any() else 0.5 for b in f]
            yield [x / sum(row) for x in row]

    rows = zip(near(t), near(s), strict=True)
    return np.mean([p * np.log((p + 1e-7) / (q + 1e-7)) for row in rows for p, q in zip(*row, strict=True)])
