"Every loss of the library, compared with its row in reference.py: values, gradients, inputs, errors, a training."

import os
import re
import subprocess
import sys
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import same, state
from fastai.torch_core import TensorBase, TensorCategory, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import REFERENCE, Row
from torch import Tensor
from torch.testing import assert_close

from fasterai_kd import KnowledgeDistillationCallback
from fasterai_kd.losses._traits import REGISTRY, trait

law = settings(deadline=None, derandomize=True, max_examples=20)
f64 = torch.float64


# Losses with options, and what they are given


class Case(NamedTuple):
    "A loss with options, and its row."

    name: str
    options: dict[str, Any]
    row: Row

    def __str__(self):
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def loss(self):
        return partial(REGISTRY[self.name], **self.options)

    def value(self, s, t, y):
        return self.loss({"s": s}, {"t": t}) if self.row.of == "layers" else self.loss(s, t, target=y)

    def expected(self, s, t, y):
        return self.row.value(s.numpy(), t.numpy(), y.numpy(), **self.options)

    def inputs(self, shape_s, shape_t=None, scale=None, **kwargs):
        "Of the student and the teacher, and labels."
        if self.row.of == "layers":
            s, t, y = features(*shape_s), features(*(shape_t or shape_s), seed=1), torch.arange(shape_s[0])
        else:
            s, t, y = batch(*shape_s, scale=1.0)
        scale = scale or {"sample": 3.0, "batch": 1.0, "layers": 1.0}[self.row.of]
        return s.mul(scale).to(**kwargs), t.mul(scale).to(**kwargs), y.to(kwargs.get("device"))


EVERY = [Case(name, options, row) for name, row in REFERENCE.items() for options in row.variants]
CASES = {str(case): case for case in EVERY if case.name in REGISTRY}  # for the others the first test fails


def select(*names, **options):
    "The cases of these losses that have these options; an option that is False may be missing."
    assert set(names) <= set(REFERENCE)
    return {
        label: case
        for label, case in CASES.items()
        if case.name in names and all(case.options.get(k, False) == v for k, v in options.items())
    }


def cases(chosen=CASES):
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


def shapes_of_rows(chosen):
    return pytest.mark.parametrize(("case", "shape_s", "shape_t"), chosen.values(), ids=chosen)


def losses(chosen):
    return pytest.mark.parametrize("loss", [c.loss for c in chosen.values()], ids=chosen)


def batch(*shape, scale=3.0, **kwargs):
    "Logits of student and teacher, and labels."
    rng = torch.Generator().manual_seed(len(shape))
    s, t = (torch.randn(shape, generator=rng, dtype=f64).mul(scale).to(**kwargs) for _ in "st")
    return s, t, torch.randint(shape[1], shape[:1] + shape[2:], generator=rng).to(s.device)


def features(*shape, seed=0, **kwargs):
    "No value within 0.1 of 0, where |F| has its kink."
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)
    return (x + 0.1 * x.sign()).to(**kwargs)


def pair(*shape, **kwargs):
    return features(*shape, **kwargs), features(*shape, seed=1, **kwargs)


def value(loss, s, t):
    "Of one pair of layers."
    return loss({"s": s}, {"t": t})


def eighths(*shape):
    "Multiples of 1/8, zeros, ties and constant rows among them: of a variance that is 0 or not tiny."
    return arrays(np.int64, shape, elements=st.integers(-24, 24)).map(lambda a: torch.from_numpy(a).double() / 8)


def shapes(s, t):
    return re.escape(f"{s} and {t}")


LAYERS = {label: case for label, case in CASES.items() if case.row.of == "layers"}
PREDICTIONS = {label: case for label, case in CASES.items() if case.row.of != "layers"}
OF_ONE_SHAPE = {label: case for label, case in LAYERS.items() if not case.row.takes_unequal_shapes}
SHAPES = {f"{label} {s} {t}": (case, s, t) for label, case in CASES.items() for s, t in case.row.shapes}
CANCELS = [(1, 2), (5,), (2, 2, 2, 2)]  # two logits, one number or two samples: their differences have few digits
TYPICAL = {f"{label} {shape}": (PREDICTIONS[label], shape) for label in PREDICTIONS for shape in [(4, 3), (2, 3, 4, 5)]}
TYPICAL |= {label: (LAYERS[label], (4, 3, 4, 5)) for label in LAYERS}

