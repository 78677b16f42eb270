"""How much unlabeled images and repeated views help a distilled student: the same steps and learning rate for all.

    python benchmark_unlabeled.py --out results                                  # both measurements
    python benchmark_unlabeled.py --measure labels --data fashion-mnist --labels 50,100,all --seeds 1 --out results
    python benchmark_unlabeled.py --out results --report                         # tables and picture again, no training

`labels`: test accuracy against the number of labels for a student alone, a student distilled on the labeled images, and
a student distilled with a batch of unlabeled images beside each labeled batch. OUT/unlabeled.md and .png show it.
`views`: accuracy, time and teacher runs with `RepeatedViews(k)` and a cached teacher. OUT/views.md shows it.

Each run is a line of OUT/unlabeled.jsonl with its settings. A run that is there is not repeated. No setting is chosen
by its accuracy: all students use the learning rate of the recipes in benchmarks/data.py.
"""

import argparse
import json
import time
import warnings

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from benchmark_losses import MODELS, Bench, read_rows  # noqa: E402
from benchmarks.data import Recipe  # noqa: E402
from benchmarks.pages import (  # noqa: E402
    ABOUT,
    GAIN,
    MEAN,
    about_teacher,
    count,
    difference,
    flow,
    gain,
    half_width,
    listed,
    markdown,
    page_head,
    teacher_row,
)
from benchmarks.report import spread, unique  # noqa: E402
from fastai.vision.all import *  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fasterai_kd.all import *  # noqa: E402
from fasterai_kd.show import COLORS  # noqa: E402

WEIGHT = 0.9  # of the distillation loss
HOWS = {
    "alone": "student alone",
    "labeled": "distilled on the labeled images",
    "unlabeled": "distilled, unlabeled images beside",
}
VIEWS = {"digits": Recipe(None, None, 24, 32, 2e-2), "fashion-mnist": Recipe(3000, None, 12, 64, 2e-2)}
GAINS = (
    ("Distillation on the labeled images", "labeled", "alone"),
    ("A batch of unlabeled images beside each labeled batch", "unlabeled", "labeled"),
)
VERDICTS = {
    "above that of live augmentation": lambda mean, half: mean > half,
    "below that of live augmentation": lambda mean, half: mean < -half,
    "not shown to differ from that of live augmentation": lambda mean, half: abs(mean) <= half,
}


class Counted(Teacher):
    "Counts the batches for which the teacher runs."

    runs = 0

    def predict(self, *inputs):
        self.runs += 1
        return super().predict(*inputs)


class Epochs(Callback):
    "CPU seconds and teacher runs of each epoch's training."

    def __init__(self, teacher):
        self.teacher, self.seconds, self.runs = teacher, [], []

    def before_train(self):
        self.start = time.process_time(), self.teacher.runs

    def after_train(self):
        self.seconds.append(round(time.process_time() - self.start[0], 3))
        self.runs.append(self.teacher.runs - self.start[1])


class Measure(Bench):
    "Runs what is not in the file yet, on one data set."

    name = "unlabeled.jsonl"

    def __init__(self, args, data):
        given = {"folder": args.folder, "out": args.out, "teacher": args.teacher}
        none = {f"{who}{what}": None for who in ("", "teacher_") for what in ("images", "draws", "epochs")}
        super().__init__(argparse.Namespace(**none | {"teacher_draws": args.teacher_draws}, **given, data=data))
        self.file = args.out / self.name
        self.done = {json.dumps(row["settings"], sort_keys=True): row for row in read_rows(self.file)}
        self.everything = self.task.dls(Recipe(None, None, 1, 64, 0), 0).train.dataset
        self.teacher = self.get_teacher()

    def label_run(self, student, n, draws, seed, how):
        "`n` labels, None: all; `how` is a key of HOWS."
        return self.student_run("labels", student, self.recipe._replace(images=n, draws=draws, epochs=1), seed, how)

    def student_run(self, stage, student, recipe, seed, how):
        settings = {**self.base, "stage": stage, "student": student, "recipe": list(recipe), "seed": seed}

        def train():
            learn = self.learner(student, recipe, seed)
            few = learn.dls.train
            # the images that are left, loaded and augmented as the labeled ones; their labels are not used
            beside = few.new(sorted(set(self.everything) - set(few.dataset))) if how == "unlabeled" else None
            kd = KnowledgeDistillationCallback(self.teacher, SoftTarget, weight=WEIGHT, unlabeled=beside)
            return {**self.fit(learn, recipe, *([] if how == "alone" else [kd])), "batches": len(few)}

        name = f"{recipe.images or 'all'} labels"
        return self.add({**settings, "how": how, "weight": WEIGHT}, name, how, train)

    def views_run(self, student, recipe, k, seed):
        "`k` views of each image, None: other ones in each epoch."
        settings = {**self.base, "stage": "views", "student": student, "recipe": list(recipe), "seed": seed}

        def train():
            learn = self.learner(student, recipe, seed)
            learn.dls.train.after_batch = turn
            teacher = Counted(self.teacher, cache=True)
            kd, epochs = KnowledgeDistillationCallback(teacher, SoftTarget, weight=WEIGHT), Epochs(teacher)
            with warnings.catch_warnings():  # the cache says that live augmentation leaves nothing to find
                warnings.filterwarnings("ignore", message=".*found in the teacher's cache")
                views = [RepeatedViews(k, seed=100 * seed)] if k else []
                numbers = self.fit(learn, recipe, kd, epochs, *views)
            return {**numbers, "epoch_seconds": epochs.seconds, "runs": epochs.runs, "batches": len(learn.dls.train)}

        return self.add({**settings, "k": k, "weight": WEIGHT}, f"k={k}" if k else "live", "views", train)


