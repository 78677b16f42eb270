"Published weights are what the papers' code says, and what the page on weights says."

import re
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, Net
from fastai.torch_core import set_seed

from fasterai_kd import *
from fasterai_kd.recipes import RECIPES

PAGE = (Path(__file__).parents[1] / "nbs" / "weights.md").read_text()
OUTPUTS = {"pred": torch.randn(8, 10), "teacher_pred": torch.randn(8, 10), "target": torch.arange(8)}


def table():
    "The recipes as the page shows them."
    lines = ["| loss | data | options | task | weight | layers | from |", "|---|---|---|---|---|---|---|"]
    for (name, data), r in RECIPES.items():
        options = ", ".join(f"`{k}={v}`" for k, v in r.options.items()) or "–"
        lines.append(f"| `{name}` | {data} | {options} | {r.task_weight:g} | {r.weight:g} | {r.layers} | {r.source} |")
    return "\n".join(lines)


def test_the_page_shows_the_recipes_of_the_code():
    assert table() in PAGE


def test_the_pages_shares_are_those_of_its_betas():
    rows = re.findall(r"^\| `(\w+)`.*\| (\d+) \| (0\.\d+) \|$", PAGE, re.M)
    assert [row[0] for row in rows] == ["SoftTarget", "FitNet", "Attention", "Similarity"]
    for name, beta, share in rows:
        r = recipe(name)
        assert r["weight"] / r["task_weight"] == pytest.approx(float(beta))
        assert float(beta) / (1 + float(beta)) == pytest.approx(float(share), abs=5e-5)


def test_a_share_and_a_sum_have_the_same_gradient_up_to_a_factor():
    w, pred = 0.75, torch.randn(8, 10, requires_grad=True)
    task, kd = pred.logsumexp(1).mean(), SoftTarget(pred, OUTPUTS["teacher_pred"])
    share, total = torch.lerp(task, kd, w), task + w / (1 - w) * kd
    a, b = (torch.autograd.grad(x, pred, retain_graph=True)[0] for x in (share, total))
    torch.testing.assert_close(a, (1 - w) * b)


@pytest.mark.parametrize(
    ("name", "data", "weight", "task", "loss"),
    [
        ("SoftTarget", "cifar100", 0.9, 0.1, lambda: SoftTarget(**OUTPUTS, T=4)),
        ("SoftTarget", "imagenet", 0.5, 0.5, lambda: Mutual(**OUTPUTS)),
        ("DecoupledKD", "cifar100", 1, 1, lambda: DecoupledKD(**OUTPUTS, T=4, alpha=1, beta=8)),
        ("DecoupledKD", "imagenet", 1, 1, lambda: DecoupledKD(**OUTPUTS, T=1, alpha=1, beta=0.5)),
        ("NKD", "imagenet", 1, 1, lambda: DecoupledKD(**OUTPUTS, T=1, beta=1.5, normalize=True)),
    ],
)
def test_losses_on_outputs_have_the_published_temperature_and_weights(name, data, weight, task, loss):
    r = recipe(name, data)
    assert (r["weight"], r["task_weight"]) == (weight, task)
    assert torch.equal(r["loss"](**OUTPUTS), loss())


@pytest.mark.parametrize(
    ("name", "weight"), [("Attention", 1000), ("Similarity", 3000), ("FitNet", 100), ("RKD", 1), ("PKT", 30000)]
)
def test_losses_on_features_have_the_weights_of_the_crd_papers_comparison(name, weight):
    r = recipe(name)
    assert (r["weight"], r["task_weight"], r["schedule"]) == (weight, 1, None)
    fm = {"a": torch.randn(8, 4, 3, 3)}, {"b": torch.randn(8, 4, 3, 3)}
    assert torch.equal(r["loss"](fm_s=fm[0], fm_t=fm[1]), globals()[name](*fm))


@pytest.mark.parametrize(("epochs", "end"), [(None, 20 / 240), (240, 20 / 240), (40, 0.5), (10, 1.0)])
def test_decoupled_kd_warms_up_over_twenty_epochs(epochs, end):
    schedule = recipe("DecoupledKD", epochs=epochs)["schedule"]
    assert schedule.progress(end / 2) == pytest.approx(0.5)
    assert schedule.progress(end) == schedule.progress(1.0) == 1
    assert recipe("DecoupledKD", "imagenet", epochs=epochs)["schedule"] is None


def test_options_replace_the_published_ones():
    assert torch.equal(recipe("DecoupledKD", beta=2)["loss"](**OUTPUTS), DecoupledKD(**OUTPUTS, beta=2))


def test_names_are_found_in_any_case():
    assert recipe("softtarget", "CIFAR100")["weight"] == 0.9


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        (
            ("SoftTargets",),
            {},
            "no recipe for the loss 'SoftTargets': did you mean 'SoftTarget'.* There are SoftTarget, D",
        ),
        (("Nothing",), {}, "no recipe for the loss 'Nothing': There are SoftTarget"),
        ((None,), {}, "no recipe for the loss None"),
        (("SoftTarget", "imagenette"), {}, "no recipe for the data 'imagenette': did you mean 'imagenet'"),
        (("Attention", "imagenet"), {}, "there is a recipe of Attention for cifar100, not for imagenet"),
        (("SoftTarget",), {"beta": 2, "gamma": 1}, "SoftTarget has no beta, gamma"),
        (("DecoupledKD",), {"epochs": 0}, "epochs must be 1 or more, got 0"),
    ],
)
def test_what_it_does_not_know_it_says_with_what_there_is(args, options, match):
    with pytest.raises(ValueError, match=match):
        recipe(*args, **options)


@pytest.mark.parametrize(("name", "data"), RECIPES)
def test_a_recipe_is_given_on_to_the_callback(make_learner, teacher, name, data):
    set_seed(0)
    layers = {"SoftTarget": (), "DecoupledKD": (), "NKD": ()}.get(name, PAIRS)
    keys = dict(zip(("activations_student", "activations_teacher"), layers, strict=False))
    kd = KnowledgeDistillationCallback(teacher, **recipe(name, data, epochs=1), **keys)
    make_learner(Net()).fit(1, 1e-4, cbs=kd)
    assert len(kd.history["kd_loss"]) == 4
