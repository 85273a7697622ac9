"""Means over seeds and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean with its confidence interval (Student's t over independent seeds)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least two values; nan where one of them is not finite."""
        if len(values) < 2:
            raise ValueError(f"expected values of at least 2 seeds, but got {len(values)}")
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, math.nan)
        mean, error = float(np.mean(values)), float(stats.sem(values))
        if error == 0:  # all the same: the t distribution has no such scale
            return cls(mean, mean, mean)
        low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, error)
        return cls(mean, float(low), float(high))

    @property
    def decided(self) -> bool:
        """Whether 0 lies outside: of a difference, whether there is one."""
        return self.low > 0 or self.high < 0

    def text(self, form: str = ".1f", unit: str = "") -> str:
        """Such as `3.1 [2.8, 3.4] epochs`."""
        numbers = f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"
        return f"{numbers} {unit}" if unit else numbers


def verdict(difference: Estimate, more: str, less: str, neither: str) -> str:
    """The word for a difference: `neither` unless its interval leaves out 0."""
    if not difference.decided:
        return neither
    return more if difference.mean > 0 else less
