"What the loss functions alone cost, forward and backward."

import itertools
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from .common import LOSSES, MISSING, OUTPUT, get_peer, in_rounds, mb, ms, ratio

MAPS = [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]  # channels and height of ResNet-18's maps at 224 px


def losses_only(args):
    "Rows of the table of loss functions, forward and backward."
    yield "loss", "sizes", "ours, ms (fastest)", "fasterai / ours", "peak of ours, MiB", "peak of fasterai, MiB"
    peer = get_peer()
    for name, what, kwargs in loss_cases(args):
        both = {"ours": LOSSES[name]} | ({"fasterai": getattr(peer[1], name)} if peer else {})
        calls = {who: partial(forward_backward, loss, kwargs) for who, loss in both.items()}
        timers = {who: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for who, f in calls.items()}
        runs = {who: lambda t=t: t.blocked_autorange(min_run_time=args.seconds).median for who, t in timers.items()}
        seconds = in_rounds(runs, args.rounds)
        peaks = [mb(peak_bytes(f, args.device)) for f in calls.values()]
        peers = (ratio(seconds, "fasterai", "ours"), *peaks) if peer else (MISSING, *peaks, "")
        yield name, what, ms(seconds["ours"]), *peers


def loss_cases(args):
    "(loss, what, its arguments): sizes as in practice, then one of them grows."

    def case(b, c=2, maps=()):
        kwargs = {"device": args.device, "generator": torch.Generator(args.device).manual_seed(0)}
        fm_s, fm_t = ({str(i): torch.randn(b, c, h, h, **kwargs) for i, (c, h) in enumerate(maps)} for _ in "st")
        pred, teacher_pred = (torch.randn(b, c, **kwargs) for _ in "st")
        for t in fm_s.values() if maps else [pred]:
            t.requires_grad_()
        target = torch.arange(b, device=args.device) % c
        return {"pred": pred, "teacher_pred": teacher_pred, "fm_s": fm_s, "fm_t": fm_t, "target": target}

    output = {f"B={b}, C=1000": {"b": b, "c": 1000} for b in (64, *args.batches)}
    output |= {f"B=64, C={c}": {"b": 64, "c": c} for c in args.classes}
    layers = {"B=8, ResNet-18's maps": {"b": 8, "maps": MAPS}}
    layers |= {f"B={b}, 512x7x7": {"b": b, "maps": MAPS[-1:]} for b in args.batches}
    layers |= {f"B=8, {n} x 128x28x28": {"b": 8, "maps": n * [(128, 28)]} for n in args.n_pairs}
    for name in args.losses or LOSSES:
        for what, sizes in (output if name in OUTPUT else layers).items():
            yield name, what, case(**sizes)


def forward_backward(loss, kwargs):
    leaves = list(kwargs["fm_s"].values()) or [kwargs["pred"]]
    return torch.autograd.grad(loss(**kwargs), leaves)


def peak_bytes(f, device):
    "Memory that `f` needs at its worst, above what was there."
    if device == "cuda":
        f()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            f()
        prof.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(sizes)), default=0)
