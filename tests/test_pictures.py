"What the pictures of the examples show."

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import example

with example("pictures") as names:
    plot_comparison, plot_temperature = names["plot_comparison"], names["plot_temperature"]

RESULTS = {"alone": [90.0, 92.0], "SoftTarget": [95.0, 96.0, 97.0]}


def ticks(axis):
    return [t.get_text() for t in axis.get_ticklabels()]


@pytest.mark.parametrize(
    "draw", [lambda **kw: plot_comparison(RESULTS, **kw), lambda **kw: plot_temperature([1.0, 2.0], **kw)]
)
def test_a_picture_is_a_new_figure_or_drawn_in_the_axes_given_and_sets_no_style(draw):
    style = dict(mpl.rcParams)
    assert isinstance(draw(), mpl.axes.Axes)
    _, (_, given) = plt.subplots(1, 2)
    assert draw(ax=given) is given
    assert dict(mpl.rcParams) == style


def test_a_point_for_each_seed_a_bar_at_the_mean_and_a_line_at_the_baseline():
    ax = plot_comparison(RESULTS, "alone")
    line, points0, mean0, points1, mean1 = ax.lines
    assert list(line.get_xdata()) == [91, 91]
    assert (list(points0.get_xdata()), list(points0.get_ydata())) == ([90, 92], [0, 0])
    assert (list(points1.get_xdata()), list(points1.get_ydata())) == ([95, 96, 97], [1, 1, 1])
    assert [(*m.get_xdata(), *m.get_ydata()) for m in (mean0, mean1)] == [(91, 0), (96, 1)]
    assert ticks(ax.yaxis) == ["alone\n91.0 ± 1.4", "SoftTarget\n96.0 ± 1.0 (+5.0)"]
    assert ax.get_ylim() == (1.5, -0.5)  # the first on top


def test_accuracies_may_be_fractions_arrays_or_of_one_seed_and_the_baseline_a_number_or_none():
    results = {"a": np.array([0.5]), "b": torch.tensor([0.25, 0.75])}
    assert ticks(plot_comparison(results, 0.6).yaxis) == ["a\n0.500 (-0.100)", "b\n0.500 ± 0.354 (-0.100)"]
    ax = plot_comparison(results)
    assert ticks(ax.yaxis) == ["a\n0.500", "b\n0.500 ± 0.354"]
    assert len(ax.lines) == 4


@pytest.mark.parametrize("results", [{}, {"a": []}, {"a": 0.9}, {"a": [[1.0, 2.0]]}])
def test_results_without_accuracies_are_refused(results):
    with pytest.raises(ValueError, match=r"results must be name → accuracies over seeds, got \{"):
        plot_comparison(results)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline must be one of alone, SoftTarget, or a number, got 'student'"):
        plot_comparison(RESULTS, "student")


def test_each_temperature_has_a_bar_for_each_class():
    logits, T = torch.tensor([2.0, 0.0, -1.0], requires_grad=True), (1, 10)
    ax = plot_temperature(logits, T, ["cat", "dog", "ox"])
    for bars, t in zip(ax.containers, T, strict=True):
        np.testing.assert_allclose([b.get_height() for b in bars], (logits.detach() / t).softmax(0), rtol=1e-5)
    assert ticks(ax.xaxis) == ["cat", "dog", "ox"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["T = 1", "T = 10"]


def test_of_many_classes_the_most_probable_are_shown_in_their_order():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    ax = plot_temperature(logits, [1], n=2)
    assert ticks(ax.xaxis) == ["1", "3"]
    np.testing.assert_allclose([b.get_height() for b in ax.containers[0]], logits.softmax(0)[[1, 3]], rtol=1e-5)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.ones(2, 3),), r"the logits \(C,\) of one sample, got \(2, 3\)"),
        ((torch.ones(3), [1], ["a"]), r"got \(3,\) and 1 classes"),
        ((torch.ones(3), [0, 1]), r"temperatures must be above 0, got \[0, 1\]"),
        ((torch.ones(3), []), r"temperatures must be above 0, got \[\]"),
    ],
)
def test_what_has_no_softened_probabilities_is_refused(args, match):
    with pytest.raises(ValueError, match=match):
        plot_temperature(*args)
