"""What the tests of the benchmarks share."""

from __future__ import annotations

from typing import Any

import bench_extra  # noqa: F401  (skips where the extra is missing)
from torch import nn
from typer.testing import CliRunner

from benchmarks import candidates, shapes
from benchmarks.cli import app
from benchmarks.timing import Stats


def invoke(*arguments: str) -> Any:
    """`python -m benchmarks <arguments>`, in this process and a wide terminal."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def stats(median: float, spread: float = 0.0) -> Stats:
    return Stats(median, median - spread, median + spread, median - spread, 9, 1)


def scaled(factor: float, offset: float = 0.0) -> Any:
    """A candidate that computes torch's output times `factor` plus `offset`."""

    def maker(case: shapes.Group, data: candidates.Data) -> tuple[nn.Module, candidates.Step]:
        module, step = candidates._eager(case, data)
        return module, lambda x, residual: step(x, residual) * factor + offset

    return maker