def turn(batch, degrees=15):
    "Rotate each image by a random angle: no two epochs show the same image, unless views are repeated."
    x, y = batch
    angle = (2 * torch.rand(len(x)) - 1) * degrees * torch.pi / 180
    sin, cos, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False), y


def all_runs(args):
    if "views" in args.measure:
        for data in args.views_data:
            measure, recipe = Measure(args, data), VIEWS[data]
            recipe = recipe._replace(epochs=args.epochs) if args.epochs else recipe
            for seed in range(args.seeds):
                for k in (1, 2, 4, None):
                    measure.views_run(args.views_student, recipe, k, seed)
    if "labels" in args.measure:
        measure = Measure(args, args.data)
        for seed in range(args.seeds):
            for n in args.labels:
                for how in HOWS if n else list(HOWS)[:2]:
                    measure.label_run(args.student, n, args.draws, seed, how)


# From the rows alone


def write_report(file):
    "Tables and picture of what is in the file."
    rows, made = read_rows(file), []
    if labels := [row for row in rows if row["settings"]["stage"] == "labels"]:
        check_same(labels, ("recipe", "seed", "how"))
        file.with_suffix(".md").write_text(labels_page(rows, labels, file.name), encoding="utf-8")
        draw(rows, labels, file.with_suffix(".png"))
        made += [file.with_suffix(".md"), file.with_suffix(".png")]
    if views := [row for row in rows if row["settings"]["stage"] == "views"]:
        made.append(file.with_name("views.md"))
        made[-1].write_text(views_page(rows, views, file.name), encoding="utf-8")
    if not made:
        raise ValueError(f"no finished runs in {file}")
    print(*made, sep=", ")


def check_same(rows, but):
    "Rows of one table differ only in these settings, and in the number of labels."
    rests = {json.dumps({k: v for k, v in row["settings"].items() if k not in but}) for row in rows}
    if len(rests) > 1 or len({tuple(row["settings"]["recipe"][1:]) for row in rows}) > 1:
        raise ValueError("there are runs with different settings: use another folder")


def by_labels(labels):
    "Number of labels, None: all, and how → seed → accuracy; the fewest labels first."
    accs = {}
    for row in sorted(labels, key=lambda row: row["settings"]["recipe"][0] or float("inf")):
        s = row["settings"]
        accs.setdefault(s["recipe"][0], {}).setdefault(s["how"], {})[s["seed"]] = row["test"]
    return accs


def labels_page(rows, labels, file):
    accs, s = by_labels(labels), labels[0]["settings"]
    _, draws, _, bs, lr, *_ = s["recipe"]
    lines = [["labels", *HOWS.values(), "gain by distillation", "gain by unlabeled images"], ["---"] * 6]
    for n, its in accs.items():
        gains = [gain(difference(its, "labeled", "alone")), gain(difference(its, "unlabeled", "labeled"))]
        lines.append([count(n), *(spread(list(its.get(how, {}).values())) for how in HOWS), *gains])
    options = {"measure": "labels", "data": s["data"], "teacher": s["teacher"], "student": s["student"]}
    options |= {"labels": ",".join(str(n or "all") for n in accs), "draws": draws}
    about = f"""{ABOUT[s["data"]]}. {about_teacher(rows, s["data"])} The student has {s["student"]} channels in its
    first layer. All students take the same steps: about {draws:,} draws of labeled images, batches of {bs}, one epoch
    of `fit_one_cycle` with learning rate {lr:g}. The loss is `SoftTarget` with `weight={s["weight"]}`. With
    `unlabeled=` each labeled batch has a batch of the other training images beside it, without their labels. This
    student sees twice as many images. No setting was chosen by its accuracy. Each seed has its own labeled images,
    initial weights and augmentation."""
    return f"""{page_head("Unlabeled images", rows, labels, options, file)}
{flow(about)}

{MEAN} {GAIN}

{markdown(lines)}

![Accuracy against the number of labels]({file.replace(".jsonl", ".png")})

## Findings

{labels_findings(rows, labels, accs)}
"""


