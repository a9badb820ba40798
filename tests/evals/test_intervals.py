"""Figures and their intervals, against formulas and against a bootstrap that is written out."""

from __future__ import annotations

import numpy as np
import pytest

from evals.intervals import ROUNDS, SEED, Figures, Ratio


def test_an_interval_is_as_wide_as_the_binomial_says():
    right = np.arange(400) % 4 != 0
    figures = Figures(400)
    figures.mean("accuracy", right)
    number = figures.numbers()["accuracy"]
    assert number.value == 75 and number.count == 400
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert number.low == pytest.approx(75 - half, abs=0.6) and number.high == pytest.approx(75 + half, abs=0.6)


def test_sums_of_ratios_are_resampled_together():
    random = np.random.default_rng(1)
    above, below = random.random((2, 30)), random.random((2, 30)) + 0.1
    figures = Figures(30)
    figures.add("sum", [Ratio(a, b, weight) for a, b, weight in zip(above, below, (2.0, 3.0), strict=True)], 30)
    number = figures.numbers()["sum"]
    assert number.value == pytest.approx(2 * above[0].sum() / below[0].sum() + 3 * above[1].sum() / below[1].sum())
    drawn, random = [], np.random.default_rng(SEED)
    for _ in range(ROUNDS // 100):
        for row in random.integers(0, 30, (100, 30)):
            drawn.append(2 * above[0][row].sum() / below[0][row].sum() + 3 * above[1][row].sum() / below[1][row].sum())
    assert (number.low, number.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))


def test_nothing_to_count():
    figures = Figures(0)
    figures.mean("accuracy", [])
    assert figures.numbers() == {}
    figures = Figures(1)
    figures.mean("all", [True])
    figures.mean("none of these", [True], [False])
    figures.add("precision", Ratio(np.zeros(1), np.zeros(1)), 1)
    numbers = figures.numbers()
    assert list(numbers) == ["all", "precision"]
    assert (numbers["all"].low, numbers["precision"].value) == (None, 0.0)


def test_a_figure_over_few_items_is_not_drawn_to_zero_by_resamplings_without_them():
    figures = Figures(50)
    figures.mean("rare", [True] * 50, [number < 2 for number in range(50)])
    number = figures.numbers()["rare"]
    assert (number.low, number.high, number.count) == (100, 100, 2)
