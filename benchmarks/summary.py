"""What the cases add up to: geometric means, worst cases, and the project's goals beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import limits
from benchmarks.candidates import OURS
from benchmarks.shapes import BASELINES, DIRECTIONS, DTYPES, LAYOUTS, OPS
from benchmarks.timing import Ratio, Stats, geometric_mean

Case = dict[str, Any]
KEYS = ("op", "direction", "layout", "dtype", "threads")


def speedup(case: Case, baseline: str) -> float:
    """How many times as long `baseline` takes as ours, as measured."""
    return float(case["speedup"][baseline]["ratio"])


def limit_share(case: Case) -> float:
    """The fraction of the fastest copy's bandwidth that ours reaches.

    What is proportional to our bandwidth (a speed-up, another fraction), divided by this, is what a
    kernel at the copy limit would reach.
    """
    return float(case["fraction"][OURS][limits.FASTEST])


def _baseline_summary(cases: Sequence[Case], baseline: str) -> dict[str, Any] | None:
    rows = [case for case in cases if baseline in case["speedup"]]
    if not rows:
        return None

    ratios = [speedup(case, baseline) for case in rows]
    at_limit = (ratio / limit_share(case) for ratio, case in zip(ratios, rows, strict=True))
    worst = min(rows, key=lambda case: speedup(case, baseline))
    return {
        "cases": len(rows),
        "geometric_mean": round(geometric_mean(ratios), 4),
        "at_limit": round(geometric_mean(at_limit), 4),
        "worst": min(ratios),
        "worst_shape": worst["shape"],
        "undecided": sum(not case["speedup"][baseline]["decided"] for case in rows),
    }


def beyond_cache(cases: Iterable[Case], limit: str) -> list[Case]:
    """The cases on tensors larger than the cache for which ours has a fraction of `limit`."""
    return [c for c in cases if c["beyond_cache"] and limit in c["fraction"].get(OURS, {})]


def fractions(cases: Iterable[Case], limit: str) -> list[float]:
    """The fractions of `limit` that ours reaches on tensors larger than the cache."""
    return [float(case["fraction"][OURS][limit]) for case in beyond_cache(cases, limit)]


def _position(item: tuple[tuple[Any, ...], Any]) -> tuple[int, ...]:
    op, direction, layout, dtype, threads = item[0]
    places = (DTYPES.index(dtype), OPS.index(op), LAYOUTS.index(layout))
    return (threads, *places, DIRECTIONS.index(direction))


def summarise(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One row per (op, direction, layout, dtype, threads) that was timed.

    A ratio whose quartiles overlap enters the mean as it was measured, so that leaving cases out
    cannot flatter it; `undecided` counts those.
    """
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        if case["timings"]:
            groups.setdefault(tuple(case[key] for key in KEYS), []).append(case)
    rows = []
    for key, members in sorted(groups.items(), key=_position):
        row: dict[str, Any] = dict(zip(KEYS, key, strict=True))
        row["speedup"] = {}
        for baseline in BASELINES:
            summary = _baseline_summary(members, baseline)
            if summary:
                row["speedup"][baseline] = summary
        row["beyond_cache"] = {
            limit: round(geometric_mean(values), 4)
            for limit in (*limits.LIMITS, limits.FASTEST)
            if (values := fractions(members, limit))
        }
        rows.append(row)
    return rows


def control(cases: Iterable[Case]) -> dict[str, Any]:
    """How often two identical copies were called different, and the quartiles of their ratio."""
    both = [case["timings"] for case in cases if limits.CONTROL in case["timings"]]
    pairs = [(Stats(**timed["clone"]), Stats(**timed[limits.CONTROL])) for timed in both]
    ratios = [Ratio.of(first, second) for first, second in pairs]
    if not ratios:
        return {"cases": 0, "claimed": 0}
    spread = Stats.of(ratio.value for ratio in ratios)
    return {
        "cases": len(ratios),
        "claimed": sum(ratio.decided for ratio in ratios),
        "ratio_q1": round(spread.q1, 4),
        "ratio_median": round(spread.median, 4),
        "ratio_q3": round(spread.q3, 4),
    }


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