typical = pytest.mark.parametrize(("case", "shape"), TYPICAL.values(), ids=TYPICAL)
on_predictions = pytest.mark.parametrize("loss", {c.name: REGISTRY[c.name] for c in PREDICTIONS.values()}.values())
on_layers = pytest.mark.parametrize("loss", {c.name: REGISTRY[c.name] for c in LAYERS.values()}.values())
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


# One row a loss


def test_every_loss_has_a_row():
    without, unknown = REGISTRY.keys() - REFERENCE.keys(), REFERENCE.keys() - REGISTRY.keys()
    assert not without, f"add a row to tests/reference.py for {', '.join(sorted(without))}"
    assert not unknown, f"no loss is registered for the rows {', '.join(sorted(unknown))} of tests/reference.py"


@pytest.mark.parametrize("name", REFERENCE)
def test_the_decorator_says_of_a_loss_what_its_row_does(name):
    loss, row = REGISTRY[name], REFERENCE[name]
    assert trait(loss, "reads_predictions") == (row.of != "layers")
    assert trait(loss, "same_shape") == (row.of == "layers" and not row.takes_unequal_shapes)
    assert trait(loss, "reduction") == ("reduction" in signature(loss).parameters)


# Values and gradients


@shapes_of_rows(SHAPES)
def test_value_is_the_formula(case, shape_s, shape_t, device):
    s, t, y = case.inputs(shape_s, shape_t)
    got = case.value(s.to(device), t.to(device), y.to(device))
    assert (got.shape, got.dtype) == ((), f64)
    smallest = 1e-15 if case.row.of == "layers" else 1e-12
    assert got.item() == pytest.approx(case.expected(s, t, y), rel=case.row.rel, abs=smallest)


@shapes_of_rows({label: row for label, row in SHAPES.items() if row[1] not in CANCELS})
def test_float32_is_enough(case, shape_s, shape_t, device):
    s, t, y = case.inputs(shape_s, shape_t)
    got = case.value(*(x.to(device, torch.float32) for x in (s, t)), y.to(device))
    assert (got.shape, got.dtype) == ((), torch.float32)
    assert got.item() == pytest.approx(case.expected(s, t, y), rel=case.row.rel32)


@shapes_of_rows(SHAPES)
def test_gradient_is_the_derivative_of_the_value(case, shape_s, shape_t):
    s, t, y = case.inputs(shape_s, shape_t, scale=1.0)
    assert torch.autograd.gradcheck(lambda s: case.value(s, t, y), s.requires_grad_())


@typical
def test_gradient_reaches_every_sample_of_the_student_and_never_the_teacher(case, shape, device):
    s, t, y = case.inputs(shape, device=device)
    case.value(s.requires_grad_(), t.requires_grad_(), y).backward()
    dim = (1, 2, 3) if case.row.of == "layers" else 1  # of logits: every position
    assert (s.grad.abs().sum(dim) > 0).all()
    assert t.grad is None


@cases(LAYERS)
@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (4, 3, 3, 2)], ids=str)
def test_gradient_reaches_every_layer_of_the_student_and_never_the_teacher(case, shape, device):
    s, t = ({i: x.to(device).requires_grad_() for i, x in enumerate(pair(*shape))} for _ in "st")
    t = dict(zip(t, reversed(t.values()), strict=True))
    case.loss(s, t).backward()
    assert all((x.grad.flatten(1).abs().sum(1) > 0).all() for x in s.values())
    assert all(x.grad is None for x in t.values())


