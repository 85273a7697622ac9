"""The CPU kernels, without torch, under GCC's or Clang's sanitizers (tests/sanitizers)."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from objects import Missing, compile_all, compiler, make_task
from objects import run as run_compiler
from rotation import INSTRUCTION_SETS, drawn, first_drawn
from strategies import available_capabilities

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CHECK = ROOT / "tests" / "sanitizers" / "check_cpu_kernels.cpp"
NO_KERNELS = ROOT / "tests" / "sanitizers" / "no_kernels.cpp"
CACHE = ROOT / "build" / "sanitizers"
FLAGS = ["-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-pthread", "-Wno-psabi", f"-I{CSRC}"]

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The kernels are thousands of inlined vectors: "undefined" would test every access for null and
# alignment too, and the scopes of temporaries are four fifths of the time to compile. In these the
# smallest file, which has the same source, stands for the others.
ADDRESS_KERNELS = ["-fsanitize=address", "-fno-sanitize-recover=all"]
OF_OTHERS = ["-fno-sanitize-address-use-after-scope"]
OF_SMALLEST = ["-fsanitize=shift,signed-integer-overflow,bounds"]
SMALLEST = "avx512_bf16"
# Races are in how a call is cut into work, which is the same for all instruction sets. Of the
# kernels the portable ones show most: ThreadSanitizer sees nothing of what an intrinsic writes.
THREAD = ["-fsanitize=thread", "-DBATCHNORM_EXT_PORTABLE"]

Names = tuple[str, ...]

#: The instruction sets, and those of them that this process has.
ALL = tuple(
    path.stem.removeprefix("kernels_") for path in sorted((CSRC / "cpu").glob("kernels_*.cpp"))
)
HAS = available_capabilities()
CASES_OF_EACH = 2000
#: Those that one program has. The last two are one for all dtypes but bfloat16.
PROGRAMS: list[Names] = [("portable",), ("avx2",), ("avx512", "avx512_bf16")]


def parts() -> list[Names]:
    """For each program the instruction sets that the processor has."""
    found = [tuple(name for name in HAS if name in names) for names in PROGRAMS]
    return [names for names in found if names]


try:
    compiler()
    MISSING = ""
except Missing as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def is_gcc() -> bool:
    text = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    return "clang" not in text.lower()


def sources(names: Names) -> list[Path]:
    """What is free of torch, with the kernels for these; the files that take longest first."""
    kernels = [CSRC / "cpu" / f"kernels_{name}.cpp" for name in names]
    others = [CHECK, *(CSRC / "core").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]
    return kernels + [path for path in others if not path.name.startswith("kernels_")]


def build(
    name: str,
    flags: list[str],
    names: Names = ALL,
    kernel_flags: Sequence[str] = (),
    smallest_flags: Sequence[str] = (),
) -> Path:
    """With the kernels for these instruction sets, which have flags of their own."""

    def flags_for(source: Path) -> Sequence[str]:
        if source.stem == f"kernels_{SMALLEST}":
            return smallest_flags or flags
        return kernel_flags or flags if source.stem.startswith("kernels_") else flags

    folder = CACHE / name
    command = [*compiler(), *FLAGS]
    tasks = [make_task(source, folder, [*command, *flags_for(source)]) for source in sources(names)]
    tasks += [
        make_task(NO_KERNELS, folder, [*command, *flags, f"-DKERNELS_FOR={left_out}"])
        for left_out in ALL
        if left_out not in names
    ]
    objects = compile_all(tasks)
    program = folder / "-".join(["check_cpu_kernels", *names])
    run_compiler([*compiler(), *flags, "-pthread", *map(str, objects), "-o", str(program)])
    return program


@functools.cache
def with_address(names: Names) -> Path:
    """The program under AddressSanitizer and UndefinedBehaviorSanitizer."""
    kernel_flags = list(ADDRESS_KERNELS)
    if is_gcc():  # calls instead of inlined checks: the kernels compile in two thirds of the time
        kernel_flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
    of_others, of_smallest = [*kernel_flags, *OF_OTHERS], [*kernel_flags, *OF_SMALLEST]
    return build("address", ADDRESS, names, of_others, of_smallest)


@functools.cache
def with_thread() -> Path:
    """The program under ThreadSanitizer, with the portable kernels."""
    return build("thread", THREAD)


def run(
    program: Path, cases: int, seed: int, kind: str, mistake: str = "none", names: Names = ()
) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(cases), str(seed), kind, mistake, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def checked(result: subprocess.CompletedProcess[str], on: str) -> int:
    """How many cases passed, on which instruction sets."""
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    found = re.search(r"checked (\d+) cases on (.*)", result.stdout)
    assert found is not None, result.stdout
    assert found[2] == on
    return int(found[1])


@pytest.mark.parametrize(
    "names", drawn(INSTRUCTION_SETS, [[names] for names in parts()]), ids=" ".join
)
def test_memory_and_values(names: Names) -> None:
    cases = CASES_OF_EACH * len(names)
    result = run(with_address(names), cases, 1, "any", names=names)
    assert checked(result, " ".join(names)) >= cases


def test_threads() -> None:
    assert checked(run(with_thread(), 600, 2, "threaded"), "portable") >= 600


def test_an_overrun_is_reported() -> None:
    """Outputs one element too small, on the heap. What of 64 bytes only the last are beyond, the
    report calls an unknown crash."""
    names = first_drawn(INSTRUCTION_SETS, parts())
    result = run(with_address(names), 200, 1, "threaded", "overrun", names)
    assert result.returncode != 0
    assert re.search("AddressSanitizer: (heap-buffer-overflow|unknown-crash)", result.stderr)
    assert "WRITE of size" in result.stderr


def test_a_wrong_value_is_reported() -> None:
    names = first_drawn(INSTRUCTION_SETS, parts())
    result = run(with_address(names), 1, 1, "threaded", "value", names)
    assert result.returncode == 1
    assert re.search(r"wrong y\[\d+\]: .*, expected .*\ncase: ", result.stderr)


def test_a_race_is_reported() -> None:
    """A task that two threads do."""
    result = run(with_thread(), 20, 1, "threaded", "race")
    assert result.returncode != 0
    assert "data race" in result.stderr
