"""Builds `batchnorm_ext._C` from csrc/; what is not about compiling is in pyproject.toml.

BATCHNORM_EXT_CUDA=auto|0|1  which backends to build, see `build_cuda`
MAX_JOBS=N                   compile N files at once (torch's build step reads it)
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
BACKENDS = ("core", "cpu", "bindings")

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "torch":
        raise
    sys.exit(
        "batchnorm_ext: no torch in this build environment; with torch "
        f"{'.'.join(map(str, MINIMUM_TORCH))} or newer installed, run: "
        "pip install --no-build-isolation ."
    )


def package_version() -> str:
    """The version that batchnorm_ext/_version.py states, without importing the package."""
    text = (ROOT / "batchnorm_ext" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        sys.exit("batchnorm_ext: batchnorm_ext/_version.py has no line __version__ = ...")
    return match.group(1)


def build_cuda(setting: str) -> bool:
    """Whether to build the CUDA backend, from the value of BATCHNORM_EXT_CUDA."""
    if setting not in ("auto", "0", "1"):
        sys.exit(f"batchnorm_ext: BATCHNORM_EXT_CUDA={setting} is not one of auto, 0, 1")
    if setting == "1":
        sys.exit(
            f"batchnorm_ext: BATCHNORM_EXT_CUDA=1, but version {package_version()} has no CUDA "
            "kernels; unset it or set it to 0 for the CPU backend"
        )
    return False


def check_platform() -> None:
    """One sentence where the build cannot work, instead of a page of compiler output."""
    if sys.platform != "linux":
        sys.exit(f"batchnorm_ext: builds on Linux with GCC or Clang only, not on {sys.platform}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < MINIMUM_TORCH:
        sys.exit(
            f"batchnorm_ext: torch {torch.__version__} is too old, "
            f"{'.'.join(map(str, MINIMUM_TORCH))} or newer is needed"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        sys.exit(f"batchnorm_ext: no Python.h in {headers}; on Debian: apt-get install python3-dev")


def sources() -> list[str]:
    """Every .cpp of the backends, relative to the root, in an order that never changes.

    The vector kernels compile longest: they go first, so that no core waits for another's.
    """
    found = (path for part in BACKENDS for path in (ROOT / "csrc" / part).rglob("*.cpp"))
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    names.remove("csrc/bindings/ops_cuda.cpp")
    return sorted(names, key=lambda name: "/kernels_" not in name)


def extension() -> Any:
    """The extension module `batchnorm_ext._C`.

    No -march and no -std: the kernels choose the instruction set at run time, and torch's build
    step adds the C++ standard its own headers need (C++17 up to 2.11, C++20 in 2.13).
    -ffp-contract=off because forward and backward must round the same expression the same way.
    torch's headers come as system headers, so that the warnings are about this project's code.
    """
    system_includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    ext = CppExtension(
        name="batchnorm_ext._C",
        sources=sources(),
        define_macros=[
            ("BATCHNORM_EXT_VERSION", f'"{package_version()}"'),
            ("BATCHNORM_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fopenmp",
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Werror=return-type",
            *system_includes,
        ],
        extra_link_args=["-fopenmp"],
    )
    ext.include_dirs = [str(ROOT / "csrc")]
    return ext


def main() -> None:
    setting = os.environ.get("BATCHNORM_EXT_CUDA", "auto")
    backends = "CPU and CUDA" if build_cuda(setting) else "CPU"
    check_platform()
    # A ninja installed beside this Python counts, also where its environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if "build_ext" in sys.argv or "bdist_wheel" in sys.argv:
        print(
            f"batchnorm_ext {package_version()}: {backends} backend for torch {torch.__version__} "
            f"(BATCHNORM_EXT_CUDA={setting})"
        )
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    )


if __name__ == "__main__":
    main()
