"""What a result depends on besides the code: machine, versions, settings, commit."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

REPOSITORY = Path(__file__).resolve().parent.parent
HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
DEFAULT_LLC_BYTES = 32 << 20


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def git_state() -> dict[str, Any]:
    """The commit, and whether the working tree differs from it. Empty outside a checkout."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(status)}


def llc_bytes() -> int:
    """Size of the last-level cache of the first core; 32 MB where the system does not say."""
    sizes = [0]
    for index in _CACHES.glob("index*"):
        size = re.fullmatch(r"(\d+)([KMG])", _read(index / "size"))
        if size:
            sizes.append(int(size[1]) * _UNITS[size[2]])
    return max(sizes) or DEFAULT_LLC_BYTES


def cpu_fields() -> dict[str, str]:
    """The lines of lscpu (or what collect_env reads elsewhere) that matter here."""
    text = collect_env.get_cpu_info(collect_env.run) or ""
    pairs = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    wanted = (
        *("Architecture", "Model name", "CPU family", "Model", "CPU(s)", "Thread(s) per core"),
        *("L2 cache", "Hypervisor vendor"),
    )
    return {key: pairs[key].strip() for key in wanted if key in pairs}


# What changes threads, kernels or memory.
_VARIABLES = re.compile(
    "OMP_NUM_THREADS|GOMP_CPU_AFFINITY|KMP_AFFINITY|BATCHNORM_EXT_.*|MALLOC_.*|LD_PRELOAD"
)


def cache_bytes(device: str) -> int:
    """Size of the last cache before the device's memory."""
    if device == "cpu":
        return llc_bytes()
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def gpu_fields() -> dict[str, Any]:
    """The current GPU: name, compute capability, memory, driver."""
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": cache_bytes("cuda"),
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def extension() -> dict[str, Any]:
    """Version, build and instruction set of batchnorm_ext."""
    import batchnorm_ext
    from batchnorm_ext import _C

    return {
        "version": batchnorm_ext.__version__,
        "build": dict(_C.build_info()),
        "cpu_capability": _C.cpu_capability(),
    }


def collect(device: str = "cpu") -> dict[str, Any]:
    """Everything above, for the result file of a run on the device."""
    huge_pages = re.search(r"\[(\w+)\]", _read(_HUGE_PAGES))
    info = collect_env.get_env_info()
    huge = os.environ.get(HUGE_PAGES_VARIABLE) == "1"
    return {
        "device": device,
        "cpu": cpu_fields(),
        **({"gpu": gpu_fields()} if device == "cuda" else {}),
        "llc_bytes": cache_bytes(device),
        "os": info.os,
        "python": info.python_version,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compiler": info.gcc_version,
        "libc": info.libc_version,
        "transparent_huge_pages": huge_pages[1] if huge_pages else "",
        "torch_allocator": "huge pages" if huge else "default",
        "variables": {k: value for k, value in os.environ.items() if _VARIABLES.fullmatch(k)},
        "batchnorm_ext": extension(),
    }


def device_name(environment: dict[str, Any]) -> str:
    """As the system calls the device that was measured."""
    if environment["device"] == "cuda":
        return str(environment["gpu"]["name"])
    return str(environment["cpu"].get("Model name", "unknown"))


def device_slug(environment: dict[str, Any]) -> str:
    """The device's name for file names: cpu-amd-epyc, cuda-nvidia-h100-80gb-hbm3."""
    model = device_name(environment)
    words = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b", " ", model).lower()
    return "-".join([environment["device"], *re.findall(r"[a-z0-9]+", words)[:5]])
