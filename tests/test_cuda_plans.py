"""The CUDA kernels under plans that the planner would not choose for tensors as small as these.

Runs where there are CUDA kernels: on the emulated device (`make test-emulated`) or on a GPU
(`make gpu-check`).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from strategies import (
    ACTIVATION_PARAMS,
    DTYPES,
    EMULATED,
    EMULATED_DEVICES,
    HAS_CUDA_KERNELS,
    MODES,
    Case,
    check_backward,
    check_forward,
    covering,
    emulated_device,
    forced_cuda_plan,
)

if not HAS_CUDA_KERNELS:
    pytest.skip(
        "no CUDA kernels here: make test-emulated runs them on the emulated device",
        allow_module_level=True,
    )

PLAN: dict[str, list[Any]] = {
    "strategy": [None, "block", "cluster", "grid", "two_kernels"],
    "access": [None, "scalar"],
    "team": [None, 1, 2, 3, 5],
    "slots": [None, 0, 1, 3],
    "unit_channels": [None, 8, 24, 64],
    "units_at_once": [None, 1, 2],
    "stream_stores": [None, True],
}
#: Any three of these and the plan's fields ...
CUT: dict[str, list[Any]] = {
    **PLAN,
    "device": list(EMULATED_DEVICES),
    # Whole vectors and tails, planes in groups and alone, more cells than there are threads.
    "shape": [(9, 5), (70, 40), (300, 3), (5, 264), (9, 5, 7), (17, 16, 4, 4), (3, 4, 600),
              (2, 3, 2311), (3, 1, 150), (40, 8, 7, 7)],
    "layout": ["contiguous", "channels_last", "unaligned"],
}  # fmt: skip
#: ... and any two of all.
OTHERS: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "activation": list(ACTIVATION_PARAMS),
    "residual": [None, "contiguous"],
    "mode": list(MODES),
}


def rows() -> list[dict[str, Any]]:
    generator = random.Random(3)
    some = covering(CUT, 3, seed=2)
    for row in some:
        row.update({name: generator.choice(values) for name, values in OTHERS.items()})
    return some + covering({**CUT, **OTHERS}, 2, seed=4)


def name_of(row: dict[str, Any]) -> str:
    return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in row.values())


ROWS = rows()


def run(check: Any, row: dict[str, Any], seed: int) -> None:
    plan = {name: row[name] for name in PLAN}
    rest = {name: value for name, value in row.items() if name not in PLAN and name != "device"}
    with emulated_device(row["device"]), forced_cuda_plan(**plan):
        check(Case(**rest, seed=seed))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_forward_by_any_plan(row: dict[str, Any]) -> None:
    run(check_forward, row, 1)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_backward_by_any_plan(row: dict[str, Any]) -> None:
    run(check_backward, row, 2)


@pytest.mark.parametrize("strategy", PLAN["strategy"])
@pytest.mark.parametrize("shape", [(70, 40), (9, 5, 7), (3, 4, 600)], ids=str)
def test_a_mean_over_all_batches(shape: tuple[int, ...], strategy: str | None) -> None:
    """momentum=None: every block reads the counter that one of them writes."""
    x = Case(shape).data().input
    ours = torch.ops.batchnorm_ext.forward_train.default
    mean, var = x.new_zeros(shape[1]), x.new_ones(shape[1])
    count = torch.tensor(2, device=x.device)
    with forced_cuda_plan(strategy=strategy):
        ours(x, None, None, None, mean, var, count, None, 1e-5, "identity", 0.0, False)
    batch = x.double().movedim(1, 0).flatten(1)
    assert int(count) == 3
    torch.testing.assert_close(mean.double(), batch.mean(1) / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), (2 + batch.var(1)) / 3, rtol=1e-5, atol=1e-6)


# ---- devices that are not what their limits say -------------------------------------------------

emulated_only = pytest.mark.skipif(EMULATED is None, reason="a real device is what it is")
#: Kernels with so many registers that one block of 256 threads fits on a multiprocessor.
MANY_REGISTERS = 192


def both_directions(shape: tuple[int, ...] = (300, 40, 3)) -> None:
    check_forward(Case(shape, seed=5))
    check_backward(Case(shape, seed=6))


@emulated_only
@pytest.mark.parametrize("strategy", [None, "cluster"])
def test_code_for_an_older_device_has_no_clusters(strategy: str | None) -> None:
    """What 9.0 compiles of PTX for 8.0 has no cluster's barrier: each block would be alone."""
    with emulated_device("hopper"):
        assert EMULATED.max_cluster() == 8
    with emulated_device("hopper", code=80), forced_cuda_plan(strategy=strategy):
        assert EMULATED.max_cluster() == 1
        both_directions()


@emulated_only
def test_as_many_blocks_are_launched_as_fit() -> None:
    with emulated_device("hopper", registers=MANY_REGISTERS), forced_cuda_plan(strategy="grid"):
        before = EMULATED.counts()
        both_directions()
        assert EMULATED.counts()["launches"] > before["launches"]
        assert EMULATED.counts()["refusals"] == before["refusals"]


@emulated_only
def test_a_refused_launch_is_planned_again_once() -> None:
    """Seven of eight multiprocessors are another process's, which no occupancy tells."""
    with emulated_device("hopper", held=7), forced_cuda_plan(strategy="grid"):
        before = EMULATED.counts()["refusals"]
        both_directions()
        refused = EMULATED.counts()["refusals"]
        assert refused == before + 2  # one for each kernel
        both_directions()
        assert EMULATED.counts()["refusals"] == refused


@emulated_only
@pytest.mark.parametrize("team", [3, 5, 6, 7])
def test_a_cluster_that_the_device_does_not_take(team: int) -> None:
    forced = forced_cuda_plan(strategy="cluster", team=team)
    with emulated_device("hopper", odd_clusters=False), forced:
        both_directions()


@emulated_only
def test_the_driver_is_asked_at_a_kernels_first_call() -> None:
    """Nothing is set for a call either: another host thread's could come in between."""
    with emulated_device("hopper"), forced_cuda_plan(strategy="block"):
        both_directions()
        before = EMULATED.counts()["questions"]
        both_directions()
        both_directions((3000, 40, 3))  # with more shared memory
        assert EMULATED.counts()["questions"] == before