@cases()
@pytest.mark.parametrize("teacher", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_inputs_give_finite_values_and_gradients_in_float32(case, teacher, size):
    signs = torch.tensor([[1.0, -1, 0], [-1, 1, 1]])
    s = size * (features(4, 3, 4, 4, dtype=torch.float32).sign() if case.row.of == "layers" else signs)
    got = case.value(s.requires_grad_(), teacher * s.detach(), torch.tensor([0, 0]))
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@cases(LAYERS)
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_a_layer_of_zeros_gives_finite_values_and_gradients(case, dead):
    s, t = pair(4, 4, 3, 3)
    s, t = s * (dead == "teacher"), t * (dead == "student")
    got = value(case.loss, s.requires_grad_(), t)
    got.backward()
    assert got.isfinite()
    assert s.grad.isfinite().all()


@halves
@typical
def test_half_precision_is_computed_in_float32(case, shape, dtype, device):
    s, t, y = case.inputs(shape, scale=300.0, dtype=dtype, device=device)  # squares and products overflow float16
    got = case.value(s.requires_grad_(), t, y)
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert got == case.value(s.float(), t.float(), y)
    assert got == case.value(s, t.float(), y)
    got.backward()
    assert s.grad.dtype == dtype


@halves
@typical
def test_half_precision_is_close_to_float32(case, shape, dtype):
    s, t, y = case.inputs(shape)
    assert case.value(s.to(dtype), t.to(dtype), y).item() == pytest.approx(case.value(s, t, y).item(), rel=0.03)


@typical
def test_torch_compile_makes_no_difference(case, shape):
    s, t, y = case.inputs(shape)
    torch._dynamo.reset()
    compiled = torch.compile(case.value, backend="eager")
    grads = [torch.autograd.grad(f(s.requires_grad_(), t, y), s)[0] for f in (case.value, compiled)]
    assert torch.equal(compiled(s, t, y), case.value(s, t, y))
    assert torch.equal(*grads)


# What may be given


@typical
def test_tensors_of_fastai_work_and_give_a_plain_tensor(case, shape):
    s, t, y = case.inputs(shape, dtype=torch.float32)
    s_img = TensorImage(s.clone()).requires_grad_()
    got = case.value(s_img, TensorBase(t), TensorCategory(y))
    assert type(got) is Tensor
    assert got == case.value(s, t, y)
    got.backward()
    assert s_img.grad.abs().sum() > 0


@typical
def test_further_keywords_are_ignored_and_partial_sets_arguments(case, shape):
    s, t, y = case.inputs(shape)
    if case.row.of == "layers":
        given_ = {"fm_s": {"s": s}, "fm_t": {"t": t}}
        others = {"pred": torch.zeros(4, 5), "teacher_pred": torch.zeros(4, 5), "target": torch.zeros(4, 5)}
    else:
        given_, others = {"pred": s, "teacher_pred": t, "target": y}, {"fm_s": {}, "fm_t": {}}
    got = case.loss(**given_, **others, lam=0.3)
    assert got == REGISTRY[case.name](*list(given_.values())[:2], target=y, **case.options)


@typical
def test_inputs_are_left_as_they_are(case, shape):
    given_ = case.inputs(shape)
    s, t, y = given_
    fm_s, fm_t = {"s": s}, {"t": t}
    case.loss(pred=s, teacher_pred=t, fm_s=fm_s, fm_t=fm_t, target=y)
    assert (list(fm_s), list(fm_t)) == (["s"], ["t"])
    assert [x._version for x in given_] == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(given_, case.inputs(shape), strict=True))


@cases()
def test_memory_format_makes_no_difference(case):
    s, t, y = case.inputs((3, 3, 4, 5))
    last = s.contiguous(memory_format=torch.channels_last)
    assert_close(case.value(last, t, y), case.value(s, t, y))
    assert_close(case.value(last, t.transpose(2, 3).contiguous().transpose(2, 3), y), case.value(s, t, y))


@losses(LAYERS)
@law
@given(eighths(2, 4, 3, 2, 2), eighths(2, 4, 3, 2, 2))
def test_loss_of_several_pairs_is_the_sum_paired_by_position_whatever_the_names(loss, s, t):
    both = loss({"a": s[0], "b": s[1]}, {"b": t[0], "a": t[1]})
    assert_close(both, value(loss, s[0], t[0]) + value(loss, s[1], t[1]))
    assert_close(both, loss({"b": s[1], "a": s[0]}, {"a": t[1], "b": t[0]}))


# Errors

x23, y2 = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@on_predictions
@pytest.mark.parametrize(
    "shape", [(2, 4), (1, 3), (3,), (2, 1), (4, 3), (2, 3, 1), (1, 2, 3)], ids=lambda shape: f"teacher {shape}"
)
def test_unequal_outputs_are_refused_and_never_broadcast(loss, shape):
    expected = rf"{loss.__name__} .*student gives {re.escape('(2, 3)')}, the teacher {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=expected):
        loss(x23, torch.zeros(shape), target=y2)


@on_predictions
def test_outputs_that_are_no_tensors_are_refused(loss):
    with pytest.raises(TypeError, match=rf"{loss.__name__} .*student's output is a tuple"):
        loss((x23, x23), x23, target=y2)
    with pytest.raises(TypeError, match=rf"{loss.__name__} .*teacher's output is a dict"):
        loss(x23, {"out": x23}, target=y2)


