"""Builds and runs check_kernels, the program that checks csrc/cuda on the emulated device."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from objects import jobs

from emulation.build import CACHE, HERE, ROOT, build

CSRC = ROOT / "csrc"
CHECKS = HERE / "check_kernels.cpp"
# The two ways to run them (kernels/device.h): the second is for a GPU, and runs here, too.
EMULATED_DEVICE = HERE / "emulated_device.cpp"
REAL_DEVICE = HERE / "real_device.cpp"
BROKEN_DEVICE = HERE / "broken_device.cpp"
NO_KERNELS = HERE / "no_kernels.cpp"


@dataclass(frozen=True)
class DType:
    """What the checks, the kernels' files and C++ call it."""

    name: str
    stem: str
    cpp: str


DTYPES = (
    DType("float32", "float", "float"),
    DType("bfloat16", "bfloat16", "BFloat16"),
    DType("float16", "half", "Half"),
    DType("float64", "double", "double"),
)

# The first report of a sanitizer ends the program.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}

Result = subprocess.CompletedProcess[str]
# A part of the cases, "every n-th from the k-th on".
Part = tuple[int, int]


def sources(
    dtypes: Sequence[DType], device: Path = EMULATED_DEVICE
) -> tuple[list[Path], dict[Path, list[str]]]:
    """What the checks with these dtypes' kernels are made of, and arguments for some of it."""
    left_out = [dtype for dtype in DTYPES if dtype not in dtypes]
    unused = {f"kernels_{way}_{each.stem}" for each in left_out for way in ("forward", "backward")}
    found = [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.stem not in unused]
    found = [CHECKS, device, CSRC / "core" / "plan_cuda.cpp", *found]
    if not left_out:
        return found, {}
    each = " ".join(f"DO({dtype.cpp})" for dtype in left_out)
    return [*found, NO_KERNELS], {NO_KERNELS: [f"-DEACH_LEFT_OUT(DO)={each}"]}


@functools.cache
def program(
    flavour: str,
    dtypes: Sequence[DType] = DTYPES,
    device: Path = EMULATED_DEVICE,
    more: Sequence[Path] = (),
) -> Path:
    """The checks, with the kernels of some dtypes. Only these may be asked for then.

    `more` are sources besides.
    """
    files, arguments = sources(dtypes, device)
    stems = (path.stem for path in (device, *more) if path != EMULATED_DEVICE)
    name = "-".join(["check_kernels", *(dtype.name for dtype in dtypes), *stems])
    output = CACHE / flavour / name
    return build(flavour, [*files, *more], output, compile_args_of=arguments)


def run(path: Path, part: Part, *more: str, timeout: float = 600) -> Result:
    """One part of the cases. `more`: seed and dtype."""
    return subprocess.run(
        [str(path), "--quiet", "{}/{}".format(*part), *more],
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
