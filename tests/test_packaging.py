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
import setuptools
import torch

import batchnorm_ext
import setup_cuda
import setup_extension
from batchnorm_ext import _C, __main__
from setup_cuda import Toolkit

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


# None in sys.modules makes `import torch` fail as it does where there is no torch.
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '{}'];"
RUN_SETUP = "runpy.run_path('setup.py', run_name='__main__')"


def test_without_torch_setup_names_the_command() -> None:
    message = refusal(run("-c", WITHOUT_TORCH.format("build_ext") + RUN_SETUP))
    assert "install torch 2.11 or newer, then: pip install ." in message


def test_a_torch_that_is_too_old_is_refused() -> None:
    code = "import runpy, sys, torch; torch.__version__ = '2.10.1+cpu';"
    message = refusal(run("-c", f"{code} sys.argv = ['setup.py', '--version']; {RUN_SETUP}"))
    assert message.endswith("torch 2.10.1+cpu is too old, torch 2.11 or newer is needed")


def test_a_missing_compiler_is_named() -> None:
    message = refusal(run("setup.py", "--version", CXX="no-such-c++"))
    assert "no compiler no-such-c++; on Debian: apt-get install g++" in message


def test_a_source_distribution_needs_no_torch(tmp_path: Path) -> None:
    code = WITHOUT_TORCH.format("egg_info") + f"sys.argv += ['--egg-base', '{tmp_path}'];"
    result = run("-c", code + RUN_SETUP)
    assert result.returncode == 0, result.stderr
    metadata = (tmp_path / "batchnorm_ext.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: {batchnorm_ext.__version__}\n" in metadata


def test_a_build_that_pip_isolates_finds_the_torch_of_the_environment(tmp_path: Path) -> None:
    """As pip does it: off the path with the environment's packages, on it with what was fetched."""
    packages = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(packages / name)
    (tmp_path / "sitecustomize.py").write_text(
        "import site, sys\n"
        "sys.path = [path for path in sys.path if path not in site.getsitepackages()]\n"
    )
    isolated = {"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    assert "No module named 'torch'" in run("-c", "import torch", **isolated).stderr
    result = run("setup.py", "--version", **isolated)
    assert f"+torch{torch.__version__.partition('+')[0]}." in result.stdout, result.stderr


def test_an_editable_install_keeps_what_it_compiles() -> None:
    """setuptools gives it a folder that is removed: each build would compile everything."""
    command = setup_extension.Build(setuptools.Distribution())
    command.editable_mode, command.build_temp = True, "/tmp/of-pip"
    command.ensure_finalized()
    assert Path(command.build_temp).parent == ROOT / "build"


def test_an_unknown_cuda_setting_is_refused() -> None:
    message = refusal(run("setup.py", "--version", BATCHNORM_EXT_CUDA="yes"))
    assert "BATCHNORM_EXT_CUDA=yes" in message and "auto, 0, 1" in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_is_refused_with_a_torch_that_has_none() -> None:
    result = run("setup.py", "build_ext", "--dry-run", BATCHNORM_EXT_CUDA="1")
    assert f"torch {torch.__version__} is a build without CUDA" in refusal(result)
    assert "Building" not in result.stdout and "running" not in result.stdout


NVCC_13 = Toolkit(Path("/opt/cuda"), (13, 0))
NVCC_12 = Toolkit(Path("/opt/cuda"), (12, 6))
NVCC_12_8 = Toolkit(Path("/opt/cuda"), (12, 8))


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "toolkit", "outcome"),
    [
        # outcome: "" builds with CUDA, otherwise words of the reason; "refused: " with an error
        ("auto", "13.0", NVCC_13, ""),
        ("auto", "13.2", NVCC_13, ""),  # the major version has to fit
        ("auto", "12.8", NVCC_12, ""),
        ("1", "13.0", NVCC_13, ""),
        ("0", "13.0", NVCC_13, "not wanted"),
        ("0", None, None, "not wanted"),
        ("auto", None, NVCC_13, "torch 2.13.0 is a build without CUDA"),
        ("auto", "13.0", None, "no nvcc in CUDA_HOME, on PATH"),
        ("auto", None, None, "without CUDA, and there is no nvcc"),
        ("auto", "12.8", NVCC_13, "nvcc in /opt/cuda is of CUDA 13.0, torch 2.13.0 of 12.8"),
        ("1", None, NVCC_13, "refused: BATCHNORM_EXT_CUDA=1, but torch 2.13.0 is a build without"),
        ("1", "13.0", None, "refused: BATCHNORM_EXT_CUDA=1, but there is no nvcc"),
        ("1", "12.8", NVCC_13, "refused: BATCHNORM_EXT_CUDA=1, but nvcc in /opt/cuda is of"),
        ("yes", "13.0", NVCC_13, "refused: BATCHNORM_EXT_CUDA=yes is not one of auto, 0, 1"),
    ],
)
def test_which_backends_are_built(
    setting: str, torch_cuda: str | None, toolkit: Toolkit | None, outcome: str
) -> None:
    try:
        without = setup_cuda.decide(setting, "2.13.0", torch_cuda, toolkit)
    except setup_cuda.Refused as refused:
        without = f"refused: {refused}"
    assert outcome in without
    assert bool(without) is bool(outcome)


