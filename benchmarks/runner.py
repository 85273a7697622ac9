"""Runs the groups of a selection: data, correctness, timing; records plain dictionaries."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import check, graphs, interrupts, limits, traffic
from benchmarks.candidates import OURS, Calls, Data, make_calls, make_data
from benchmarks.record import Record
from benchmarks.shapes import Group
from benchmarks.timing import Ratio, Stats, interleave

# Share of a group's time that goes into timing; the rest is its data and its correctness check.
TIMING_SHARE = 0.5
# Even a preset that is behind its budget gives a case this much: many rounds for a short call.
LEAST_S = 0.03


def _timed(direction: str, data: Data, calls: dict[str, Calls]) -> dict[str, Callable[[], object]]:
    """Everything that is timed for a direction: the candidates and the copies."""
    timed: dict[str, Callable[[], object]] = {
        name: getattr(candidate, direction) for name, candidate in calls.items()
    }
    return {**timed, **limits.copies(data.x)}


class Runner:
    """Measures groups one after the other within a time budget."""

    def __init__(
        self,
        budget_s: float,
        limit_s: float,
        rounds: tuple[int, int],
        llc_bytes: int,
        record: Record,
    ) -> None:
        self.budget_ends = time.monotonic() + budget_s
        self.limit_ends = time.monotonic() + limit_s
        self.rounds = rounds
        self.llc_bytes = llc_bytes
        self.record = record

    def run(self, groups: Sequence[Group], progress: Callable[[Group], None]) -> bool:
        """Check and time every group; `progress` is told before each, never while timing.

        False where the time was up before the last case.
        """
        threads = torch.get_num_threads()
        try:
            for done, group in enumerate(groups):
                progress(group)
                torch.set_num_threads(group.threads)
                left = max(self.budget_ends - time.monotonic(), 0.0) / (len(groups) - done)
                budget_s = left * TIMING_SHARE / len(group.directions)
                if self._time_is_up() or not self._group(group, max(budget_s, LEAST_S)):
                    return False
                self.record.add("done", str(group))
        finally:
            torch.set_num_threads(threads)
        return True

    def _time_is_up(self) -> bool:
        interrupts.raise_again()
        return time.monotonic() > self.limit_ends

    def _group(self, group: Group, budget_s: float) -> bool:
        """Record the cases of a group; False where the time was up before the last of them."""
        # What is captured in a CUDA graph must have been built on the stream of the capture.
        with contextlib.ExitStack() as streams:
            if group.device == "cuda":
                streams.enter_context(torch.cuda.stream(graphs.stream()))
            data = make_data(group)
            calls, errors = self._checked(group, data)
            for direction in group.directions:
                if self._time_is_up():
                    return False
                case = self._case(group, direction, data, calls, errors, budget_s)
                self.record.add("case", case)
        if "compile" in group.baselines:
            torch._dynamo.reset()
        return True

    def _checked(
        self, group: Group, data: Data
    ) -> tuple[dict[str, Calls], dict[str, dict[str, float]]]:
        """The candidates whose results are right on both data sets, and their errors."""
        shifted = make_data(group, mean=check.LARGE_MEAN, seed=1)
        if group.op != "bn":
            check.silence_kinks(data)
            check.silence_kinks(shifted)
        names = (OURS, *group.baselines)
        calls = self._candidates(names, group, data)
        errors: dict[str, dict[str, float]] = {name: {} for name in names}
        problems: dict[str, str] = {}
        for label, sample in (("mean 0", data), ("mean 1000", shifted)):
            tried = calls if sample is data else self._candidates(tuple(calls), group, sample)
            outcomes = check.check(tried, sample, group.op, group.directions)
            for name, outcome in outcomes.items():
                errors[name][label] = round(outcome.worst, 4)
                if not outcome.ok:
                    text = (
                        f"{outcome.where}: {outcome.worst:.3g} times the bound, data with {label}"
                    )
                    problems.setdefault(name, text)
        for name, text in problems.items():
            del calls[name]
            self._failed(name, group, text)
        return calls, errors

    def _candidates(self, names: Sequence[str], group: Group, data: Data) -> dict[str, Calls]:
        """Those of `names` that can be built for the group; the others have failed."""
        calls = {}
        for name in names:
            try:
                calls[name] = make_calls(name, group, data)
            except Exception as error:
                self._failed(name, group, f"{type(error).__name__}: {error}".splitlines()[0])
        return calls

    def _failed(self, name: str, group: Group, text: str) -> None:
        kind = "failures" if name == OURS else "peer_failures"
        self.record.add(kind, f"{group}: {name}: {text}")

    def _case(
        self,
        group: Group,
        direction: str,
        data: Data,
        calls: dict[str, Calls],
        errors: dict[str, dict[str, float]],
        budget_s: float,
    ) -> dict[str, Any]:
        numel, itemsize = data.x.numel(), data.x.element_size()
        moved = traffic.compulsory_bytes(group.op, direction, numel, itemsize)
        case: dict[str, Any] = {
            "family": group.shape.family,
            "shape": group.shape.name,
            "layout": group.layout,
            "dtype": group.dtype,
            "op": group.op,
            "direction": direction,
            "threads": group.threads,
            "tensor_bytes": data.x.nbytes,
            "compulsory_bytes": moved,
            "beyond_cache": data.x.nbytes > self.llc_bytes,
            "check": errors,
            "timings": {},
            "speedup": {},
            "fraction": {},
        }
        if OURS not in calls:  # wrong results are not timed
            return case
        quiet = torch.no_grad() if direction == "eval" else contextlib.nullcontext()
        with quiet:
            if group.device == "cuda":
                stats = self._time_graphs(group, direction, data, calls, budget_s)
            else:
                timed = _timed(direction, data, calls)
                stats = interleave(timed, budget_s=budget_s, rounds=self.rounds)
        if OURS not in stats:
            return case
        case["timings"] = {name: value.as_dict() for name, value in stats.items()}
        case["speedup"] = self._speedups(stats, group)
        case["fraction"] = {
            name: self._fractions(moved, data.x, stats, name) for name in calls if name in stats
        }
        return case

    def _time_graphs(
        self,
        group: Group,
        direction: str,
        data: Data,
        calls: dict[str, Calls],
        budget_s: float,
    ) -> dict[str, Stats]:
        """As interleave, of calls that are captured with rotating tensors."""
        moved = traffic.compulsory_bytes(group.op, direction, data.x.numel(), data.x.element_size())
        sets = [_timed(direction, data, calls)]
        for seed in range(1, graphs.sets_needed(moved, self.llc_bytes)):
            other = make_data(group, seed=seed)
            sets.append(
                _timed(direction, other, {name: make_calls(name, group, other) for name in calls})
            )
        replays: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        for name in sets[0]:
            try:
                replays[name], counts[name] = graphs.capture([timed[name] for timed in sets])
            except RuntimeError as error:
                self._failed(name, group, f"{direction}: {error}".splitlines()[0])
        stats = interleave(replays, budget_s=budget_s, rounds=self.rounds, block_s=graphs.BLOCK_S)
        return {name: found.shared_by(counts[name]) for name, found in stats.items()}

    @staticmethod
    def _fractions(moved: int, x: Tensor, stats: dict[str, Stats], name: str) -> dict[str, float]:
        """The fraction of each copy's bandwidth; that of the fastest copy is the least."""
        copied = traffic.copy_bytes(x.numel(), x.element_size())
        found = {
            limit: round(
                traffic.fraction_of_limit(moved, stats[name].median, copied, stats[limit].median), 4
            )
            for limit in limits.LIMITS
            if limit in stats
        }
        return {**found, limits.FASTEST: min(found.values())}

    @staticmethod
    def _speedups(stats: dict[str, Stats], group: Group) -> dict[str, Any]:
        ratios = {
            name: Ratio.of(stats[name], stats[OURS]) for name in group.baselines if name in stats
        }
        return {
            name: {"ratio": round(ratio.value, 4), "decided": ratio.decided}
            for name, ratio in ratios.items()
        }
