"""The tables and pictures of the README, the guides and the page of results, from the stored results alone.

python results_in_readme.py
"""

import json
import re
import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from benchmark_losses import read_rows  # noqa: E402
from benchmarks.pages import markdown, teacher_row  # noqa: E402
from benchmarks.report import ALONE, Runs, spread  # noqa: E402
from benchmarks.students import PAYOFF, of, payoff_about, payoff_table, sizes  # noqa: E402
from pictures import plot_comparison  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "nbs" / "results"
COLUMNS = {  # data and student → its name
    ("digits", "6"): "digits, 100 labels",
    ("fashion-mnist", "8"): "Fashion-MNIST, 1,000 labels",
    ("fashion-mnist", "4"): "the same, 4 channels",
    ("fashion-mnist-all", "8"): "Fashion-MNIST, all labels",
}
EIGHT = ("SoftTarget", "DecoupledKD", "Logits", "Mutual", "Attention", "Similarity", "FitNet", "ActivationBoundaries")
ROWS = {  # group and name, or how it begins → its name here
    ALONE: "student alone",
    **{("default", name): f"`{name}`" for name in EIGHT},
    ("published", "Attention"): "`Attention`, published weight",
    ("published", "FitNet"): "`FitNet`, published weight",
    ("newer", "SoftTarget"): "`SoftTarget(T=2, standardize=True)`",
    ("newer", "DIST"): "`DIST(beta=2, gamma=2)`",
    ("newer", "RKD"): "`RKD`, last map",
    ("newer", "PKT"): "`PKT`, last map",
    ("auto", "SoftTarget"): '`SoftTarget(T=4)`, `weight="auto"`',
    ("auto", "Attention"): '`Attention`, `weight="auto"`',
    ("combined", "SoftTarget(T=4) + Attention, tuned"): "`SoftTarget(T=4)` + `Attention`, weights tuned",
}
DRAWN = (
    "student alone",
    "`SoftTarget`",
    "`DecoupledKD`",
    "`Attention`",
    "`FitNet`",
    "`RKD`, last map",
    list(ROWS.values())[-1],
)


