"""pytest on the GPU, by name, each test with a time of its own; each outcome is a line.

    python -m benchmarks.gpu.tests first|cases

A test that hangs or crashes ends its worker, which xdist replaces; without xdist it ends the rest.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

from benchmarks.gpu import emulated, journal, missing, time_limit

#: Seconds of one test; the first calls of a compiler are among them.
LIMIT_S = 45
AGREES = "tests/test_gpu.py::test_agrees_with_the_cpu"
SANITIZED = "tests/test_gpu.py::test_compute_sanitizer_finds_nothing"
#: In order: the files' own, graphs and streams first.
FIRST = [
    *("tests/test_gpu.py", "tests/test_sync_gpu.py"),
    *("--deselect", AGREES, "--deselect", SANITIZED),
]
CASES = [
    *(AGREES, "tests/test_cuda_plans.py", "tests/test_sync_ops.py"),
    *("tests/test_forward.py", "tests/test_backward.py"),
]
EMULATED_CASES = ["tests/test_cuda_plans.py::test_a_mean_over_all_batches"]
MOST_WORKERS = 8


class Recorder:
    """pytest's reports as lines."""

    def __init__(self) -> None:
        self.lines = journal.Journal.of_the_check()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One for each test, and one for what goes wrong around it."""
        if report.when == "call" or not report.passed:
            self.lines.write(
                "test",
                id=report.nodeid,
                outcome=report.outcome,
                seconds=round(report.duration, 3),
                why=report.longreprtext[-300:] if report.failed else "",
            )


def arguments(what: str) -> list[str]:
    """pytest's."""
    chosen = FIRST if what == "first" else EMULATED_CASES if emulated.WANTED else CASES
    workers = 1 if what == "first" else min(MOST_WORKERS, os.cpu_count() or 1)
    return ["-v", "-p", "no:cacheprovider", *chosen, *bounded(LIMIT_S, workers)]


def bounded(limit: float, workers: int) -> list[str]:
    """Arguments for a time of each test; what it ends goes on in another process of xdist, if
    that is there. Test by test, since a file is too much for one worker."""
    words = ["-p", time_limit.NAME, time_limit.OPTION, str(limit)]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "6"]
    return words


def main() -> int:
    """The exit status."""
    (what,) = sys.argv[1:]
    if not emulated.WANTED:
        os.environ["BATCHNORM_EXT_TEST_DEVICE"] = "cuda"
    status = pytest.main(arguments(what), plugins=[Recorder()])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        missing.leave("no GPU for these tests")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
