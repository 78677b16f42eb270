"""Which student, and how long to train it: accuracy against size and against epochs, alone and distilled.

    python benchmark_students.py --out results
    python benchmark_students.py --out results --report             # tables and picture again, no training

Students of several widths, with their parameters, file size and latency, and one student trained for less and for more
epochs: all learn from the same 1,000 labeled images of Fashion-MNIST. Each width has the learning rate that suits it
best without a teacher, on the tune split and with other seeds. The pay-off: on digits, a student of 100 labels beside
its teacher, as in quickstart.py, but with a test split; there nothing is chosen.

Each run is a line of OUT/students.jsonl with its settings. A run that is there is not repeated. OUT/students.md and
.png are made from these lines.
"""

import argparse
import io
import time
import warnings

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from benchmark_losses import TUNE_SEEDS, read_rows  # noqa: E402
from benchmark_unlabeled import Measure  # noqa: E402
from benchmarks.report import unique  # noqa: E402
from benchmarks.students import FILE, HOWS, PAYOFF, draw, page  # noqa: E402
from fastai.vision.all import *  # noqa: E402

LABELS = 1000
ROUNDS, CALLS, PAUSE = 200, 50, 0.1  # of the latency, in seconds


class Students(Measure):
    name = FILE

    def size_run(self, width):
        "Parameters, file size and latency of a model: they do not depend on the training."
        settings = {**self.base, "stage": "size", "student": width, "seed": 0}
        zero = {"test": 0, "cpu_seconds": 0}
        return self.add(settings, "size", "size", lambda: size(self.task.model(width), self.task.sample) | zero)

    def tuned(self, width, recipe, lrs):
        "The recipe with the learning rate that is best for the student alone, on the tune split."
        accs = {}
        for lr in lrs:
            rows = [self.student_run("tune", width, recipe._replace(lr=lr), seed, "alone") for seed in TUNE_SEEDS]
            accs[lr] = np.mean([row["tune"] for row in rows])
        return recipe._replace(lr=max(accs, key=accs.get))


def size(model, sample):
    buffer, rounds = io.BytesIO(), []
    torch.save(model.state_dict(), buffer)
    model, x = model.eval(), torch.zeros_like(sample, dtype=torch.float)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            times = []
            for _ in range(CALLS):
                start = time.perf_counter()
                model(x)
                times.append(1e3 * (time.perf_counter() - start))
            rounds.append(float(np.median(times)))
            time.sleep(PAUSE)  # a later round may find the processor free
    parameters, ms = sum(p.numel() for p in model.parameters()), min(rounds)  # what it takes when nothing else runs
    return {"parameters": parameters, "kb": round(buffer.tell() / 1e3, 1), "ms": round(ms, 3)}


def all_runs(args):
    measure = Students(args, "fashion-mnist")
    for width in unique([args.teacher, *args.students]):
        measure.size_run(width)
    recipe = measure.recipe._replace(images=LABELS, draws=args.draws, epochs=args.sizes_epochs)
    widths = unique([*args.students, args.epochs_student])
    recipes = {width: measure.tuned(width, recipe, args.lrs) for width in widths}
    runs = [(width, recipes[width]) for width in args.students]
    runs += [(args.epochs_student, recipes[args.epochs_student]._replace(epochs=epochs)) for epochs in args.epochs]
    for seed in range(args.seeds):
        for how in HOWS:
            for width, recipe in runs:
                measure.student_run("students", width, recipe, seed, how)


def payoff_runs(args):
    measure = Students(argparse.Namespace(**vars(args) | {"teacher": args.payoff_teacher}), "digits")
    for width in (args.payoff_teacher, args.payoff_student):
        measure.size_run(width)
    recipe = measure.recipe._replace(draws=args.draws, epochs=4)
    for seed in range(args.seeds):
        for how in PAYOFF:
            measure.student_run("payoff", args.payoff_student, recipe, seed, how)


def write_report(file):
    rows = read_rows(file)
    file.with_suffix(".md").write_text(page(rows), encoding="utf-8")
    draw(rows, file.with_suffix(".png"))
    print(file.with_suffix(".md"), file.with_suffix(".png"), sep=", ")


def listed(kind, text):
    return [kind(part) for part in text.split(",")]


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, integers, numbers = parser.add_argument, partial(listed, int), partial(listed, float)
    add("--students", type=partial(listed, str), default=["4", "8", "16", "32"], help="channels, with commas")
    add("--sizes-epochs", type=int, default=8, help="epochs of these students")
    add("--epochs-student", default="8", help="channels of the student that is trained for")
    add("--epochs", type=integers, default=[2, 4, 8, 16], help="so many epochs, with commas")
    add("--lrs", type=numbers, default=[0.02, 0.08, 0.32], help="learning rates to choose from, with commas")
    add("--draws", type=int, default=5000, help="labeled images in an epoch, each several times")
    add("--teacher", default="32", help="channels of its first layer")
    add("--teacher-draws", type=int, help="images in an epoch of the teacher; None: as in benchmarks/data.py")
    add("--payoff-teacher", default="64", help="channels, on digits")
    add("--payoff-student", default="6", help="the same")
    add("--seeds", type=int, default=3, help="trainings of each row")
    add("--folder", help="of Fashion-MNIST's files, None: where they usually are")
    add("--out", type=Path, default=Path("results"), help="folder")
    add("--report", action="store_true", help="no training: only the tables and the picture, from the file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # in models as small as these, threads wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        payoff_runs(args)
        all_runs(args)
    write_report(args.out / FILE)


if __name__ == "__main__":
    main()
