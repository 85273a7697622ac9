"""What all tests share: threads, hypothesis' profile, a clean plan after each test.

BATCHNORM_EXT_EMULATED_CUDA=1 runs the tests on the CUDA kernels, on the emulated device, instead of
the CPU's (`make test-emulated`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from emulation.build import CompileError, Missing
from emulation.operators import use_emulated_cuda
from hypothesis import HealthCheck, settings

# The same examples on every run, and no deadline on a machine that others use too.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    # What inductor kept from another run tells nothing of what it makes of this package now.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # for processes that tests start
    torch._inductor.config.force_disable_caches = True
    if "TORCH_TRACE" not in os.environ:
        # The compiler's structured trace has no readable text; it would bury a failure's own.
        logging.getLogger("torch.__trace").addFilter(lambda record: False)
    if os.environ.get("BATCHNORM_EXT_EMULATED_CUDA") == "1":
        try:
            use_emulated_cuda()
        except (Missing, CompileError) as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Global state that a failing test could leave changed."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """One thread for this test."""
    torch.set_num_threads(1)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """For tests that ask for what is exact; rounding is the subject of others."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)
