"""What the cases add up to: geometric means and worst cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
