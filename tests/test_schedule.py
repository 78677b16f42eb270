"Schedules: the share of the training done → the factor on the weight."

import math
import pickle
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import Net
from fastai.callback.schedule import sched_lin

from fasterai_kd import KnowledgeDistillationCallback, Schedule, SoftTarget, schedule
from fasterai_kd.schedule import available_schedules, sched_agp, sched_dsd, sched_iterative, sched_onecycle

E = math.exp
# What a user reads off the plot: (pct, value), from before the start to the end
POINTS = {
    "lin": [(0, 0), (0.25, 0.25), (0.5, 0.5), (1, 1)],
    "cos": [(0, 0), (0.25, (1 - math.cos(math.pi / 4)) / 2), (1 / 3, 0.25), (0.5, 0.5), (2 / 3, 0.75), (1, 1)],
    "agp": [(0, 0), (0.1, 0), (0.2, 0), (0.4, 37 / 64), (0.6, 7 / 8), (0.8, 63 / 64), (1, 1)],
    "iterative": [(0, 0), (0.2, 0), (0.21, 1 / 3), (0.46, 1 / 3), (0.47, 2 / 3), (0.73, 2 / 3), (0.74, 1), (1, 1)],
    "one_shot": [(0, 0), (0.25, 0), (0.49, 0), (0.5, 1), (0.75, 1), (1, 1)],
    "one_cycle": [(0, (1 + E(-8)) / (1 + E(6))), (3 / 7, (1 + E(-8)) / 2), (0.5, (1 + E(-8)) / (1 + E(-1))), (1, 1)],
    "dsd": [(0, 0), (1 / 6, 0.25), (0.25, 0.5), (0.5, 1), (0.75, 0.5), (5 / 6, 0.25), (1, 0)],
}
GRID = [i / 1000 for i in range(1001)]

every_schedule = pytest.mark.parametrize("name", POINTS)


@every_schedule
def test_values_are_those_of_the_formula(name):
    progress = getattr(schedule, name).progress
    assert [progress(pct) for pct, _ in POINTS[name]] == pytest.approx([value for _, value in POINTS[name]], abs=1e-12)


@every_schedule
def test_values_stay_between_start_and_end_and_are_python_floats(name):
    values = [getattr(schedule, name).progress(pct) for pct in [*np.linspace(0, 1, 11), *GRID]]
    assert min(values) >= 0
    assert max(values) <= 1
    assert {type(value) for value in values} == {float}


@every_schedule
def test_values_never_fall_but_for_dsd_which_rises_and_returns(name):
    steps = np.diff([getattr(schedule, name).progress(pct) for pct in GRID])
    turn = 500 if name == "dsd" else 1000
    assert (steps[:turn] >= 0).all()
    assert (steps[turn:] <= 0).all()
    assert steps.any()


@every_schedule
def test_any_start_end_and_window_is_the_same_curve_moved_and_stretched(name):
    ready = getattr(schedule, name)
    unit = Schedule(ready.sched_func)
    own = Schedule(ready.sched_func, start_pct=0.25, end_pct=0.75, start_val=3.0, end_val=1.0)
    assert [own.progress(pct) for pct in (0, 0.1, 0.2499)] == [3.0] * 3
    inside = [(own.progress(0.25 + pos / 2), 3 - 2 * unit.progress(pos)) for pos in GRID]
    assert [a for a, _ in inside] == pytest.approx([b for _, b in inside])
    assert [own.progress(pct) for pct in (0.75, 0.8, 1, 1.5)] == pytest.approx([3 - 2 * unit.progress(1)] * 4)


def test_the_ready_made_schedules_are_listed():
    assert sorted(available_schedules()) == sorted(POINTS)
    assert all(isinstance(getattr(schedule, name), Schedule) for name in available_schedules())
    available_schedules().clear()
    assert len(available_schedules()) == 7


@pytest.mark.parametrize(
    ("func", "pos", "value"),
    [
        (partial(sched_iterative, n_steps=5), 0.5, 0.6),
        (partial(sched_onecycle, α=10, β=5), 0.5, (1 + E(-5)) / 2),
        (sched_agp, 0.5, 0.875),
        (sched_dsd, 0.25, 0.5),
        (lambda start, end, pos: start + (end - start) * pos**2, 0.5, 0.25),
    ],
    ids=["n_steps", "steepness", "agp", "dsd", "own"],
)
def test_any_function_of_start_end_and_position_is_a_schedule(func, pos, value):
    assert func(0, 1, pos) == pytest.approx(value)
    assert Schedule(func, start_pct=0.5).progress(0.5 + pos / 2) == pytest.approx(value)


@pytest.mark.parametrize("pct", [0.0, 0.5, 1.0])
def test_an_empty_window_is_a_jump(pct):
    jump = Schedule(sched_lin, start_pct=pct, end_pct=pct, start_val=2.0, end_val=5.0)
    assert jump.progress(pct - 1e-9) == 2
    assert jump.progress(pct) == 5


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1), (0, 1.1), (0.6, 0.5), (float("nan"), 1), (0, float("nan"))])
def test_a_window_outside_of_the_training_is_refused(start, end):
    with pytest.raises(ValueError, match=f"0 <= start_pct <= end_pct <= 1, got {start} and {end}"):
        Schedule(sched_lin, start_pct=start, end_pct=end)


@pytest.mark.parametrize("func", ["cos", None, 0.5])
def test_what_is_no_function_is_refused(func):
    with pytest.raises(TypeError, match=f"sched_func must be a function .* got {func!r}"):
        Schedule(func)


@every_schedule
def test_use_leaves_a_schedule_as_it_was_and_values_do_not_depend_on_what_was_asked_before(name):
    ready = getattr(schedule, name)
    before = dict(vars(ready))
    rising = [ready.progress(pct) for pct in GRID]
    ready.plot(num_points=3)
    assert [ready.progress(pct) for pct in reversed(GRID)] == rising[::-1]
    assert vars(ready) == before


@every_schedule
def test_schedules_pickle(name):
    ready = getattr(schedule, name)
    copy = pickle.loads(pickle.dumps(ready))
    assert [copy.progress(pct) for pct in GRID] == [ready.progress(pct) for pct in GRID]


@every_schedule
def test_plot_draws_the_schedule_times_the_target_and_returns_the_axes(name):
    ready = getattr(schedule, name)
    ax = ready.plot(target=50, num_points=101)
    (line,) = ax.lines
    assert line.get_xdata() == pytest.approx(np.linspace(0, 1, 101))
    assert line.get_ydata() == pytest.approx([50 * ready.progress(pct) for pct in line.get_xdata()])
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_plot_draws_a_thousand_points_up_to_100_by_default():
    (line,) = schedule.lin.plot().lines
    assert len(line.get_xdata()) == 1000
    assert line.get_ydata()[-1] == 100


def test_plot_draws_on_given_axes_so_that_schedules_can_be_compared():
    ax = plt.subplots()[1]
    assert all(getattr(schedule, name).plot(ax=ax) is ax for name in POINTS)
    assert len(ax.lines) == len(POINTS)
    assert len(plt.get_fignums()) == 1


def test_a_schedule_is_checked_up_to_the_end_of_the_training():
    with pytest.raises(ValueError, match=r"weight must be between 0 and 1, got 1\.004 at 100% of the training"):
        KnowledgeDistillationCallback(Net(), SoftTarget, weight=1.0, schedule=Schedule(sched_lin, 0, 1, 0.5, 1.004))
