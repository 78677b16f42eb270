"How the weight of the distillation loss moves during training: `pct` of the training done → factor."

import inspect
import math
from collections.abc import Callable
from typing import Any

from fastai.callback.schedule import sched_cos, sched_lin

from ._docs import describe_parameters

__all__ = [
    "Schedule",
    "agp",
    "available_schedules",
    "cos",
    "dsd",
    "iterative",
    "lin",
    "one_cycle",
    "one_shot",
    "sched_agp",
    "sched_dsd",
    "sched_iterative",
    "sched_onecycle",
    "sched_oneshot",
    "schedules",
]


class Schedule:
    "Goes from `start_val` to `end_val` between `start_pct` and `end_pct` of the training, along `sched_func`."

    def __init__(
        self,
        sched_func: Callable[[float, float, float], float],  # (start, end, position in 0..1) → value
        start_pct: float = 0.0,  # constant `start_val` before this share of the training
        end_pct: float = 1.0,  # constant after it
        start_val: float = 0.0,  # at the start
        end_val: float = 1.0,  # at the end
    ):
        if not callable(sched_func):
            raise TypeError(f"sched_func must be a function (start, end, pos) → value, got {sched_func!r}")
        if not 0 <= start_pct <= end_pct <= 1:
            raise ValueError(f"expected 0 <= start_pct <= end_pct <= 1, got {start_pct} and {end_pct}")
        self.sched_func, self.start_pct, self.end_pct = sched_func, start_pct, end_pct
        self.start_val, self.end_val = start_val, end_val

    def progress(
        self,
        pct_train: float,  # share of the training done, 0 to 1
    ) -> float:
        "The value at `pct_train`."
        if pct_train < self.start_pct:
            return float(self.start_val)
        done = pct_train >= self.end_pct
        pos = 1.0 if done else (pct_train - self.start_pct) / (self.end_pct - self.start_pct)
        return float(self.sched_func(self.start_val, self.end_val, pos))

    def plot(
        self,
        target: float = 100,  # the value is multiplied by this
        num_points: int = 1000,
        ax: Any = None,  # matplotlib axes to draw on
    ) -> Any:
        "Draw the schedule over the training; returns the axes."
        import matplotlib.pyplot as plt

        ax = ax or plt.subplots()[1]
        pcts = [i / (num_points - 1) for i in range(num_points)]
        ax.plot(pcts, [self.progress(pct) * target for pct in pcts])
        ax.set(xlabel="share of the training", ylabel="value")
        return ax


def sched_oneshot(
    start: float,  # value at the beginning
    end: float,  # value at the end
    pos: float,  # share of the way done, 0 to 1
) -> float:
    "`end` at once."
    return end


def sched_iterative(
    start: float,  # value at the beginning
    end: float,  # value at the end
    pos: float,  # share of the way done, 0 to 1
    n_steps: int = 3,  # number of equal steps
) -> float:
    "Stairs from `start` to `end`."
    return start + (end - start) / n_steps * math.ceil(pos * n_steps)


def sched_agp(
    start: float,  # value at the beginning
    end: float,  # value at the end
    pos: float,  # share of the way done, 0 to 1
) -> float:
    'Fast at first, then slower: a cubic (Zhu & Gupta, "To prune, or not to prune", 2017, eq. 1).'
    return end + (start - end) * (1 - pos) ** 3


def sched_onecycle(
    start: float,  # value at the beginning
    end: float,  # value at the end
    pos: float,  # share of the way done, 0 to 1
    α: float = 14,  # steepness
    β: float = 6,  # offset
) -> float:
    'An S-curve, steepest in the first half (Hubens et al., "One-Cycle Pruning", 2022).'
    return start + (end - start) * (1 + math.exp(-α + β)) / (1 + math.exp(-α * pos + β))


def sched_dsd(
    start: float,  # value at the beginning
    end: float,  # value at the end
    pos: float,  # share of the way done, 0 to 1
) -> float:
    "To `end` in the middle and back to `start`, along a cosine."
    return sched_cos(start, end, 2 * pos)


one_shot = Schedule(sched_oneshot, start_pct=0.5)
iterative = Schedule(sched_iterative, start_pct=0.2)
agp = Schedule(sched_agp, start_pct=0.2)
one_cycle = Schedule(sched_onecycle)
cos = Schedule(sched_cos)
lin = Schedule(sched_lin)
dsd = Schedule(sched_dsd)

schedules = ("one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd")


def available_schedules() -> list[str]:
    "The names of the ready-made schedules."
    return list(schedules)


for _function in (sched_agp, sched_dsd, sched_iterative, sched_onecycle, sched_oneshot):
    describe_parameters(_function)


def factor_at(schedule: Any, pct: float) -> float:
    "Of a `Schedule` or a function: share of the training done → factor."
    return float(getattr(schedule, "progress", schedule)(pct))


def check_schedule(
    schedule: Any,
    weight_at: Callable[[float], float],  # share of the training done → weight; raises for one that cannot be
) -> None:
    "TypeError for what is neither None, a `Schedule` nor a function; at each percent, what `weight_at` raises."
    if schedule is None:
        return
    function = getattr(schedule, "progress", schedule)
    if not callable(function):
        raise TypeError(f"schedule must be a Schedule or a function pct → factor, got {schedule!r}")
    try:
        inspect.signature(function).bind(0.0)
    except ValueError:  # compiled, without a signature
        return
    except TypeError as e:
        raise TypeError(
            f"schedule must be a Schedule or a function pct → factor, such as SchedCos(0, 1); {schedule!r}: {e}"
        ) from e
    # one's own function may count how often it is called
    if isinstance(schedule, Schedule) or type(schedule).__module__ == "fastai.callback.schedule":
        for percent in range(101):
            weight_at(percent / 100)
