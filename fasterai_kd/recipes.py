"Published weights: what a paper, or its authors' code, gives to a loss."

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

from fastai.callback.schedule import sched_lin

from .losses import PKT, RKD, Attention, DecoupledKD, FitNet, Similarity, SoftTarget
from .schedule import Schedule

__all__ = ["recipe"]


class Recipe(NamedTuple):
    "The loss is `task_weight` · task loss + `weight` · `loss`."

    loss: Callable[..., Any]
    options: dict[str, Any]  # of the loss
    weight: float
    task_weight: float
    layers: str  # which are compared
    source: str
    warm_up: int = 0  # epochs in which `weight` grows from 0
    epochs: int = 0  # of the training, where there is a warm-up


_CRD = "Tian et al., ICLR 2020, their code (RepDistiller)"
_DKD = "Zhao et al., CVPR 2022, their code (mdistiller)"
_NKD = "Yang et al., ICCV 2023, their code"

RECIPES = {
    ("SoftTarget", "cifar100"): Recipe(SoftTarget, {"T": 4}, 0.9, 0.1, "–", _CRD),
    ("SoftTarget", "imagenet"): Recipe(SoftTarget, {"T": 1}, 0.5, 0.5, "–", _DKD),
    ("DecoupledKD", "cifar100"): Recipe(DecoupledKD, {"T": 4, "alpha": 1, "beta": 8}, 1, 1, "–", _DKD, 20, 240),
    ("DecoupledKD", "imagenet"): Recipe(DecoupledKD, {"T": 1, "alpha": 1, "beta": 0.5}, 1, 1, "–", _DKD),
    ("NKD", "imagenet"): Recipe(DecoupledKD, {"normalize": True, "T": 1, "alpha": 1, "beta": 1.5}, 1, 1, "–", _NKD),
    ("Attention", "cifar100"): Recipe(Attention, {"p": 2}, 1000, 1, "the end of each stage", _CRD),
    ("Similarity", "cifar100"): Recipe(Similarity, {"p": 2}, 3000, 1, "the last map", _CRD),
    ("FitNet", "cifar100"): Recipe(FitNet, {}, 100, 1, "one in the middle", _CRD),
    ("RKD", "cifar100"): Recipe(RKD, {"w_d": 25, "w_a": 50}, 1, 1, "the pooled features", _CRD),
    ("PKT", "cifar100"): Recipe(PKT, {}, 30000, 1, "the pooled features", _CRD),
}


def recipe(
    loss_name: str,  # such as 'DecoupledKD'; 'NKD' is `DecoupledKD(normalize=True)`
    data: str = "cifar100",  # on which the weights were chosen
    epochs: int | None = None,  # of the fit, for the length of a warm-up; None: the published share of the training
    **options: Any,  # of the loss, in place of the published ones, such as `beta=2`
) -> dict[str, Any]:
    """Published weights, to be given on: `KnowledgeDistillationCallback(teacher, **recipe("DecoupledKD"))`.

    A dict of `loss`, `weight`, `task_weight` and `schedule`; `recipe("Attention") | {"weight": 100.0}` changes one.
    Layers are not in it. They were chosen for networks of 0.1 to 30 million parameters on these data: a start for
    others, of which nbs/weights.md says more.

    - SoftTarget, Attention, Similarity, FitNet, RKD and PKT on CIFAR-100: Tian et al., "Contrastive Representation
      Distillation", ICLR 2020, the weights of their comparison. Zagoruyko & Komodakis write β/2 · Σ with a norm in
      place of the mean; 1000 is the factor of the mean squared difference that `Attention` is.
    - DecoupledKD, and SoftTarget on ImageNet: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. `beta` was
      chosen for each pair of networks between 2 (ResNet-56 → 20) and 8 (ResNet-32x4 → 8x4, the default here), and the
      weight grows over the first 20 of 240 epochs.
    - NKD on ImageNet: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023.

    Raises ValueError for a loss or data that it does not know, and for options that the loss does not have.
    """
    names, datas = list(dict.fromkeys(n for n, _ in RECIPES)), list(dict.fromkeys(d for _, d in RECIPES))
    name, data = _find("loss", loss_name, names), _find("data", data, datas)
    if (name, data) not in RECIPES:
        there = " and ".join(d for n, d in RECIPES if n == name)
        raise ValueError(f"there is a recipe of {name} for {there}, not for {data}")
    r = RECIPES[name, data]
    unknown = options.keys() - inspect.signature(r.loss).parameters.keys()
    if unknown:
        raise ValueError(f"{r.loss.__name__} has no {', '.join(sorted(unknown))}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be 1 or more, got {epochs}")
    share = min(1.0, r.warm_up / (epochs or r.epochs)) if r.warm_up else 0.0
    return {
        "loss": partial(r.loss, **{**r.options, **options}),
        "weight": float(r.weight),
        "task_weight": float(r.task_weight),
        "schedule": Schedule(sched_lin, end_pct=share) if share else None,
    }


def _find(what: str, name: str, names: list[str]) -> str:
    "The one of `names` that is meant."
    by_lower = {n.lower(): n for n in names}
    if not isinstance(name, str) or name.lower() not in by_lower:
        near = get_close_matches(str(name).lower(), by_lower, n=1)
        hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
        raise ValueError(f"there is no recipe for the {what} {name!r}: {hint}There are {', '.join(names)}")
    return by_lower[name.lower()]
