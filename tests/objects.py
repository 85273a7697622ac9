"""Objects that tests compile: once for each command, kept until a file they are made of changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class Missing(RuntimeError):
    """Something that is needed for compiling is not installed. The message says what to do."""


class CompileError(RuntimeError):
    """The compiler or linker failed. The message is its own."""


@dataclass(frozen=True)
class Task:
    """One object to compile."""

    source: Path
    output: Path
    command: list[str]


def make_task(source: Path, folder: Path, command: Sequence[str]) -> Task:
    """The command, all but what to compile and where to, is part of the object's name."""
    name = f"{source.stem}-{digest([str(source), *command])}.o"
    return Task(source, folder / name, list(command))


def compiler() -> list[str]:
    """The C++ compiler: $CXX, or g++."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise Missing(f"no C++ compiler {command[0]!r}: apt-get install g++")
    return command


def digest(words: Iterable[str]) -> str:
    """A short name for a command."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def dependencies(depfile: Path) -> list[Path]:
    """The files that an object was made from, as the compiler wrote them down."""
    text = depfile.read_text().partition(":")[2].replace("\\\n", " ")
    return [Path(word) for word in shlex.split(text)]


def is_current(task: Task) -> bool:
    """The command is part of the object's name; here, whether a file has changed since."""
    depfile = task.output.with_suffix(".d")
    if not task.output.exists() or not depfile.exists():
        return False
    made = task.output.stat().st_mtime_ns
    files = dependencies(depfile)
    return all(path.exists() and path.stat().st_mtime_ns < made for path in files)


def run(command: Sequence[str]) -> None:
    """Raises CompileError with the compiler's words."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{result.stderr}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, for what is made at this path. Whoever dies lets go."""
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_one(task: Task) -> None:
    """If a file has changed since; what another process is compiling is waited for."""
    task.output.parent.mkdir(parents=True, exist_ok=True)
    with locked(task.output):
        if not is_current(task):
            _compile(task)


def _compile(task: Task) -> None:
    """Into a name of its own first: whoever interrupts it leaves no half of an object."""
    own = task.output.with_name(f"{os.getpid()}-{task.output.name}")
    depfile = task.output.with_suffix(".d")
    own_depfile = own.with_suffix(".d")
    words = [*task.command, "-MMD", "-MF", str(own_depfile)]
    if "--coverage" in words:  # the names of its data are made from the output's name
        own, own_depfile = task.output, depfile
        words = [*task.command, "-MMD", "-MF", str(depfile)]
    run([*words, "-c", str(task.source), "-o", str(own)])
    own_depfile.replace(depfile)
    own.replace(task.output)


def jobs() -> int:
    """How many compilers to start: $MAX_JOBS, or this process's share of the processors."""
    side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)) // side_by_side))


def compile_all(tasks: Sequence[Task]) -> list[Path]:
    """The objects, those first that are named first."""
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(compile_one, tasks))
    return [task.output for task in tasks]
