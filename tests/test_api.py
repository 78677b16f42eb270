"What can be imported from where, and that a script for fasterai runs after a change of its imports."

import ast
import importlib.metadata
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastai.learner import Learner

import fasterai_kd
from fasterai_kd import schedule
from fasterai_kd.losses import intermediate, output, relations
from fasterai_kd.losses._traits import REGISTRY

LOSSES = list(REGISTRY)
CALLBACK = [
    "KnowledgeDistillationCallback",
    "get_model_layers",
    "get_module_by_name",
    "match_feature_layers",
]
MORE = ["EMATeacher", "Ensemble", "MutualLearning", "RepeatedViews", "Teacher", "TeacherCache", "renormalize"]
SCHEDULES = ["Schedule", "one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd", "schedules"]
SCHEDULES += ["sched_oneshot", "sched_iterative", "sched_agp", "sched_onecycle", "sched_dsd", "available_schedules"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("fasterai_kd", LOSSES + CALLBACK + MORE + ["Schedule", "combine", "select"]),
        ("fasterai_kd.all", LOSSES + CALLBACK + MORE + ["combine", "select"]),
        ("fasterai_kd.losses", [*LOSSES, "match_feature_layers"]),
        (
            "fasterai_kd.losses.intermediate",
            ["Attention", "Similarity", "FitNet", "ActivationBoundaries", "CWD", "Cosine"],
        ),
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


SHAPES = [getattr(schedule, name) for name in SCHEDULES if name.startswith("sched_")]
METHODS = [fasterai_kd.Teacher.forward, fasterai_kd.Schedule.progress]


@pytest.mark.parametrize("obj", [*PUBLIC, *SHAPES, *METHODS, Learner.distill], ids=lambda o: o.__qualname__)
def test_help_shows_what_every_parameter_means(obj):
    shown = pydoc.render_doc(obj, renderer=pydoc.plaintext)
    for name, p in inspect.signature(obj).parameters.items():
        if p.kind != p.VAR_KEYWORD and name != "self":
            assert re.search(rf"^ *\|? *{name}: \S", shown, re.MULTILINE), name


def test_help_shows_where_further_arguments_go():
    assert re.search(r"^ *kwargs: of the callback", pydoc.render_doc(Learner.distill, renderer=pydoc.plaintext), re.M)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_says_what_it_raises_and_its_source(name):
    doc = getattr(fasterai_kd, name).__doc__
    assert "Raises ValueError" in doc
    assert "Source" in doc


def test_the_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("fasterai_kd") == fasterai_kd.__version__


PACKAGE = Path(fasterai_kd.__file__).parent
FLOOR = {"_tensors", "_modules", "_class_axis", "_docs", "schedule"}  # imported by all, importing one another alone
ROOMS = {  # may import, besides the floor
    "losses": {"features.layout"},
    "features": set(),
    "teacher": {"features.hooks"},
    "data": set(),
    "weighting": set(),
    "history": set(),
    "extra_optimizers": set(),
    "_layer_similarity": {"features.hooks", "features.layout", "losses.matching"},
    "mutual_learning": {"losses", "teacher.output", "weighting"},
    "distiller": {"losses", "features", "teacher", "data", "history", "extra_optimizers"},
    "distillation_callback": {"distiller", "losses", "teacher", "weighting", "history"},
    "distill": {"losses", "teacher", "distillation_callback"},
    "payoff": set(),
    "show": {"losses", "distillation_callback", "_layer_similarity", "payoff"},
}


def imported(path):
    "The package's own modules that a file imports, from its root: 'losses.combine'."
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else [])]
            yield from [".".join(base)] if node.module else [".".join([*base, n.name]) for n in node.names]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_between_the_rooms_point_down(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room in ("__init__", "all"):
        return
    allowed = FLOOR if room in FLOOR else FLOOR | ROOMS[room] | {room}
    for name in imported(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) <= 280
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node, clean=False) or ""
            statements = node.end_lineno - node.body[0].lineno + 1 - len(documented.splitlines())
            assert statements <= 40, f"{node.name} has {statements} lines"


def test_the_callback_is_read_on_few_screens():
    assert len((PACKAGE / "distillation_callback.py").read_text().splitlines()) <= 280


def test_the_files_of_the_losses_export_what_they_register():
    exported = {name for file in (intermediate, output, relations) for name in file.__all__}
    assert exported == set(LOSSES)
    assert all(getattr(fasterai_kd, name) is loss for name, loss in REGISTRY.items())


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


@pytest.mark.slow
def test_a_script_for_fasterai_runs_after_a_change_of_its_imports():
    code = PEER_SCRIPT.replace("fasterai.distill", "fasterai_kd").replace(
        "fasterai.core.schedule", "fasterai_kd.schedule"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "['0', '1'] ['0', '1']" in ran.stdout
    assert "done 0.5" in ran.stdout
