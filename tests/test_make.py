"""What `make` prints while it builds (.ci/quietly), when it builds, and what it refuses."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What a build by ninja prints within pip, and how it ends.
BUILD = """
print("  batchnorm_ext 1.0: CPU backend for torch 2.99.0")
print("  warning: no previously-included files matching '*.o' found anywhere in distribution")
print("  running build_ext")
for k, name in enumerate(["core/plan", "cpu/forward"], 1):
    print(f"  [{k}/3] c++ -Ifolder -c -c /somewhere/csrc/{name}.cpp -o {name}.o -O3", flush=True)
print("  csrc/cpu/forward.cpp:7:3: warning: unused variable 'x'")
print("  [3/3] c++ -shared plan.o forward.o")
raise SystemExit(STATUS)
"""


def quietly(log: Path, status: int, **environment: str) -> subprocess.CompletedProcess[str]:
    code = BUILD.replace("STATUS", str(status))
    return subprocess.run(
        [ROOT / ".ci" / "quietly", log, "compiling", sys.executable, "-c", code],
        env={**os.environ, "V": "", **environment},
        capture_output=True,
        text=True,
    )


def test_a_build_is_a_few_lines_for_a_person(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "build.log"
    result = quietly(log, 0)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[:-1] == [
        "compiling ...",
        "batchnorm_ext 1.0: CPU backend for torch 2.99.0",
        "csrc/cpu/forward.cpp:7:3: warning: unused variable 'x'",
    ]
    assert lines[-1].startswith("compiling: done in ")
    assert "-Ifolder" in log.read_text()


def test_a_failed_build_shows_all_of_it(tmp_path: Path) -> None:
    result = quietly(tmp_path / "build.log", 7)
    assert result.returncode == 7
    assert "compiling: FAILED, exit status 7" in result.stdout
    assert "[2/3] c++ -Ifolder -c -c /somewhere/csrc/cpu/forward.cpp" in result.stdout


@pytest.mark.parametrize(
    ("printed", "helps"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "df -h . /tmp"),
        ("Failed to establish a new connection: [Errno -2] Name or service not known", "index"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
    ],
)
def test_what_is_missing_is_said_last(tmp_path: Path, printed: str, helps: str) -> None:
    command = [sys.executable, "-c", f"print({printed!r}); raise SystemExit(3)"]
    result = subprocess.run(
        [ROOT / ".ci" / "quietly", tmp_path / "log", "installing", *command],
        env={**os.environ, "V": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3
    last = result.stdout.splitlines()[-1]
    assert last.startswith("make: ") and helps in last


def test_a_log_for_which_there_is_no_space() -> None:
    result = subprocess.run(
        [ROOT / ".ci" / "quietly", "/dev/full", "compiling", sys.executable, "-c", BUILD * 200],
        env={**os.environ, "V": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("make: a disk is full") and "Traceback" not in result.stderr


def test_everything_is_shown_where_asked_for(tmp_path: Path) -> None:
    result = quietly(tmp_path / "build.log", 0, V="1")
    assert "[1/3] c++ -Ifolder" in result.stdout
    assert "compiling" not in result.stdout


def all_of(terminal: int) -> str:
    """What was written to a terminal whose other end is closed: a read may bring a part of it."""
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError as error:  # how Linux says that there is no more
        assert error.errno == errno.EIO
    return b"".join(parts).decode()


def test_a_terminal_gets_a_counter(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    command = [str(ROOT / ".ci" / "quietly"), str(tmp_path / "log"), "compiling"]
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*command, sys.executable, "-c", BUILD.replace("STATUS", "0")],
        env={**os.environ, "V": ""},
        stdout=child,
    )
    os.close(child)
    assert process.wait() == 0
    shown = all_of(parent)
    os.close(parent)
    assert "\r\033[Kcompiling 2 of 3: csrc/cpu/forward.cpp" in shown
    assert shown.endswith(" s\r\n")


FINDER = "lib/python3.11/site-packages/__editable___batchnorm_ext_1_0_finder.py"


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Path]:
    """A project with all that a build reads and leaves, and the environment it was built for."""
    project, venv = tmp_path / "project", tmp_path / "venv"
    sources = ["setup.py", "setup_extension.py", "batchnorm_ext/_version.py", "csrc/core/plan.cpp"]
    shutil.copytree(ROOT / ".ci", project / ".ci")
    shutil.copy(ROOT / "Makefile", project)
    for path in (
        *(project / source for source in sources),
        project / "batchnorm_ext" / "_C.so",
        venv / "bin" / "python",
        venv / ".batchnorm_ext" / "torch",
        venv / FINDER,
        project / "build" / f"built-for{str(venv).replace('/', '-')}",  # the newest
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    write_finder(venv, project)
    return project, venv


def write_finder(venv: Path, project: Path) -> None:
    """What an editable install of the project leaves in the environment."""
    (venv / FINDER).write_text(f"MAPPING = {{'batchnorm_ext': '{project}/batchnorm_ext'}}\n")


def commands_of_build(project: Path, venv: Path) -> str:
    """What `make build` would do."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "BATCHNORM"))}
    return subprocess.run(
        ["make", "--dry-run", "build", f"VENV={venv}"],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_what_is_built_and_installed_is_left_alone(built: tuple[Path, Path]) -> None:
    assert "pip" not in commands_of_build(*built)


@pytest.mark.parametrize("lost", ["project/batchnorm_ext/_C.so", f"venv/{FINDER}"])
def test_a_build_that_is_lost_is_done_again(
    lost: str, built: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / lost).unlink()
    commands = commands_of_build(*built)
    assert "--no-index --no-deps --no-build-isolation --editable ." in commands


def test_another_checkout_in_the_environment_is_replaced(built: tuple[Path, Path]) -> None:
    project, venv = built
    write_finder(venv, project.parent / "another")
    assert "--editable ." in commands_of_build(project, venv)


def test_a_changed_source_is_built(built: tuple[Path, Path]) -> None:
    os.utime(built[0] / "csrc" / "core" / "plan.cpp", (2**32, 2**32))
    assert "--editable ." in commands_of_build(*built)


@pytest.mark.parametrize(
    ("folder", "options"), [("with a space", []), ("plain", ["VENV=an environment"])]
)
def test_a_path_with_a_space_is_named(folder: str, options: list[str], tmp_path: Path) -> None:
    project = tmp_path / folder
    project.mkdir()
    shutil.copy(ROOT / "Makefile", project)
    result = subprocess.run(
        ["make", "--dry-run", "help", *options], cwd=project, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "can not work with a path that has a space" in result.stderr
    assert (options[0].partition("=")[2] if options else str(project)) in result.stderr
