"""The figures behind single choices: page faults, the plan's thresholds, one core's kernels.

They stand in docs/measured-facts.md and above the thresholds in csrc/core/plan.cpp. float32 unless
a row says otherwise; every comparison is interleaved, as in timing.py.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from batchnorm_ext import _C
from benchmarks import limits, report, results
from benchmarks.candidates import EPS, OURS, Calls, make_calls, make_data
from benchmarks.console import make_console, show
from benchmarks.shapes import FEWEST_ROUNDS, MODES, Group, find_shape
from benchmarks.timing import Ratio, interleave

Timed = dict[str, Callable[[], object]]
ROUNDS = (FEWEST_ROUNDS, 61)
MEMORY_SHAPE = (64, 64, 112, 112)


@dataclass(frozen=True)
class Trial:
    """A threshold of plan.cpp, a shape that it decides, and fields that say the opposite.

    A True in `forced` stands for the opposite of what is chosen; numbers and names for themselves.
    """

    threshold: str
    shape: str
    forced: dict[str, Any]
    layout: str = "channels_first"
    threads: int = 1
    mode: str = "train"

    @property
    def passes(self) -> tuple[str, ...]:
        """Timed together."""
        return MODES[self.mode]


# Units beside a forced scheme: what planes() in plan.cpp chooses for that scheme, in round numbers.
COLUMNS = {"scheme": "expanded", "unit_channels": 16}
RUNS = {"scheme": "planes", "unit_channels": 64}
TRIALS = (
    Trial("kElementsPerThread", "16x64x8x8", {"threads": 1}, threads=2),
    Trial("kElementsPerThread", "8x64x8x8", {"threads": 2}, threads=2),
    Trial("kRowBytes", "128x512x7x7", {"unit_channels": 1}),
    Trial("kRunBytes", "8x256x14x14", {"unit_channels": 1}),
    Trial("kRunBytes", "64x256x14x14", {"unit_channels": 10}),
    Trial("kGroupBytes", "64x96x28x28", {"unit_channels": 64}, "channels_last"),
    Trial("kSmallPlane", "64x256x6x6", RUNS),
    Trial("kSmallPlane", "64x256x7x7", RUNS),
    Trial("kSmallPlane", "64x256x8x8", COLUMNS),
    Trial("kMinExpandedRows", "16x256x5x5", RUNS),
    Trial("kMinExpandedRows", "16x256x7x7", COLUMNS),
    Trial("kTinyPlane", "64x256x3x3", RUNS, mode="eval"),
    Trial("kTinyPlane", "16x256x5x5", COLUMNS, mode="eval"),
    Trial("kNearBytes", "8x512x7x7", {"group_rows": 1}, "channels_last"),
    Trial("kNearBytes", "8x256x56x56", {"group_rows": 8}, "channels_last"),
    Trial("kFarRowBytes", "32x64x112x112", {"group_rows": 8}, "channels_last"),
    Trial("kLongPlane", "32x1024x14x14", {"stream": True}, mode="eval"),
    Trial("kLongPlane", "64x64x55x55", {"stream": True}, mode="eval"),
    Trial("stream", "32x64x112x112", {"stream": True}, mode="eval"),
    Trial("stream", "32x64x112x112", {"stream": True}),
)

# Two lengths of one channel, all in a second-level cache: in the difference a call's cost is gone.
LENGTHS = (8 * 1024, 64 * 1024)
KERNEL_DTYPES = ("float32", "bfloat16")
# What a kernel costs, in calls of operators: the first without the second.
KERNELS: dict[str, tuple[str, str | None]] = {
    "moments of a run": ("forward_train", "forward_eval"),
    "sums of backward, of a run": ("sums", None),
    "forward write, one channel": ("forward_eval", None),
    "backward write, one channel": ("backward", "sums"),
    "clone of the same elements": ("clone", None),
}


def memory(budget_s: float) -> list[dict[str, Any]]:
    """Seconds to fill a large tensor by one thread: fresh pages, fresh huge pages, old memory."""
    x = torch.randn(MEMORY_SHAPE)
    target = torch.empty_like(x)
    calls: Timed = {
        "fill, fresh": lambda: torch.empty_like(x).fill_(1.0),
        "fill, fresh huge pages": lambda: limits.huge_empty_like(x).fill_(1.0),
        "fill, memory that exists": lambda: target.fill_(1.0),
        "copy, fresh": lambda: torch.empty_like(x).copy_(x),
        "copy, fresh huge pages": lambda: limits.huge_empty_like(x).copy_(x),
        "copy, memory that exists": lambda: target.copy_(x),
    }
    found = interleave(calls, budget_s=budget_s, rounds=ROUNDS)
    return [{"what": k, "bytes": x.nbytes, "timing": v.as_dict()} for k, v in found.items()]


def _plans(trial: Trial, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What the planner chooses for each pass."""
    numbers = (sizes[0], sizes[1], math.prod(sizes[2:]), trial.threads)
    return {p: dict(_C.plan(trial.layout, "float32", *numbers, p)) for p in trial.passes}


