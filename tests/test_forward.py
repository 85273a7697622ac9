"""The forward pass against the float64 oracle, over everything that a call can combine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import (
    ACTIVATION_PARAMS,
    BUFFERS,
    DTYPES,
    LAYOUTS,
    MODES,
    PARAMETERS,
    Case,
    cases,
    check_forward,
    covering,
    covering_cases,
)

#: All ranks; odd and even sizes; planes of 1, of less and more than a vector; few, many channels.
SHAPES = [
    (2, 1),
    (7, 3),
    (33, 17),
    (128, 65),
    (2, 257),
    (2, 3, 5),
    (1, 3, 49),
    (33, 1, 3),
    (7, 65, 31),
    (128, 3, 7),
    (2, 3, 5, 7),
    (7, 17, 7, 7),
    (1, 3, 14, 14),
    (33, 3, 1, 1),
    (2, 257, 1, 3),
    (2, 3, 3, 5, 2),
    (3, 17, 2, 1, 3),
]
#: Any three of these ...
AXES = {
    "dtype": DTYPES,
    "layout": list(LAYOUTS),
    "activation": list(ACTIVATION_PARAMS),
    "residual": [None, "contiguous", "channels_last", "sliced"],
    "mode": MODES,
}
#: ... and any two of all.
OTHERS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "parameters": list(PARAMETERS),
    "buffers": list(BUFFERS),
}


@pytest.mark.parametrize("case", covering_cases(AXES, 3, OTHERS), ids=str)
def test_any_choices(case: Case) -> None:
    check_forward(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [*range(1, 51), 196])
def test_every_plane_size(s: int, dtype: torch.dtype, layout: str) -> None:
    for n in (2, 7):
        for activation, residual in (("identity", None), ("relu", layout), ("silu", None)):
            check_forward(Case((n, 3, s), dtype, layout, activation, residual, seed=s))


@pytest.mark.parametrize("c", [*range(1, 34), 63, 64, 65, 127, 128, 129, 257])
def test_every_number_of_channels(c: int) -> None:
    for n in (2, 33, 70):
        for activation, residual in (("identity", None), ("relu6", "contiguous")):
            check_forward(Case((n, c), torch.float32, "contiguous", activation, residual, seed=c))
            check_forward(Case((n, c), torch.float16, "contiguous", activation, residual, seed=c))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 33, 63, 64, 65, 127, 128, 129, 200])
def test_every_batch_size(n: int) -> None:
    for shape in ((n, 3, 4), (n, 5, 3, 3), (n, 2, 67)):
        for layout in ("contiguous", "channels_last"):
            check_forward(Case(shape, torch.float32, layout, seed=n))


PLAN_AXES: dict[str, list[Any]] = {
    "shape": [(9, 5), (70, 33), (300, 3), (9, 5, 7), (17, 9, 3, 3), (2, 3, 200), (3, 1, 150)],
    "layout": ["contiguous", "channels_last"],
    "dtype": list(DTYPES),
    "activation": ["identity", "relu", "leaky_relu", "gelu"],
    "residual": [None, "contiguous"],
    "mode": list(MODES),
    "scheme": [None, "planes", "expanded"],
    "cooperative": [None, False, True],
    "stream": [None, False, True],
    "threads": [None, 1, 2, 3],
    "unit_channels": [None, 1, 2, 8, 64],
    "fold": [None, 1, 2, 5],
    "group_rows": [None, 1, 3, 64],
}


def plan_cases() -> list[Case]:
    fields = ("scheme", "cooperative", "stream", "threads", "unit_channels", "fold", "group_rows")
    made = []
    for i, row in enumerate(covering(PLAN_AXES, 2, seed=1)):
        plan = tuple((name, row[name]) for name in fields if row[name] is not None)
        rest = {name: value for name, value in row.items() if name not in fields}
        made.append(Case(**rest, plan=plan, seed=i))
    return made


@pytest.mark.parametrize("case", plan_cases(), ids=str)
def test_every_plan(case: Case) -> None:
    """The work may be cut in any way that the planner knows, whatever it would choose itself."""
    check_forward(case)


#: Planes that are walked together: short ones, with a mask that lies across them, and ones that are
#: longer than a reduction takes at once.
PLANES = [
    Case(shape, dtype, "contiguous", activation, residual, plan=plan, seed=i)
    for i, (shape, dtype, (activation, residual), plan) in enumerate(
        itertools.product(
            [(17, 27, 7, 7), (16, 19, 14, 14), (15, 27, 7, 7), (2, 11, 71, 73)],
            [torch.float32, torch.bfloat16],
            [("identity", None), ("relu", "contiguous"), ("gelu", "contiguous")],
            [(), (("threads", 2), ("unit_channels", 8)), (("threads", 3), ("cooperative", True))],
        )
    )
]


@pytest.mark.parametrize("case", PLANES, ids=str)
def test_planes_together(case: Case) -> None:
    check_forward(case)


@given(case=cases())
def test_any_case(case: Case) -> None:
    check_forward(case)
