"""The same bits on every run; the same numbers with any threads and any instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from strategies import (
    ACTIVATION_PARAMS,
    DTYPES,
    Case,
    available_capabilities,
    check_backward,
    check_forward,
    covering_cases,
    cpu_capability,
    forced_plan,
)
from torch import Tensor

from batchnorm_ext import _C

pytestmark = pytest.mark.usefixtures("two_threads")

AXES: dict[str, Any] = {
    "shape": [(700, 65), (5000, 3), (9, 17, 30, 5), (2, 3, 4001), (64, 33, 7, 7), (3, 2049)],
    "dtype": DTYPES,
    "layout": ["contiguous", "channels_last"],
    "activation": list(ACTIVATION_PARAMS),
    "residual": [None, "contiguous"],
    "mode": ["train", "eval"],
}
CASES = covering_cases(AXES, 2)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(case: Case) -> list[Tensor]:
    """Output, gradients, buffers."""
    data = case.data()
    leaves = [t.requires_grad_() for t in data.differentiable()]
    y = case.call(data)
    gradients = torch.autograd.grad(y, leaves, data.grad_output)
    buffers = [b for b in (data.running_mean, data.running_var) if b is not None]
    return [y.detach(), *gradients, *buffers]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_run_is_the_same(case: Case) -> None:
    """Bit for bit, with the planner's threads and with two forced on small tensors."""
    for plan in ({}, {"threads": 2, "cooperative": True}, {"threads": 2, "cooperative": False}):
        with forced_plan(**plan):
            first = results(case)
            for _ in range(3):
                for a, b in zip(results(case), first, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_is_the_same_at_full_size(dtype: torch.dtype) -> None:
    """Large enough for all threads without being told."""
    for layout in ("contiguous", "channels_last"):
        case = Case((16, 64, 28, 28), dtype, layout, "relu", "contiguous")
        first = results(case)
        for _ in range(4):
            for a, b in zip(results(case), first, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_thread_counts(case: Case, count: int) -> None:
    """Each within the oracle's bounds; the parts are forced, since the tensors are small."""
    plan = (("threads", count), ("cooperative", True))
    forced = replace(case, plan=plan)
    with threads(count):
        check_forward(forced)
        check_backward(forced)


def test_number_of_threads_is_torchs() -> None:
    """torch.set_num_threads holds, and elementwise results don't depend on it."""
    case = Case((16, 64, 28, 28), activation="silu", mode="eval")
    outputs = []
    for count in (1, 2):
        with threads(count):
            outputs.append(results(case)[:2])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", available_capabilities())
@pytest.mark.parametrize("case", covering_cases({**AXES, "mode": ["train"]}, 2), ids=str)
def test_instruction_sets(case: Case, capability: str) -> None:
    """Each against the oracle."""
    with cpu_capability(capability):
        check_forward(case)
        check_backward(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets_against_each_other(case: Case) -> None:
    """Vectors have the same 64 bytes everywhere, so only fused multiply-adds may differ: results
    are as close as two roundings of z allow."""
    data = case.data()
    oracle = case.oracle(data)
    bounds = case.bounds(data, oracle)
    outputs = {}
    for capability in available_capabilities():
        with cpu_capability(capability):
            outputs[capability] = results(case)[0].double()
    plainest = outputs.pop("portable")
    for other in outputs.values():
        tolerances.assert_within(other, plainest, 2.0 * bounds.output, "output")
        assert torch.equal(other, outputs["avx2"])  # all have fused multiply-adds


@pytest.mark.parametrize("capability", available_capabilities())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_past_the_caches(dtype: torch.dtype, capability: str) -> None:
    """Of every width: the same bits as ordinary ones, on planes that begin at whole vectors."""
    case = Case((3, 5, 8, 24), dtype, "contiguous", "relu", "contiguous")
    with cpu_capability(capability):
        ordinary, streamed = (results(replace(case, plan=(("stream", s),))) for s in (False, True))
    for a, b in zip(streamed, ordinary, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", available_capabilities())
def test_capability_is_the_one_that_was_set(capability: str) -> None:
    with cpu_capability(capability):
        assert _C.cpu_capability() == capability


def test_unknown_capability() -> None:
    before = _C.cpu_capability()
    with pytest.raises((ValueError, RuntimeError), match="sse9"):
        _C.set_cpu_capability("sse9")
    assert _C.cpu_capability() == before


@pytest.mark.parametrize(("name", "works"), [("portable", True), ("sse9", False)])
def test_capability_from_the_environment(name: str, works: bool) -> None:
    """BATCHNORM_EXT_CPU is read at import; a wrong one is an error, not a surprise."""
    code = "from batchnorm_ext import _C, ops; print(_C.cpu_capability())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BATCHNORM_EXT_CPU": name},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode == 0) == works
    assert name in (found.stdout if works else found.stderr)


def test_python_threads() -> None:
    """Calls side by side, as DataParallel and servers make them, share no scratch memory."""
    cases = [replace(case, seed=i) for i, case in enumerate(CASES[:: len(CASES) // 8])]
    expected = [results(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(results, cases), expected, strict=True):
                for a, b in zip(got, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)  # other thread counts
