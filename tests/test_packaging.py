"""What setup.py refuses and how, the version's one place, and `python -m batchnorm_ext`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm_ext
from batchnorm_ext import _C, __main__

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """This Python with these arguments, in the project's root."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which a command refused."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("batchnorm_ext: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_without_torch_setup_names_the_command() -> None:
    # None in sys.modules makes `import torch` fail as it does where there is no torch.
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    assert "pip install --no-build-isolation ." in refusal(run("-c", code))


def test_cuda_is_refused_while_there_are_no_kernels() -> None:
    result = run("setup.py", "build_ext", "--dry-run", BATCHNORM_EXT_CUDA="1")
    assert "has no CUDA kernels" in refusal(result)
    assert "Building" not in result.stdout and "running" not in result.stdout


def test_an_unknown_cuda_setting_is_refused() -> None:
    message = refusal(run("setup.py", "--version", BATCHNORM_EXT_CUDA="yes"))
    assert "BATCHNORM_EXT_CUDA=yes" in message and "auto, 0, 1" in message


@pytest.mark.parametrize("setting", ["auto", "0"])
def test_the_cpu_settings_are_accepted(setting: str) -> None:
    result = run("setup.py", "--version", BATCHNORM_EXT_CUDA=setting)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == batchnorm_ext.__version__


def test_the_version_stands_in_one_place() -> None:
    version = batchnorm_ext.__version__
    assert _C.build_info()["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    stated = re.compile(rf'"{re.escape(version)}"')
    files = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for folder, suffix in (("batchnorm_ext", "*.py"), ("csrc", "*.cpp"), ("csrc", "*.h")):
        files += (ROOT / folder).rglob(suffix)
    places = [path for path in files if stated.search(path.read_text())]
    assert places == [ROOT / "batchnorm_ext" / "_version.py"]


def test_the_extension_was_built_for_the_torch_that_runs() -> None:
    assert _C.build_info()["torch_version"] == torch.__version__


def test_one_openmp_runtime_is_loaded() -> None:
    # Two of them would each keep a pool of threads, and torch.set_num_threads would reach only one.
    code = "import batchnorm_ext; print(open('/proc/self/maps').read())"
    maps = run("-c", code).stdout.splitlines()
    loaded = {line.split()[-1] for line in maps if re.search(r"/lib(gomp|omp|iomp5)\b", line)}
    assert len(loaded) == 1, loaded


def test_report() -> None:
    result = run("-m", "batchnorm_ext")
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^(\S.*?)  +(.*)$", result.stdout, re.M))
    assert rows["batchnorm_ext"].startswith(batchnorm_ext.__version__)
    assert rows["torch"] == f"{torch.__version__} (built for {torch.__version__})"
    assert rows["in use"] in rows["built for"].split(", ")
    assert rows["devices"].startswith("cpu")
    assert "problem:" not in result.stdout


def test_report_as_json_agrees_with_the_extension() -> None:
    result = run("-m", "batchnorm_ext", "--json")
    report = json.loads(result.stdout)
    assert report["build"] == _C.build_info()
    assert report["problems"] == []
    assert set(report["cpu"]["built"]) >= {"portable", report["cpu"]["used"]}


def test_report_uses_the_instruction_set_that_was_asked_for() -> None:
    report = json.loads(run("-m", "batchnorm_ext", "--json", BATCHNORM_EXT_CPU="portable").stdout)
    assert report["cpu"]["used"] == "portable"
    slower = any(name != "portable" for name in report["cpu"]["offered"])
    assert any("unset BATCHNORM_EXT_CPU" in hint for hint in report["hints"]) is slower


@pytest.fixture
def report() -> dict[str, Any]:
    return __main__.collect()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("torch_version", "2.99.0", "built for torch 2.99.0"),
        ("version", "9.9.9", "the extension is of version 9.9.9"),
        ("openmp", False, "without OpenMP"),
    ],
)
def test_each_problem_comes_with_its_command(
    report: dict[str, Any], key: str, value: object, message: str
) -> None:
    report["build"][key] = value
    (problem,) = __main__.problems(report)
    assert message in problem and "pip install --no-build-isolation" in problem
    assert f"problem: {problem}" in __main__.render(report)


def test_too_many_threads_and_idle_gpus_are_pointed_out(report: dict[str, Any]) -> None:
    report["threads"] = {"torch": 64, "cores": 2}
    report["gpus"] = [{"name": "A GPU", "capability": "9.0"}]
    report["build"]["cuda"] = False
    text = __main__.render(report)
    assert "export OMP_NUM_THREADS=2" in text
    assert "no CUDA kernels" in text and "cpu, A GPU (9.0)" in text
    assert "BATCHNORM_EXT_CUDA=1 pip install" in text


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ("7.5;8.0", "8.0", True),
        ("7.5;8.0", "8.6", True),  # machine code runs on later ones of its major version
        ("8.6", "8.0", False),
        ("7.5;8.0", "9.0", False),
        ("7.5;8.0+PTX", "9.0", True),  # PTX is compiled for anything later
        ("9.0+PTX", "8.9", False),
        ("9.0a;10.0", "10.0", True),
        ("7.5;10.0", "12.0", False),
    ],
)
def test_architectures_against_the_devices(
    report: dict[str, Any], architectures: str, capability: str, fits: bool
) -> None:
    report["gpus"] = [{"name": "A GPU", "capability": capability}]
    report["build"]["cuda"] = {"version": "13.0", "architectures": architectures}
    text = __main__.render(report)
    assert f"by nvcc 13.0 for {architectures}" in text
    assert (f"TORCH_CUDA_ARCH_LIST={capability} BATCHNORM_EXT_CUDA=1 pip" in text) is not fits


def test_a_problem_sets_the_exit_status(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report["build"]["torch_version"] = "2.99.0"
    monkeypatch.setattr(__main__, "collect", lambda: report)
    assert __main__.main(["--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1
