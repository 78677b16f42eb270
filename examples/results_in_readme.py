"""The README's table and picture of results, from the files of benchmark_losses.py alone.

python results_in_readme.py
"""

import json
import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from benchmarks.report import ALONE, Runs  # noqa: E402
from pictures import plot_comparison  # noqa: E402

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by examples/results_in_readme.py -->\n", "<!-- end -->\n"
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
        lines = (ROOT / "nbs" / "results" / f"{data}.jsonl").read_text(encoding="utf-8").splitlines()
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
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(accs, path):
    fig = Figure(figsize=(12, 4), layout="constrained")
    for ax, column in zip(fig.subplots(1, 2), list(accs)[:2], strict=True):
        shown = {row.replace("`", ""): accs[column][row] for row in DRAWN}
        plot_comparison(shown, "student alone", ax)
        ax.set(title=column, xlabel="test accuracy in %, 5 seeds")
    fig.savefig(path, dpi=110, metadata={"Software": None})


def main(readme=ROOT / "README.md", picture=ROOT / "nbs" / "images" / "results.png"):
    accs = accuracies()
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + table(accs) + END + rest.partition(END)[2], encoding="utf-8")
    draw(accs, picture)


if __name__ == "__main__":
    main()
