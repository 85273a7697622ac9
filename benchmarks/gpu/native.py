"""Programs that nvcc makes of one command, and whose lines go into the journal as they come."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import setup_cuda
from benchmarks.gpu import journal, missing


def nvcc() -> str:
    """The compiler; a step without one ends here."""
    toolkit = setup_cuda.find_toolkit()
    if toolkit is None:
        missing.leave("no nvcc")
    return str(toolkit.home / "bin" / "nvcc")


def compile_program(sources: Sequence[Path], output: Path, flags: Sequence[str]) -> int:
    """For the GPU at hand. The exit status."""
    arch = "-arch=native" if missing.has_gpu() else "-arch=sm_90"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc(), "-O3", "-std=c++17", arch, *flags, "-o", str(output), *map(str, sources)]
    return subprocess.run(command).returncode


def relay(command: Sequence[str | Path], kind: str, only_printed: str | None = None) -> int:
    """Runs it. Its lines are printed and written down: JSON as it is, others as text, but for those
    that begin with `only_printed`; where it ends badly, the last one whatever it is. The status."""
    # C's standard output is held back where it is no terminal.
    by_line = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []
    lines = journal.Journal.of_the_check()
    process = subprocess.Popen(
        [*by_line, *map(str, command)], stdout=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdout is not None
    last, status = "", None
    try:
        for last in process.stdout:
            print(last, end="", flush=True)
            if only_printed is None or not last.startswith(only_printed):
                lines.write(kind, **(_object(last) or {"text": last.strip()}))
        status = process.wait()
    finally:
        if status != 0:
            lines.write(kind, text=f"ended with {status} after: {last.strip()}")
    return abs(status)


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return {k: v for k, v in value.items() if k != "kind"} if isinstance(value, dict) else {}
