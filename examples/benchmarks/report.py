"The table and the picture of benchmark_losses.py, from its rows alone."

from math import sqrt

import numpy as np
from benchmarks.variants import get_variants
from matplotlib.figure import Figure
from pictures import plot_comparison
from scipy.stats import t as student_t

FASHION = (
    "Fashion-MNIST, 28x28, 10 classes: 55,000 of its training images to train, 5,000 to tune, its own 10,000 to test"
)
ABOUT = {
    "digits": "scikit-learn's handwritten digits, 8x8, 10 classes: 797 images for training, 300 to tune, 700 to test",
    "fashion-mnist": FASHION,
    "fashion-mnist-all": f"{FASHION}. Teacher and student are trained with the same images",
    "pets": "Oxford-IIIT Pets, cats against dogs: 70 % of the images for training, 10 % to tune, 20 % to test",
    "cifar100": "CIFAR-100, 32x32, 100 classes: its training and its test images, nothing to tune",
}
TITLES = {
    "digits": "Losses on digits",
    "fashion-mnist": "Losses on Fashion-MNIST, few labels",
    "fashion-mnist-all": "Losses on Fashion-MNIST, all labels",
    "pets": "Losses on Oxford Pets",
    "cifar100": "Losses on CIFAR-100",
}
GROUPS = {
    "": "",
    "default": "the eight with the losses guide's weights",
    "published": "published weights",
    "newer": "newer losses, published weights",
    "auto": "`weight='auto'`",
    "tuned": "weight chosen on the tune split",
    "combined": "two losses",
}
HOW = (
    "Accuracy in % on the test split, mean ± standard deviation over the seeds; all rows of a table have the same "
    "images, steps and learning rate. Nothing was chosen on the test split: the learning rate and the tuned weights "
    "were, on the tune split, with other seeds and the first student."
)
ASKED = (
    "Does anything beat the best single loss with the guide's weights? In each group the row is taken that did best on "
    "the tune split, averaged over these seeds; that single loss is {}. Differences on the test split are by seed, "
    "with their 95 % interval (Student's t):\n"
)
NOTES = """\
- Feature losses can lose: weights that work for one pair of models are too large for another, and maps of a student of
  few channels cannot follow every map of its teacher.
- On two classes `DecoupledKD` equals `SoftTarget` at T=4, up to its weight: there are no other classes to decouple.
- `FitNet` and `ActivationBoundaries` compare maps value by value, so they have `adapter="auto"`: a 1x1 convolution with
  BatchNorm that learns along where channels differ. fasterai has none, so it is beside them only where they are equal.
- fasterai blends, so it has no rows where the task loss has a weight of its own, and eight losses.
- Many rows and few seeds: a difference of one row may be chance. The tune split is small too, and its picks change
  with the seeds. Trainings are short; with longer ones, other data or models the order may be another.
- `auto` sets the weight of the whole: within two losses the ratio is fixed, 0.9 to 1000 with `Attention` as published,
  else 1 to 1.
- One teacher for all; ± is the standard deviation over seeds, which change initial weights, order and augmentation of
  the images and, where not all are labeled, which ones are."""


class Runs:
    "The reported accuracies of one student: row → seed → (tune, test)."

    def __init__(self, rows):
        self.groups, self.accs, self.peer, settings = {}, {}, {}, {}
        for row in rows:
            how = dict(row["settings"])
            name, seed, library = (row["group"], row["name"]), how.pop("seed"), how["library"]
            if settings.setdefault((name, library), how) != how:
                raise ValueError(f"there are runs of {name} with different settings: use another folder")
            kind = self.accs if library == "fasterai_kd" else self.peer
            kind.setdefault(name, {})[seed] = row["tune"], row["test"]

    def test(self, row, peer=False):
        return [test for _, test in (self.peer if peer else self.accs).get(row, {}).values()]

    def pick(self, rows):
        "The best of them on the tune split."
        rows = [r for r in rows if r in self.accs]
        return max(rows, key=lambda r: np.mean([tune for tune, _ in self.accs[r].values()]), default=None)

    def difference(self, row, base):
        "Of their accuracies on the test split, for each seed that both have."
        a, b = self.accs[row], self.accs[base]
        return np.array([a[seed][1] - b[seed][1] for seed in a if seed in b])