@pytest.mark.parametrize("loss", [loss for loss in REGISTRY.values() if "T" in signature(loss).parameters])
@pytest.mark.parametrize("T", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(loss, T):
    x = features(2, 3, 2, 2)
    with pytest.raises(ValueError, match=rf"{loss.__name__} needs a finite temperature T > 0, got {T}"):
        loss(pred=x23, teacher_pred=x23, fm_s={"s": x}, fm_t={"t": x}, T=T, target=y2)


@on_layers
@pytest.mark.parametrize(("n_s", "n_t"), [(0, 0), (2, 1), (1, 2), (0, 1), (1, 0)])
def test_missing_layers_and_unequal_numbers_of_them_are_refused(loss, n_s, n_t):
    x = features(2, 3, 4, 4)
    expected = rf"{loss.__name__} compares layers in pairs, got {n_s} of the student and {n_t} of the teacher"
    with pytest.raises(ValueError, match=f"{expected}: give activations_student and activations_teacher"):
        loss(dict.fromkeys("ab"[:n_s], x), dict.fromkeys("ab"[:n_t], x))


@on_layers
def test_missing_features_are_an_error_that_says_what_to_give(loss):
    with pytest.raises(ValueError, match="got 0 of the student and 0 of the teacher: give activations_student"):
        loss(None, None)


@on_layers
@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (2, 4, 2, 2), (6, 4, 2, 2), (1, 7), (2, 7), (6, 7)], ids=str)
def test_unequal_batches_are_refused_and_never_broadcast(loss, shape):
    expected = rf"{loss.__name__}.* student layer 'conv' and teacher layer 'stem' .*batches"
    with pytest.raises(ValueError, match=rf"{expected}.*{shapes((3, 4, 2, 2), shape)}"):
        loss({"conv": features(3, 4, 2, 2)}, {"stem": features(*shape)})


@losses(OF_ONE_SHAPE)
@pytest.mark.parametrize(
    "shape", [(3, 1, 2, 2), (3, 4, 1, 1), (3, 4, 2, 1), (3, 8, 2, 2), (3, 4), (3, 1, 4, 2, 2)], ids=str
)
def test_unequal_features_are_refused_and_never_broadcast_where_one_shape_is_needed(loss, shape):
    fit = ", ".join(sorted({c.name for c in LAYERS.values() if c.row.takes_unequal_shapes}))
    expected = rf"{loss.func.__name__} .*student layer 'conv' and teacher layer 'stem'.*{shapes((3, 4, 2, 2), shape)}"
    with pytest.raises(ValueError, match=expected):
        loss({"conv": features(3, 4, 2, 2)}, {"stem": features(*shape)})
    with pytest.raises(ValueError, match=rf".*{shapes(shape, (3, 4, 2, 2))}.* use one of {fit}$"):
        loss({"conv": features(*shape)}, {"stem": features(3, 4, 2, 2)})


# A training


@pytest.mark.parametrize("name", REFERENCE)
def test_a_training_lowers_the_loss_and_leaves_the_teacher(make_learner, teacher, student, name):
    layers = ["layer1", "layer2"] if REFERENCE[name].of == "layers" else None
    kd = KnowledgeDistillationCallback(teacher, REGISTRY[name], layers, layers, weight=1.0)
    first, before = student.conv1.weight.clone(), state(teacher)
    make_learner().fit(6, 0.01, cbs=kd)
    steps = kd.history["kd_loss"]
    assert sum(steps[-4:]) < sum(steps[:4])  # the last epoch and the first
    assert not torch.equal(student.conv1.weight, first)
    assert same(before, state(teacher))


# The page for contributors

WITH_THE_EXAMPLE = """
import re, sys
import pytest
sys.path.insert(0, "tests")
import conftest, fasterai_kd, reference
from fasterai_kd.losses import output

page = re.sub("(?m)^   ", "", open("nbs/add_a_loss.md", encoding="utf-8").read())
loss, formula = re.findall("```python\\n(.*?)```", page, re.S)
exec(loss, vars(output))
exec(formula, vars(reference))
sys.exit(pytest.main(["-q", "-k", "LogitNorm", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_example_of_add_a_loss_passes_the_tests_that_go_over_all_losses():
    files = [f"tests/test_{name}.py" for name in ("losses", "losses_output", "callback")]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins want to come before other imports
    command = [sys.executable, "-c", WITH_THE_EXAMPLE, *files]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 50
