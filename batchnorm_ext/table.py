"""Text for a screen: columns that give way where it is narrow, and numbers of four digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_GAP = "  "
_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


@dataclass(frozen=True)
class Column:
    """A heading and its cells; where there is no room, the column of the least `worth` goes."""

    heading: str
    cells: Sequence[str]
    worth: float

    @property
    def width(self) -> int:
        """Characters of the widest cell."""
        return max(map(len, (self.heading, *self.cells)))


def render(columns: Sequence[Column], width: int) -> str:
    """The columns side by side, the first to the left: as many as fit into `width`, but one."""
    shown = [column for column in columns if any(column.cells)]
    while len(shown) > 1 and sum(c.width + len(_GAP) for c in shown) - len(_GAP) > width:
        shown.remove(min(shown, key=lambda column: column.worth))
    first, *rest = shown
    rows = zip(*([c.heading, *c.cells] for c in shown), strict=True)
    return "\n".join(
        _GAP.join(
            [name.ljust(first.width), *(x.rjust(c.width) for c, x in zip(rest, cells, strict=True))]
        ).rstrip()
        for name, *cells in rows
    )


def number(value: float) -> str:
    """Four digits, or all before the point: 0.1234, 12.34, 12345."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(max(3 - math.floor(math.log10(value)), 0), 6)}f}"


def unit(seconds: Sequence[float]) -> tuple[str, float]:
    """The unit, and how many seconds it has, in which the least of `seconds` is at least one."""
    least = min(seconds, default=1.0)
    return next((found for found in _UNITS if least >= found[1]), _UNITS[-1])


def shorten(text: str, width: int) -> str:
    """The text in one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: max(width - 3, 0)] + "..."


def one_line(error: BaseException) -> str:
    """The class of an exception, and the first line of what it says."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
