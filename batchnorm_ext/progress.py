"""A line on stderr that says how far a long call is: on a terminal only, and gone afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")

#: Who gets an answer sooner is not told how far it is. Seconds.
_PATIENCE = 1.0


def say(text: str) -> None:
    """A line that the next one replaces; an empty one leaves nothing."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)


def counted(items: Collection[_Item], title: str) -> Iterator[_Item]:
    """The items, with a line for each that is begun after the first second."""
    start = time.monotonic()
    said = False
    try:
        for number, item in enumerate(items, 1):
            if time.monotonic() - start > _PATIENCE:
                say(f"{title}: {number} of {len(items)}")
                said = True
            yield item
    finally:
        if said:
            say("")
