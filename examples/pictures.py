"""Two pictures of the notebooks and the results: accuracies over seeds, and what a temperature does.

from pictures import plot_comparison, plot_temperature
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

BLUE, GREY = "#0072B2", "0.4"


def plot_comparison(
    results: Mapping[str, Sequence[float]],  # name → accuracies, one for each seed
    baseline: str | float | None = None,  # which of them is the student alone, or its accuracy
    ax: Axes | None = None,
) -> Axes:
    "A point for each seed, a bar at the mean, a line at the baseline; names with mean ± standard deviation and gain."
    accs = {name: np.asarray(values, dtype=float) for name, values in results.items()}
    if not accs or any(a.ndim != 1 or not a.size for a in accs.values()):
        raise ValueError(f"results must be name → accuracies over seeds, got {results}")
    if isinstance(baseline, str) and baseline not in accs:
        raise ValueError(f"baseline must be one of {', '.join(accs)}, or a number, got {baseline!r}")
    base = accs[baseline].mean() if isinstance(baseline, str) else baseline
    digits = 1 if max(a.max() for a in accs.values()) > 1 else 3  # in % or not
    ax, labels = _new_axes(ax, (7, 0.9 + 0.55 * len(accs))), []
    if base is not None:
        ax.axvline(base, color=GREY, ls="--", lw=1, zorder=1)
    for i, (name, a) in enumerate(accs.items()):
        color = GREY if name == baseline else BLUE
        ax.plot(a, [i] * len(a), "o", color=color, alpha=0.5, ms=8, mec="none")
        ax.plot(a.mean(), i, "|", color=color, ms=24, mew=2.5)
        std = f" ± {a.std(ddof=1):.{digits}f}" if len(a) > 1 else ""
        gain = f" ({a.mean() - base:+.{digits}f})" if base is not None and name != baseline else ""
        labels.append(f"{name}\n{a.mean():.{digits}f}{std}{gain}")
    ax.set(
        xlabel="accuracy in %" if digits == 1 else "accuracy",
        yticks=range(len(labels)),
        yticklabels=labels,
        ylim=(len(labels) - 0.5, -0.5),
    )
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_temperature(
    logits: Tensor,  # (C,) of one sample
    T: Sequence[float] = (1, 2, 4, 8),  # temperatures
    classes: Sequence[Any] | None = None,  # their names: dls.vocab
    n: int = 10,  # how many classes to show: the most probable ones
    ax: Axes | None = None,
) -> Axes:
    "The probabilities of one sample, softened by each temperature."
    logits = torch.as_tensor(logits).detach().float().cpu()
    if logits.ndim != 1 or (classes is not None and len(classes) != len(logits)):
        given = "" if classes is None else f" and {len(classes)} classes"
        raise ValueError(f"plot_temperature takes the logits (C,) of one sample, got {tuple(logits.shape)}{given}")
    if not len(T) or min(T) <= 0:
        raise ValueError(f"temperatures must be above 0, got {T}")
    shown = logits.topk(min(n, len(logits))).indices.sort().values
    names = [str(j if classes is None else classes[j]) for j in shown.tolist()]
    ax, x, width = _new_axes(ax, (7, 3.2)), np.arange(len(shown)), 0.8 / len(T)
    for i, (t, color) in enumerate(zip(T, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(T))), strict=True)):
        probs = (logits / t).softmax(0)[shown].numpy()
        ax.bar(x + (i - (len(T) - 1) / 2) * width, probs, width, color=color, label=f"T = {t:g}")
    ax.set(xlabel="class", ylabel="probability")
    ax.set_xticks(x, names)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def _new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    return plt.figure(figsize=figsize, layout="constrained").subplots() if ax is None else ax