def accuracies() -> dict[str, dict[str, np.ndarray]]:
    "Name of the column → name of the row → accuracy of each seed, in %."
    found = {}
    for (data, student), column in COLUMNS.items():
        lines = (RESULTS / f"{data}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["settings"]["stage"] == "report"]
        runs = Runs(row for row in rows if row["settings"]["student"] == student)
        found[column] = {}
        for (group, start), row in ROWS.items():
            names = [n for g, n in runs.accs if g == group and n.startswith(start)]
            found[column][row] = np.array([acc for name in names for acc in runs.test((group, name))])
    return found


def table(accs) -> str:
    lines = [["", *accs], ["---"] * (1 + len(accs))]
    for row in ROWS.values():
        cells = [row]
        for column in accs.values():
            a, base = column[row], column["student alone"]
            if not len(a):
                cells.append("–")
                continue
            gain = "" if row == "student alone" else f" ({(a - base).mean():+.1f})"
            cells.append(f"{a.mean():.1f} ± {a.std(ddof=1):.1f}{gain}")
        lines.append(cells)
    return markdown(lines)


def helps(accs) -> str:
    "Where distillation helps, and where it does not."
    rows = of(read_rows(RESULTS / "unlabeled.jsonl"), "labels")
    labels = {}
    for row in rows:
        labels.setdefault((row["settings"]["recipe"][0], row["settings"]["how"]), []).append(row["test"])
    cases = {
        "100 labels, and unlabeled images": (labels[100, "alone"], labels[100, "unlabeled"]),
        "100 labels": (labels[100, "alone"], labels[100, "labeled"]),
        "1,000 labels": (labels[1000, "alone"], labels[1000, "labeled"]),
        "all 55,000 labels": (labels[None, "alone"], labels[None, "labeled"]),
        "tiny student, `Attention` at its published weight": tuple(
            accs["the same, 4 channels"][row] for row in ("student alone", "`Attention`, published weight")
        ),
    }
    lines = [["Fashion-MNIST, 5 seeds", "student alone", "distilled", "gain"], ["---", "---:", "---:", "---:"]]
    for case, (alone, distilled) in cases.items():
        gain = f"{np.mean(distilled) - np.mean(alone):+.1f}"
        lines.append([case, f"{spread(list(alone))} %", f"{spread(list(distilled))} %", gain])
    return markdown(lines)


def fill(page: Path, **blocks: str) -> None:
    "What stands between <!-- name --> and <!-- /name -->."
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise ValueError(f"{page.name} has no block <!-- {name} --> ... <!-- /{name} -->")
        text = re.sub(pattern, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def draw_losses(accs, path):
    fig = Figure(figsize=(12, 4), layout="constrained")
    for ax, column in zip(fig.subplots(1, 2), list(accs)[:2], strict=True):
        shown = {row.replace("`", ""): accs[column][row] for row in DRAWN}
        plot_comparison(shown, "student alone", ax)
        ax.set(title=column, xlabel="test accuracy in %, 5 seeds")
    fig.savefig(path, dpi=110, metadata={"Software": None})


def draw_payoff(rows, path):
    "Accuracy over latency; areas are parameters, an arrow goes from the student alone to the distilled one."
    teacher, its, runs = teacher_row(rows, "digits"), sizes(rows, "digits"), of(rows, "payoff")
    big, small = (its[int(row["settings"][who])] for row, who in ((teacher, "teacher"), (runs[0], "student")))
    accs = {how: np.mean([r["test"] for r in runs if r["settings"]["how"] == how]) for how in PAYOFF}
    fig = Figure(figsize=(5, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.scatter(big["ms"], teacher["test"], s=600, color="0.6")
    ax.annotate("teacher", (big["ms"], teacher["test"]), (0, 16), textcoords="offset points", ha="center")
    area = max(12, 600 * small["parameters"] / big["parameters"])  # else too small to be seen
    for (how, acc), color in zip(accs.items(), ("0.4", "#0072B2", "#D55E00"), strict=True):
        ax.scatter(small["ms"], acc, s=area, color=color)
        text = f"{PAYOFF[how].removeprefix('… ')}, {acc:.1f} %"
        ax.annotate(text, (small["ms"], acc), (10, 0), textcoords="offset points", va="center", color=color)
    arrow = {"arrowstyle": "->", "color": "0.4", "shrinkA": 5, "shrinkB": 5}
    ax.annotate("", (small["ms"], accs["unlabeled"]), (small["ms"], accs["alone"]), arrowprops=arrow)
    ax.set(xscale="log", xlabel="latency of one image in ms (log)", ylabel="test accuracy in %")
    ax.set_xlim(small["ms"] / 1.4, big["ms"] * 1.6)
    ax.margins(y=0.2)
    ticks = [small["ms"], big["ms"]]
    ax.set_xticks(ticks, [f"{ms:.2f}" for ms in ticks])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150, metadata={"Software": None})


def tables(page: str) -> str:
    "The first table of a page of results, with the list after it."
    text = (RESULTS / page).read_text(encoding="utf-8")
    first = re.search(r"^\|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)[0]
    findings = re.search(r"## Findings\n\n(.*)", text, re.DOTALL)
    return f"{first}\n\n{findings[1].strip()}" if findings else first


def block(page: Path, name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page.read_text(encoding="utf-8"), re.DOTALL)[1]


def main(root=ROOT):
    accs, students, nbs = accuracies(), read_rows(RESULTS / "students.jsonl"), root / "nbs"
    fill(root / "README.md", payoff=f"{payoff_table(students)}\n\n{payoff_about(students)}", helps=helps(accs))
    labels, losses = tables("unlabeled.md"), table(accs)
    fill(nbs / "results" / "README.md", labels=labels, losses=losses, speed=tables("speed.md"))
    fill(nbs / "unlabeled.md", labels=labels)
    fill(nbs / "choosing_a_loss.md", losses=losses)
    fill(nbs / "choosing_a_student.md", sizes=block(RESULTS / "students.md", "sizes"))
    fill(nbs / "training_length.md", epochs=block(RESULTS / "students.md", "epochs"))
    draw_losses(accs, nbs / "images" / "results.png")
    draw_payoff(students, nbs / "images" / "payoff.png")


if __name__ == "__main__":
    main()
