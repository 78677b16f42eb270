"""How accurate distilled students are, loss by loss: the same images, steps, learning rate and seeds for all.

    python benchmark_losses.py --data digits --seeds 5 --peer --out results
    python benchmark_losses.py --data fashion-mnist --student 8,4 --peer --out results
    python benchmark_losses.py --data fashion-mnist-all --losses SoftTarget,Attention --out results  # all labels
    python benchmark_losses.py --data pets --out results                      # downloads 800 MB
    python benchmark_losses.py --data cifar100 --teacher resnet56 --student resnet20 --seeds 1 --out results
    python benchmark_losses.py --data digits --out results --report           # the table anew, no training

Each run is a line of OUT/DATA.jsonl with all its settings; a run that is there is not repeated. OUT/DATA.md and .png
are made from these lines. On a tune split, with the first student and seeds of their own, are chosen: the learning
rate, for the student alone and then used for all, and the weights of the rows called tuned, from the small grids in
benchmarks/variants.py. Accuracies are those of the test split, which no choice has seen.
"""

import argparse
import json
import time
import warnings
from copy import deepcopy

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

import fastai  # noqa: E402
from benchmarks.data import get_task  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.variants import GRID, adapter, get_callback, get_variants, peer_has  # noqa: E402
from fastai.vision.all import *  # noqa: E402

from fasterai_kd.all import *  # noqa: E402

MODELS = {
    "digits": ("32", "6"),
    "fashion-mnist": ("32", "8,4"),
    "fashion-mnist-all": ("32", "8"),
    "pets": ("resnet34", "resnet18"),
    "cifar100": ("resnet56", "resnet20"),
}
TUNE_SEEDS = (1000, 1001)  # none of those reported


class NoValidation(Callback):
    "Spare it during the training: the accuracy is taken afterwards."

    def before_validate(self):
        raise CancelValidException()


class Bench:
    "Runs what is not in the file yet."

    def __init__(self, args):
        self.args, self.task = args, get_task(args)
        self.file = args.out / f"{args.data}.jsonl"
        self.done = {json.dumps(row["settings"], sort_keys=True): row for row in read_rows(self.file)}
        self.teacher_recipe = override(self.task.teacher, args, "teacher_")
        self.recipe = override(self.task.student, args)
        self.base = {"data": args.data, "teacher": args.teacher, "teacher_recipe": list(self.teacher_recipe)}
        self.base |= {"size": args.size} if args.data == "pets" else {}

    def learner(self, arch, recipe, seed, make=None):
        set_seed(seed, reproducible=True)  # before the DataLoaders, which draw the order of the images from it
        dls = self.task.dls(recipe, seed)
        if make is not None:
            return make(dls, arch)
        kwargs = {"loss_func": CrossEntropyLossFlat(), "metrics": accuracy}
        if recipe.steps:
            kwargs |= {"opt_func": partial(SGD, mom=0.9, wd=5e-4, decouple_wd=False), "wd_bn_bias": True}
        return Learner(dls, self.task.model(arch), **kwargs)

    def fit(self, learn, recipe, *cbs):
        "The row's numbers: accuracy in % on the tune split, if there is one, and the test split."
        learn.logger, cbs, start = noop, [NoValidation(), *cbs], time.process_time()
        with learn.no_bar():
            if recipe.steps:
                learn.fit(recipe.epochs, recipe.lr, cbs=[*cbs, ParamScheduler({"lr": partial(drops, recipe.lr)})])
            else:
                learn.fit_one_cycle(recipe.epochs, recipe.lr, cbs=cbs)
            seconds = round(time.process_time() - start, 1)
            accs = [round(100 * learn.validate(i)[1], 2) for i in range(1, len(learn.dls.loaders))]
        return {"tune": accs[0] if len(accs) > 1 else None, "test": accs[-1], "cpu_seconds": seconds}

    def add(self, settings, name, group, train):
        "The row of a run, from the file or from `train`."
        key = json.dumps(settings, sort_keys=True)
        if key not in self.done:
            numbers = train()
            threads = f"{str(default_device()).upper()}, {torch.get_num_threads()} thread"
            about = {"device": threads, "torch": torch.__version__, "fastai": fastai.__version__}
            self.done[key] = {"group": group, "name": name, **numbers, "settings": settings, **about}
            with self.file.open("a") as f:
                f.write(json.dumps(self.done[key], ensure_ascii=False) + "\n")
            who = f"{settings.get('student', 'teacher')}, seed {settings['seed']}, {group}: {name}"
            print(f"{who:<75} {numbers['test']:5.1f} %  {numbers['cpu_seconds']:6.1f} s", flush=True)
        return self.done[key]

    def get_teacher(self):
        "Trained, or as stored in OUT/models."
        settings = {**self.base, "stage": "teacher", "seed": 0}
        learn = self.learner(self.args.teacher, self.teacher_recipe, 0, self.task.make_teacher)
        stored = self.args.out / "models" / f"{self.args.data}_{self.args.teacher}.pth"
        key = json.dumps(settings, sort_keys=True)
        if stored.exists() and (saved := torch.load(stored, weights_only=True))["key"] == key and key in self.done:
            learn.model.load_state_dict(saved["model"])
        else:
            self.done.pop(key, None)
            self.add(settings, "teacher", "teacher", lambda: self.fit(learn, self.teacher_recipe))
            stored.parent.mkdir(exist_ok=True)
            torch.save({"key": key, "model": learn.model.state_dict()}, stored)
        return learn.model.eval()

    def run(self, variant, student, seed, lr, stage="report", library="fasterai_kd"):
        recipe = self.recipe._replace(lr=lr)
        what = {"stage": stage, "library": library, "student": student, "recipe": list(recipe), "seed": seed}
        how = {"parts": variant.parts, "weight": variant.weight, "task_weight": variant.task_weight}
        how |= {"adapter": adapter(variant)} if adapter(variant) else {}
        group = f"{stage}, {variant.group}" if stage == "tune" else variant.group

        def train():
            learn = self.learner(student, recipe, seed)
            teacher = deepcopy(self.teacher)  # fasterai leaves gradients in it
            cbs = get_callback(variant, teacher, self.pairs(student), library)
            return self.fit(learn, recipe, *cbs)

        return self.add({**self.base, **what, **how}, variant.name, group, train)

    def pairs(self, student):
        return match_feature_layers(self.task.model(student), self.teacher, self.task.sample)

    def tune(self, student):
        "The learning rate and the weights that do best on the tune split."
        best = {"lr": self.args.lr or self.recipe.lr}
        if not self.args.tune:
            return best
        for name, variants in GRID.items():
            if name == "lr" and self.args.lr is not None:
                continue
            if all(part[0] in self.args.losses for v in variants.values() for part in v.parts):
                means = {}
                for value, variant in variants.items():
                    lr = value if name == "lr" else best["lr"]
                    rows = [self.run(variant, student, seed, lr, "tune") for seed in TUNE_SEEDS]
                    means[value] = np.mean([row["tune"] for row in rows])
                best[name] = max(means, key=means.get)
        return best

    def all_runs(self):
        self.teacher = self.get_teacher()
        best = self.tune(self.args.student[0])
        print(f"chosen on the tune split: {best}")
        for seed in range(self.args.seeds):
            for student in self.args.student:
                for variant in get_variants(best, self.args.losses):
                    self.run(variant, student, seed, best["lr"])
                    if self.args.peer and peer_has(variant, self.pairs(student)):
                        self.run(variant, student, seed, best["lr"], library="fasterai")


