"""What is too long for every run of the tests: a part of it each time, another one on each turn.

`TEST_TURN=n` takes a turn (0 where nobody asks; .ci/run takes the day of the year), and
`make test-slow` takes what is left out of this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

TURN = int(os.environ.get("TEST_TURN", "0"))

#: Into how many parts each is divided, of which one is done.
INSTRUCTION_SETS = "the CPU kernels' instruction sets under AddressSanitizer"
CASES = "the CUDA kernels' cases, emulated"
ACCESSES = "the CUDA kernels' cases under AddressSanitizer"
RACES = "the CUDA kernels' cases under ThreadSanitizer"
EMULATED = "the Python tests of the operators on the emulated device"
COMPILED = "inductor's modes by kinds of module"
STEPS = "ten steps of several processes by activation"
EXPERIMENTS = "the training experiments in a tiny form"
PARTS = {
    INSTRUCTION_SETS: 3,
    # ACCESSES and RACES are, of each of four dtypes, the cases in 3 and 9 parts. With a factor in
    # common with the numbers of plans (10) and devices (7), a part would miss some of them.
    CASES: 3,
    ACCESSES: 12,
    RACES: 36,
    EMULATED: 4,
    COMPILED: 3,
    STEPS: 3,
    EXPERIMENTS: 2,
}


def part_of(what: str, most: int | None = None) -> tuple[int, int]:
    """(k, n): every n-th from the k-th on, of at most so many."""
    n = PARTS[what] if most is None else min(PARTS[what], most)
    return TURN % n, n


def drawn(what: str, values: Sequence[Sequence[Any]]) -> list[Any]:
    """Parameters of a test: those that it is not the turn of are marked slow."""
    k, n = part_of(what, len(values))
    return [
        pytest.param(*value, marks=() if i % n == k else pytest.mark.slow)
        for i, value in enumerate(values)
    ]


def first_drawn(what: str, values: Sequence[Any]) -> Any:
    """One of those that it is the turn of."""
    return values[part_of(what, len(values))[0]]


def left_out() -> list[str]:
    """What this turn does not do, a line each."""
    return [f"{n - 1} of {n} parts of {what}" for what, n in PARTS.items()]