@pytest.mark.parametrize(
    ("asked", "gpus", "toolkit", "built"),
    [
        (None, [], NVCC_13, "7.5;8.0;8.6;9.0;10.0;11.0;12.0+PTX"),
        (None, [], NVCC_12_8, "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        (None, [], NVCC_12, "7.5;8.0;8.6;9.0+PTX"),
        (None, [(9, 0), (8, 0), (9, 0)], NVCC_13, "8.0;9.0"),
        ("8.9 9.0+PTX", [(7, 5)], NVCC_13, "8.9;9.0+PTX"),
        ("native", [(7, 5)], NVCC_13, "7.5"),
        ("", [], NVCC_12, "7.5;8.0;8.6;9.0+PTX"),
    ],
)
def test_which_architectures_are_built(
    asked: str | None, gpus: list[tuple[int, int]], toolkit: Toolkit, built: str
) -> None:
    environment = {} if asked is None else {"TORCH_CUDA_ARCH_LIST": asked}
    assert setup_cuda.architectures(environment, gpus, toolkit) == built


def write_nvcc(folder: Path, version: str, top: Path | None = None) -> Path:
    """A script that answers what setup_cuda.py asks of nvcc."""
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n"
        f"echo '#$ TOP={top or folder}/..' >&2\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit, real, pip = tmp_path / "explicit", tmp_path / "real", tmp_path / "site-packages"
    monkeypatch.setattr(setup_cuda, "site_packages", lambda: [pip])
    monkeypatch.setattr(setup_cuda, "USUAL_PLACE", tmp_path / "usual")
    nowhere = {"PATH": str(tmp_path)}
    assert setup_cuda.find_toolkit(nowhere) is None
    write_nvcc(pip / "nvidia" / "cu13" / "bin", "13.1")
    assert setup_cuda.find_toolkit(nowhere) == Toolkit(pip / "nvidia" / "cu13", (13, 1))
    write_nvcc(tmp_path / "usual" / "bin", "12.4")
    assert setup_cuda.find_toolkit(nowhere) == Toolkit(tmp_path / "usual", (12, 4))
    # What is on PATH is a script that calls another one.
    write_nvcc(real / "bin", "13.0")
    write_nvcc(tmp_path / "scripts", "13.0", top=real / "bin")
    on_path = {"PATH": f"{tmp_path / 'scripts'}{os.pathsep}{os.environ['PATH']}"}
    assert setup_cuda.find_toolkit(on_path) == Toolkit(real, (13, 0))
    write_nvcc(explicit / "bin", "12.8")
    assert setup_cuda.find_toolkit(on_path | {"CUDA_HOME": str(explicit)}) == Toolkit(
        explicit, (12, 8)
    )


def test_which_cuda_runtime_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "site-packages"
    monkeypatch.setattr(setup_cuda, "site_packages", lambda: [pip])
    toolkit = Toolkit(tmp_path / "toolkit", (13, 0))
    with pytest.raises(setup_cuda.Refused, match=r"no libcudart\.so\.13"):
        setup_cuda.runtime_library(toolkit)
    libraries = pip / "nvidia" / "cu13" / "lib"
    libraries.mkdir(parents=True)
    (libraries / "libcudart_static.a").touch()
    assert setup_cuda.runtime_library(toolkit)[0] == str(libraries / "libcudart_static.a")
    (libraries / "libcudart.so.13").touch()  # pip has no libcudart.so
    assert setup_cuda.runtime_library(toolkit) == [str(libraries / "libcudart.so.13")]


def test_the_sources_of_each_build() -> None:
    cpu, both = (set(setup_extension.sources(cuda)) for cuda in (False, True))
    added = both - cpu
    assert cpu < both
    assert "csrc/bindings/ops_cuda.cpp" in added
    assert {Path(name).suffix for name in cpu} == {".cpp"}
    assert {Path(name).parent.name for name in added} == {"cuda", "bindings"}
    # Of a .cpp and a .cu with one stem, the objects would have one name.
    stems = [Path(name).stem for name in both if Path(name).parent.name in ("cuda", "bindings")]
    assert len(stems) == len(set(stems))


@pytest.mark.parametrize("setting", ["auto", "0"])
def test_the_cpu_settings_are_accepted(setting: str) -> None:
    result = run("setup.py", "--version", BATCHNORM_EXT_CUDA=setting)
    assert result.returncode == 0, result.stderr
    version = f"{batchnorm_ext.__version__}+torch{torch.__version__.partition('+')[0]}"
    assert result.stdout.split()[-1].startswith(f"{version}.c")


def test_the_version_stands_in_one_place() -> None:
    version = batchnorm_ext.__version__
    assert _C.build_info()["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    stated = re.compile(rf'"{re.escape(version)}"')
    files = [*ROOT.glob("setup*.py"), ROOT / "pyproject.toml"]
    for folder, suffix in (("batchnorm_ext", "*.py"), ("csrc", "*.cpp"), ("csrc", "*.h")):
        files += (ROOT / folder).rglob(suffix)
    places = [path for path in files if stated.search(path.read_text())]
    assert places == [ROOT / "batchnorm_ext" / "_version.py"]


def test_the_extension_was_built_for_the_torch_that_runs() -> None:
    assert _C.build_info()["torch_version"] == torch.__version__


def test_another_torch_is_refused_at_import() -> None:
    code = "import torch; torch.__version__ = '2.99.0+cpu'; import batchnorm_ext"
    result = run("-c", code)
    assert result.returncode == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("ImportError: ")]
    built_for = torch.__version__.partition("+")[0]
    assert f"built for torch {built_for}, but torch 2.99.0+cpu is installed" in message
    assert message.endswith("pip install --force-reinstall --no-deps .")


def test_a_library_that_does_not_load_is_named_at_import() -> None:
    """As one built for a torch with other symbols."""
    code = "import sys; sys.modules['batchnorm_ext._C'] = None; import batchnorm_ext"
    result = run("-c", code)
    assert f"cannot be loaded with torch {torch.__version__}" in result.stderr
    assert result.stderr.strip().endswith("--force-reinstall --no-deps .")


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
    assert message in problem and "pip install --force-reinstall" in problem
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
        ("Hopper", "8.0", True),  # who can tell
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
