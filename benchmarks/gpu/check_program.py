"""The checks of the CUDA kernels as a program for a real GPU. Needs nvcc, and no torch.

    python3 -m benchmarks.gpu.check_program [--arch sm_90] build      # build/gpu/check_kernels
    python3 -m benchmarks.gpu.check_program run [--quiet] [k/n] [seed] [dtype]

They are those of tests/emulation, on the device's own memory: the same cases, formulas and
properties. The kernels are compiled as setup_extension.py has it. `run` builds what is not current,
then becomes the program, so its arguments, output and exit status are those of check_kernels.cpp.
Exit status 2: there is no nvcc.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from objects import CompileError, Missing, Task, compile_all, compiler, locked, make_task  # noqa: E402
from objects import run as run_compiler  # noqa: E402

from setup_cuda import NVCC_FLAGS, Refused, Toolkit, find_toolkit, runtime_library  # noqa: E402

CSRC = ROOT / "csrc"
CHECKS = ROOT / "tests" / "emulation"
FOLDER = ROOT / "build" / "gpu"
PROGRAM = FOLDER / "check_kernels"
# A source that does not compile, no C++ compiler, no library of the CUDA runtime.
FAILURES = (CompileError, Missing, Refused)


def sources() -> list[Path]:
    """What the program is made of, the slowest to compile first."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: "kernels_" not in path.name)
    checks = [CHECKS / "check_kernels.cpp", CHECKS / "real_device.cpp"]
    return [*kernels, *checks, CSRC / "core" / "plan_cuda.cpp"]


def tasks(toolkit: Toolkit, arch: str) -> list[Task]:
    """The objects to compile."""
    nvcc = str(toolkit.home / "bin" / "nvcc")
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"]
    command = [nvcc, *NVCC_FLAGS, *warnings, f"-arch={arch}", "-I", str(CSRC)]
    return [make_task(source, FOLDER, command) for source in sources()]


def build(toolkit: Toolkit, arch: str) -> Path:
    """Compile side by side what has changed, and link. Raises what FAILURES lists."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(PROGRAM):
        objects = map(str, compile_all(tasks(toolkit, arch)))
        library = runtime_library(toolkit)
        # Where the library is shared, the program finds it in its place.
        words = [*compiler(), *objects, *library, f"-Wl,-rpath,{Path(library[0]).parent}"]
        run_compiler([*words, "-o", str(PROGRAM)])
    return PROGRAM


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; does not return where the program takes over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="native", help="such as sm_90; default: the GPU's own")
    parser.add_argument("command", choices=("build", "run"))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="for the program")
    options = parser.parse_args(arguments)
    if options.command == "build" and options.rest:
        parser.error(f"build takes no {' '.join(options.rest)}; options come before it")
    toolkit = find_toolkit()
    if toolkit is None:
        print("check_program: no nvcc, so the CUDA kernels are NOT CHECKED", file=sys.stderr)
        return 2
    try:
        program = build(toolkit, options.arch)
    except FAILURES as error:
        print(f"check_program: {error}", file=sys.stderr)
        return 1
    print(program, flush=True)
    if options.command == "run":
        os.execv(program, [str(program), *options.rest])
    return 0


if __name__ == "__main__":
    sys.exit(main())
