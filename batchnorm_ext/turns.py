"""Timing in turns: a disturbance of the machine meets every candidate.

The order is drawn anew in each round, since what ran before leaves its traces in the caches.
"""

from __future__ import annotations

import random
import statistics
import time
import timeit
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)

#: Rounds where a time is given: quartiles need a few, and more than so many tell nothing new.
MIN_ROUNDS, MAX_ROUNDS = 5, 200
_ORDER_SEED = 0


@dataclass(frozen=True)
class Quartiles:
    """Seconds of one call: the median over `rounds` calls, and the quartiles."""

    median: float
    q1: float
    q3: float
    rounds: int

    @staticmethod
    def of(samples: Sequence[float]) -> Quartiles:
        """Those of at least one sample, interpolated between the two nearest."""
        if len(samples) == 1:
            return Quartiles(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Quartiles(median, q1, q3, len(samples))

    def overlaps(self, other: Quartiles) -> bool:
        """Whether the ranges between the quartiles meet: then neither is called faster."""
        return self.q1 <= other.q3 and other.q1 <= self.q3


def take_turns(
    keys: Iterable[_Key],
    prepare: Callable[[_Key], object],
    run: Callable[[_Key], object],
    *,
    rounds: int | None,
    seconds: float,
    clock: Callable[[], float],
    fail: Callable[[_Key, Exception], object],
    say: Callable[[str], object],
) -> dict[_Key, Quartiles]:
    """Time `run` of each key once a round: `rounds` times, or for `seconds` within the limits.

    `prepare` comes before each, untimed. A key for which one of them raises is handed to `fail` and
    takes no further part. Each round is announced to `say`.
    """
    samples: dict[_Key, list[float]] = {key: [] for key in keys}
    order, end, count = random.Random(_ORDER_SEED), time.perf_counter() + seconds, 0
    while samples and _another(count, rounds, time.perf_counter() < end):
        count += 1
        say(f"round {count}")
        for key in order.sample(list(samples), len(samples)):
            # timeit keeps the garbage collector out of it.
            timer = timeit.Timer(partial(run, key), partial(prepare, key), timer=clock)
            try:
                samples[key].append(timer.timeit(1))
            except Exception as error:
                del samples[key]
                fail(key, error)
    return {key: Quartiles.of(values) for key, values in samples.items()}


def _another(count: int, rounds: int | None, in_time: bool) -> bool:
    if rounds is not None:
        return count < rounds
    return count < MIN_ROUNDS or (in_time and count < MAX_ROUNDS)