ALONE = ("", "student alone")


def write_report(rows, args):
    "OUT/DATA.md and OUT/DATA.png."
    teachers = {row["settings"]["teacher"]: row for row in rows if row["settings"]["stage"] == "teacher"}
    sections = {}
    for row in rows:
        if row["settings"]["stage"] == "report":
            sections.setdefault((row["settings"]["teacher"], row["settings"]["student"]), []).append(row)
    sections = {key: Runs(its_rows) for key, its_rows in sections.items()}
    if not sections:
        raise ValueError(f"no finished runs of {args.data} in {args.out}")
    parts = [head(rows, args.data), given_lr(rows)[1]]
    for (teacher, student), runs in sections.items():
        parts += [f"## {teacher} teaches {student}", about(teachers[teacher], rows, student), table(runs)]
        parts += [answer(runs)] if has_tune(runs) else []
    parts += [choices(rows), "## Notes", NOTES, f"![The best row of each group on the tune split]({args.data}.png)"]
    (args.out / f"{args.data}.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    draw(sections, args.out / f"{args.data}.png")
    print(f"{args.out / args.data}.md, .png")


def choices(rows):
    "What was tried on the tune split."
    tried = {}
    for row in rows:
        if row["settings"]["stage"] == "tune":
            s = row["settings"]
            tried.setdefault((row["name"], s["student"], s["recipe"][4]), []).append(row["tune"])
    if not tried:
        return ""
    lines = [["row", "student", "lr", "accuracy on the tune split", "seeds"], ["---"] * 5]
    for (name, student, lr), accs in tried.items():
        lines.append([name if name == ALONE[1] else code(name), student, f"{lr:g}", spread(accs), str(len(accs))])
    return "## Choices\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def has_tune(runs):
    return all(tune is not None for tune, _ in runs.accs[ALONE].values())


def head(rows, data):
    settings = [row["settings"] for row in rows if row["settings"]["stage"] == "report"]
    values = {name: unique(s[name] for s in settings) for name in ("teacher", "student", "seed", "library")}
    versions = {name: " and ".join(unique(row[name] for row in rows)) for name in ("torch", "fastai", "device")}
    peer = " --peer" if "fasterai" in values["library"] else ""
    used = unique(part[0] for s in settings for part in s["parts"])
    every = {part[0] for v in get_variants(None) for part in v.parts}
    losses = "" if set(used) == every else f" --losses {','.join(used)}"
    commands = [
        f"python examples/benchmark_losses.py --data {data} --teacher {teacher} --student "
        f"{','.join(unique(s['student'] for s in settings if s['teacher'] == teacher))} --seeds "
        f"{len(values['seed'])}{losses}{given_lr(rows)[0]}{peer} --out nbs/results"
        for teacher in values["teacher"]
    ]
    return (
        f"# {TITLES[data]}\n\n```bash\n" + "\n".join(commands) + "\n```\n\n"
        f"Made by this script, torch {versions['torch']}, fastai {versions['fastai']}, {versions['device']}; the "
        f"single runs, with all settings, are in [{data}.jsonl]({data}.jsonl).\n\n{ABOUT[data]}. {HOW}"
    )


def given_lr(rows):
    "The option and a sentence, where the learning rate is not the one that was best on the tune split."
    used = {row["settings"]["recipe"][4] for row in rows if row["settings"]["stage"] == "report"}
    tried = {}
    for row in rows:
        if row["settings"]["stage"] == "tune" and row["name"] == ALONE[1]:
            tried.setdefault(row["settings"]["recipe"][4], []).append(row["tune"])
    best = max(tried, key=lambda lr: np.mean(tried[lr]), default=None)
    if best is None or len(used) > 1 or best in used:
        return "", ""
    (lr,) = used
    have = f" instead of {np.mean(tried[lr]):.1f}" if lr in tried else ""
    return (
        f" --lr {lr:g}",
        f"**The learning rate is {lr:g}, but {best:g} is better for the student alone on the tune split: "
        f"{np.mean(tried[best]):.1f}{have}. Gains may differ at that one.**",
    )


def about(teacher, rows, student):
    all_settings = [row["settings"] for row in rows if row["settings"]["stage"] == "report"]
    s = next(s for s in all_settings if s["student"] == student)
    return f"Teacher: {recipe(s['teacher_recipe'])}; {teacher['test']:.1f} %. Student: {recipe(s['recipe'])}."


def recipe(settings):
    images, draws, epochs, bs, lr, *_ = settings
    images = "all training images" if images is None else f"{images:,} labeled images"
    return f"{images}, {epochs} epochs of {'each once' if draws is None else f'{draws:,}'}, batches of {bs}, lr {lr:g}"


def table(runs):
    lines = [["", "loss", "accuracy", "gain", "better in"], ["---"] * 5]
    if runs.peer:
        lines = [[*lines[0], "fasterai 0.4.1"], ["---"] * 6]
    order = sorted(runs.accs, key=lambda row: list(GROUPS).index(row[0]))
    last = ""
    for row in order:
        gain = runs.difference(row, ALONE)
        group, name = row
        cells = [GROUPS[group] if group != last else "", name if row == ALONE else code(name), spread(runs.test(row))]
        cells += ["", ""] if row == ALONE else [f"{gain.mean():+.1f}", f"{sum(gain > 0)} of {len(gain)}"]
        cells += [spread(runs.test(row, peer=True))] if runs.peer else []
        lines.append(cells)
        last = group
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def answer(runs):
    "Does it pay to go beyond the best single loss?"
    single = runs.pick([row for row in runs.accs if row[0] == "default"])
    if single is None:
        return ""
    best = runs.pick([row for row in runs.accs if row[0] not in ("", "combined")])
    text = [ASKED.format(code(single[1]))]
    for group in ("published", "newer", "auto", "tuned", "combined"):
        if row := runs.pick([row for row in runs.accs if row[0] == group]):
            text.append(f"- {GROUPS[group]}, {code(row[1])}: {compare(runs.difference(row, single))}")
            if group == "combined" and best != single:
                against = f"{code(best[1])} ({GROUPS[best[0]]})"
                text.append(
                    f"- the same against the best single loss of all groups, {against}: "
                    f"{compare(runs.difference(row, best))}"
                )
    text.append(f"- {code(single[1])} itself against the student alone: {compare(runs.difference(single, ALONE))}")
    return "\n".join(text)


def compare(d):
    if len(d) < 2:
        return f"{d.mean():+.1f}, one seed"
    half = student_t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / sqrt(len(d))
    verdict = "better" if d.mean() > half else "worse" if d.mean() < -half else "no difference shown"
    return f"{d.mean():+.1f} ± {half:.1f}, better in {sum(d > 0)} of {len(d)} seeds: **{verdict}**"


def draw(sections, path):
    "The student alone and the best row of each group on the tune split; without one, all rows."
    shown = []
    for runs in sections.values():
        rows = list(runs.accs)
        if has_tune(runs):
            rows = [runs.pick([row for row in runs.accs if row[0] == group]) for group in GROUPS]
        shown.append({row: runs.test(row) for row in rows if row})
    fig = Figure(figsize=(8 * len(shown), 1 + 0.6 * max(map(len, shown))), layout="constrained")
    for ax, key, accs in zip(fig.subplots(1, len(shown), squeeze=False)[0], sections, shown, strict=True):
        names = {row: f"{row[0]}: {row[1]}" if row[0] else row[1] for row in accs}
        plot_comparison({names[row]: values for row, values in accs.items()}, names[ALONE], ax)
        ax.set(title="{} teaches {}".format(*key), xlabel="test accuracy in %")
    fig.savefig(path, dpi=110)


def spread(accs):
    if not accs:
        return ""
    return f"{np.mean(accs):.1f}" + (f" ± {np.std(accs, ddof=1):.1f}" if len(accs) > 1 else "")


def code(name):
    return f"`{name}`"


def unique(values):
    return list(dict.fromkeys(values))
