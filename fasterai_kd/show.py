"""Pictures and tables for notebooks: `from fasterai_kd.show import *`.

Each picture draws in `ax`, or in a new figure, and returns the axes to go on with. Where a student or a teacher is
expected, a `Learner` also works; models run in evaluation mode and are left as they were.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from torch import Tensor

from ._docs import describe_parameters
from ._layer_similarity import Layers, attention_maps, cka_matrix, layer_features, layer_names, linear_cka
from ._tensors import plain, shape_of
from .distillation_callback import KnowledgeDistillationCallback
from .losses.matching import LayerPairs
from .payoff import LATENCY, PARAMETERS, RATIOS, SIZES, compare_models

__all__ = [
    "compare_models",
    "linear_cka",
    "plot_losses",
    "plot_similarity",
    "plot_tradeoff",
    "show_attention",
    "show_pairs",
]

COLORS = BLUE, VERMILION, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # Okabe & Ito
GREY, MAPS = "0.4", "viridis"


def show_pairs(
    pairs: LayerPairs,  # of `match_feature_layers`
    ax: Axes | None = None,
) -> Axes:
    "The student's layers on the left, the teacher's on the right; a line says what fits, dashed if not every loss."
    if not isinstance(pairs, LayerPairs):
        raise TypeError(f"show_pairs draws what match_feature_layers returns, got {pairs!r}")
    ax = _axes(ax, (8, 0.8 + 0.6 * len(pairs.rows)))
    for i, (student, teacher, resolution, channels, fit) in enumerate(pairs.rows):
        ax.plot([0, 1], [i, i], color=GREY, lw=1.5, ls="-" if fit == "all" else "--", zorder=1)
        for x, name, ha, color in ((0, student, "right", BLUE), (1, teacher, "left", VERMILION)):
            box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": color, "lw": 1.5}
            ax.text(x, i, name, ha=ha, va="center", bbox=box)
        if fit:
            sizes = f"{resolution.replace('x', '×')}, {channels} channels".replace("<->", "↔")
            ax.text(0.5, i - 0.06, sizes, ha="center", va="bottom", size="small")
            ax.text(0.5, i + 0.06, "all losses" if fit == "all" else fit, ha="center", va="top", size="small")
    ax.text(0, -0.6, "student", ha="right", color=BLUE, weight="bold")
    ax.text(1, -0.6, "teacher", ha="left", color=VERMILION, weight="bold")
    ax.set(xlim=(-0.5, 1.5), ylim=(len(pairs.rows) - 0.4, -1))
    ax.axis("off")
    return ax


def show_attention(
    x: Tensor,  # one image (C, H, W), as the models get it
    student: Any,  # model or Learner
    teacher: Any,  # model or Learner
    pairs: Layers | None = None,  # layers to compare; None: those of `match_feature_layers`
    before: Any = None,  # the student before the training, say a deepcopy of it
    ax: Any = None,  # array of axes, a row for each pair
    overlay: bool = False,  # draw the maps over the image
) -> Any:
    """Where layers are active, a row for each pair: the mean over channels of F², each map from 0 to its own maximum.

    Returns an array of axes: rows × (image, student before, student after, teacher).
    Raises ValueError for more than one image, and for layers that give no maps.
    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    xb = plain(x)[None] if x.ndim == 3 else plain(x)
    if xb.ndim != 4 or len(xb) != 1:
        raise ValueError(f"show_attention takes one image (C, H, W), got {shape_of(x)}: give xb[0]")
    names_s, names_t = layer_names(pairs, student, teacher, xb)
    if len(names_s) != len(names_t):
        raise ValueError(f"layers pair by position: got {names_s} of the student and {names_t} of the teacher")
    columns = {"image": [_image(xb[0])] * len(names_s)}
    for title, model in _students(student, before).items():
        columns[title] = [m[0].numpy() for m in attention_maps(model, names_s, xb, "student")]
    columns["teacher"] = [m[0].numpy() for m in attention_maps(teacher, names_t, xb, "teacher")]
    axes = _axes(ax, (2 * len(columns) + 0.4, 2 * len(names_s) + 0.3), len(names_s), len(columns))
    for column, (title, maps) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title)
        for a, m in zip(column, maps, strict=True):
            over = overlay and title != "image"
            frame = (-0.5, xb.shape[3] - 0.5, xb.shape[2] - 0.5, -0.5) if over else None
            if over:
                a.imshow(columns["image"][0], cmap="gray", vmin=0)
            a.imshow(m, cmap="gray" if title == "image" else MAPS, vmin=0, alpha=0.6 if over else None, extent=frame)
            a.set(xticks=[], yticks=[])
    for a, s, t in zip(axes[:, 0], names_s, names_t, strict=True):
        a.set_ylabel(f"{s} ↔ {t}")
    return axes


