"""What is too long for every run of the tests: a part of it each time, another one on each turn.

`TEST_TURN=n` takes a turn (0 where nobody asks; .ci/run takes the day of the year), and
`make test-slow` takes what is left out of this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

TURN = int(os.environ.get("TEST_TURN", "0"))

#: Into how many parts each is divided, of which one is done.
CASES = "the CUDA kernels' cases, emulated"
ACCESSES = "the CUDA kernels' cases under AddressSanitizer"
RACES = "the CUDA kernels' cases under ThreadSanitizer"
EMULATED = "the Python tests of the operators on the emulated device"
COMPILED = "inductor's modes by kinds of module"
STEPS = "ten steps of several processes by activation"
EXPERIMENTS = "the training experiments in a tiny form"
PARTS = {
    CASES: 2,
    # With the number of plans in common (10), a part would miss some of them.
    ACCESSES: 7,
    RACES: 37,
    EMULATED: 2,
    COMPILED: 3,
    STEPS: 3,
    EXPERIMENTS: 2,
}


def part_of(what: str) -> tuple[int, int]:
    """(k, n): every n-th from the k-th on."""
    return TURN % PARTS[what], PARTS[what]


def drawn(what: str, values: Iterable[Sequence[Any]]) -> list[Any]:
    """Parameters of a test: those that it is not the turn of are marked slow."""
    k, n = part_of(what)
    return [
        pytest.param(*value, marks=() if i % n == k else pytest.mark.slow)
        for i, value in enumerate(values)
    ]


def left_out() -> list[str]:
    """What this turn does not do, a line each."""
    return [f"{n - 1} of {n} parts of {what}" for what, n in PARTS.items()]
