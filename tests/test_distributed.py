"Two processes train the student that one process trains with the same global batches, also from stored outputs."

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
SCRIPT = """
import contextlib, io, os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, os.environ["EXAMPLES"])
from distributed import *  # patches fastai's broadcast, which knows GPUs only

torch.set_num_threads(1)
world, rank, halves = num_distrib() or 1, rank_distrib(), torch.arange(32).view(2, -1, 4)
# rank r of two gets the r-th half of the samples: one process takes batches of both halves
order = halves.flatten() if world == 2 else halves.transpose(0, 1).flatten()
images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
items = [(images[i], tensor(i % 4)) for i in order]
valid = [(images[i], tensor(i % 4)) for i in range(16)]

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.act(self.conv2(self.act(self.conv1(x)))).mean((2, 3)))

layers, results, printed = ["conv1", "conv2"], {}, io.StringIO()
for loss in (SoftTarget, DecoupledKD, Attention, FitNet):
    torch.manual_seed(0)
    teacher, student = Net(4), Net(4)
    calls = []
    teacher.register_forward_hook(lambda m, i, o: calls.append(type(m).__name__))
    kd = KnowledgeDistillationCallback(teacher, loss, *((layers, layers) if loss in (Attention, FitNet) else ()))
    dls = DataLoaders(*(DataLoader(d, bs=8 // world, device="cpu") for d in (items, valid)))
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=sgd, wd=0., metrics=kd.metrics)
    with contextlib.redirect_stdout(printed), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 0.1, cbs=kd)
    assert calls == ["Net"] * 12, calls  # the teacher is not wrapped and runs once a batch
    assert type(learn.model) is Net and not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    results[loss.__name__] = [p.detach() for p in learn.model.parameters()], list(learn.recorder.values[-1])[1:]

again = []  # with one folder of stored outputs for all processes
for fit in range(2):
    calls.clear()
    torch.manual_seed(0)
    student = [Net(4) for _ in range(2)][1]  # as above
    kd = KnowledgeDistillationCallback(Teacher(teacher, cache=f"outputs{world}"), loss, layers, layers)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=sgd, wd=0., metrics=kd.metrics)
    with contextlib.redirect_stdout(printed), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 0.1, cbs=kd)
    again.append(([p.detach() for p in learn.model.parameters()], len(calls), len(kd._distiller.teacher.cache)))
    if world > 1:
        torch.distributed.barrier()
results["cached"] = again

torch.manual_seed(0)
teacher, student = Net(4), Net(4)
more = DataLoader([(images[i] + 1,) for i in range(16)], bs=8 // world, device="cpu")  # each rank its own share
learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=sgd, wd=0.)
with contextlib.redirect_stdout(io.StringIO()), learn.distrib_ctx(sync_bn=False, cpu=True):
    learn.fit(2, 0.1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, unlabeled=more))
results["unlabeled"] = [p.detach() for p in learn.model.parameters()], [0, 0, 0]

def agrees_at_first(pred, teacher_pred, calls, **kwargs):
    "The first batch of the second process has no gradient."
    calls.append(1)
    return SoftTarget(pred, teacher_pred) * (rank == 0 or len(calls) > 1)

results["auto"] = []
for loss, task_weight in ((SoftTarget, None), (SoftTarget, 1.0), (partial(agrees_at_first, calls=[]), 1.0)):
    torch.manual_seed(0)
    kd = KnowledgeDistillationCallback(Net(4), loss, weight="auto", task_weight=task_weight)
    learn = Learner(dls, Net(4), loss_func=CrossEntropyLossFlat(), opt_func=sgd, wd=0.)
    with contextlib.redirect_stdout(io.StringIO()), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 0.1, cbs=kd)
    results["auto"].append(kd.history["weight"])

torch.manual_seed(rank)  # also a student that differs between the ranks is followed as all have it
student, kd = Net(4), KnowledgeDistillationCallback(EMATeacher(0.5), SoftTarget)
learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=sgd, wd=0.)
with contextlib.redirect_stdout(io.StringIO()), learn.distrib_ctx(sync_bn=False, cpu=True):
    learn.fit(2, 0.1, cbs=kd)
assert type(kd.teacher) is Net
results["EMATeacher"] = [p.detach() for p in kd.teacher.parameters()], [0, 0, 0]
torch.save((results, printed.getvalue()), f"{world}-{rank}.pt")
teardown_distrib()  # else torch sometimes aborts a process that ends
"""


def launch(tmp_path, processes):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py"]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            command[1],
        ]
    env = {**os.environ, "EXAMPLES": str(EXAMPLE.parent), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(tmp_path / f"{processes}-{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.works("many processes", "distrib_ctx: DDP on 2 processes gives the student of one; also with unlabeled=")
def test_two_processes_train_the_student_that_one_trains(tmp_path):
    ((one, _),) = launch(tmp_path, 1)
    del one["cached"]
    *auto, _ = one.pop("auto")
    assert all(len(set(weights)) > 1 for weights in auto)
    (first, printed), (second, nothing) = launch(tmp_path, 2)
    for loss, (params, values) in one.items():
        for p, a, b in zip(params, first[loss][0], second[loss][0], strict=True):
            torch.testing.assert_close(a, p)
            assert torch.equal(a, b)
        assert first[loss][1][:3] == pytest.approx(values[:3], rel=1e-4)  # valid_loss, task_loss, kd_loss over all
    assert printed.count("valid_loss") == 6
    assert "valid_loss" not in nothing  # only rank 0 prints
    for rank in (first, second):
        for weights, expected in zip(rank["auto"], auto, strict=False):
            assert weights == pytest.approx(expected, rel=1e-4)  # of the gradient of all samples
        assert rank["auto"][2] == first["auto"][2]  # also where the batch of one process has no gradient
        cold, warm = rank["cached"]
        assert 0 < cold[1] < 13  # batches that a teacher saw, with one as a check
        assert (warm[1], warm[2]) == (1, 48 - 16)  # validation is on images that are trained on
        for params in (cold[0], warm[0]):
            assert all(torch.equal(a, b) for a, b in zip(params, rank["FitNet"][0], strict=True))


@pytest.mark.slow
@pytest.mark.works("many processes", "examples/distributed.py, started by `accelerate launch`")
def test_the_example_runs_by_accelerate_launch(tmp_path):
    flags = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(EXAMPLE)]
    command += ["--cpu", "--epochs=1", "--images=64"]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("valid_loss") == 2  # of the teacher and of the student, once
