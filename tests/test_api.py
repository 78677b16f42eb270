"What can be imported from where, and that a script for fasterai runs after a change of its imports."

import ast
import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import fasterai_kd

LOSSES = ["SoftTarget", "Logits", "Mutual", "DecoupledKD", "Attention", "Similarity", "FitNet", "ActivationBoundaries"]
LOSSES += ["DIST", "RKD", "PKT", "CWD"]
CALLBACK = [
    "KnowledgeDistillationCallback",
    "TeacherCache",
    "get_model_layers",
    "get_module_by_name",
    "match_feature_layers",
]
MORE = ["EMATeacher", "MutualLearning", "recipe", "renormalize"]
SCHEDULES = ["Schedule", "one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd", "schedules"]
SCHEDULES += ["sched_oneshot", "sched_iterative", "sched_agp", "sched_onecycle", "sched_dsd", "available_schedules"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("fasterai_kd", LOSSES + CALLBACK + MORE + ["Schedule", "combine"]),
        ("fasterai_kd.all", LOSSES + CALLBACK + MORE + ["combine"]),
        ("fasterai_kd.losses", [*LOSSES, "match_feature_layers"]),
        ("fasterai_kd.losses.intermediate", ["Attention", "Similarity", "FitNet", "ActivationBoundaries", "CWD"]),
        ("fasterai_kd.distillation_callback", CALLBACK),
        ("fasterai_kd.schedule", SCHEDULES),
    ],
)
def test_the_star_import_gives_the_public_names_and_no_others(module, names):
    space = {}
    exec(f"from {module} import *", space)
    got = set(space) - {"__builtins__"}
    assert set(names) <= got
    if module in ("fasterai_kd", "fasterai_kd.all"):
        assert got == set(names)


PUBLIC = [getattr(fasterai_kd, name) for name in fasterai_kd.__all__]


@pytest.mark.parametrize("obj", PUBLIC, ids=lambda o: o.__name__)
def test_every_public_object_has_a_docstring_and_typed_arguments(obj):
    assert len(obj.__doc__) > 30
    params = inspect.signature(obj).parameters.values()
    assert all(p.annotation is not p.empty for p in params)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_says_what_it_raises_and_its_source(name):
    doc = getattr(fasterai_kd, name).__doc__
    assert "Raises ValueError" in doc
    assert "Source" in doc


def test_the_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("fasterai_kd") == fasterai_kd.__version__


ARROWS = {  # who may import whom: everything else of the package is off limits
    "_tensors": [],
    "_classes": [],
    "_modes": [],
    "schedule": [],
    "capture": ["_modes", "_tensors"],
    "watch": ["capture"],
    "adapters": ["_tensors"],
    "teacher": ["_modes", "_tensors"],
    "ema": ["_tensors", "teacher"],
    "recipes": ["losses", "schedule"],
    "inputs": ["_tensors"],
    "fast": ["_modes", "_tensors"],
    "_fingerprint": [],
    "_measure": [],
    "_packing": ["_tensors"],
    "_shelf": [],
    "cache": ["_fingerprint", "_measure", "_packing", "_shelf", "_tensors"],
    "parts": ["_tensors"],
    "losses._logits": ["_classes", "_tensors"],
    "losses._pairs": ["_tensors"],
    "losses.combine": ["_pairs", "_tensors"],
    "losses.output": ["_logits"],
    "losses.intermediate": ["_logits", "_pairs", "_tensors", "relations"],
    "losses.relations": ["_pairs"],
    "losses.matching": ["_modes", "_tensors"],
    "probe": ["_modes", "_tensors", "capture", "losses.matching"],
}


@pytest.mark.parametrize("module", ARROWS)
def test_losses_schedules_capture_and_teacher_know_neither_each_other_nor_the_callback(module):
    tree = ast.parse(inspect.getsource(importlib.import_module(f"fasterai_kd.{module}")))
    nodes = ast.walk(tree)
    imported = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level]
    assert sorted(imported) == ARROWS[module]


def test_importing_the_package_draws_no_picture_and_imports_no_optional_package():
    code = "import sys, warnings; warnings.simplefilter('ignore'); import fasterai_kd.all; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"fasterai", "timm", "accelerate", "pytest", "fasterai_kd.show"} & set(modules)


PEER_SCRIPT = """
from fasterai.distill.all import *
from fasterai.core.schedule import cos
from fasterai.distill.distillation_callback import match_feature_layers
from fasterai.distill.losses import Attention
from fastai.vision.all import *

x = torch.randn(8, 3, 32, 32)
dls = DataLoaders.from_dsets([(a, tensor(i % 2)) for i, a in enumerate(x)], [(x[0], tensor(0))], bs=4, device='cpu')
head = lambda c: [nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(c, 2)]
net = lambda c: nn.Sequential(ConvLayer(3, c), ConvLayer(c, c, stride=2), *head(c))
teacher, student = net(8), net(4)
pairs = match_feature_layers(student, teacher, torch.randn(1, 3, 32, 32))
print(pairs['student'], pairs['teacher'], get_model_layers(student)[:2], get_module_by_name(student, '0'))
kd = KnowledgeDistillationCallback(teacher, Attention, pairs['student'], pairs['teacher'], 0.9, cos)
Learner(dls, student, loss_func=F.cross_entropy).fit_one_cycle(1, 1e-3, cbs=kd)
kd = KnowledgeDistillationCallback(teacher, partial(DecoupledKD, beta=2.), weight=0.5, schedule=cos)
Learner(dls, student, loss_func=F.cross_entropy, cbs=kd).fit(1)
print('done', kd.current_weight)
"""


def test_a_script_for_fasterai_runs_after_a_change_of_its_imports():
    code = PEER_SCRIPT.replace("fasterai.distill", "fasterai_kd").replace(
        "fasterai.core.schedule", "fasterai_kd.schedule"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "['0', '1'] ['0', '1']" in ran.stdout
    assert "done 0.5" in ran.stdout