def drops(lr, pct):
    "Of the papers on CIFAR-100: x0.1 after epochs 150, 180 and 210 of 240."
    return lr * 0.1 ** sum(pct >= epoch / 240 for epoch in (150, 180, 210))


def override(recipe, args, prefix=""):
    "With what the command line says."
    given = {name: getattr(args, prefix + name) for name in ("images", "draws", "epochs")}
    return recipe._replace(**{name: n for name, n in given.items() if n is not None})


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", choices=MODELS, default="digits")
    add("--teacher", help="width of the CNN, or name of the ResNet")
    add("--student", help="the same; several with commas between")
    add("--losses", help="only rows of these, with commas between: SoftTarget,Attention")
    add("--seeds", type=int, default=3, help="trainings of each row")
    add("--peer", action="store_true", help="also train with the installed fasterai, where it has the loss")
    add("--out", type=Path, default=Path("results"), help="folder")
    add("--report", action="store_true", help="no training: only the table and the picture, from the file")
    add("--tune", action=argparse.BooleanOptionalAction, help="choose learning rate and weights; not pets, cifar100")
    add("--lr", type=float, help="of the students, instead of the one chosen")
    for who in ("", "teacher-"):
        for what in ("images", "draws", "epochs"):
            add(f"--{who}{what}", type=int, help=f"of the {who[:-1] or 'students'}; None: as the recipe")
    add("--folder", help="of fashion-mnist's or cifar100's files, None: where they usually are")
    add("--size", type=int, default=224, help="of pets' pictures")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="pets' teacher")
    add("--workers", type=int, help="processes that load pets' pictures")
    args = parser.parse_args(argv)
    teacher, student = MODELS[args.data]
    args.teacher, args.student = args.teacher or teacher, (args.student or student).split(",")
    args.tune = args.data not in ("pets", "cifar100") if args.tune is None else args.tune
    every = {part[0]: None for v in get_variants(None) for part in v.parts}
    args.losses = args.losses.split(",") if args.losses else list(every)
    if unknown := set(args.losses) - every.keys():
        parser.error(f"no loss {', '.join(unknown)}: choose from {', '.join(every)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # in models as small as these, threads wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        Bench(args).all_runs()
    write_report(read_rows(args.out / f"{args.data}.jsonl"), args)


if __name__ == "__main__":
    main()
