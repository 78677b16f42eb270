"""Distill on several GPUs, or on several processes of one machine.

    accelerate launch --multi_gpu distributed.py                      # all GPUs of this machine
    accelerate launch --cpu --num_processes 2 distributed.py --cpu    # a try on two CPU processes

Only `with student.distrib_ctx()`, and `teardown_distrib()` at the end, differ from training in one process. Each
process has the teacher, which is not wrapped, and the student's features come from inside the wrapper. Generated
pictures stand in for data.
"""

import argparse
import warnings

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from fastai.distributed import *  # noqa: E402
from fastai.vision.all import *  # noqa: E402

from fasterai_kd.all import *  # noqa: E402


@patch
def _broadcast(self: DistributedDL, t: list[int], rank: int) -> list[int]:
    "As in fastai, which knows GPUs only: the order of the samples, the same in all processes."
    t = torch.tensor(t, device=self.device)
    torch.distributed.broadcast(t, rank)
    return t.tolist()


def stripes(i: int, size: int = 32) -> tuple[Tensor, Tensor]:
    "Sample `i`: stripes in one of four directions, and which."
    g, label = torch.Generator().manual_seed(i), i % 4
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    wave = [x, y, x + y, x - y][label] * 20 + torch.rand(1, generator=g) * 6
    return wave.sin().expand(3, -1, -1) + torch.randn(3, size, size, generator=g), tensor(label)


def cnn(width: int) -> nn.Module:
    layers = [ConvLayer(3, width, stride=2), ConvLayer(width, 2 * width, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(2 * width, 4))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Knowledge distillation on several processes")
    parser.add_argument("--cpu", action="store_true", help="no GPU")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args(argv)
    device = torch.device("cpu") if args.cpu else default_device()
    items = [stripes(i) for i in range(args.images)]
    n_valid = len(items) // 4
    dls = DataLoaders.from_dsets(items[n_valid:], items[:n_valid], bs=16, device=device, num_workers=0)
    set_seed(42)

    def learner(width: int) -> Learner:
        return Learner(dls, cnn(width), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    teacher, student = learner(32), learner(4)
    ctx = {"sync_bn": not args.cpu, "cpu": args.cpu}  # SyncBatchNorm is for GPUs
    with teacher.distrib_ctx(**ctx):
        teacher.fit_one_cycle(args.epochs, 1e-2)
    pairs = match_feature_layers(student.model, teacher.model, items[0][0].to(device))
    kd = KnowledgeDistillationCallback(teacher, Attention, pairs["student"], pairs["teacher"], weight=0.9)
    with student.distrib_ctx(**ctx):
        student.fit_one_cycle(args.epochs, 1e-2, cbs=kd)
    return student.validate()[1]


if __name__ == "__main__":
    main()
    teardown_distrib()  # else torch sometimes aborts a process that ends
