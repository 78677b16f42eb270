"""What a transformer teaches a small convolutional network, by each loss; and what an encoder without a head does.

    python benchmark_transformers.py --out results             # trains what is missing in OUT/transformers.jsonl
    python benchmark_transformers.py --out results --report    # OUT/transformers.md again, no training

The teacher is a hybrid: two convolutions, then blocks of a vision transformer on 7x7 tokens and a class token. The
students see 1,000 labels of Fashion-MNIST and the other training images without labels. All take the same steps at one
learning rate, that of the recipes in benchmarks/data.py, and `weight="auto"`: nothing is chosen by its accuracy.
"""

import argparse
import json
import time
import warnings
from contextlib import redirect_stdout

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from benchmark_losses import Bench, NoValidation, read_rows  # noqa: E402
from benchmark_unlabeled import GAIN, MEAN, gain, markdown  # noqa: E402
from benchmarks.data import Recipe  # noqa: E402
from benchmarks.report import spread  # noqa: E402
from fastai.vision.all import *  # noqa: E402

from fasterai_kd.all import *  # noqa: E402

LOSSES = {
    "alone": None,
    "SoftTarget": (SoftTarget, None),
    "Attention": (Attention, None),
    "FitNet + adapter": (FitNet, "auto"),
    "Cosine on tokens + adapter": (Cosine, "auto"),
    "SoftTarget + Attention": (combine((SoftTarget, 1.0), (Attention, 100.0)), None),
}
ENCODER = {
    "scratch": "student alone",
    "SoftTarget": "`SoftTarget`, unlabeled images beside",
    "pretrained": "pretrained on the encoder's embeddings of images without labels, then fine-tuned",
}