def plot_losses(
    kd: KnowledgeDistillationCallback,  # after a fit
    smooth: float = 0.8,  # share of the past in the running means, drawn over the losses themselves; 0: none
    ax: Axes | None = None,
) -> Axes:
    """Task and distillation loss in each step of the last fit, without the callback's weight, which is on the right.

    The parts of a combined loss are there with their own weights and schedules: one that fades falls.

    The scale is logarithmic if no loss is ≤ 0. There are gaps where the teacher did not run.
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth must be at least 0 and below 1, got {smooth}")
    losses = {name: np.asarray(values) for name, values in kd.history.items() if name != "weight"}
    if not kd.history["weight"]:
        raise ValueError("kd.history has no steps: train with cbs=kd first")
    ax = _axes(ax, (7, 3.5))
    for (name, values), color in zip(losses.items(), cycle(COLORS), strict=False):
        label = {"task_loss": "task loss", "kd_loss": "distillation loss"}.get(name, name)
        if smooth:
            ax.plot(values, color=color, alpha=0.25, lw=1)
        ax.plot(_running_mean(values, smooth), color=color, label=label)
    ax.set(xlabel="step", ylabel="loss", yscale="linear" if any((v <= 0).any() for v in losses.values()) else "log")
    right = ax.twinx()
    right.plot(kd.history["weight"], color=GREY, ls=":", label="weight (right)")
    right.set(ylabel="weight", ylim=(0, 1.05 * max(kd.history["weight"]) or 1))
    lines = [*ax.get_legend_handles_labels()[0], *right.lines]
    ax.legend(handles=lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(3, len(lines)), frameon=False)
    return ax


def plot_similarity(
    student: Any,  # model or Learner
    teacher: Any,  # model or Learner
    xb: Tensor | tuple[Tensor, ...],  # a batch as the models get it, the larger the better
    layers: Layers | None = None,  # {"student": names, "teacher": names}; None: those of `match_feature_layers`
    before: Any = None,  # the student before the training, say a deepcopy of it
    ax: Any = None,  # with `before` an array of two axes
) -> Any:
    "How alike each layer of the student and each of the teacher see a batch, by `linear_cka` from 0 to 1."
    names_s, names_t = layer_names(layers, student, teacher, xb)
    features_t, students = layer_features(teacher, names_t, xb, "teacher"), _students(student, before)
    figsize = (1 + 0.75 * len(names_t)) * len(students), 1.2 + 0.6 * len(names_s)
    axes = _axes(ax, figsize, *([] if before is None else [2]))
    for a, (title, model) in zip(np.atleast_1d(axes), students.items(), strict=True):
        cka = cka_matrix(layer_features(model, names_s, xb, "student"), features_t).numpy()
        a.imshow(cka, cmap=MAPS, vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(cka):
            a.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        a.set(title="linear CKA", ylabel=title, xlabel="teacher", yticks=range(len(names_s)), yticklabels=names_s)
        _name_ticks(a, names_t)
    return axes


def plot_tradeoff(
    table: pd.DataFrame,  # of `compare_models`
    metric: str | None = None,  # column to show; None: the first metric
    arrow: tuple[str, str] | None = None,  # from a row to another; None: from "student alone" to the last row
    ax: Axes | None = None,
) -> Axes:
    """A metric against latency, on a logarithmic axis; the area of a disc shows the number of parameters.

    Raises ValueError for a table without metrics, an unknown metric, or an arrow between unknown rows.
    """
    metrics = [name for name in table if name not in (*SIZES, *RATIOS)]
    if not {LATENCY, PARAMETERS} <= set(table) or not metrics or metric not in (None, *metrics):
        raise ValueError(f"plot_tradeoff needs a table of compare_models with metrics, got {metric=} of {list(table)}")
    if arrow is None and "student alone" in table.index[:-1]:
        arrow = ("student alone", table.index[-1])
    if arrow is not None and not set(arrow) <= set(table.index):
        raise ValueError(f"arrow must name two rows of {list(table.index)}, got {arrow}")
    y, ms, areas = table[metric or metrics[0]], table[LATENCY], 2500 * table[PARAMETERS] / table[PARAMETERS].max()
    ax = _axes(ax, (7, 4))
    for name, color in zip(table.index, cycle(COLORS), strict=False):
        ax.scatter(ms[name], y[name], s=areas[name], color=color, alpha=0.7, lw=0)
        text, right = f"{name}\n{table[PARAMETERS][name]:,} parameters", 8 + (areas[name] / np.pi) ** 0.5
        ax.annotate(text, (ms[name], y[name]), (right, 0), textcoords="offset points", va="center")
    if arrow is not None:
        tail, head = ((ms[name], y[name]) for name in arrow)
        style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 5, "shrinkB": 5, "mutation_scale": 15}
        ax.annotate("", head, tail, arrowprops=style)
    ax.set(xscale="log", xlabel=f"latency in ms, batch of 1{_on(table)}", ylabel=y.name)
    ax.set_xlim(ms.min() / 2, ms.max() * 6)  # room for the names
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(y=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _on(table: pd.DataFrame) -> str:
    return f", {table.attrs['device']}" if "device" in table.attrs else ""


def _axes(ax: Any, figsize: tuple[float, float], *shape: int) -> Any:
    "`ax` if given, else new axes; an array if there is a shape."
    if ax is None:
        fig = plt.figure(figsize=figsize, layout="constrained")
        return fig.subplots(*(1, 1, *shape)[-2:], squeeze=False).reshape(shape)[()]
    if np.shape(ax) != shape:
        raise ValueError(f"ax must be {f'an array of axes of shape {shape}' if shape else 'one axes'}, got {ax!r}")
    return np.asarray(ax) if shape else ax


def _name_ticks(ax: Axes, names: Sequence[str]) -> None:
    "Names along the x axis, turned if they are long."
    turned = max(map(len, names)) > 5
    align = "right" if turned else "center"
    ax.set_xticks(range(len(names)), names, rotation=45 * turned, ha=align, rotation_mode="anchor")


def _students(student: Any, before: Any) -> dict[str, Any]:
    return {"student": student} if before is None else {"student before": before, "student after": student}


def _image(x: Tensor) -> Any:
    "(H, W, 3) or (H, W), from 0 to 1."
    x = x.detach().cpu().float()
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-9)
    return (x.permute(1, 2, 0) if len(x) == 3 else x.mean(0)).numpy()


def _running_mean(values: Any, beta: float) -> Any:
    "Exponentially weighted, unbiased from the first step on; nan stays nan."
    total, weight, means = 0.0, 0.0, np.full(len(values), np.nan)
    for i in np.flatnonzero(~np.isnan(values)):
        total, weight = beta * total + values[i], beta * weight + 1
        means[i] = total / weight
    return means


for _name in __all__:
    describe_parameters(globals()[_name])
