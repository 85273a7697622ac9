"""Processes that run tests side by side (`pytest -n auto`): how many, and who runs what.

What is long is begun first, so that no process is left alone with it at the end; what builds or
starts something of its own is run by one process.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

#: A worker with torch and what it compiles with: about 0.6 GB, and a compiler of 0.8 GB.
GIB_OF_A_WORKER = 1.5

#: Names and patterns of test ids, those first that take longest. Tests with the same name are run
#: by one process in a row; EACH by any. All others go by their files.
EACH = ""
TOGETHER: tuple[tuple[str, str], ...] = (
    ("address", r"test_sanitizers\.py::test_(memory|an_overrun|a_wrong)"),
    (EACH, r"test_emulated_operators\.py"),
    ("install", r"test_install\.py"),
    ("emulation tsan", r"test_cuda_kernels\.py::test_races|test_emulation_runtime\.py.*tsan"),
    ("emulation asan", r"test_cuda_kernels\.py::test_accesses|test_emulation_runtime\.py.*asan"),
    ("emulation plain", r"test_cuda_kernels\.py|test_emulation_runtime\.py"),
    ("threads", r"test_sanitizers\.py"),
    ("sync", r"test_sync\.py"),
    (EACH, r"test_examples\.py.*compile_and_export"),
    (EACH, r"test_compile\.py.*inductor"),
    ("sync models", r"test_sync_models\.py"),
    (EACH, r"test_(compile|examples|experiments|export)\.py"),
    ("results", r"test_benchmark"),
)
PATTERNS = [re.compile(pattern) for _, pattern in TOGETHER]


def place_of(nodeid: str) -> int:
    """Where a test stands in TOGETHER; behind its end if it does not."""
    return next((i for i, p in enumerate(PATTERNS) if p.search(nodeid)), len(PATTERNS))


def unit_of(nodeid: str) -> str:
    """What names the tests that one process runs in a row."""
    place = place_of(nodeid)
    if place == len(TOGETHER):
        return nodeid.partition("::")[0]
    return TOGETHER[place][0] or nodeid


def scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's, which hands out units in the order of the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Units(config, log)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_gib() -> float:
    """The machine's, or what the container has of it."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) / 2**30)


def how_many(config: pytest.Config) -> int:
    """0 is one process without workers: also where one test is asked for, or output as it comes."""
    if config.option.capture == "no" or any("::" in argument for argument in config.args):
        return 0
    workers = min(cores(), int(memory_gib() / GIB_OF_A_WORKER))
    return workers if workers > 1 else 0


def threads_of_a_test() -> int:
    """Torch's. Beside other workers one, but for tests that ask for more by themselves."""
    side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
    return 1 if side_by_side else min(2, cores())
