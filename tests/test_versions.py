"""`.ci/versions`, with a make that only says what it was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Makes an environment whose python knows nothing but torch's version, and fails with torch 2.9.9.
MAKE = """#!/usr/bin/env bash
for argument in "$@"; do case "$argument" in VENV=*|TORCH_SPEC=*) export "$argument";; esac; done
echo "make $3 in $2 with $TORCH_SPEC, CUDA $BATCHNORM_EXT_CUDA, pytest $PYTEST_ARGS"
mkdir -p "$VENV/bin"
cat >"$VENV/bin/python" <<'END'
#!/usr/bin/env bash
case "$*" in *__version__*) echo 2.99.0+cpu;; *) echo "python $*";; esac
END
chmod +x "$VENV/bin/python"
[ "$TORCH_SPEC" != torch==2.9.9 ]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with the scripts and some files, and the make beside it."""
    folder = tmp_path / "project"
    (folder / ".ci").mkdir(parents=True)
    for name in ("versions", "copy-sources"):
        shutil.copy(ROOT / ".ci" / name, folder / ".ci")
    (folder / ".gitignore").write_text("build/\n*.so\n")
    for name in ("kept.py", "removed.py", "ignored.so"):
        (folder / name).write_text(name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    return folder


def run(project: Path, *versions: str) -> subprocess.CompletedProcess[str]:
    path = f"{project.parent / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [project / ".ci" / "versions", *versions],
        env={**os.environ, "PATH": path, "PYTEST_ARGS": "-k some"},
        capture_output=True,
        text=True,
    )


def log(project: Path, version: str) -> list[str]:
    return (project / "build" / "versions" / version / "log").read_text().splitlines()


def test_each_version_is_tested_and_one_that_fails_counts(project: Path) -> None:
    result = run(project, "2.11.0", "2.9.9", "newest")
    assert result.returncode == 1
    table = [line.split() for line in result.stdout.splitlines()[-3:]]
    assert table == [
        ["2.11.0", "2.99.0+cpu", "passed"],
        ["2.9.9", "2.99.0+cpu", "FAILED"],
        ["newest", "2.99.0+cpu", "passed"],
    ]
    for version, spec in [("2.11.0", "torch==2.11.0"), ("newest", "torch")]:
        source = project / "build" / "versions" / version / "source"
        assert log(project, version) == [
            f"make test in {source} with {spec}, CUDA 0, pytest -k some"
        ]
    assert "with torch==2.9.9" in result.stdout, "not what the failed one printed"
    assert run(project, "2.11.0").returncode == 0


def test_the_copy_follows_the_sources_and_keeps_what_was_compiled(project: Path) -> None:
    run(project, "newest")
    source = project / "build" / "versions" / "newest" / "source"
    assert not (source / "ignored.so").exists()
    (source / "build").mkdir()
    (project / "kept.py").write_text("changed")
    (project / "removed.py").unlink()
    (project / "not added.py").write_text("new")
    assert run(project, "newest").returncode == 0
    assert (source / "kept.py").read_text() == "changed"
    assert (source / "not added.py").exists() and (source / "build").exists()
    assert not (source / "removed.py").exists()
    assert log(project, "newest")[0] == "python -m pip install --quiet --upgrade torch"


@pytest.mark.parametrize("versions", [["2.11.0", "latest"], ["2.11.0", "2.1/../.."], []])
def test_what_is_no_version_is_refused_before_anything_is_done(
    project: Path, versions: list[str]
) -> None:
    result = run(project, *versions)
    assert result.returncode == 2
    assert (f"'{versions[-1]}' is no version" if versions else "usage:") in result.stderr
    assert not (project / "build").exists()


def test_make_hands_the_versions_on() -> None:
    # Under `make test` a make of our own would name the folders that it enters and leaves.
    quiet = ["--dry-run", "--no-print-directory"]
    command = ["make", *quiet, "versions", "VERSIONS=2.11.0 newest"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == ".ci/versions 2.11.0 newest"
