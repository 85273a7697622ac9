"""The figures that the project set itself, beside those of a result: `compare FILE --goals`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import limits
from benchmarks.candidates import OURS
from benchmarks.summary import Case, beyond_cache, limit_share, speedup
from benchmarks.timing import geometric_mean


@dataclass(frozen=True)
class Figure:
    """What one case reached, and a kernel at the copy limit would (None: no copy bounds it)."""

    value: float
    at_limit: float | None = None


@dataclass(frozen=True)
class Goal:
    """A figure that the project set itself: `combine` of those that `collect` finds."""

    name: str
    target: float
    collect: Callable[[dict[str, Any]], list[Figure]]
    combine: Callable[[list[float]], float] = geometric_mean
    at_most: bool = False

    def row(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """The goal against what was measured and against the copy limit; None without cases."""
        found = self.collect(result)
        if not found:
            return None
        value = round(self.combine([figure.value for figure in found]), 3)
        bounds = [figure.at_limit for figure in found if figure.at_limit is not None]
        reached = operator.le if self.at_most else operator.ge
        return {
            "goal": self.name,
            "target": self.target,
            "at_limit": round(self.combine(bounds), 3) if bounds else None,
            "measured": value,
            "cases": len(found),
            "reached": reached(value, self.target),
        }


def _figure(case: Case, value: float) -> Figure:
    return Figure(value, value / limit_share(case))


def _ratios(result: dict[str, Any], **want: str | tuple[str, ...]) -> list[Figure]:
    return [
        _figure(case, speedup(case, "eager"))
        for case in result["cases"]
        if "eager" in case["speedup"]
        and all(case[key] in ((v,) if isinstance(v, str) else v) for key, v in want.items())
    ]


def _speed_goal(name: str, target: float, **want: str | tuple[str, ...]) -> Goal:
    return Goal(f"{name}, geometric mean", target, lambda result: _ratios(result, **want))


def _fraction_goal(direction: str, limit: str, target: float) -> Goal:
    def collect(result: dict[str, Any]) -> list[Figure]:
        cases = beyond_cache((c for c in result["cases"] if c["direction"] == direction), limit)
        return [_figure(case, case["fraction"][OURS][limit]) for case in cases]

    name = f"{direction} beyond the cache, fraction of {limit.replace('_', ' ')}"
    return Goal(name, target, collect)


def _host(result: dict[str, Any]) -> list[Figure]:
    rows = (row for row in result["host_time"] if row["direction"] == "forward+backward")
    return [Figure(float(row["ours_over_eager"])) for row in rows]


FUSED = ("bn_relu", "bn_add_relu")
GOALS = (
    *(
        _speed_goal(f"{layout} {name} {way}", target, layout=layout, op=ops, direction=way)
        for layout, name, ops, targets in (
            ("channels_first", "bn", ("bn",), (5.0, 4.0, 1.0)),
            ("channels_last", "bn", ("bn",), (2.5, 3.0, 1.0)),
            ("channels_first", "fused", FUSED, (6.0, 5.0, 1.5)),
            ("channels_last", "fused", FUSED, (4.0, 4.0, 1.5)),
        )
        for way, target in zip(("forward", "backward", "eval"), targets, strict=True)
    ),
    Goal("slowest case of all", 0.98, _ratios, min),
    # The goal was set against clone; the fastest copy is the harder limit, see limits.py.
    *(
        _fraction_goal(direction, limit, target)
        for limit in ("clone", limits.FASTEST)
        for direction, target in (("forward", 0.75), ("backward", 0.70))
    ),
    Goal("host time of (2,4,2,2) forward+backward over nn.BatchNorm2d's", 0.90, _host, min, True),
)


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal against this result; those that it holds no measurement for are left out.

    They are the CPU's: a GPU has others, which its regimes and not its operators have set.
    """
    if result.get("environment", {}).get("device", "cpu") != "cpu":
        return []
    rows = (goal.row(result) for goal in GOALS)
    return [row for row in rows if row is not None]
