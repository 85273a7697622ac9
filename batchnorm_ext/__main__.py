"""``python -m batchnorm_ext``: what is installed, and the command that mends what is wrong.

``python -m batchnorm_ext plan`` shows how a call would be cut into work (see plan.py), and
``python -m batchnorm_ext compare`` what this package brings for a model (see compare_command.py).

Exit status: 0 where all is well, 1 where a problem is listed, or nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import _C, __version__, compare_command, plan

REBUILD = "pip install --force-reinstall --no-deps ."
REBUILD_WITH_CUDA = f"BATCHNORM_EXT_CUDA=1 {REBUILD}"

# The processor flags, as the Linux kernel names them, that each instruction set needs.
_AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
_NEEDED_FLAGS = {
    "avx512_bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set[str](),
}


def _processor() -> tuple[str, list[str]]:
    """The processor's name and the instruction sets it offers, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (ln.partition(":") for ln in lines)}
    flags = set(fields.get("flags", "").split())
    offered = [name for name, needed in _NEEDED_FLAGS.items() if needed <= flags]
    return fields.get("model name", platform.machine()), offered


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[dict[str, str]]:
    """Name and compute capability ("9.0") of every GPU that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    return found


def _runs_on(capability: str, architectures: str) -> bool:
    """Whether code built for "7.5;9.0+PTX" runs on a device of this capability.

    Machine code runs on later minor versions of its major one, PTX on everything later. Names
    ("Hopper") are not understood, and taken for right.
    """
    device = tuple(map(int, capability.split(".")))
    for word in architectures.split(";"):
        if not word[:1].isdigit():
            return True
        built = tuple(map(int, word.removesuffix("+PTX").rstrip("af").split(".")))
        if built <= device and (built[0] == device[0] or word.endswith("+PTX")):
            return True
    return False


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain values."""
    name, offered = _processor()
    build: dict[str, Any] = dict(_C.build_info())
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "location": str(Path(__file__).parent),
        "build": build,
        "cpu": {
            "name": name,
            "offered": offered,
            "built": build["cpu_capabilities_built"],
            "used": _C.cpu_capability(),
            "requested": os.environ.get("BATCHNORM_EXT_CPU"),
        },
        "threads": {"torch": torch.get_num_threads(), "cores": _usable_cores()},
        "gpus": _gpus(),
    }


def problems(report: dict[str, Any]) -> Iterator[str]:
    """What is wrong, each with the command that mends it."""
    build = report["build"]
    if build["version"] != report["version"]:
        yield (
            f"the extension is of version {build['version']}, the Python files of "
            f"{report['version']}: {REBUILD}"
        )
    if build["torch_version"] != report["torch"]:
        yield (
            f"built for torch {build['torch_version']}, running with {report['torch']}: {REBUILD}"
        )
    if not build["openmp"]:
        yield f"built without OpenMP, so on one thread; with a compiler that has it: {REBUILD}"
    for gpu in report["gpus"] if build["cuda"] else []:
        if not _runs_on(gpu["capability"], build["cuda"]["architectures"]):
            yield (
                f"built for the architectures {build['cuda']['architectures']}, but {gpu['name']} "
                f"is {gpu['capability']}: TORCH_CUDA_ARCH_LIST={gpu['capability']} "
                f"{REBUILD_WITH_CUDA}"
            )


def hints(report: dict[str, Any]) -> Iterator[str]:
    """What works, but not as well as it could."""
    cpu, threads = report["cpu"], report["threads"]
    best = next((name for name in cpu["offered"] if name in cpu["built"]), cpu["used"])
    if cpu["used"] != best:
        mend = ": unset BATCHNORM_EXT_CPU" if cpu["requested"] else ""
        yield f"the kernels in use are {cpu['used']}, this processor has {best}{mend}"
    if threads["torch"] > threads["cores"]:
        yield (
            f"{threads['torch']} threads on {threads['cores']} usable cores: "
            f"export OMP_NUM_THREADS={threads['cores']}"
        )
    if report["gpus"] and not report["build"]["cuda"]:
        yield (
            "this build has no CUDA kernels, so CUDA tensors need torch.nn.BatchNorm*; with nvcc "
            f"and a CUDA build of torch: {REBUILD_WITH_CUDA}"
        )


def _cuda_kernels(cuda: dict[str, str] | bool) -> str:
    if not isinstance(cuda, dict):
        return "no"
    return f"by nvcc {cuda['version']} for {cuda['architectures']}"


def render(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    build, cpu, threads = report["build"], report["cpu"], report["threads"]
    gpus = report["gpus"]
    rows = [
        ("batchnorm_ext", f"{report['version']} in {report['location']}"),
        ("Python", report["python"]),
        ("torch", f"{report['torch']} (built for {build['torch_version']})"),
        ("compiler", f"{build['compiler']}, C++{build['cpp_standard']}"),
        ("OpenMP", "yes" if build["openmp"] else "no"),
        ("CUDA kernels", _cuda_kernels(build["cuda"])),
        ("processor", cpu["name"]),
        ("it offers", ", ".join(cpu["offered"])),
        ("built for", ", ".join(cpu["built"])),
        ("in use", cpu["used"]),
        ("threads", f"{threads['torch']} (torch) on {threads['cores']} usable cores"),
        ("devices", ", ".join(["cpu", *(f"{g['name']} ({g['capability']})" for g in gpus)])),
    ]
    lines = [f"{label:<15}{value}" for label, value in rows]
    notes = [f"problem: {text}" for text in problems(report)]
    notes += [f"hint: {text}" for text in hints(report)]
    return "\n".join([*lines, "", *(notes or ["nothing to mend"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser(prog="python -m batchnorm_ext", description="Report.")
    parser.add_argument("--version", action="version", version=f"batchnorm_ext {__version__}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    commands = parser.add_subparsers(dest="command", metavar="{plan,compare}")
    plan.add_arguments(
        commands.add_parser("plan", help="how a call would be cut into work, and why")
    )
    compare_command.add_arguments(
        commands.add_parser("compare", help="what this package brings for a model of yours")
    )
    arguments = parser.parse_args(argv)
    if arguments.command is not None:
        return int({"plan": plan, "compare": compare_command}[arguments.command].run(arguments))
    report = collect()
    found = list(problems(report))
    if arguments.json:
        print(json.dumps({**report, "problems": found, "hints": list(hints(report))}, indent=2))
    else:
        print(render(report))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
