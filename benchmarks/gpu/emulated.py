"""The emulated device (tests/emulation) in the GPU's place. As a program: builds it."""

from __future__ import annotations

import os
import sys

from benchmarks.gpu import missing
from benchmarks.gpu.steps import EMULATED, ROOT

WANTED = all(os.environ.get(name) == value for name, value in EMULATED.items())


def use_tests() -> None:
    """Makes what the tests are made of importable."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))


def use() -> None:
    """Puts the CUDA kernels behind the operators for CPU tensors, for the rest of this process."""
    use_tests()
    from emulation.operators import use_emulated_cuda

    use_emulated_cuda()


def main() -> int:
    """Builds the emulated operators, for the extension that is there. The exit status."""
    use_tests()
    from emulation.operators import build_module
    from objects import Missing

    try:
        print(build_module())
    except Missing as error:
        missing.leave(str(error).splitlines()[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
