"What the parts of the benchmark share: the losses, the peer, rounds and how numbers are shown."

import importlib.util
import random
from statistics import median

from fasterai_kd.all import *

OUTPUT = {f.__name__: f for f in (SoftTarget, DecoupledKD, Logits, Mutual)}
LAYERS = {f.__name__: f for f in (Attention, Similarity, FitNet, ActivationBoundaries)}
LOSSES = OUTPUT | LAYERS
MISSING = "not installed"


def installed(package):
    return importlib.util.find_spec(package) is not None


def get_peer():
    "fasterai's callback and module of losses, or None."
    if not installed("fasterai"):
        return None
    from fasterai.distill import losses
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as PeerCallback

    return PeerCallback, losses


def in_rounds(
    runs,  # name → function that returns a number
    rounds,  # how often, after a first time that does not count
):
    "The numbers of each by name, one a round; in a round all run, in random order."
    numbers = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in random.sample(list(runs), len(runs)):
            number = runs[name]()
            if i:
                numbers[name].append(number)
    return numbers


def ratio(numbers, name, base):
    "Median and range over the rounds."
    r = [a / b for a, b in zip(numbers[name], numbers[base], strict=True)]
    return f"{median(r):.2f} ({min(r):.2f}-{max(r):.2f})"


def ms(seconds):
    "Median, and the fastest round: what the step costs when nothing else runs."
    return f"{median(seconds) * 1e3:.3g} ({min(seconds) * 1e3:.3g})"


def mb(n):
    return "" if n is None else f"{n / 2**20:.1f}"
