"""The rows of benchmark_losses.py: which losses, with which arguments and weights, on which layers.

Published weights are those of the papers, or of the collections RepDistiller and mdistiller where a paper has none
for CIFAR-100's logits. Where the callback's total is (1-w) · task + w · distillation, `task_weight` is None.
"""

from typing import NamedTuple

from fastai.vision.all import *

from fasterai_kd.all import *

LOSSES = {f.__name__: f for f in (SoftTarget, DecoupledKD, Logits, Mutual, DIST)}  # of outputs
LOSSES |= {f.__name__: f for f in (Attention, Similarity, FitNet, ActivationBoundaries, RKD, PKT)}
ADAPTED = ("FitNet", "ActivationBoundaries")  # compare value by value: `adapter="auto"` where channels differ


class Variant(NamedTuple):
    "A row."

    group: str
    name: str
    parts: list  # of [name of the loss, its arguments, its weight, its layers: None, "all" pairs or the "last"]
    weight: float | str = 0.5
    task_weight: float | None = None


def soft(T=5, weight=1, **kwargs):
    return ["SoftTarget", {**({"T": T} if T != 5 else {}), **kwargs}, weight, None]


def output(name, weight=1, **kwargs):
    return [name, kwargs, weight, None]


def layers(name, which="all", weight=1):
    return [name, {}, weight, which]


ALONE = Variant("", "student alone", [], 0)


def tuned_soft(w):
    return Variant("tuned", f"SoftTarget(T=4), weight {w:g}", [soft(4)], w)


def tuned_attention(w):
    return Variant("tuned", f"Attention, task + {w:g}·", [layers("Attention")], w, 1)


GRID = {
    "lr": dict.fromkeys((1e-2, 2e-2, 4e-2, 8e-2, 0.16, 0.32), ALONE),
    "SoftTarget": {w: tuned_soft(w) for w in (0.1, 0.25, 0.5, 0.75, 0.9)},
    "Attention": {w: tuned_attention(w) for w in (1, 10, 100, 1000)},
}


def get_variants(
    best,  # what was chosen on the tune split; None: stand-ins
    losses=None,  # only rows made of these
):
    if best is None:
        best = {"SoftTarget": 0.5, "Attention": 100}
    rows = [
        ALONE,
        *[Variant("default", name, [output(name)]) for name in ("SoftTarget", "DecoupledKD", "Logits", "Mutual")],
        Variant("default", "Attention", [layers("Attention")], 0.9),
        *[Variant("default", name, [layers(name)]) for name in ("Similarity", *ADAPTED)],
        Variant("published", "SoftTarget(T=4)", [soft(4)], 0.9, 0.1),
        Variant("published", "DecoupledKD", [output("DecoupledKD")], 1, 1),
        Variant("published", "Attention", [layers("Attention")], 1000, 1),
        Variant("published", "Similarity, last map", [layers("Similarity", "last")], 3000, 1),
        Variant("published", "FitNet", [layers("FitNet")], 100, 1),
        Variant("newer", "SoftTarget(T=2, standardize=True)", [soft(2, standardize=True)], 9, 0.1),
        Variant("newer", "DIST(beta=2, gamma=2)", [output("DIST", beta=2, gamma=2)], 1, 1),
        Variant("newer", "RKD, last map", [layers("RKD", "last")], 1, 1),
        Variant("newer", "PKT, last map", [layers("PKT", "last")], 30000, 1),
        Variant("auto", "SoftTarget(T=4)", [soft(4)], "auto"),
        *[Variant("auto", f, [layers(f)], "auto") for f in ("Attention", "FitNet")],
        *[Variant("auto", f"{f}, last map", [layers(f, "last")], "auto") for f in ("Similarity", "RKD", "PKT")],
        Variant("combined", "SoftTarget(T=4) + Attention, published", both(0.9, 1000), 1, 0.1),
        Variant("combined", "SoftTarget(T=4) + Attention, auto", both(0.9, 1000), "auto"),
        Variant("combined", "SoftTarget(T=4) + DIST, auto", [soft(4), output("DIST")], "auto"),
        Variant("combined", "SoftTarget(T=4) + RKD, auto", [soft(4), layers("RKD", "last")], "auto"),
    ]
    w, a = best.get("SoftTarget"), best.get("Attention")
    if w is not None:
        rows.append(tuned_soft(w))
    if a is not None:
        rows.append(tuned_attention(a))
    if w is not None and a is not None:
        name = f"SoftTarget(T=4) + Attention, tuned: {w:g}, {a:g}·"
        rows.append(Variant("combined", name, both(w, a * (1 - w)), 1, 1 - w))
    return [v for v in rows if losses is None or all(part[0] in losses for part in v.parts)]


def both(soft_weight, attention_weight):
    return [soft(4, round(soft_weight, 6)), layers("Attention", weight=round(attention_weight, 6))]


def adapter(variant):
    return "auto" if any(part[0] in ADAPTED for part in variant.parts) else None


def peer_has(variant, pairs):
    "Whether fasterai can train so: it blends, has eight losses and no adapters."
    equal = all(row.fit == "all" for row in pairs.rows)
    return variant.group in ("", "default") and (equal or adapter(variant) is None)


def get_callback(variant, teacher, pairs, library="fasterai_kd"):
    "A list of it, empty for the student alone."
    if not variant.parts:
        return []
    if library == "fasterai":
        return [get_peer_callback(variant, teacher, pairs)]
    parts = []
    for name, kwargs, weight, which in variant.parts:
        loss = partial(LOSSES[name], **kwargs) if kwargs else LOSSES[name]
        last = {side: names[-1:] for side, names in pairs.items()}
        parts.append((loss, weight, {None: None, "all": pairs, "last": last}[which]))
    kwargs = {"weight": variant.weight, "task_weight": variant.task_weight, "adapter": adapter(variant)}
    (loss, _, compared), *more = parts
    if more:
        return [KnowledgeDistillationCallback(teacher, combine(*parts), **kwargs)]
    names = [] if compared is None else [compared["student"], compared["teacher"]]
    return [KnowledgeDistillationCallback(teacher, loss, *names, **kwargs)]


def get_peer_callback(variant, teacher, pairs):
    "fasterai's own callback and loss, for rows of one loss with its defaults."
    from fasterai.distill import losses
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as PeerCallback

    ((name, _, _, which),) = variant.parts
    names = [[f"model.{s}" for s in pairs["student"]], pairs["teacher"]] if which else []
    return PeerCallback(teacher, getattr(losses, name), *names, weight=variant.weight)
