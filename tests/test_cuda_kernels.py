"""The CUDA kernels, on the CPU: every pass, strategy, dtype, layout and activation of csrc/cuda on
the emulated device, against the formulas in double (tests/emulation/check_kernels.cpp).

Each run has a part of the cases, another one on each turn (tests/rotation.py).
"""

from __future__ import annotations

import re
import signal
import subprocess

import pytest
from emulation.build import HERE, require_everything
from emulation.coverage import REQUIRED, measure, summary
from emulation.kernels import (
    BROKEN_DEVICE,
    DTYPES,
    REAL_DEVICE,
    Part,
    checks_done,
    program,
    run,
    run_side_by_side,
)
from emulation.mistakes import MISTAKES
from emulation.mutants import planted
from objects import Missing
from rotation import ACCESSES, CASES, RACES, drawn, part_of

try:
    require_everything()
    MISSING = ""
except Missing as error:
    MISSING = f"THE CUDA KERNELS ARE NOT TESTED ON THE CPU: {error}"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.mark.parametrize(
    "part", drawn(CASES, [[(k, 3)] for k in range(3)]), ids="{0[0]}/{0[1]}".format
)
def test_results(part: Part) -> None:
    assert checks_done(run_side_by_side(program("plain"), part)) > 1_000_000


def checks_of_the_turn(flavour: str, what: str) -> int:
    """A dtype's, and of its cases a part."""
    k, n = part_of(what)
    turn, dtype = k // len(DTYPES), DTYPES[k % len(DTYPES)]
    path = program(flavour, (dtype,))
    return checks_done(run_side_by_side(path, (turn, n // len(DTYPES)), "1", dtype.name))


def test_accesses() -> None:
    """Out of bounds, misaligned, undefined: AddressSanitizer and UBSan."""
    assert checks_of_the_turn("asan", ACCESSES) > 500_000


def test_races() -> None:
    """ThreadSanitizer."""
    assert checks_of_the_turn("tsan", RACES) > 50_000


def test_as_on_a_gpu() -> None:
    """With memory of the device's own, and the device as it is: what `check_program.py` builds."""
    results = run_side_by_side(program("plain", device=REAL_DEVICE), (7, 24))
    assert checks_done(results) > 100_000
    assert "skipped" not in "".join(result.stdout for result in results)


def test_what_the_device_cannot_run_is_skipped_and_counted() -> None:
    path = program("plain", device=REAL_DEVICE, more=(HERE / "turing.cpp",))
    result = run(path, (3, 10), "1", "float32")  # every tenth plan is a cluster
    assert checks_done([result]) == 0
    assert re.search(r"^18 cases skipped: the device has no clusters$", result.stdout, re.MULTILINE)


def test_each_case_is_named_before_it_runs() -> None:
    """And at once: nothing is flushed here when the process ends."""
    command = [str(program("plain", device=BROKEN_DEVICE)), "0/1", "1", "float16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGABRT
    (said,) = done.stdout.splitlines()
    assert said.startswith("case ") and " float16 " in said


def test_a_wrong_case_is_no_end_and_many_are() -> None:
    result = run(program("plain", device=BROKEN_DEVICE), (0, 1))
    assert result.returncode == 1
    *wrong, skipped, last = result.stdout.splitlines()
    assert all("returned 1 (cudaErrorInvalidValue)" in line or "[" in line for line in wrong)
    cases = [line.partition(": ")[0] for line in wrong]
    assert len(cases) == 40
    assert max(map(cases.count, cases)) == 4
    assert re.fullmatch(r"\d+ cases skipped: no clusters", skipped)
    assert int(last.split()[2]) > 40, "those that are not shown are counted"


def test_a_lost_device_is_the_end() -> None:
    result = run(program("plain", device=BROKEN_DEVICE), (0, 1), "1", "float64")
    assert result.returncode == 1
    said, last = result.stdout.splitlines()
    assert "float64" in said and "it is lost; the cases after it are not run" in said
    assert last == "0 checks, 1 failures"


@pytest.mark.slow
def test_coverage() -> None:
    assert summary(measure()) >= REQUIRED


def test_mistakes_can_be_planted() -> None:
    """`make mutants` takes minutes; here, that the sources still have what it replaces."""
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
    for mistake in MISTAKES:
        planted(mistake)
