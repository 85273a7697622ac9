"""The installed package: a wheel built from the source distribution, in an environment of its own.

The wheel is compiled from nothing, so a file that the source distribution lacks shows here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import batchnorm_ext

ROOT = Path(__file__).resolve().parent.parent

# Trains the same small net with both batch norms for one step and prints what was found.
TRAINING_STEP = """
import copy, json
import torch
import batchnorm_ext
from torch import nn

torch.manual_seed(0)
theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                       nn.Linear(8 * 36, 4))
ours = batchnorm_ext.convert_batchnorm(copy.deepcopy(theirs))
x, target = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
for net in (theirs, ours):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(net(x), target).backward()
    optimizer.step()
torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
print(json.dumps({"file": batchnorm_ext.__file__, "class": type(ours[1]).__module__}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without this checkout on any path; its output is shown if it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "BATCHNORM"))}
    environment["TORCH_CUDA_ARCH_LIST"] = "9.0"  # one is enough, where CUDA is built at all
    # What is fast is built in place; here, what is packed.
    environment["CXXFLAGS"] = "-O0 -DBATCHNORM_EXT_PORTABLE"
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # setuptools leaves its *.egg-info beside the sources; the list in an old one would be reused.
    folder = tmp_path_factory.mktemp("sdist")
    run(
        sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder,
        cwd=ROOT,
    )  # fmt: skip
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
        "--no-cache-dir", "-w", folder, sdist,
        cwd=folder,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with this wheel; torch is seen through a .pth file."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        wheel, cwd=folder,
    )  # fmt: skip
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "outer.pth").write_text("".join(f"{path}\n" for path in sorted(outer)))
    return python


def test_the_source_distribution_has_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed = {path.relative_to(ROOT).as_posix() for path in files}
    assert {Path(name).suffix for name in needed} == {".cpp", ".h", ".cu", ".cuh"}
    build = {path.name for path in ROOT.glob("setup*.py")}
    build |= {"pyproject.toml", "Makefile", ".ci/quietly"}
    assert needed | build <= names


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"batchnorm_ext/{path.name}" for path in (ROOT / "batchnorm_ext").glob("*.py*")}
    expected.add("batchnorm_ext/py.typed")
    expected.add(f"batchnorm_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert {"batchnorm_ext/_C.pyi", "batchnorm_ext/ops.py"} <= expected
    info = f"{wheel.name.partition('-cp')[0]}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}licenses/LICENSE" in names


def test_the_wheel_says_which_torch_it_is_for(sdist: Path, wheel: Path) -> None:
    version = batchnorm_ext.__version__
    assert sdist.name == f"batchnorm_ext-{version}.tar.gz"
    torch_version = torch.__version__.partition("+")[0]
    built_for = wheel.name.removeprefix(f"batchnorm_ext-{version}+torch{torch_version}.")
    assert re.match(r"(cpu|cu\d+)-cp3\d+-cp3\d+-linux_", built_for), wheel.name


def test_the_wheel_needs_torch_only(wheel: Path) -> None:
    info = f"{wheel.name.partition('-cp')[0]}.dist-info/METADATA"
    metadata = zipfile.ZipFile(wheel).read(info).decode()
    lines = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in lines if "extra ==" not in line] == ["Requires-Dist: torch>=2.11"]
    for extra in ("test", "bench", "docs", "dev", "cuda"):
        assert f"Provides-Extra: {extra}" in metadata


def test_one_training_step_with_the_installed_package(installed: Path, tmp_path: Path) -> None:
    found = json.loads(run(installed, "-I", "-c", TRAINING_STEP, cwd=tmp_path))
    assert Path(found["file"]).is_relative_to(installed.parent.parent)
    assert found["class"].startswith("batchnorm_ext.")


def test_the_report_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    report = json.loads(run(installed, "-I", "-m", "batchnorm_ext", "--json", cwd=tmp_path))
    assert report["version"] == batchnorm_ext.__version__
    assert Path(report["location"]).is_relative_to(installed.parent.parent)
    assert report["problems"] == []
