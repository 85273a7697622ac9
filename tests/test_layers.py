"""The allowed directions: core <- cpu, cuda <- bindings, and modules -> functional -> ops -> _C.

Reads the #include lines and the import statements; nothing is compiled or imported.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each folder of csrc/ may include from.
CSRC_LAYERS = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "bindings": {"core", "cpu", "cuda", "bindings"},
}
# Folders of system headers (<torch/...>, <cub/...>) and single headers by prefix.
SYSTEM_FOLDERS = {
    "core": set[str](),
    "cpu": {"sys"},
    "cuda": {"cooperative_groups", "cuda", "nv", "cub"},
    "bindings": {"torch", "ATen", "c10", "pybind11", "cuda", "sys"},
}
CUDA_HEADER = re.compile(
    r"^(cuda|driver_types|vector_types|cooperative_groups|device_)\w*\.(h|hpp)$"
)
SOURCE_SUFFIXES = {".h", ".hpp", ".cpp", ".cu", ".cuh", ".inc"}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.MULTILINE)

# What each module of the package may import from the package. A new module gets its line here.
PACKAGE_LAYERS = {
    "_version": set[str](),
    "inductor": set[str](),
    "ops": {"_C", "_version", "inductor"},
    "functional": {"ops"},
    "export": {"functional", "ops"},
    "policies": set[str](),
    "memory": {"ops"},
    "accumulator": set[str](),
    "modules": {"accumulator", "functional", "policies"},
    "control": {"accumulator", "modules"},
    "synchronized": {"functional", "ops"},
    "sync_modules": {"functional", "modules", "synchronized"},
    "convert": {"modules", "policies", "sync_modules"},
    "trace": set[str](),
    "joined": {"functional", "modules", "trace"},
    "sites": {"convert", "joined", "modules", "trace"},
    "fuse": {"convert", "joined", "progress", "sites", "trace"},
    "progress": set[str](),
    "table": set[str](),
    "turns": set[str](),
    "trial": set[str](),
    "comparison": {"fuse", "table", "turns"},
    "comparing": {
        "comparison",
        "convert",
        "fuse",
        "modules",
        "progress",
        "table",
        "trial",
        "turns",
    },
    "reference": set[str](),
    "__init__": {
        "_version",
        "ops",
        "export",
        "functional",
        "memory",
        "policies",
        "modules",
        "comparing",
        "comparison",
        "control",
        "convert",
        "fuse",
        "sync_modules",
    },
    "plan": {"_C"},
    "compare_command": {"comparing", "table", "trial"},
    "__main__": {"__init__", "_C", "_version", "compare_command", "plan"},
}
# The one run-time dependency.
FOREIGN = {"torch"}


def include_violations(csrc: Path) -> list[str]:
    """Every include below `csrc` that goes against CSRC_LAYERS or SYSTEM_FOLDERS."""
    found = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        layer = path.relative_to(csrc).parts[0]
        if layer not in CSRC_LAYERS:
            found.append(f"{path.relative_to(csrc)}: the folder {layer} has no place in the layers")
            continue
        for bracket, name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            problem = (
                _project_include(csrc, layer, name)
                if bracket == '"'
                else _system_include(layer, name)
            )
            if problem:
                found.append(f"{path.relative_to(csrc)}: {name}: {problem}")
    return found


def _project_include(csrc: Path, layer: str, name: str) -> str | None:
    if not (csrc / name).is_file() or ".." in Path(name).parts:
        return "quoted includes are paths below csrc/"
    if Path(name).parts[0] not in CSRC_LAYERS[layer]:
        return f"{layer} may include from {sorted(CSRC_LAYERS[layer])} only"
    return None


def _system_include(layer: str, name: str) -> str | None:
    folder = name.rpartition("/")[0].partition("/")[0]
    if folder and folder not in SYSTEM_FOLDERS[layer]:
        return f"{layer} may not include headers of {folder}"
    if name in ("Python.h", "pybind11.h") and layer != "bindings":
        return "only bindings knows Python"
    if CUDA_HEADER.match(name) and layer in ("core", "cpu"):
        return f"{layer} may not include CUDA headers"
    return None


def import_violations(package: Path) -> list[str]:
    """Every import in `package` that goes against PACKAGE_LAYERS, or of a foreign package."""
    found = []
    for path in sorted(package.glob("**/*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        if module not in PACKAGE_LAYERS:
            found.append(f"{module}: has no place in PACKAGE_LAYERS")
            continue
        for target in _imports(ast.parse(path.read_text(encoding="utf-8")), package):
            inside, _, name = target.partition(":")
            if inside == "package" and name not in PACKAGE_LAYERS[module]:
                found.append(f"{module} imports {name}, allowed: {sorted(PACKAGE_LAYERS[module])}")
            if inside == "foreign" and name not in FOREIGN and name not in sys.stdlib_module_names:
                found.append(f"{module} imports {name}, which no installation brings")
    return found


def _imports(tree: ast.AST, package: Path) -> list[str]:
    """Imports as `package:ops` or `foreign:torch`, wherever in the file they stand."""
    targets: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{package.name}.{node.module}" if node.module else package.name
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        targets += [_target(name, package) for name in names]
    return targets


def _target(name: str, package: Path) -> str:
    parts = name.split(".")
    if parts[0] != package.name:
        return f"foreign:{parts[0]}"
    known = len(parts) > 1 and (parts[1] in PACKAGE_LAYERS or parts[1] == "_C")
    return f"package:{parts[1] if known else '__init__'}"


def test_includes_go_the_allowed_way() -> None:
    files = list((ROOT / "csrc").rglob("*.cpp"))
    assert files, "no sources found: this test reads nothing"
    assert include_violations(ROOT / "csrc") == []


def test_imports_go_the_allowed_way() -> None:
    assert (ROOT / "batchnorm_ext" / "modules.py").is_file()
    assert import_violations(ROOT / "batchnorm_ext") == []


@pytest.mark.parametrize(
    ("path", "line", "allowed"),
    [
        ("core/a.h", "#include <cstdint>", True),
        ("core/a.h", "#include <torch/library.h>", False),
        ("core/a.h", "#  include <cuda_runtime.h>", False),
        ("core/a.h", '#include "cpu/b.h"', False),
        ("cpu/b.cpp", '#include "core/here.h"', True),
        ("cpu/b.cpp", '#include "bindings/here.h"', False),
        ("cpu/b.cpp", "#include <ATen/ATen.h>", False),
        ("cpu/b.cpp", "#include <immintrin.h>", True),
        ("cpu/b.cpp", '#include "missing.h"', False),
        ("cpu/simd/b.cpp", '#include "cuda/here.h"', False),
        ("cuda/c.cu", "#include <cuda_fp16.h>", True),
        ("cuda/c.cu", "#include <c10/cuda/CUDAStream.h>", False),
        ("cuda/c.cu", '#include "cpu/here.h"', False),
        ("bindings/d.cpp", "#include <torch/library.h>", True),
        ("bindings/d.cpp", '#include "cuda/here.h"', True),
        ("other/e.cpp", "#include <cstdint>", False),
    ],
)
def test_include_rules(tmp_path: Path, path: str, line: str, allowed: bool) -> None:
    for folder in CSRC_LAYERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "here.h").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(f"#pragma once\n{line}\n")
    assert (include_violations(tmp_path) == []) is allowed


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("modules", "from .functional import batch_norm", True),
        ("modules", "from . import functional", True),
        ("modules", "from .ops import forward_train", False),
        ("modules", "import batchnorm_ext._C", False),
        ("modules", "import numpy", False),
        ("functional", "from batchnorm_ext.modules import BatchNorm1d", False),
        ("functional", "from batchnorm_ext import batch_norm", False),
        ("functional", "def late():\n    from . import modules", False),
        ("ops", "from . import _C", True),
        ("ops", "from .functional import batch_norm", False),
        ("reference", "import torch.nn.functional as F", True),
        ("reference", "from .functional import batch_norm", False),
        ("unheard_of", "import torch", False),
    ],
)
def test_import_rules(tmp_path: Path, module: str, line: str, allowed: bool) -> None:
    package = tmp_path / "batchnorm_ext"
    package.mkdir()
    (package / f"{module}.py").write_text(line + "\n")
    assert (import_violations(package) == []) is allowed
