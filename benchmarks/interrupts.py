"""Signals that end a run, as an exception: what was found until then can still be written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, and what `timeout` and most job systems send first.
ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """One of ENDING arrived. No error of a candidate: `except Exception` lets it pass."""

    def __init__(self, number: int) -> None:
        """For the signal with this number."""
        super().__init__(f"it was interrupted by {signal.Signals(number).name}")
        self.status = 128 + number  # as shells count


_arrived: list[int] = []


def raise_again() -> None:
    """Raise Interrupted if a signal arrived and something made an error of it or dropped it."""
    if _arrived:
        raise Interrupted(_arrived[0])


@contextmanager
def raised() -> Iterator[None]:
    """Within this, a signal of ENDING raises Interrupted, even where the parent had it ignored."""
    _arrived.clear()

    def stop(number: int, frame: FrameType | None) -> None:
        _arrived.append(number)
        raise_again()

    usual = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
