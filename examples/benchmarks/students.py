"Tables, findings and picture of benchmark_students.py, from its rows alone."

from itertools import pairwise

import numpy as np
from benchmarks.pages import (
    GAIN,
    MEAN,
    about_teacher,
    difference,
    flow,
    gain,
    half_width,
    listed,
    markdown,
    page_head,
    teacher_row,
)
from benchmarks.report import spread, unique
from matplotlib.figure import Figure

from fasterai_kd.show import COLORS

FILE = "students.jsonl"
HOWS = {"alone": "student alone", "labeled": "distilled"}
LATENCY = "of one image on one CPU thread: the lowest of 200 medians of 50 calls"
PAYOFF = {"alone": "student alone", "labeled": "student distilled", "unlabeled": "… and unlabeled images"}
TRAINING, TEST = 797, 700  # images of digits, as benchmarks/data.py splits them


def page(rows):
    some_sizes, some_epochs = split(rows)
    by_width, by_epochs = by(some_sizes, width_of), by(some_epochs, epochs_of)
    s = some_sizes[0]["settings"]
    images, draws, epochs, bs, *_ = s["recipe"]
    lrs = unique(row["settings"]["recipe"][4] for row in of(rows, "tune"))
    options = {"students": ",".join(map(str, by_width)), "sizes-epochs": epochs_of(some_sizes[0])}
    options |= {"epochs-student": width_of(some_epochs[0]), "epochs": ",".join(map(str, by_epochs))}
    options |= {"lrs": ",".join(f"{lr:g}" for lr in lrs), "draws": draws}
    options |= {} if s["teacher"] == "32" else {"teacher": s["teacher"]}
    about = f"""Fashion-MNIST, 28x28. {about_teacher(rows, "fashion-mnist")} All students learn from {images:,} labeled
    images; each seed has its own. An epoch draws each of them {draws // images} times. Batches of {bs},
    `fit_one_cycle`, images shifted by up to one pixel and mirrored. The loss is `SoftTarget` with
    `weight={s["weight"]}`. The learning rate is the one that suits the student alone best; the distilled student has
    the same. Nothing else was chosen by its accuracy, and nothing on the test images."""
    chosen = f"""Accuracy of the student alone after {epochs} epochs on the tune split, with
    {len(unique(row["settings"]["seed"] for row in of(rows, "tune")))} other seeds. The best of each row was taken."""
    return f"""{page_head("Size and epochs", rows, some_sizes, options, FILE, "benchmark_students.py")}
{flow(about)}

{MEAN} {GAIN}

![Accuracy against size and against epochs, alone and distilled](students.png)

## Size

<!-- sizes -->
{epochs_of(some_sizes[0])} epochs for each student. Latency {LATENCY}. The file holds the weights alone.

{sizes_table(rows, by_width)}

{sizes_findings(by_width)}
<!-- /sizes -->

## Epochs

<!-- epochs -->
A student of {width_of(some_epochs[0])} channels; each row is a training of its own.

{epochs_table(by_epochs)}

{epochs_findings(by_epochs)}
<!-- /epochs -->

## Learning rates

{flow(chosen)}

{rates_table(of(rows, "tune"), lrs)}

## The pay-off

{payoff_about(rows)}

{payoff_table(rows)}
"""


def by(rows, key):
    "Key of a row → how → seed → accuracy, in order."
    accs = {}
    for row in sorted(rows, key=key):
        s = row["settings"]
        accs.setdefault(key(row), {}).setdefault(s["how"], {})[s["seed"]] = row["test"]
    return accs


def of(rows, stage):
    return [row for row in rows if row["settings"]["stage"] == stage]


def width_of(row):
    return int(row["settings"]["student"])


def epochs_of(row):
    return row["settings"]["recipe"][2]


def split(rows):
    "Rows of the two tables: all widths at one number of epochs, all numbers of epochs at one width."
    runs = of(rows, "students")
    if not runs:
        raise ValueError(f"no finished runs in {FILE}")
    width = max(unique(map(width_of, runs)), key=lambda w: len({epochs_of(r) for r in runs if width_of(r) == w}))
    epochs = max(unique(map(epochs_of, runs)), key=lambda e: len({width_of(r) for r in runs if epochs_of(r) == e}))
    return [r for r in runs if epochs_of(r) == epochs], [r for r in runs if width_of(r) == width]


def sizes(rows, data):
    "Width → the row with its parameters, file size and latency."
    return {width_of(row): row for row in of(rows, "size") if row["settings"]["data"] == data}


def costs(row):
    return [f"{row['parameters']:,}", f"{row['kb']:,.0f} KB", f"{row['ms']:.2f} ms"]


def sizes_table(rows, accs):
    teacher, its = teacher_row(rows, "fashion-mnist"), sizes(rows, "fashion-mnist")
    width = int(teacher["settings"]["teacher"])
    lines = [["channels", "parameters", "file", "latency", *HOWS.values(), "gain"], ["---"] * 7]
    lines.append([f"{width}, teacher", *costs(its[width]), f"{teacher['test']:.1f}", "", ""])
    lines += [[str(width), *costs(its[width]), *cells(hows)] for width, hows in accs.items()]
    return markdown(lines)


def epochs_table(accs):
    lines = [["epochs", *HOWS.values(), "gain"], ["---"] * 4]
    return markdown([*lines, *([str(epochs), *cells(hows)] for epochs, hows in accs.items())])


