"""benchmarks/gpu/check_program.py: the checks of the CUDA kernels as a program for a real GPU.

That the same checks are right is for test_cuda_kernels.py; here, that nvcc takes them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import setup_cuda
from benchmarks.gpu import check_program

TOOLKIT = setup_cuda.find_toolkit()
needs_nvcc = pytest.mark.skipif(
    TOOLKIT is None, reason="THE GPU'S CHECK PROGRAM IS NOT COMPILED: no nvcc"
)


def test_it_has_all_kernels() -> None:
    sources = check_program.sources()
    assert all(path.is_file() for path in sources)
    assert set((check_program.CSRC / "cuda").glob("*.cu")) <= set(sources)
    assert len(set(sources)) == len(sources)


def test_the_kernels_are_compiled_as_they_are_shipped() -> None:
    toolkit = setup_cuda.Toolkit(check_program.ROOT, (13, 0))
    for task in check_program.tasks(toolkit, "sm_90"):
        assert set(setup_cuda.NVCC_FLAGS) | {"-arch=sm_90"} <= set(task.command)


def test_without_nvcc_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_program, "find_toolkit", lambda: None)
    assert check_program.main(["build"]) == 2
    assert "no nvcc, so the CUDA kernels are NOT CHECKED" in capsys.readouterr().err


def test_build_takes_nothing_that_it_would_ignore() -> None:
    with pytest.raises(SystemExit, match="2"):
        check_program.main(["build", "--arch", "sm_90"])


def test_it_needs_no_package() -> None:
    code = "import sys; import benchmarks.gpu.check_program as p; print(sorted(sys.modules))"
    # -S: nothing of site-packages
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=check_program.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'torch'" not in done.stdout


@pytest.mark.slow
@needs_nvcc
def test_nvcc_builds_it_and_it_says_what_it_finds() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.check_program", "--arch", "sm_90", "run"]
    done = subprocess.run(
        [*command, "--quiet", "5/240"], cwd=check_program.ROOT, capture_output=True, text=True
    )
    last = done.stdout.splitlines()[-1]
    if done.returncode == 0:  # there is a GPU
        assert last.endswith(" checks, 0 failures") and not last.startswith("0 ")
    else:
        assert "device_limits: " in done.stdout, done.stdout + done.stderr
        assert last == "0 checks, 1 failures"
