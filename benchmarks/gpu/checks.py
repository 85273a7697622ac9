"""`build` and `run [k/n]` of the program that checks the kernels on the device, without torch.

What makes it is check_program.py. On the emulated device it is the emulation's own program.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import emulated, missing, native
from benchmarks.gpu.steps import ROOT

MAKER = "benchmarks.gpu.check_program"
PROGRAM = ROOT / "build" / "gpu" / "check_kernels"
#: What it says before each case: its log keeps that.
CASE = "case "
#: Of the kernels that the emulated one is made with.
EMULATED_DTYPE = "float32"


def _emulated_program() -> Path:
    emulated.use_tests()
    from emulation import kernels

    dtypes = tuple(each for each in kernels.DTYPES if each.name == EMULATED_DTYPE)
    return kernels.program("plain", dtypes)


def build() -> int:
    """The exit status."""
    if emulated.WANTED:
        print(_emulated_program())
        return 0
    native.nvcc()
    return subprocess.run([sys.executable, "-m", MAKER, "build"]).returncode


def run(part: str = "0/1") -> int:
    """The exit status. Of all cases every n-th from the k-th on."""
    if emulated.WANTED:
        command: list[Path | str] = [_emulated_program(), part, "1", EMULATED_DTYPE]
    elif PROGRAM.exists():
        command = [PROGRAM, part]
    else:
        missing.leave(f"no {PROGRAM.relative_to(ROOT)}")
    return native.relay(command, "check", only_printed=CASE)


def main() -> int:
    """The exit status."""
    what, *part = sys.argv[1:]
    return build() if what == "build" else run(*part)


if __name__ == "__main__":
    raise SystemExit(main())
