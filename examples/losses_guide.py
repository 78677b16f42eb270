"""All eight distillation losses on Oxford-IIIT Pets, cats against dogs: ResNet-34 teaches ResNet-18.

    python losses_guide.py
    python losses_guide.py --losses SoftTarget Attention --epochs 3 --images 1000 --size 128

The first run downloads the pictures (800 MB) and the teacher's ImageNet weights. The students start from scratch,
all from the same weights and with the same batches: only the loss differs.
"""

import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction

warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)  # fastai's import, with recent versions of torch

from fastai.vision.all import *  # noqa: E402

from fasterai_kd.all import *  # noqa: E402

SAME = "Yes (same channels)"
LAYERS = {Attention: "Yes", Similarity: "Yes", FitNet: SAME, ActivationBoundaries: SAME}  # losses that compare layers
WEIGHTS = {**dict.fromkeys((SoftTarget, DecoupledKD, Logits, Mutual, *LAYERS), 0.5), Attention: 0.9}
LOSSES = {loss.__name__: loss for loss in WEIGHTS}


def label_func(f):
    "Cats: in Pets the names of their breeds, and only those, start with a capital."
    return f[0].isupper()


def get_dls(args):
    path = untar_data(URLs.PETS)
    files = get_image_files(path / "images").sorted()
    if args.images is not None:
        files = files.shuffle()[: args.images]
    bs = min(args.bs, max(2, len(files) // 4))  # few pictures should give a few batches too
    kwargs = {"seed": args.seed, "bs": bs, "num_workers": args.workers}
    return ImageDataLoaders.from_name_func(path, files, label_func, item_tfms=Resize(args.size), **kwargs)


def train_student(dls, args, *cbs):
    "The accuracy of a ResNet-18 trained from scratch."
    set_seed(args.seed)
    dls.rng.seed(args.seed)
    student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
    student.fit_one_cycle(args.epochs, 1e-3, cbs=cbs)
    return student.recorder.values[-1][-1]


def match_layers(teacher, size):
    "Pairs of layers of one resolution, printed."
    pairs = match_feature_layers(resnet18(num_classes=2), teacher, torch.randn(1, 3, size, size))
    print(f"\n{'Student':<16} Teacher")
    for s, t in zip(pairs["student"], pairs["teacher"], strict=True):
        print(f"{s:<12} <-> {t}")
    return pairs


def print_results(baseline, accuracies):
    "A Markdown table."
    row = "| {:<20} | {:<12} | {:>8} | {:>11} | {:<19} |".format
    print(f"\n{row('Loss', 'Type', 'Accuracy', 'vs Baseline', 'Needs layers?')}")
    print(row("-" * 20, "-" * 12, "-" * 7 + ":", "-" * 10 + ":", "-" * 19))
    print(row("No distillation", "", f"{baseline:.1%}", "", ""))
    for loss, acc in accuracies.items():
        kind = "Intermediate" if loss in LAYERS else "Output"
        print(row(loss.__name__, kind, f"{acc:.1%}", f"{acc - baseline:+.1%}", LAYERS.get(loss, "No")))


def parse_args(argv):
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--size", type=int, default=224, help="pictures are cropped to size x size")
    add("--epochs", type=int, default=10, help="of each student")
    add("--teacher-epochs", type=int, default=5, help="of the teacher")
    add("--images", type=int, help="number of pictures, None for all")
    add("--losses", nargs="+", choices=LOSSES, metavar="LOSS", help="which, None for all eight")
    add("--bs", type=int, default=64, help="batch size")
    add("--pretrained", action=BooleanOptionalAction, default=True, help="start the teacher from ImageNet weights")
    add("--seed", type=int, default=42, help="of weights, batches and the split into training and validation")
    add("--workers", type=int, help="processes that load pictures, None for one per core")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    set_seed(args.seed)
    dls = get_dls(args)
    print("Teacher, ResNet-34")
    teacher = vision_learner(dls, resnet34, metrics=accuracy, pretrained=args.pretrained)
    teacher.fit_one_cycle(args.teacher_epochs, 1e-3)
    print("\nNo distillation, ResNet-18")
    baseline, accuracies = train_student(dls, args), {}
    pairs = match_layers(teacher.model, args.size)
    for loss in map(LOSSES.get, args.losses or LOSSES):
        print(f"\n{loss.__name__}")
        layers = (pairs["student"], pairs["teacher"]) if loss in LAYERS else ()
        kd = KnowledgeDistillationCallback(teacher.model, loss, *layers, weight=WEIGHTS[loss])
        accuracies[loss] = train_student(dls, args, kd)
    print_results(baseline, accuracies)


if __name__ == "__main__":
    main()
