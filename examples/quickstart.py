"""Distill a teacher into a student 100 times smaller, on scikit-learn's handwritten digits: nothing to download.

    python quickstart.py                        # two to three minutes on one core
    python quickstart.py --seeds 1 --epochs 1   # a first look, not a result
    python quickstart.py --picture quickstart.png --table quickstart.md   # the pay-off as files

The teacher learns from 897 labeled images, the students from 100 of them; 900 other images are the validation set. The
last student sees the other 797 images too, without their labels: the teacher says what they are. All students have the
same labeled images, steps and learning rate, which was chosen on the validation set. The losses shown for a distilled
student include the distillation loss: compare accuracies. At the end the last student is exported to a file.
"""

import argparse
import warnings

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from fastai.vision.all import *  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402

from fasterai_kd.all import *  # noqa: E402
from fasterai_kd.show import compare_models, plot_tradeoff  # noqa: E402

TEACHER, STUDENT = 64, 6  # channels of the first layer
ALL, FEW = 897, 100  # labeled images
DRAWS = 3200  # images shown in an epoch


def get_images(labeled: int) -> tuple[L, L, L]:
    "Digits, 8x8, with labels: `labeled` for training, those that are left, and always the same 900 for validation."
    x, y = load_digits(return_X_y=True)
    train, valid = train_test_split(np.arange(len(y)), test_size=900, stratify=y, random_state=0)
    rest = train[:0]
    if labeled < len(train):
        train, rest = train_test_split(train, train_size=labeled, stratify=y[train], random_state=0)
    x = (x * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # as in a picture file
    return tuple(L(zip(x[part], y[part], strict=True)) for part in (train, rest, valid))


def get_dls(
    labeled: int,  # number of training images
    draws: int,  # images shown in an epoch, each about draws / labeled times
) -> DataLoaders:
    train, _, valid = get_images(labeled)
    train = train * max(1, draws // labeled)
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=list(range(10)))),
        get_x=ItemGetter(0),
        get_y=ItemGetter(1),
        splitter=IndexSplitter(range(len(train), len(train) + len(valid))),
        batch_tfms=Shift(),
    )
    return block.dataloaders(train + valid, bs=32, val_bs=900, num_workers=0)


class Shift(Transform):
    "Move each training image by up to one pixel: few images are soon known by heart."

    split_idx = 0  # not in validation

    def encodes(self, x: TensorImageBW) -> TensorImageBW:
        moved = F.pad(x, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # (B, 1, 3, 3, 8, 8): all nine shifts
        row, col = torch.randint(3, (2, len(x)))
        return moved[torch.arange(len(x)), :, row, col]


def cnn(width: int) -> nn.Module:
    "Three convolutions, at 8x8, 4x4 and 2x2."
    return nn.Sequential(
        ConvLayer(1, width),
        ConvLayer(width, 2 * width, stride=2),
        ConvLayer(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        Flatten(),
        nn.Linear(4 * width, 10),
    )


def get_learner(width: int, labeled: int, draws: int = DRAWS, seed: int = 0, metrics: object = accuracy) -> Learner:
    set_seed(seed, reproducible=True)  # before the DataLoaders, which draw the order of the images from it
    return Learner(get_dls(labeled, draws), cnn(width), loss_func=CrossEntropyLossFlat(), metrics=metrics)


def fit(learn: Learner, epochs: int, lr: float, cbs: Callback | None = None, title: str | None = None) -> float:
    "Train, showing fastai's progress table if there is a title; returns the accuracy in % after the last epoch."
    learn.logger = print_row if title else noop
    learn.logger([f"{title}\n{'epoch':>12}", "train_loss", "valid_loss", "accuracy", "time"])
    with learn.no_bar():
        learn.fit_one_cycle(epochs, lr, cbs=cbs)
    return 100 * learn.recorder.values[-1][2]


def print_row(row: list[object]) -> None:
    "A row of fastai's progress table; its progress bar would fill a log file."
    print("".join(f"{cell:>12.4f}" if isinstance(cell, float) else f"{cell:>12}" for cell in row))


def show_table(results: dict[str, list[float]]) -> None:
    alone = np.mean(results["student alone"])
    print(f"{'':<25} {'accuracy in %':>13} {'gain':>6}")
    for name, accs in results.items():
        std = f" ± {np.std(accs, ddof=1):.1f}" if len(accs) > 1 else ""
        gain = "" if name == "student alone" else f"{np.mean(accs) - alone:+.1f}"
        print(f"{name:<25} {f'{np.mean(accs):.1f}{std}':>13} {gain:>6}".rstrip())


def write_markdown(table: pd.DataFrame, about: str, path: str) -> None:
    "The table as a page of the documentation."
    text = table.formatted()
    lines = [["", *text], ["---"] + ["---:"] * len(text.columns), *([name, *row] for name, *row in text.itertuples())]
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    Path(path).write_text(f"# The quickstart's pay-off\n\n{about}\n\n{rows}\n{table.note}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Knowledge distillation on handwritten digits")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each student")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--draws", type=int, default=DRAWS, help="training images in an epoch, with repetitions")
    parser.add_argument("--picture", default="quickstart.png", help="where to save the picture")
    parser.add_argument("--export", default="student.pkl", help="where to save the last student")
    parser.add_argument("--table", help="where to save the last table, as Markdown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # in models as small as these, threads wait for each other

    teacher = get_learner(TEACHER, ALL, args.draws, seed=0)
    teacher_acc = fit(teacher, args.epochs, 5e-3, title="teacher")

    distilled = partial(KnowledgeDistillationCallback, teacher, SoftTarget, weight=0.9)
    students = {
        "student alone": lambda: None,
        "distilled": distilled,
        "with unlabeled images": lambda: distilled(unlabeled=get_images(FEW)[1]),  # the labels are ignored
    }
    results, models = {name: [] for name in students}, {"teacher": teacher}
    for seed in range(args.seeds):
        for name, make_callback in students.items():
            student = models[name] = get_learner(STUDENT, FEW, args.draws, seed)
            kd = make_callback()
            results[name].append(fit(student, args.epochs, 2e-2, cbs=kd, title=f"\n{name}" if seed == 0 else None))

    print(f"\nteacher: {teacher_acc:.1f} %; students: {FEW} labeled images\n")
    show_table(results)
    table = compare_models(models)
    means = {name: np.mean(accs) / 100 for name, accs in results.items()}
    table["accuracy"] = pd.Series({"teacher": teacher_acc / 100, **means})
    about = f"`examples/quickstart.py`: digits, {FEW} labeled images. Accuracy of students: mean of {args.seeds} seeds."
    print(f"\n{table}\n")
    plot_tradeoff(table).figure.savefig(args.picture, dpi=150, metadata={"Software": None} if args.table else None)
    if args.table:
        write_markdown(table, about, args.table)
    student.export(args.export)
    print(f"picture: {args.picture}\nstudent: {student.path / args.export}, to be loaded with load_learner")


if __name__ == "__main__":
    main()