def labels_findings(rows, labels, accs):
    texts = []
    for what, how, base in GAINS:
        gains = {n: d for n, its in accs.items() if len(d := difference(its, how, base))}
        if gains:
            most, least = (f(gains, key=lambda n: gains[n].mean()) for f in (max, min))
            texts.append(
                f"{what} adds most with {count(most)} labels ({gains[most].mean():+.1f} points) and least with "
                f"{count(least)} labels ({gains[least].mean():+.1f})."
            )
            unclear = [count(n) for n, d in gains.items() if abs(d.mean()) <= half_width(d)]
            worse = [count(n) for n, d in gains.items() if d.mean() < -half_width(d)]
            texts[-1] += f" The interval includes 0 with {listed(unclear)} labels." if unclear else ""
            texts[-1] += f" It makes the student worse with {listed(worse)} labels." if worse else ""
    best = {n: np.mean(list(its["unlabeled"].values())) for n, its in accs.items() if "unlabeled" in its}
    if len(best) > 1:
        top, low = max(best, key=best.get), min(best)
        teacher = teacher_row(rows, labels[0]["settings"]["data"])["test"]
        texts.append(
            f"With unlabeled images {count(low)} labels give {best[low]:.1f} % and {count(top)} labels "
            f"{best[top]:.1f} %. The teacher reaches {teacher:.1f} %."
        )
    if "alone" in accs.get(None, {}):
        alone = np.mean(list(accs[None]["alone"].values()))
        texts.append(
            f"The student alone reaches {alone:.1f} % with all labels. No image is left for `unlabeled=` there."
        )
    seconds = {
        how: np.median([r["cpu_seconds"] / r["batches"] for r in labels if r["settings"]["how"] == how])
        for how in unique(row["settings"]["how"] for row in labels)
    }
    if seconds.keys() == HOWS.keys() and all(seconds.values()):
        texts.append(
            f"A step with unlabeled images takes {seconds['unlabeled'] / seconds['labeled']:.1f} times the CPU time of "
            f"a distilled step without them, and {seconds['unlabeled'] / seconds['alone']:.1f} times that of the "
            "student alone."
        )
    texts.append(
        "The teacher learned with labels for many images that the student uses without labels. One learning rate for "
        "all is not tuned, so each way to train may do better at another one."
    )
    return "\n".join(f"- {text}" for text in texts)


def views_page(rows, views, file):
    first = views[0]["settings"]
    datas = unique(row["settings"]["data"] for row in views)
    epochs = unique(row["settings"]["recipe"][2] for row in views)
    options = {"measure": "views", "views-data": ",".join(datas), "teacher": first["teacher"]}
    options |= {"views-student": first["student"]}
    options |= {} if epochs == [VIEWS[data].epochs for data in datas] else {"epochs": epochs[0]}
    mirrored = " Fashion-MNIST is also mirrored." if "fashion-mnist" in datas else ""
    about = f"""Each image is shifted by up to one pixel and rotated by up to 15 degrees.{mirrored} With
    `RepeatedViews(k)` the augmentation repeats after k epochs; `live` is the same training without it. Each student is
    distilled with `SoftTarget`, `weight={first["weight"]}` and `Teacher(teacher, cache=True)`. No setting was chosen by
    its accuracy."""
    columns = f"""{MEAN} {GAIN} CPU seconds are those of an epoch's training, the median of the epochs after epoch k.
    For `live` they are those after epoch 4; the cache is off by then. The last column counts the batches of all
    epochs for which the teacher ran. After epoch k it runs for one batch only, to check the stored outputs."""
    text = f"{page_head('Repeated views', rows, views, options, file)}\n{flow(about)}\n\n{flow(columns)}\n"
    sections = [views_section(rows, [row for row in views if row["settings"]["data"] == data]) for data in datas]
    return "\n".join([text, *sections])


