"""The CUDA kernels, on the CPU: every pass, strategy, dtype, layout and activation of csrc/cuda on
the emulated device, against the formulas in double (tests/emulation/check_kernels.cpp).

Without a sanitizer all cases run; under AddressSanitizer and ThreadSanitizer, which take longer, a
part of them, another one for each $EMULATION_TURN.
"""

from __future__ import annotations

import os

import pytest
from emulation.build import Missing, require_everything
from emulation.coverage import REQUIRED, measure, summary
from emulation.kernels import Part, checks_done, program, run_side_by_side
from emulation.mistakes import MISTAKES
from emulation.mutants import planted

try:
    require_everything()
    MISSING = ""
except Missing as error:
    MISSING = f"THE CUDA KERNELS ARE NOT TESTED ON THE CPU: {error}"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

TURN = int(os.environ.get("EMULATION_TURN", "0"))


def turn_of(parts: int) -> Part:
    """Of so many parts; with the number of plans in common (10), a part would miss some of them."""
    return TURN % parts, parts


@pytest.mark.parametrize("part", [(k, 4) for k in range(4)], ids="{0[0]}/{0[1]}".format)
def test_results(part: Part) -> None:
    assert checks_done(run_side_by_side(program("plain"), part)) > 1_000_000


def test_accesses() -> None:
    """Out of bounds, misaligned, undefined: AddressSanitizer and UBSan."""
    assert checks_done(run_side_by_side(program("asan"), turn_of(7))) > 500_000


def test_races() -> None:
    """ThreadSanitizer."""
    assert checks_done(run_side_by_side(program("tsan"), turn_of(37))) > 50_000


def test_coverage() -> None:
    assert summary(measure()) >= REQUIRED


def test_mistakes_can_be_planted() -> None:
    """`make mutants` takes minutes; here, that the sources still have what it replaces."""
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
    for mistake in MISTAKES:
        planted(mistake)
