"""Whether setup.py builds the CUDA backend, with which nvcc and for which architectures.

BATCHNORM_EXT_CUDA=auto|0|1  auto: where nvcc and a CUDA build of torch are found and fit together
CUDA_HOME=path               the toolkit to use, instead of the one on PATH, the usual or pip's
TORCH_CUDA_ARCH_LIST=...     "8.0;9.0+PTX"; else the visible GPUs', else all that are common
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Machine code for each, and PTX that later devices compile, by the nvcc that knows them: what is
#: 11.0 since CUDA 13.0 was called 10.1 before.
ARCHITECTURES = {
    (13, 0): "7.5;8.0;8.6;9.0;10.0;11.0;12.0+PTX",
    (12, 8): "7.5;8.0;8.6;9.0;10.0;12.0+PTX",
    (0, 0): "7.5;8.0;8.6;9.0+PTX",
}
#: As the CPU's kernels: no fast math, and no product and sum made one that is not written as fmaf,
#: so that forward and backward round the same expression the same way.
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
USUAL_PLACE = Path("/usr/local/cuda")
NVCC_FROM_PYPI = 'pip install "cuda-toolkit[nvcc,cccl]"'


class Refused(Exception):
    """The build that was asked for is not possible. The message says what is missing."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit."""

    home: Path  # the folder with bin/nvcc
    version: tuple[int, int]

    def __str__(self) -> str:
        return "{}.{}".format(*self.version)


def decide(
    setting: str, torch_version: str, torch_cuda: str | None, toolkit: Toolkit | None
) -> str:
    """Why there is no CUDA backend in this build, or "" where there is one.

    `torch_cuda` is torch.version.cuda. Raises Refused where BATCHNORM_EXT_CUDA=1 cannot be had.
    """
    if setting not in ("auto", "0", "1"):
        raise Refused(f"BATCHNORM_EXT_CUDA={setting} is not one of auto, 0, 1")
    if setting == "0":
        return "not wanted"
    missing = []
    if torch_cuda is None:
        missing.append(f"torch {torch_version} is a build without CUDA")
    if toolkit is None:
        missing.append(
            f"there is no nvcc in CUDA_HOME, on PATH, in {USUAL_PLACE} or in this environment "
            f"({NVCC_FROM_PYPI})"
        )
    if torch_cuda and toolkit and int(torch_cuda.split(".")[0]) != toolkit.version[0]:
        missing.append(
            f"nvcc in {toolkit.home} is of CUDA {toolkit}, torch {torch_version} of {torch_cuda}"
        )
    if missing and setting == "1":
        raise Refused("BATCHNORM_EXT_CUDA=1, but " + ", and ".join(missing))
    return ", and ".join(missing)


def site_packages() -> list[Path]:
    """Where pip puts packages."""
    return sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})


def home_of(nvcc: str) -> Path | None:
    """The toolkit that an nvcc belongs to: what is on PATH may be a script or a link."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"^#\$ TOP=(.*)$", result.stderr, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else None


def homes(environment: Mapping[str, str]) -> Iterator[Path]:
    """Where a toolkit may be, the most explicit first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    if nvcc := shutil.which("nvcc", path=environment.get("PATH")):
        yield home_of(nvcc) or Path(nvcc).resolve().parent.parent
    yield USUAL_PLACE
    for folder in site_packages():
        yield from sorted((folder / "nvidia").glob("cu[0-9]*"), reverse=True)


def version_of(nvcc: Path) -> tuple[int, int] | None:
    """What `nvcc --version` says, or None where it does not run."""
    try:
        result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", result.stdout)
    return (int(found[1]), int(found[2])) if found else None


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The first one whose nvcc runs."""
    for home in homes(environment):
        if version := version_of(home / "bin" / "nvcc"):
            return Toolkit(home, version)
    return None


def architectures(
    environment: Mapping[str, str], capabilities: Sequence[tuple[int, int]], toolkit: Toolkit
) -> str:
    """What to compile for, as TORCH_CUDA_ARCH_LIST has it; `capabilities` are the visible GPUs'."""
    asked = environment.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if asked and asked != "native":
        return asked
    if capabilities:
        return ";".join("{}.{}".format(*each) for each in sorted(set(capabilities)))
    return next(known for since, known in ARCHITECTURES.items() if toolkit.version >= since)


def runtime_library(toolkit: Toolkit) -> list[str]:
    """The linker's arguments for the CUDA runtime.

    By its file: pip's packages have no libcudart.so that -lcudart would find. torch has loaded it
    by the same name before the extension is imported.
    """
    folders = [toolkit.home / "lib64", toolkit.home / "lib"]
    for folder in site_packages():
        folders += [folder / "nvidia" / f"cu{toolkit.version[0]}" / "lib"]
        folders += [folder / "nvidia" / "cuda_runtime" / "lib"]
    for folder in folders:
        for library in sorted(folder.glob(f"libcudart.so.{toolkit.version[0]}*")):
            return [str(library)]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return [str(folder / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
    raise Refused(f"no libcudart.so.{toolkit.version[0]} in {', '.join(map(str, folders))}")
