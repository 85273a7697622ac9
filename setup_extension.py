"""How `batchnorm_ext._C` is compiled from csrc/, with the torch that is imported here.

BATCHNORM_EXT_CUDA=auto|0|1  which backends to build, see setup_cuda.py
MAX_JOBS=N                   compile N files at once (torch's build step reads it)
CXXFLAGS='-O0 ...'           more arguments for the C++ compiler, after those that stand here
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

import setup_cuda

ROOT = Path(__file__).resolve().parent
FOLDERS = ("core", "cpu", "bindings")


def check_platform() -> None:
    """One sentence where the build cannot work, instead of a page of compiler output."""
    if sys.platform != "linux":
        sys.exit(f"batchnorm_ext: builds on Linux with GCC or Clang only, not on {sys.platform}")
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]  # as "ccache g++"
    if shutil.which(compiler) is None:
        sys.exit(f"batchnorm_ext: no compiler {compiler}; on Debian: apt-get install g++")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        sys.exit(f"batchnorm_ext: no Python.h in {headers}; on Debian: apt-get install python3-dev")


def sources(cuda: bool) -> list[str]:
    """Every source of the backends, relative to the root."""
    found = [path for part in FOLDERS for path in (ROOT / "csrc" / part).rglob("*.cpp")]
    if cuda:
        found += (ROOT / "csrc" / "cuda").rglob("*.cu")
    else:
        found.remove(ROOT / "csrc" / "bindings" / "ops_cuda.cpp")
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def seconds(source: str) -> float:
    """About how long a source takes to compile, to begin the long ones first."""
    name = Path(source).name
    if name.startswith("kernels_"):
        return 15
    return 10 if name == "autograd.cpp" else 5 if "/bindings/" in source else 1


def jobs() -> int:
    """How many to compile at once: one for each processor, as far as there is a GiB for each."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory)))


class Build(BuildExtension):
    """torch's, which leaves the order to the names and the number of jobs to ninja."""

    def finalize_options(self) -> None:
        """Keeps what an editable install compiles, so that the next one compiles what has changed.

        setuptools has it compiled into a folder that is removed.
        """
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = str(ROOT / "build" / f"temp.{sys.implementation.cache_tag}")

    def build_extension(self, ext: Any) -> None:
        """Compiles the longest sources first, so that no core waits for another's at the end."""
        os.environ.setdefault("MAX_JOBS", str(jobs()))
        compile_all = self.compiler.compile

        def in_order(sources: list[str], *args: Any, **kwargs: Any) -> Any:
            return compile_all(sorted(sources, key=seconds, reverse=True), *args, **kwargs)

        self.compiler.compile = in_order
        super().build_extension(ext)


def extension(version: str) -> Any:
    """The extension module `batchnorm_ext._C`, with the CPU backend.

    No -march and no -std: the kernels choose the instruction set at run time, and torch's build
    step adds the C++ standard its own headers need (C++17 up to 2.11, C++20 in 2.13).
    -ffp-contract=off because forward and backward must round the same expression the same way.
    torch's headers come as system headers, so that the warnings are about this project's code.
    """
    system_includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    ext = CppExtension(
        name="batchnorm_ext._C",
        sources=sources(cuda=False),
        define_macros=[
            ("BATCHNORM_EXT_VERSION", f'"{version}"'),
            ("BATCHNORM_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args={
            "cxx": [
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
                *shlex.split(os.environ.get("CXXFLAGS", "")),
            ]
        },
        extra_link_args=["-fopenmp"],
    )
    ext.include_dirs = [str(ROOT / "csrc")]
    return ext


def add_cuda(ext: Any, toolkit: setup_cuda.Toolkit, architectures: str) -> None:
    """Adds the CUDA backend.

    The kernels know nothing of torch, so nvcc gets none of its headers: a file takes seconds.
    """
    # torch looks for nvcc in CUDA_HOME and the usual places only, and for architectures it asks the
    # visible GPUs, even where there are none.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    ext.sources = sources(cuda=True)
    ext.define_macros += [
        ("BATCHNORM_EXT_CUDA", f'"{toolkit}"'),
        ("BATCHNORM_EXT_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ]
    ext.extra_compile_args["cxx"] += ["-isystem", str(toolkit.home / "include")]
    ext.extra_compile_args["nvcc"] = [
        *setup_cuda.NVCC_FLAGS,
        "-Xptxas=-warn-spills",
        "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra",
    ]
    ext.libraries += ["c10_cuda", "torch_cuda"]
    ext.extra_link_args += setup_cuda.runtime_library(toolkit)


def label(backend: str) -> str:
    """What a build adds to its version: it works with one torch, on some devices."""
    return f"+torch{torch.__version__.partition('+')[0]}.{backend}"


def arguments(version: str) -> dict[str, Any]:
    """setup()'s, for the compiled part; exits with a sentence where it cannot be built."""
    setting = os.environ.get("BATCHNORM_EXT_CUDA", "auto")
    toolkit = setup_cuda.find_toolkit() if setting != "0" else None
    backends, backend, ext = "CPU", "cpu", extension(version)
    try:
        without = setup_cuda.decide(setting, torch.__version__, torch.version.cuda, toolkit)
        if toolkit and not without:
            gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
            architectures = setup_cuda.architectures(os.environ, list(gpus), toolkit)
            add_cuda(ext, toolkit, architectures)
            backends = f"CPU and CUDA {toolkit} ({architectures})"
            backend = "cu{}{}".format(*toolkit.version)
    except setup_cuda.Refused as refusal:
        sys.exit(f"batchnorm_ext: {refusal}")
    check_platform()
    # A ninja installed beside this Python counts, also where its environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if {"build_ext", "bdist_wheel", "editable_wheel"} & set(sys.argv):
        why = f", no CUDA: {without}" if without and setting == "auto" else ""
        print(
            f"batchnorm_ext {version}: {backends} backend for torch {torch.__version__} "
            f"(BATCHNORM_EXT_CUDA={setting}{why})"
        )
    return {
        "version": version + label(backend),
        "ext_modules": [ext],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True)},
    }