class Hybrid(nn.Module):
    "A vision transformer on the 7x7 maps of two convolutions; with `classes=0` an encoder."

    def __init__(self, width=64, depth=4, classes=10):
        super().__init__()
        self.stem = nn.Sequential(ConvLayer(1, width // 2, stride=2), ConvLayer(width // 2, width, stride=2))
        self.token, self.place = (nn.Parameter(0.02 * torch.randn(1, n, width)) for n in (1, 50))
        block = partial(nn.TransformerEncoderLayer, width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.ModuleList([block() for _ in range(depth)]), nn.LayerNorm(width)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Measure(Bench):
    "Runs what is not in the file yet."

    def __init__(self, args):
        none = {f"{who}{what}": None for who in ("", "teacher_") for what in ("images", "draws", "epochs")}
        none |= {"teacher_epochs": args.teacher_epochs, "teacher_draws": args.teacher_draws}
        super().__init__(argparse.Namespace(**none, folder=args.folder, out=args.out, teacher="hybrid", data=args.data))
        self.file = args.out / "transformers.jsonl"
        self.done = {json.dumps(row["settings"], sort_keys=True): row for row in read_rows(self.file)}
        self.teacher_recipe = self.teacher_recipe._replace(lr=2e-3)
        self.base["teacher_recipe"] = list(self.teacher_recipe)
        self.task = self.task._replace(make_teacher=self.make_teacher)
        self.everything = self.task.dls(Recipe(None, None, 1, 64, 0), 0).train.dataset
        self.teacher = self.get_teacher()

    def make_teacher(self, dls, name):
        return Learner(dls, Hybrid(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    def others(self, few):
        "The images without labels, loaded and augmented as the labeled ones."
        return few.new(sorted(set(self.everything) - set(few.dataset)))

    def loss_run(self, student, labels, draws, seed, how):
        "`how` is a key of LOSSES."
        recipe = Recipe(labels, draws, 1, self.recipe.bs, self.recipe.lr)
        settings = {**self.base, "stage": "losses", "student": student, "recipe": list(recipe), "seed": seed}

        def train():
            learn = self.learner(student, recipe, seed)
            return self.fit(learn, recipe, *self.callbacks(learn, how))

        return self.add({**settings, "how": how}, how, "losses", train)

    def callbacks(self, learn, how):
        if LOSSES[how] is None:
            return []
        loss, adapter = LOSSES[how]
        pairs = match_feature_layers(learn.model, self.teacher, self.task.sample)
        layers = [] if how == "SoftTarget" else list(pairs.values())
        options = {"weight": "auto", "adapter": adapter, "unlabeled": self.others(learn.dls.train)}
        return [KnowledgeDistillationCallback(self.teacher, loss, *layers, **options)]

    def encoder_run(self, student, labels, draws, seed, how):
        "`how` is a key of ENCODER; all take the steps of `draws` images, the pretrained one two thirds without labels."
        recipe = Recipe(labels, draws, 1, self.recipe.bs, self.recipe.lr)
        settings = {**self.base, "stage": "encoder", "student": student, "recipe": list(recipe), "seed": seed}

        def train():
            learn = self.learner(student, recipe, seed)
            if how == "SoftTarget":
                return self.fit(learn, recipe, *self.callbacks(learn, how))
            if how == "scratch":
                return self.fit(learn, recipe)
            start, model = time.process_time(), learn.model
            self.pretrain(model, 2 * draws // 3, seed)
            seconds = time.process_time() - start
            few = recipe._replace(draws=draws // 3)
            numbers = self.fit(Learner(self.task.dls(few, seed), model, CrossEntropyLossFlat(), metrics=accuracy), few)
            return {**numbers, "cpu_seconds": round(numbers["cpu_seconds"] + seconds, 1)}

        return self.add({**settings, "how": how}, how, "encoder", train)

    def pretrain(self, model, draws, seed):
        "From the embeddings alone: the dataloaders give no labels."
        dls = self.task.dls(Recipe(draws, None, 1, self.recipe.bs, 0), seed)
        dls.train.after_batch = lambda batch: batch[:1]
        encoder = deepcopy(self.teacher)
        encoder.head = nn.Identity()
        learn = Learner(DataLoaders(dls.train, dls.train, device=default_device()), model, CrossEntropyLossFlat())
        learn.logger = noop
        with learn.no_bar(), redirect_stdout(None):
            learn.distill(encoder, 1, self.recipe.lr, cbs=NoValidation())


def all_runs(args):
    measure = Measure(args)
    for seed in range(args.seeds):
        for how in LOSSES:
            measure.loss_run(args.student, args.labels, args.draws, seed, how)
        for how in ENCODER:
            measure.encoder_run(args.student, args.few_labels, args.draws, seed, how)


# From the rows alone


def write_report(file, command):
    rows = read_rows(file)
    teacher = next(row for row in rows if row["settings"]["stage"] == "teacher")
    losses, encoder = (table(rows, stage, names) for stage, names in (("losses", LOSSES), ("encoder", ENCODER)))
    recipe = next(row for row in rows if row["settings"]["stage"] == "losses")["settings"]["recipe"]
    few = next(row for row in rows if row["settings"]["stage"] == "encoder")["settings"]["recipe"]
    seeds = len({row["settings"]["seed"] for row in rows})
    page = f"""# Transformers as teachers

```bash
{command}
```

Made by this script with torch {teacher["torch"]}, fastai {teacher["fastai"]}, {teacher["device"]}, {seeds} seeds. The
single runs are in [{file.name}]({file.name}).

The teacher is a hybrid of two convolutions and four blocks of a vision transformer. It learned from 40,000 labeled
images of Fashion-MNIST and reaches {teacher["test"]:.1f} %; the convolutional teacher of the other pages 87.8 %.
The student is convolutional, with {losses[0]["settings"]["student"]} channels in its first layer. All rows of a table
take the same steps: {recipe[1]:,} draws of labeled images, batches of {recipe[3]}, one epoch of `fit_one_cycle` with
learning rate {recipe[4]:g}. Distillation has `weight="auto"`. {MEAN} {GAIN}

## Losses, with {recipe[0]:,} labels and the other images without labels

{markdown(losses[1])}

The feature losses compare the pairs of `match_feature_layers`: the student's layers `0`, `1` and `2` with `blocks.1`,
`blocks.2` and `blocks.3`.

## An encoder without a head, with {few[0]:,} labels

{markdown(encoder[1])}

The encoder is the same teacher without its last layer, so it has learned from labels. A foundation model has not. The
pretrained student takes two thirds of the steps without any labels, on {2 * recipe[1] // 3:,} images:
`learn.distill(encoder, 1)`.
"""
    file.with_suffix(".md").write_text(page, encoding="utf-8")
    print(file.with_suffix(".md"))


def table(rows, stage, names):
    "A row of this stage, and the lines of its table."
    accs = {how: {} for how in names}
    mine = [row for row in rows if row["settings"]["stage"] == stage]
    for row in mine:
        accs[row["settings"]["how"]][row["settings"]["seed"]] = row["test"]
    base = next(iter(accs.values()))
    lines = [["training", "accuracy", "gain over the student alone"], ["---"] * 3]
    for how, by_seed in accs.items():
        gains = np.array([by_seed[seed] - base[seed] for seed in by_seed])
        label = names[how] if isinstance(names[how], str) else "student alone" if how == "alone" else f"`{how}`"
        lines.append([label, spread(list(by_seed.values())), "" if by_seed is base else gain(gains)])
    return mine[0], lines


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="fashion-mnist", choices=["fashion-mnist"])
    add("--labels", type=int, default=1000, help="of the students of the first table")
    add("--few-labels", type=int, default=300, help="of the second")
    add("--draws", type=int, default=30000, help="labeled images drawn in a training, each several times")
    add("--student", default="16", help="channels of its first layer")
    add("--teacher-epochs", type=int, default=4)
    add("--teacher-draws", type=int, help="images in an epoch of the teacher; None: as in benchmarks/data.py")
    add("--seeds", type=int, default=3, help="trainings of each row")
    add("--folder", help="of Fashion-MNIST's files, None: where they usually are")
    add("--out", type=Path, default=Path("results"), help="folder")
    add("--report", action="store_true", help="no training: only the page, from the file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # in models as small as these, threads wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        all_runs(args)
    options = f"--draws {args.draws} --seeds {args.seeds} --out nbs/results"
    write_report(
        args.out / "transformers.jsonl", f"OMP_NUM_THREADS=1 python examples/benchmark_transformers.py {options}"
    )


if __name__ == "__main__":
    main()