def views_section(rows, views):
    s = views[0]["settings"]
    check_same(views, ("recipe", "seed", "k"))
    images, _, epochs, bs, lr, *_ = s["recipe"]
    lines = [["augmentation", "accuracy", "difference from live", "CPU seconds an epoch", "teacher ran for"]]
    lines.append(["---"] * 5)
    accs, seconds, gains = {}, {}, {}
    for k in (1, 2, 4, None):
        its = [row for row in views if row["settings"]["k"] == k]
        accs[k] = {row["settings"]["seed"]: row["test"] for row in its}
        seconds[k] = np.median([sec for row in its for sec in row["epoch_seconds"][k or 4 :]] or [np.nan])
    for k, its in accs.items():
        if its:
            share = np.mean([sum(r["runs"]) / r["batches"] / epochs for r in views if r["settings"]["k"] == k])
            gains[k] = difference(accs, k, None) if k else []
            name = f"`RepeatedViews({k})`" if k else "live"
            cells = [spread(list(its.values())), gain(gains[k]), f"{seconds[k]:.2f}", f"{100 * share:.0f} % of batches"]
            lines.append([name, *cells])
    compared = {k: d for k, d in gains.items() if len(d)}
    texts = []
    for verdict, holds in VERDICTS.items():
        if ks := [f"k={k}" for k, d in compared.items() if holds(d.mean(), half_width(d))]:
            texts.append(f"With {listed(ks)} the accuracy is {verdict}.")
    if compared:
        shares = unique(f"{share:.2f}" for share in sorted(seconds[k] / seconds[None] for k in compared))
        texts.append(
            f"An epoch with stored outputs takes {' to '.join(unique([shares[0], shares[-1]]))} of the CPU time of an "
            "epoch with live augmentation. The teacher is small here, so there is little to save."
        )
        texts.append(
            "These trainings are short. Longer ones repeat each view more often, which may cost more accuracy."
        )
    about = f"""{about_teacher(rows, s["data"])} The student has {s["student"]} channels in its first layer. It
    learns from {f"{images:,}" if images else "all training"} images, {epochs} epochs, batches of {bs},
    learning rate {lr:g}."""
    return f"""## {ABOUT[s["data"]]}

{flow(about)}

{markdown(lines)}

{chr(10).join(f"- {text}" for text in texts)}
"""


def draw(rows, labels, path):
    "A line with error bars for each way to train, over the number of labels."
    accs, s = by_labels(labels), labels[0]["settings"]
    everything = max([2 * n for n in accs if n] + [55000 if s["data"] == "fashion-mnist" else 0])
    fig = Figure(figsize=(7, 4.2), layout="constrained")
    ax = fig.subplots()
    teacher = teacher_row(rows, s["data"])["test"]
    ax.axhline(teacher, color="0.4", ls="--", lw=1, label=f"teacher, {teacher:.1f} %")
    for (how, label), color, marker in zip(HOWS.items(), COLORS, "osD", strict=False):
        apart = 1 + 0.04 * (list(HOWS).index(how) - 1)  # else error bars hide each other
        values = {(n or everything) * apart: list(its[how].values()) for n, its in accs.items() if how in its}
        means = [np.mean(v) for v in values.values()]
        errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values.values()]
        ax.errorbar(list(values), means, errors, label=label, color=color, marker=marker, ms=6, lw=2, capsize=4)
    ticks = [n or everything for n in accs]
    ax.set(xscale="log", xlabel="labels", ylabel="test accuracy in %", title=ABOUT[s["data"]])
    ax.set_xticks(ticks, [f"{n:,}" if n else "all" for n in accs])
    ax.minorticks_off()
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    fig.savefig(path, dpi=130)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--measure", type=lambda s: s.split(","), default=["views", "labels"], help="labels, views or both")
    add("--data", choices=list(ABOUT), default="fashion-mnist", help="of the labels measurement")
    add("--views-data", type=lambda s: s.split(","), default=list(VIEWS), help="with commas between")
    add("--labels", type=numbers, default=[50, 100, 300, 1000, None], help="with commas between; all: every label")
    add("--draws", type=int, default=55000, help="labeled images drawn in a training, each several times")
    add("--epochs", type=int, help="of the views measurement; None: as in VIEWS")
    add("--teacher", default=MODELS["fashion-mnist"][0], help="channels of its first layer")
    add("--student", default="16", help="the same")
    add("--views-student", default="8", help="the same, of the views measurement")
    add("--teacher-draws", type=int, help="images in an epoch of the teacher; None: as in benchmarks/data.py")
    add("--seeds", type=int, default=3, help="trainings of each row")
    add("--folder", help="of Fashion-MNIST's files, None: where they usually are")
    add("--out", type=Path, default=Path("results"), help="folder")
    add("--report", action="store_true", help="no training: only the tables and the picture, from the file")
    args = parser.parse_args(argv)
    if unknown := set(args.measure) - {"labels", "views"} | set(args.views_data) - VIEWS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return args


def numbers(text):
    return [None if n == "all" else int(n) for n in text.split(",")]


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # in models as small as these, threads wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        all_runs(args)
    write_report(args.out / "unlabeled.jsonl")


if __name__ == "__main__":
    main()
