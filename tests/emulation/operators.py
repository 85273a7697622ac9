"""Puts the CUDA kernels, on the emulated device, behind the operators for CPU tensors.

Only for this process, and for the rest of it: what `import torch_emulated` registers stays.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from batchnorm_ext import _C, ops

from .build import CACHE, HERE, ROOT, build

CSRC = ROOT / "csrc"
#: What knows torch, and is compiled with its headers.
BINDINGS = HERE / "torch_emulated.cpp"


def build_module() -> Path:
    """The Python module torch_emulated, for this Python and this torch."""
    kernels = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "core" / "plan_cuda.cpp"]
    includes = [*include_paths(), sysconfig.get_path("include")]
    # Objects for another torch have other commands, so other names.
    flags = [f"-DBUILT_FOR_TORCH={torch.__version__}", "-O0", "-g0"]
    flags += [word for path in includes for word in ("-isystem", path)]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    name = f"torch_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build(
        "plain",
        [BINDINGS, *kernels],
        CACHE / "plain" / torch.__version__ / name,
        compile_args_of={BINDINGS: flags},
        link_args=libraries,
    )


def use_emulated_cuda() -> Any:
    """Loads it, and lets `_C`'s CUDA plans be those that its calls follow. Returns the module."""
    path = build_module()
    loader = importlib.machinery.ExtensionFileLoader("torch_emulated", str(path))
    spec = importlib.util.spec_from_loader("torch_emulated", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["torch_emulated"] = module
    ops._is_host_memory = lambda tensor: False  # what is emulated is a device's
    vars(_C).update(plan_cuda=module.plan_cuda, force_cuda_plan=module.force_cuda_plan)
    return module
