"""Compiles the CUDA kernels and a test program for the host, with the emulated device.

As a function: `build("asan", [source], output)`. As a program, for one's own experiments:
`cd tests && python -m emulation.build plain my_test.cpp --output ../build/my_test`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from objects import CompileError, Missing, Task, compile_all, compiler, locked, make_task, run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME = HERE / "runtime"
CACHE = ROOT / "build" / "emulation"

# Without contraction a product and a sum are rounded each; what kernels want fused they write as
# fmaf.
COMMON = ["-std=c++20", "-g1", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra"]
COMMON += ["-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden", "-fno-gnu-unique"]
# The runtime's bookkeeping belongs to all fibers; a sanitizer would take it for their own.
RUNTIME_FLAGS = ["-O2"]
FLAVOURS: dict[str, list[str]] = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
    "coverage": ["-O0", "--coverage"],
}
LINK_FLAGS: dict[str, list[str]] = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined"],
    "tsan": ["-fsanitize=thread"],
    "coverage": ["--coverage"],
}


def include_of_nvcc(nvcc: str) -> list[Path]:
    """The include folders that nvcc itself uses: what is on PATH may be a script."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    found = re.findall(r"^#\$ INCLUDES=(.*)$", result.stderr, re.MULTILINE)
    words = shlex.split(found[0]) if found else []
    return [Path(word[2:]) for word in words if word.startswith("-I")]


def cuda_include_candidates() -> list[Path]:
    """Where CUDA's headers may be, the most explicit first."""
    found = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            found.append(Path(home) / "include")
            found += sorted(Path(home).glob("targets/*/include"))
    if nvcc := shutil.which("nvcc"):
        found += include_of_nvcc(nvcc)
    site_packages = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    for folder in sorted(site_packages):
        found += sorted((folder / "nvidia").glob("cu[0-9]*/include"), reverse=True)
        found.append(folder / "nvidia" / "cuda_runtime" / "include")
    found.append(Path("/usr/local/cuda/include"))
    return found


def cuda_includes() -> list[Path]:
    """CUDA's include folder, and within it the one of its C++ libraries. Nothing is linked."""
    candidates = cuda_include_candidates()
    for folder in candidates:
        needed = ["cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h"]
        if all((folder / name).exists() for name in needed):
            return [path for path in (folder.resolve(), folder.resolve() / "cccl") if path.is_dir()]
    raise Missing(
        "CUDA's headers were not found (no GPU and no driver is needed). Either\n"
        "  pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl\n"
        "or install a toolkit and put its nvcc on PATH or its folder into CUDA_HOME.\n"
        f"Looked in: {', '.join(map(str, candidates))}"
    )


def require_everything() -> None:
    """Raises Missing, with what to install."""
    compiler()
    cuda_includes()


def task_of(source: Path, folder: Path, flags: Sequence[str]) -> Task:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    return make_task(source, folder, [*compiler(), *COMMON, *flags, *language])


def link(objects: Sequence[Path], output: Path, flavour: str, link_args: Sequence[str]) -> None:
    # A library must not take the real CUDA runtime's functions for its own, where one is loaded.
    shared = ["-shared", "-Wl,-Bsymbolic"] if output.suffix == ".so" else []
    command = [*compiler(), "-pthread", *LINK_FLAGS[flavour], *shared, *map(str, objects)]
    command += link_args
    stamp = output.with_name(f"{output.name}.link")
    text = shlex.join(command)
    newest = max(path.stat().st_mtime_ns for path in objects)
    is_same = output.exists() and stamp.exists() and stamp.read_text() == text
    if is_same and output.stat().st_mtime_ns > newest:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    own = output.with_name(f"{output.name}.{os.getpid()}")
    run([*command, "-o", str(own)])
    own.replace(output)
    stamp.write_text(text)


def tasks_of(
    flavour: str,
    sources: Sequence[Path | str],
    csrc: Path,
    folder: Path,
    defines: Sequence[str] = (),
    extra_includes: Sequence[Path | str] = (),
    compile_args: Sequence[str] = (),
    compile_args_of: Mapping[Path, Sequence[str]] | None = None,
) -> list[Task]:
    """What to compile, into `folder`: the sources, with `csrc`'s headers, and the runtime."""
    require_everything()
    system = [word for path in cuda_includes() for word in ("-isystem", str(path))]
    own = [f"-I{path}" for path in (RUNTIME, csrc, *extra_includes)]
    defined = [f"-D{name}" for name in defines]
    flags = [*FLAVOURS[flavour], *defined, *compile_args, *own, *system]
    more = compile_args_of or {}
    tasks = [
        task_of(Path(path).resolve(), folder, [*flags, *more.get(Path(path), ())])
        for path in sources
    ]
    runtime_flags = [*RUNTIME_FLAGS, *defined, f"-I{RUNTIME}", *system]
    tasks += [
        task_of(path, CACHE / "runtime", runtime_flags) for path in sorted(RUNTIME.glob("*.cpp"))
    ]
    return tasks


def build(
    flavour: str,
    sources: Sequence[Path | str],
    output: Path | str,
    defines: Sequence[str] = (),
    extra_includes: Sequence[Path | str] = (),
    compile_args: Sequence[str] = (),
    link_args: Sequence[str] = (),
    compile_args_of: Mapping[Path, Sequence[str]] | None = None,
) -> Path:
    """Builds a program, or a library if the output ends in ".so", and returns its path.

    The sources (.cpp and .cu) get the flavour's sanitizer. The runtime is added, without one.
    `defines` are NAME or NAME=VALUE, `compile_args_of` more arguments for some of the sources.
    What has not changed is not compiled again.
    """
    output = Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = CACHE / flavour
    tasks = tasks_of(
        flavour,
        sources,
        ROOT / "csrc",
        folder,
        defines,
        extra_includes,
        compile_args,
        compile_args_of,
    )
    with locked(output):
        link(compile_all(tasks), output, flavour, link_args)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a program with the emulated CUDA device.")
    parser.add_argument("flavour", choices=FLAVOURS)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--define", action="append", default=[])
    arguments = parser.parse_args()
    try:
        print(build(arguments.flavour, arguments.sources, arguments.output, arguments.define))
    except (Missing, CompileError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
