"""What a distilling step costs, next to the student's own step and to the least that distilling needs.

    python benchmark_speed.py                                      # all losses, ResNet-34 teaches ResNet-18
    python benchmark_speed.py --teacher trainable --losses SoftTarget,Attention --rounds 9
    python benchmark_speed.py --losses-only                        # forward and backward of the loss functions
    python benchmark_speed.py --user                               # epochs as in losses_guide.py and quickstart.py

Each variant is a fastai Learner with its own copies of student and teacher. In a round each of them, in random order,
fits the same batches; the time per step is that of `--steps` batches in a row, loading included, after a first batch
that does not count. Ratios are within a round; shown are the median and the range of the rounds. Where other programs
run too, `OMP_NUM_THREADS=1 python benchmark_speed.py --clock cpu` is steadier.

- student alone: no distillation
- limit: written by hand, hooks, teacher in evaluation mode without a graph, loss, blend, and nothing else; it clones no
  map, though some models overwrite maps in place (not those of the ResNets that are compared here)
- ours: KnowledgeDistillationCallback, also with `cache` when all is stored
- fasterai, torchdistill: if installed; the former with its own losses, of the latter the hooks in a step like the limit

"saved" is what the graph keeps for the backward pass, without weights; "peak" is CUDA memory above what was there
before the step; "left" are gradients that the teacher has afterwards.
"""

import argparse
import json
import os
import random
import warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler is talkative
warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

import torch  # noqa: E402
from benchmarks.common import LOSSES  # noqa: E402
from benchmarks.losses import losses_only  # noqa: E402
from benchmarks.steps import steps  # noqa: E402
from benchmarks.user import user  # noqa: E402


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    numbers = {"type": int, "nargs": "*"}
    add("--losses-only", action="store_true", help="time the loss functions")
    add("--user", action="store_true", help="time epochs of training")
    add("--losses", type=lambda s: s.split(","), help="with commas between: SoftTarget,Attention")
    add("--teacher", choices=["frozen", "trainable", "vision_learner"], default="frozen")
    add("--teacher-arch", default="resnet34", help="of torchvision")
    add("--student-arch", default="resnet18", help="of torchvision")
    add("--px", type=int, default=64, help="height and width of the images")
    add("--bs", type=int, default=16, help="batch size")
    add("--pairs", type=int, default=5, help="of layers, at most")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="half precision needs cuda")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: where other programs run too; give one thread")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=4, help="timed in a fit")
    add("--seconds", type=float, default=0.1, help="that a loss function runs in a round, with --losses-only")
    add("--batches", **numbers, default=[64, 128, 256, 512], help="sizes of batches, with --losses-only")
    add("--classes", **numbers, default=[10, 100, 1000, 10000, 100000], help="with --losses-only")
    add("--n-pairs", **numbers, default=[1, 2, 4, 8, 16], help="of layers, with --losses-only")
    add("--images", type=int, default=64, help="in an epoch, with --user")
    add("--draws", type=int, default=1000, help="images in an epoch of the quickstart, with --user")
    add("--out", help="JSON file")
    add("--markdown", help="file for the table")
    args = parser.parse_args(argv)
    if unknown := set(args.losses or ()) - set(LOSSES):
        parser.error(f"no loss {', '.join(unknown)}: choose from {', '.join(LOSSES)}")
    if (args.clock, args.device) == ("cpu", "cuda"):
        parser.error("cuda needs the wall clock")
    if args.dtype != "float32" and args.device == "cpu":
        parser.error("fastai's mixed precision is for cuda")
    return args


def main(argv=None):
    args = parse_args(argv)
    random.seed(0)
    torch.manual_seed(0)
    about = f"{args.clock} time, torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads"
    if not args.losses_only:
        about += f", {args.px} px, batch {args.bs}, {args.teacher} {args.teacher_arch}"
    rows, lines = [], [about, ""]
    print("\n".join(lines))
    for row in losses_only(args) if args.losses_only else user(args) if args.user else steps(args):
        new = [f"| {' | '.join(row)} |"] + ([] if rows else [f"|{'---|' * len(row)}"])
        print(*new, sep="\n", flush=True)
        rows.append(row)
        lines += new
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.out:
        results = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        Path(args.out).write_text(json.dumps({"settings": vars(args), "about": about, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
