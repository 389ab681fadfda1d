"""Medians, quartiles, and paired differences with a bootstrap interval: what a sentence "X is better than Y" rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 10_000, 0.95
MIN_PAIRS = 5  # the differences of fewer have one sign by chance too often


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        q1, median, q3 = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75))
        return cls(float(median), float(q1), float(q3))


class Difference(NamedTuple):
    """Mean of paired differences, and the interval that holds the mean of LEVEL of all resamples of the pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero; never so for fewer than MIN_PAIRS pairs."""
        return self.pairs >= MIN_PAIRS and (self.low > 0.0 or self.high < 0.0)


def bootstrap(differences: Sequence[float], seed: int = 0) -> Difference:
    """Of paired differences, at least one."""
    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return Difference(float(values.mean()), float(low), float(high), len(values))
