"""CUDA: which kernels each candidate really runs, by torch's profiler, and how long each takes."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import OURS, make_calls, make_data
from benchmarks.console import simple_table
from benchmarks.shapes import BASELINES, LAYOUTS, Group, find_shape

SHAPES = ("128x64x56x56", "128x512x7x7", "4096x1024")
DTYPES = ("bfloat16", "float32")
CALLS = 5


def run(op: str = "bn_relu") -> list[dict[str, Any]]:
    """A row for each shape, layout, dtype, candidate and kernel: calls and microseconds of each."""
    rows = []
    for name in SHAPES:
        shape = find_shape(name)
        for layout in (each for each in LAYOUTS if each in shape.layouts):
            for dtype in DTYPES:
                group = Group(shape, layout, dtype, op, 1, device="cuda")
                for candidate in (OURS, *BASELINES):
                    rows += [
                        {"shape": name, "layout": layout, "dtype": dtype, "candidate": candidate}
                        | kernel
                        for kernel in _kernels(group, candidate)
                    ]
                torch._dynamo.reset()
    return rows


def _kernels(group: Group, candidate: str) -> list[dict[str, Any]]:
    calls = make_calls(candidate, group, make_data(group))
    for _ in range(2):
        calls.forward()
        calls.backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            calls.forward()
            calls.backward()
        torch.cuda.synchronize()
    return [
        {
            "kernel": event.key,
            "calls": event.count / CALLS,
            "us": round(event.device_time_total / event.count, 2),
        }
        for event in profiler.key_averages()
        if event.device_time_total > 0
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as they are."""
    made = simple_table("Kernels of a training step's forward and backward (bn_relu)")
    for name in ("shape", "layout", "dtype", "candidate"):
        made.add_column(name)
    made.add_column("kernel", overflow="fold", max_width=60)  # names of hundreds of characters
    for name in ("calls", "us"):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*(str(value) for value in row.values()))
    return made
