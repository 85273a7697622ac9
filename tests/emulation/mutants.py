"""Plants mistakes in the CUDA kernels and their plan, and sees that the checks find every one.

    cd tests && python -m emulation.mutants [k/n] [--only TEXT]

Each mistake goes into a copy of the sources of which only the kernels of one dtype are compiled. It
is found if the checks of this dtype fail in the build that is named. One that does not compile is
not found.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from objects import CompileError, Missing, Task, compile_one, dependencies, jobs

from emulation.build import CACHE, link, require_everything, tasks_of
from emulation.kernels import (
    CHECKS,
    CSRC,
    DTYPES,
    EMULATED_DEVICE,
    NO_KERNELS,
    DType,
    Part,
    program,
    run,
    sources,
)
from emulation.mistakes import MISTAKES, Mistake

# Of the dtype's cases, how many are run before a mistake counts as not found.
# Nothing in common with the numbers of plans (10) and of devices (7), or a part would miss some.
PARTS: dict[str, Part] = {"plain": (0, 1), "asan": (0, 3), "tsan": (6, 9)}
FOLDER = CACHE / "mutants"


class NotPlanted(RuntimeError):
    """The sources do not contain the text that a mistake replaces, or do so twice."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mistake."""

    mistake: Mistake
    is_found: bool
    seconds: float


def dtype_of(mistake: Mistake) -> DType:
    """Whose kernels have it, and are checked."""
    return next(dtype for dtype in DTYPES if dtype.stem == mistake.dtype)


def planted(mistake: Mistake) -> str:
    """The file's text with the mistake in it."""
    text = (CSRC / mistake.file).read_text()
    for right, wrong in mistake.edits:
        if text.count(right) != 1:
            raise NotPlanted(f"{mistake.file} has {text.count(right)} times, not once: {right!r}")
        text = text.replace(right, wrong)
    return text


# What the launchers include and do not call.
OF_KERNELS_ONLY = {"activations", "cell", "partials", "team", "forward_kernels", "backward_kernels"}


def is_affected(task: Task, mistake: Mistake) -> bool:
    """Whether an object is to be made with the mistake. The checks themselves stay as they are."""
    name = task.source.stem
    file = CSRC / mistake.file
    if task.source in (CHECKS, EMULATED_DEVICE, NO_KERNELS):
        return False
    if name.startswith("launch_") and file.stem in OF_KERNELS_ONLY:
        return False
    return file in [path.resolve() for path in dependencies(task.output.with_suffix(".d"))]


def build_with(mistake: Mistake, folder: Path) -> Path:
    """The checks, with the mistake."""
    csrc = folder / "csrc"
    for part in ("core", "cuda"):
        shutil.copytree(CSRC / part, csrc / part)
    (csrc / mistake.file).write_text(planted(mistake))
    files, arguments = sources([dtype_of(mistake)])
    cache = CACHE / mistake.flavour
    right = tasks_of(mistake.flavour, files, CSRC, cache, compile_args_of=arguments)
    moved = [csrc / path.relative_to(CSRC) if path.is_relative_to(CSRC) else path for path in files]
    wrong = tasks_of(mistake.flavour, moved, csrc, folder, compile_args=["-w", "-g0"])
    first, rest = [], []  # of functions that several objects have, the linker takes the first
    for as_it_was, as_it_is in zip(right, wrong, strict=True):
        if is_affected(as_it_was, mistake):
            compile_one(as_it_is)
            first.append(as_it_is.output)
        else:
            rest.append(as_it_was.output)
    output = folder / "check_kernels"
    link([*first, *rest], output, mistake.flavour, [])
    return output


def is_found(path: Path, mistake: Mistake) -> bool:
    part, dtype = PARTS[mistake.flavour], dtype_of(mistake)
    try:
        return run(path, part, "1", dtype.name, timeout=300).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def judge(mistake: Mistake, number: int) -> Verdict:
    """Builds and runs it."""
    start = time.monotonic()
    folder = FOLDER / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    found, said = False, ""
    try:
        found = is_found(build_with(mistake, folder), mistake)
    except CompileError as error:
        said = f" does not compile: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    verdict = Verdict(mistake, found, time.monotonic() - start)
    how = f"found by {mistake.flavour}" if found else "NOT FOUND"
    print(f"{how:14} {verdict.seconds:5.1f} s  {mistake.file}: {mistake.what}{said}", flush=True)
    return verdict


def judge_all(mistakes: Sequence[Mistake]) -> list[Verdict]:
    for flavour, stem in sorted({(mistake.flavour, mistake.dtype) for mistake in mistakes}):
        program(flavour, tuple(dtype for dtype in DTYPES if dtype.stem == stem))
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(judge, mistakes, range(len(mistakes))))


def main() -> None:
    parser = argparse.ArgumentParser(description="See that planted mistakes are found.")
    parser.add_argument("part", nargs="?", default="0/1", help="k/n: every n-th from the k-th on")
    parser.add_argument("--only", default="", help="those whose description contains this")
    arguments = parser.parse_args()
    k, n = map(int, arguments.part.split("/"))
    chosen = [mistake for mistake in MISTAKES if arguments.only in mistake.what][k % n :: n]
    try:
        require_everything()
    except Missing as error:
        sys.exit(f"no mistake is planted: {error}")
    if n > 1:
        others = len(MISTAKES) - len(chosen)
        print(f"part {k % n} of {n}: {len(chosen)} mistakes; left to other turns: {others}")
    verdicts = judge_all(chosen)
    found = sum(verdict.is_found for verdict in verdicts)
    print(f"killed {found} of {len(verdicts)}")
    if found < len(verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
