"""Interleaved timing and the arithmetic on its results.

The candidates take turns within one run, so that a disturbance of the machine meets all of them. In
each round the order is drawn anew: what ran before leaves its traces in the caches, and in a fixed
order the same candidate would always profit. (Two equal copies, one after the heaviest candidate
and one after another copy, differed by 3 % that way.) A time is the median over the rounds and
carries its quartiles.
"""

from __future__ import annotations

import math
import random
import timeit
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch.utils.benchmark

# A block shorter than this is mostly the clock and the loop: short calls are repeated in it.
BLOCK_S = 0.5e-3
WARM_UP_CALLS = 2
ORDER_SEED = 0

# torch's timer waits for the accelerator where there is one; on the CPU it is the clock itself.
_clock: Callable[[], float] = torch.utils.benchmark.timer


@dataclass(frozen=True)
class Stats:
    """Seconds per call: the median over `rounds` blocks of `calls` calls each, and quartiles."""

    median: float
    q1: float
    q3: float
    minimum: float
    rounds: int
    calls: int

    @staticmethod
    def of(samples: Iterable[float], calls: int = 1) -> Stats:
        """The statistics of samples that are seconds per call already."""
        values = np.asarray(list(samples), dtype=np.float64)
        q1, median, q3 = (float(x) for x in np.percentile(values, (25, 50, 75)))
        return Stats(median, q1, q3, float(values.min()), len(values), calls)

    def shared_by(self, calls: int) -> Stats:
        """Of one call, where what was timed is so many."""
        median, q1, q3, least = (t / calls for t in (self.median, self.q1, self.q3, self.minimum))
        return Stats(median, q1, q3, least, self.rounds, self.calls * calls)

    def as_dict(self) -> dict[str, float]:
        """The fields for JSON, rounded to a tenth of a nanosecond."""
        return {key: round(value, 10) for key, value in asdict(self).items()}


def overlap(a: Stats, b: Stats) -> bool:
    """Whether the ranges between the quartiles meet: then neither is called faster."""
    return a.q1 <= b.q3 and b.q1 <= a.q3


@dataclass(frozen=True)
class Ratio:
    """How many times as long the baseline takes; `decided` is False where the quartiles overlap."""

    value: float
    decided: bool

    @staticmethod
    def of(baseline: Stats, ours: Stats) -> Ratio:
        """The ratio of the medians."""
        return Ratio(baseline.median / ours.median, not overlap(baseline, ours))

    def __str__(self) -> str:
        digits = 2 if self.value < 9.995 else 1
        return f"{self.value:.{digits}f}x" if self.decided else "~"


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: that of x and 1/x is 1. nan for no values."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else math.nan


def _block(call: Callable[[], object], calls: int) -> float:
    """Seconds per call over one block; timeit keeps the garbage collector out of it."""
    return timeit.Timer(call, timer=_clock).timeit(calls) / calls


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    rounds: tuple[int, int],
    block_s: float = BLOCK_S,
) -> dict[str, Stats]:
    """Time the candidates in turns: as many rounds within `rounds` as `budget_s` allows.

    Each candidate is called before it is timed, and its number of calls per block is chosen from
    that. Outputs are dropped as they come, so every call pays for its own fresh buffers.
    """
    calls: dict[str, int] = {}
    round_s = 0.0
    for name, call in candidates.items():
        _block(call, WARM_UP_CALLS)
        estimate = max(_block(call, 1), 1e-7)
        calls[name] = max(1, math.ceil(block_s / estimate))
        round_s += calls[name] * estimate
    count = min(max(int(budget_s / round_s), rounds[0]), rounds[1])

    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(ORDER_SEED)
    for _ in range(count):
        for name in order.sample(names, len(names)):
            samples[name].append(_block(candidates[name], calls[name]))
    return {name: Stats.of(samples[name], calls[name]) for name in names}