def opposite(trial: Trial, plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields to force, with each True made the opposite of what the first pass has."""
    first = plans[trial.passes[0]]
    return {k: not first[k] if v is True else v for k, v in trial.forced.items()}


def _under(fields: Mapping[str, Any], calls: Calls, passes: tuple[str, ...]) -> Callable[[], None]:
    """The passes one after the other with `fields` forced; with none, as the planner chooses."""
    steps: list[Callable[[], object]] = [getattr(calls, name) for name in passes]

    def call() -> None:
        _C.force_plan(**fields)
        for step in steps:
            step()

    return call


def plan_trial(trial: Trial, budget_s: float) -> dict[str, Any]:
    """The plan chosen against the one forced, the passes of a trial together."""
    shape = find_shape(trial.shape)
    plans = _plans(trial, shape.sizes)
    forced = opposite(trial, plans)
    torch.set_num_threads(trial.threads)
    group = Group(shape, trial.layout, "float32", "bn", trial.threads)
    calls = make_calls(OURS, group, make_data(group))
    fields = {"chosen": {}, "forced": forced}
    both: Timed = {k: _under(v, calls, trial.passes) for k, v in fields.items()}
    try:
        with torch.set_grad_enabled(trial.mode == "train"):
            found = interleave(both, budget_s=budget_s, rounds=ROUNDS)
    finally:
        _C.force_plan()
    ratio = Ratio.of(found["forced"], found["chosen"])
    return {
        "threshold": trial.threshold,
        "shape": trial.shape,
        "layout": trial.layout,
        "mode": trial.mode,
        "threads": trial.threads,
        "chosen": plans,
        "forced": forced,
        "timings": {name: stats.as_dict() for name, stats in found.items()},
        "forced_over_chosen": {"ratio": round(ratio.value, 4), "decided": ratio.decided},
    }


def _operators(x: Tensor) -> Timed:
    """The operators' calls that KERNELS names, on one channel."""
    ops = torch.ops.batchnorm_ext
    dy, ones, zeros = torch.randn_like(x), torch.ones(1), torch.zeros(1)
    mean, invstd = zeros.double(), ones.double()
    plain = ("identity", 0.0)

    def backward(*wanted: bool) -> object:
        return ops.backward.default(
            dy, x, None, ones, zeros, mean, invstd, None, True, *plain, wanted
        )

    return {
        "clone": x.clone,
        "forward_eval": lambda: ops.forward_eval.default(
            x, None, ones, zeros, zeros, ones, EPS, *plain
        ),
        "forward_train": lambda: ops.forward_train.default(
            x, None, ones, zeros, None, None, None, 0.1, EPS, *plain, False
        ),
        "sums": lambda: backward(False, False, True, True),
        "backward": lambda: backward(True, False, False, False),
    }


def kernel_costs(dtype: str, budget_s: float) -> dict[str, dict[str, float]]:
    """Nanoseconds per 16 elements, from the two LENGTHS; `spread`: the quartiles' half distances.

    The spread is the sum over all timings that enter, as if their errors never cancelled.
    """
    calls: Timed = {}
    for length in LENGTHS:
        x = torch.randn(1, 1, length).to(getattr(torch, dtype))
        calls.update({f"{name} {length}": call for name, call in _operators(x).items()})
    found = interleave(calls, budget_s=budget_s, rounds=ROUNDS)
    unit = (LENGTHS[1] - LENGTHS[0]) / 16 * 1e-9

    def slope(name: str) -> tuple[float, float]:
        short, long = (found[f"{name} {length}"] for length in LENGTHS)
        apart = sum((stats.q3 - stats.q1) / 2 for stats in (short, long))
        return (long.median - short.median) / unit, apart / unit

    costs = {}
    for kernel, (whole, without) in KERNELS.items():
        cost, spread = slope(whole)
        less, more = slope(without) if without else (0.0, 0.0)
        costs[kernel] = {"ns": round(cost - less, 3), "spread": round(spread + more, 3)}
    return costs


def kernels(budget_s: float) -> list[dict[str, Any]]:
    """The costs for every instruction set that was built and that this processor has."""
    rows = []
    usual = _C.cpu_capability()
    try:
        for name in cast("list[str]", _C.build_info()["cpu_capabilities_built"]):
            try:
                _C.set_cpu_capability(name)
            except RuntimeError:
                continue
            for dtype in KERNEL_DTYPES:
                costs = kernel_costs(dtype, budget_s)
                rows.append({"cpu_capability": name, "dtype": dtype, "costs": costs})
    finally:
        _C.set_cpu_capability(usual)
    return rows


def measure(budget_s: float) -> dict[str, Any]:
    """Everything; `budget_s` is for each interleaved comparison, the one of memory has five."""
    threads = torch.get_num_threads()
    settings = {
        "preset": "micro",
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "budget_s": budget_s,
        "rounds": list(ROUNDS),
        "load_average_before": os.getloadavg()[0],
    }
    try:
        torch.set_num_threads(1)
        parts = {"memory": memory(5 * budget_s), "kernels": kernels(budget_s)}
        parts["plans"] = [plan_trial(trial, budget_s) for trial in TRIALS]
    finally:
        torch.set_num_threads(threads)
    return {**results.header(settings), **parts}


def run(output: Path | None, budget_s: float) -> None:
    """Measure, show, write."""
    result = measure(budget_s)
    show(make_console(), *report.micro_tables(result))
    print("written:", results.write_result(result, output))