def rates_table(rows, lrs):
    "Of the tune split; the best one in bold."
    lines = [["channels", *(f"{lr:g}" for lr in lrs)], ["---"] * (1 + len(lrs))]
    for width in unique(map(width_of, rows)):
        accs = [[r["tune"] for r in rows if width_of(r) == width and r["settings"]["recipe"][4] == lr] for lr in lrs]
        best = max(map(np.mean, accs))
        lines.append([str(width), *(f"**{spread(a)}**" if np.mean(a) == best else spread(a) for a in accs)])
    return markdown(lines)


def cells(hows):
    accs = [spread(list(hows.get(how, {}).values())) for how in HOWS]
    return [*accs, gain(difference(hows, "labeled", "alone"))]


def sizes_findings(accs):
    alone, distilled = means(accs, "alone"), means(accs, "labeled")
    texts = gain_findings(accs, "channels")
    for small, accuracy in distilled.items():
        if beaten := [width for width in alone if width > small and alone[width] < accuracy]:
            texts.append(
                f"Distilled, the student of {small} channels reaches {accuracy:.1f} %. Alone, the one of "
                f"{max(beaten)} reaches {alone[max(beaten)]:.1f} %."
            )
    for how, accuracies in ((HOWS["labeled"], distilled), (HOWS["alone"], alone)):
        steps = [f"{b - a:+.1f}" for a, b in pairwise(accuracies.values())]
        texts.append(f"Each doubling of the channels adds, {how}, {listed(steps)} points.")
    return bullets(texts)


def epochs_findings(accs):
    texts = gain_findings(accs, "epochs")
    for how, label in HOWS.items():
        accuracies = means(accs, how)
        first, previous, last = min(accuracies), *sorted(accuracies)[-2:]
        texts.append(
            f"{label.capitalize()}: {accuracies[first]:.1f} % with {first} epochs and {accuracies[last]:.1f} % with "
            f"{last}. The last {last - previous} epochs add {accuracies[last] - accuracies[previous]:+.1f} points."
        )
    return bullets(texts)


def means(accs, how):
    return {key: np.mean(list(hows[how].values())) for key, hows in accs.items() if how in hows}


def gain_findings(accs, what):
    gains = {key: difference(hows, "labeled", "alone") for key, hows in accs.items()}
    most, least = (f(gains, key=lambda key: gains[key].mean()) for f in (max, min))
    text = f"Distillation adds most with {most} {what} ({gains[most].mean():+.1f} points) and least with {least} "
    text += f"({gains[least].mean():+.1f})."
    if unclear := [str(key) for key, d in gains.items() if abs(d.mean()) <= half_width(d)]:
        text += f" The interval includes 0 with {listed(unclear)} {what}."
    return [text]


def bullets(texts):
    return "\n".join(f"- {text}" for text in texts)


def payoff_about(rows):
    run = of(rows, "payoff")[0]
    images, draws, epochs, *_ = run["settings"]["recipe"]
    seeds = len(unique(row["settings"]["seed"] for row in of(rows, "payoff")))
    return flow(
        f"""scikit-learn's handwritten digits. The teacher learned from {TRAINING} labeled images, the student from
        {images} of them, in {epochs} epochs of {draws:,} draws. In the last row the student also sees the other
        {TRAINING - images} images, without their labels. Accuracy on {TEST} test images, mean ± standard deviation over
        {seeds} seeds. Latency {LATENCY}; the file holds the weights alone."""
    )


def payoff_table(rows):
    "What the student costs and what it reaches, beside the teacher."
    teacher, its, runs = teacher_row(rows, "digits"), sizes(rows, "digits"), of(rows, "payoff")
    big, small = its[int(teacher["settings"]["teacher"])], its[width_of(runs[0])]
    lines = [["", "accuracy in %", "latency in ms", "file in KB", "parameters"], ["---", *["---:"] * 4]]
    large, little = ([f"{row['ms']:.2f}", f"{row['kb']:,.0f}", f"{row['parameters']:,}"] for row in (big, small))
    lines.append(["teacher", f"{teacher['test']:.1f}", *large])
    for how, label in PAYOFF.items():
        accs = [row["test"] for row in runs if row["settings"]["how"] == how]
        lines.append([label, spread(accs), *little])
    lines.append(["teacher / student", "", *(f"{big[name] / small[name]:.0f}×" for name in ("ms", "kb", "parameters"))])
    return markdown(lines)


def draw(rows, path):
    "Accuracy over parameters and over epochs."
    some_sizes, some_epochs = split(rows)
    fig = Figure(figsize=(9, 3.8), layout="constrained")
    teacher, axes = teacher_row(rows, "fashion-mnist")["test"], fig.subplots(1, 2, sharey=True)
    parameters = {width: row["parameters"] for width, row in sizes(rows, "fashion-mnist").items()}
    for ax, accs, xs in ((axes[0], by(some_sizes, width_of), parameters), (axes[1], by(some_epochs, epochs_of), None)):
        ax.axhline(teacher, color="0.4", ls="--", lw=1, label=f"teacher, {teacher:.1f} %")
        x = [xs[key] if xs else key for key in accs]
        for (how, label), color, marker in zip(HOWS.items(), COLORS, "os", strict=False):
            values = [list(hows[how].values()) for hows in accs.values()]
            errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            means = [np.mean(v) for v in values]
            ax.errorbar(x, means, errors, label=label, color=color, marker=marker, lw=2, capsize=4)
        ax.set(xscale="log", xlabel="parameters" if xs else "epochs")
        ax.set_xticks(x, [f"{value:,}" for value in x])
        ax.minorticks_off()
        ax.grid(axis="y", color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="test accuracy in %")
    axes[1].legend(frameon=False, loc="lower right")
    fig.savefig(path, dpi=130, metadata={"Software": None})
