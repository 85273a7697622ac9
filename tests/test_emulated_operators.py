"""The Python tests once more, with the CUDA kernels behind the operators (tests/emulation).

A part of them, in a process of its own: `make test-emulated` runs the whole of the files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation.build import require_everything
from objects import Missing
from rotation import EMULATED, drawn

ROOT = Path(__file__).resolve().parent.parent
PARTS = [
    "test_cuda_plans.py test_sync_ops.py test_ops.py",
    "test_policies.py test_frozen.py test_module_tracing.py "
    "test_backward.py::test_any_choices test_backward.py::test_any_case",
    "test_cuda_plans.py test_accumulation.py test_fused_modules.py",
    "test_layouts.py test_modules.py "
    "test_forward.py::test_any_choices test_forward.py::test_any_case",
]

try:
    require_everything()
    MISSING = ""
except Missing as error:
    MISSING = f"THE CUDA KERNELS ARE NOT TESTED ON THE CPU: {error}"


@pytest.mark.skipif(
    os.environ.get("BATCHNORM_EXT_EMULATED_CUDA") == "1", reason="these tests are running already"
)
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(
    "tests", drawn(EMULATED, [[part] for part in PARTS]), ids=["first", "second", "third", "fourth"]
)
def test_the_python_tests_pass_on_the_cuda_kernels(tests: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [f"tests/{name}" for name in tests.split()],
        cwd=ROOT,
        env=os.environ | {"BATCHNORM_EXT_EMULATED_CUDA": "1", "HYPOTHESIS_MAX_EXAMPLES": "20"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(result.stdout[-8000:], result.stderr[-4000:])
    assert result.returncode == 0
