"""What all tests share: processes and threads, hypothesis' profile, a clean plan after each test.

BATCHNORM_EXT_EMULATED_CUDA=1 runs the tests on the CUDA kernels, on the emulated device, instead of
the CPU's (`make test-emulated`).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Before torch is imported, and for the processes that tests start. Idle threads of several workers
# wait without taking the others' processors. Inductor takes the processor's flags for what they are
# (to try them out took each process 7 s), starts no processes of its own (3 s), and keeps nothing:
# what it kept from another run tells nothing of what it makes of this package now.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import rotation
import torch
import workers
from emulation.operators import use_emulated_cuda
from hypothesis import HealthCheck, settings
from objects import CompileError, Missing

import batchnorm_ext
from batchnorm_ext import _C

# The same examples on every run, and no deadline on a machine that others use too.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(workers.threads_of_a_test())
    if "TORCH_TRACE" not in os.environ:
        # The compiler's structured trace has no readable text; it would bury a failure's own.
        logging.getLogger("torch.__trace").addFilter(lambda record: False)
    if os.environ.get("BATCHNORM_EXT_EMULATED_CUDA") == "1":
        try:
            use_emulated_cuda()
        except (Missing, CompileError) as error:
            raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Also in one process: what fails of the long ones fails early."""
    items.sort(key=lambda item: workers.place_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who runs what; --dist asks for another way."""
    return workers.scheduler(config, log) if config.getvalue("dist") == "load" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means."""
    return workers.how_many(config)


def pytest_report_header() -> list[str]:
    """What is tested, and what is left to other turns."""
    return [
        f"batchnorm_ext {batchnorm_ext.__version__}, torch {torch.__version__}, "
        f"kernels for {_C.cpu_capability()}",
        f"turn {rotation.TURN}: left to others, and to make test-slow:",
        *(f"  {line}" for line in rotation.left_out()),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many passed, and a line for each reason to skip."""
    counts = Counter(
        " ".join(report.longrepr[2].removeprefix("Skipped: ").split())
        for report in terminalreporter.stats.get("skipped", [])
    )
    terminalreporter.section("passed and skipped")
    terminalreporter.write_line(f"passed  {len(terminalreporter.stats.get('passed', []))}")
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Global state that a failing test could leave changed."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """One thread for this test."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> None:
    """Two threads for this test, also beside other workers: for what threads may change."""
    torch.set_num_threads(2)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """For tests that ask for what is exact; rounding is the subject of others."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)
