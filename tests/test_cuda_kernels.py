"""The CUDA kernels, on the CPU: every pass, strategy, dtype, layout and activation of csrc/cuda on
the emulated device, against the formulas in double (tests/emulation/check_kernels.cpp).

Each run has a part of the cases, another one on each turn (tests/rotation.py).
"""

from __future__ import annotations

import pytest
from emulation.build import require_everything
from emulation.coverage import REQUIRED, measure, summary
from emulation.kernels import DTYPES, Part, checks_done, program, run_side_by_side
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
    "part", drawn(CASES, [[(k, 4)] for k in range(4)]), ids="{0[0]}/{0[1]}".format
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


@pytest.mark.slow
def test_coverage() -> None:
    assert summary(measure()) >= REQUIRED


def test_mistakes_can_be_planted() -> None:
    """`make mutants` takes minutes; here, that the sources still have what it replaces."""
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
    for mistake in MISTAKES:
        planted(mistake)
