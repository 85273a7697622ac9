"""Builds and runs check_kernels, the program that checks csrc/cuda on the emulated device."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from objects import jobs

from emulation.build import CACHE, HERE, ROOT, build

CSRC = ROOT / "csrc"
SOURCES = [
    HERE / "check_kernels.cpp",
    CSRC / "core" / "plan_cuda.cpp",
    *sorted((CSRC / "cuda").glob("*.cu")),
]

# The first report of a sanitizer ends the program.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}

Result = subprocess.CompletedProcess[str]
# A part of the cases, "every n-th from the k-th on".
Part = tuple[int, int]


@functools.cache
def program(flavour: str) -> Path:
    """The checks, with every dtype's kernels."""
    return build(flavour, SOURCES, CACHE / flavour / "check_kernels")


def run(path: Path, part: Part, *more: str, timeout: float = 600) -> Result:
    """One part of the cases. `more`: seed and dtype."""
    return subprocess.run(
        [str(path), "{}/{}".format(*part), *more],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | OPTIONS,
    )


def run_side_by_side(path: Path, part: Part, *more: str) -> list[Result]:
    """The same, on as many processors as there may be compilers."""
    k, n = part
    parts = [(k + n * i, n * jobs()) for i in range(jobs())]
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(lambda each: run(path, each, *more), parts))


def checks_done(results: Sequence[Result]) -> int:
    """How many checks there were. Raises AssertionError, with what was printed, if any failed."""
    total = 0
    for result in results:
        said = (result.stdout + result.stderr)[-6000:]
        assert result.returncode == 0, f"{result.args} exited with {result.returncode}:\n{said}"
        found = re.search(r"^(\d+) checks, 0 failures$", result.stdout, re.MULTILINE)
        assert found is not None, said
        total += int(found[1])
    return total
