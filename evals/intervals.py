"""Figures with intervals: sums of ratios over items, and a bootstrap over these items, with a fixed seed.

Every figure of the benchmarks here is a weighted sum of ratios of sums: accuracy is the ratio of right answers to
items, F1 that of twice the hits to what was asked and said, MME's perception the sum of twenty ratios. One resampling
of the items gives an interval to all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.items import Number

ROUNDS, SEED = 1000, 0
_AT_ONCE = 100  # rounds


@dataclass(frozen=True)
class Ratio:
    """`weight` times the sum of `numerator` by the sum of `denominator`, arrays [N] over the items; 0 if that is 0."""

    numerator: np.ndarray
    denominator: np.ndarray
    weight: float = 100.0


class Figures:
    """Figures over `size` items (or groups of items that are scored together), added one by one."""

    def __init__(self, size: int):
        self.size = size
        self._terms: dict[str, tuple[list[Ratio], int]] = {}

    def add(self, name: str, terms: Ratio | Sequence[Ratio], count: int) -> None:
        """A figure that is the sum of `terms`, over `count` questions; none is added for 0."""
        if count:
            self._terms[name] = ([terms] if isinstance(terms, Ratio) else list(terms), count)

    def mean(self, name: str, values: Sequence[float], where: Sequence[bool] | None = None) -> None:
        """A figure in percent: the mean of `values` [N] where `where` [N] is true."""
        kept = np.ones(self.size) if where is None else np.asarray(where, float)
        self.add(name, Ratio(np.asarray(values, float) * kept, kept), int(kept.sum()))

    def numbers(self) -> dict[str, Number]:
        """All figures by name, in order, with 95% intervals if there are at least two items."""
        columns = [array for terms, _ in self._terms.values() for term in terms for array in _pair(term)]
        if not columns:
            return {}
        table = np.stack(columns, axis=1)
        whole = self._values(table.sum(axis=0, keepdims=True), empty=0.0)[0]
        bounds = np.full((2, len(whole)), np.nan)
        if self.size > 1:
            random, drawn = np.random.default_rng(SEED), []
            for _ in range(ROUNDS // _AT_ONCE):
                picks = random.integers(0, self.size, (_AT_ONCE, self.size))
                weights = np.stack([np.bincount(row, minlength=self.size) for row in picks])
                drawn.append(self._values(weights @ table, empty=np.nan))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a figure that no resampling has
                bounds = np.nanquantile(np.concatenate(drawn), (0.025, 0.975), axis=0)
        ends = [[None if np.isnan(end) else float(end) for end in row] for row in bounds.T]
        each = zip(self._terms.items(), whole, ends, strict=True)
        return {name: Number(float(value), count, *row) for (name, (_, count)), value, row in each}

    def _values(self, sums: np.ndarray, empty: float) -> np.ndarray:
        """Figures [R, F] from sums of the columns [R, 2 x terms]; a ratio to nothing is `empty`."""
        above, below = sums[:, 0::2], sums[:, 1::2]
        ratios = np.divide(above, below, out=np.full(above.shape, empty), where=below > 0)
        values, at = [], 0
        for terms, _ in self._terms.values():
            weights = np.array([term.weight for term in terms])
            values.append(ratios[:, at : at + len(terms)] @ weights)
            at += len(terms)
        return np.stack(values, axis=1)


def _pair(term: Ratio) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(term.numerator, float), np.asarray(term.denominator, float)
