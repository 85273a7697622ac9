"""The device that calls run on: the GPU, or with BATCHNORM_EXT_EMULATED_CUDA=1 the emulated one.

Whoever imports this has torch and batchnorm_ext, with the CUDA kernels behind its operators.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from batchnorm_ext import _C
from benchmarks import environment, graphs
from benchmarks.gpu import emulated, missing

Calls = Sequence[Callable[[], object]]
#: Seconds of one call, of a set that was prepared.
Timed = Callable[[], float]


def limits_of(name: str) -> _C.CudaDevice | None:
    """Those of the device that the driver calls so, if plans are known for it."""
    words = re.split(r"[\s-]+", re.sub(r"rtx\s+", "rtx", name.lower()))
    known = _C.cuda_devices()
    return next((known[word] for word in words if word in known), None)


class Emulated:
    """CPU tensors; the clock is the host's. Its times tell nothing of a GPU's."""

    name = "cpu"
    cache_bytes = 1 << 20
    limits: _C.CudaDevice | None = None

    def describe(self) -> dict[str, Any]:
        """For the journal."""
        return {"name": "emulated", "torch": torch.__version__}

    def synchronize(self) -> None:
        """Calls are over when they return."""

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        """Nothing."""
        return contextlib.nullcontext()

    def prepare(self, calls: Calls) -> Timed:
        """A loop."""

        def run() -> float:
            begin = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin) / len(calls)

        return run


class Gpu:
    """The current CUDA device; calls are timed by its events, in a graph."""

    name = "cuda"

    def __init__(self) -> None:
        self.cache_bytes = environment.cache_bytes("cuda")
        self.limits = limits_of(torch.cuda.get_device_name())

    def describe(self) -> dict[str, Any]:
        """For the journal."""
        return {**environment.gpu_fields(), "torch": torch.__version__, "build": _C.build_info()}

    def synchronize(self) -> None:
        """Raises where a call went wrong."""
        torch.cuda.synchronize()

    def at_work(self) -> contextlib.AbstractContextManager[object]:
        """The stream that graphs are captured on."""
        return torch.cuda.stream(graphs.stream())

    def prepare(self, calls: Calls) -> Timed:
        """A graph of them, after a first call of each."""
        replay, count = graphs.capture(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run() -> float:
            begin.record()
            replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3 / count

        return run


def here() -> Emulated | Gpu:
    """The device; a step that needs what is not there ends."""
    if emulated.WANTED:
        emulated.use()
        return Emulated()
    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.version.cuda else "is a build without CUDA"
        missing.leave(f"torch {torch.__version__} {why}")
    if not _C.build_info()["cuda"]:
        missing.leave("batchnorm_ext was built without CUDA")
    return Gpu()


@contextlib.contextmanager
def forced(fields: dict[str, Any]) -> Iterator[None]:
    """The CUDA plans' fields for the calls inside."""
    _C.force_cuda_plan(**fields)
    try:
        yield
    finally:
        _C.force_cuda_plan()
