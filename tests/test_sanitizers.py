"""The CPU kernels, without torch, under GCC's or Clang's sanitizers (tests/sanitizers)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from objects import Missing, compile_all, compiler, make_task
from objects import run as run_compiler

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CHECK = ROOT / "tests" / "sanitizers" / "check_cpu_kernels.cpp"
CACHE = ROOT / "build" / "sanitizers"
FLAGS = ["-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-pthread", "-Wno-psabi", f"-I{CSRC}"]

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The kernels are thousands of inlined vectors: "undefined" would test every access for null and
# alignment too, and the scopes of temporaries are four fifths of the time to compile. In these the
# smallest file, which has the same source, stands for the others.
ADDRESS_KERNELS = ["-fsanitize=address", "-fno-sanitize-recover=all"]
OF_OTHERS = ["-fno-sanitize-address-use-after-scope"]
OF_SMALLEST = ["-fsanitize=shift,signed-integer-overflow,bounds"]
SMALLEST = "kernels_avx512_bf16.cpp"
# Races are in how a call is cut into work, which is the same for all instruction sets. Of the
# kernels the portable ones show most: ThreadSanitizer sees nothing of what an intrinsic writes.
THREAD = ["-fsanitize=thread", "-DBATCHNORM_EXT_PORTABLE"]

try:
    compiler()
    MISSING = ""
except Missing as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def is_gcc() -> bool:
    text = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    return "clang" not in text.lower()


def sources() -> list[Path]:
    """Everything that is free of torch; the files that take longest first."""
    found = [CHECK, *(CSRC / "core").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]
    return sorted(found, key=lambda path: (not path.name.startswith("kernels_"), path.name))


def build(name: str, flags: list[str], kernel_flags: list[str], smallest_flags: list[str]) -> Path:
    def flags_for(source: Path) -> list[str]:
        if source.name == SMALLEST:
            return smallest_flags
        return kernel_flags if source.name.startswith("kernels_") else flags

    folder = CACHE / name
    tasks = [
        make_task(source, folder, [*compiler(), *FLAGS, *flags_for(source)]) for source in sources()
    ]
    objects = compile_all(tasks)
    program = folder / "check_cpu_kernels"
    run_compiler([*compiler(), *flags, "-pthread", *map(str, objects), "-o", str(program)])
    return program


@pytest.fixture(scope="module")
def with_address() -> Path:
    """The program under AddressSanitizer and UndefinedBehaviorSanitizer."""
    kernel_flags = list(ADDRESS_KERNELS)
    if is_gcc():  # calls instead of inlined checks: the kernels compile in two thirds of the time
        kernel_flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
    return build("address", ADDRESS, [*kernel_flags, *OF_OTHERS], [*kernel_flags, *OF_SMALLEST])


@pytest.fixture(scope="module")
def with_thread() -> Path:
    """The program under ThreadSanitizer, with the portable kernels."""
    return build("thread", THREAD, THREAD, THREAD)


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def checked(result: subprocess.CompletedProcess[str]) -> int:
    """How many cases passed."""
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    found = re.search(r"checked (\d+) cases on portable", result.stdout)
    assert found is not None, result.stdout
    return int(found[1])


def test_memory_and_values(with_address: Path) -> None:
    assert checked(run(with_address, 6000)) >= 6000


def test_threads(with_thread: Path) -> None:
    assert checked(run(with_thread, 600, 2, "threaded")) >= 600


def test_an_overrun_is_reported(with_address: Path) -> None:
    """Outputs one element too small, on the heap."""
    result = run(with_address, 200, 1, "threaded", "overrun")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "WRITE of size" in result.stderr


def test_a_wrong_value_is_reported(with_address: Path) -> None:
    result = run(with_address, 1, 1, "threaded", "value")
    assert result.returncode == 1
    assert re.search(r"wrong y\[\d+\]: .*, expected .*\ncase: ", result.stderr)


def test_a_race_is_reported(with_thread: Path) -> None:
    """A task that two threads do."""
    result = run(with_thread, 20, 1, "threaded", "race")
    assert result.returncode != 0
    assert "data race" in result.stderr
