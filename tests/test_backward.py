"""The backward pass against the oracle's explicit formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import (
    ACTIVATION_PARAMS,
    DTYPES,
    EXPANDED,
    LAYOUTS,
    MODES,
    PARAMETERS,
    Case,
    cases,
    check_backward,
    covering_cases,
)
from test_forward import PLANES, SHAPES, plan_cases

AXES = {
    "dtype": DTYPES,
    "layout": list(LAYOUTS),
    "activation": list(ACTIVATION_PARAMS),
    "residual": [None, "contiguous", "channels_last", "sliced"],
    "mode": MODES,
}
OTHERS: dict[str, list[Any]] = {
    "shape": list(SHAPES),
    "parameters": list(PARAMETERS),
    "grad_layout": [*LAYOUTS, *EXPANDED],
}


@pytest.mark.parametrize("case", covering_cases(AXES, 3, OTHERS), ids=str)
def test_any_choices(case: Case) -> None:
    check_backward(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [*range(1, 51), 196])
def test_every_plane_size(s: int, dtype: torch.dtype, layout: str) -> None:
    for n in (2, 7):
        for activation, residual in (("identity", None), ("relu", layout), ("silu", None)):
            check_backward(Case((n, 3, s), dtype, layout, activation, residual, seed=s))


@pytest.mark.parametrize("c", [*range(1, 34), 63, 64, 65, 127, 128, 129, 257])
def test_every_number_of_channels(c: int) -> None:
    for n in (2, 33, 70):
        for activation, residual in (("identity", None), ("relu6", "contiguous")):
            check_backward(Case((n, c), torch.float32, "contiguous", activation, residual, seed=c))
            check_backward(Case((n, c), torch.float16, "contiguous", activation, residual, seed=c))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 33, 63, 64, 65, 127, 128, 129, 200])
def test_every_batch_size(n: int) -> None:
    for shape in ((n, 3, 4), (n, 5, 3, 3), (n, 2, 67)):
        for layout in ("contiguous", "channels_last"):
            check_backward(Case(shape, torch.float32, layout, seed=n))


@pytest.mark.parametrize("case", plan_cases(), ids=str)
def test_every_plan(case: Case) -> None:
    check_backward(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_gradient_of_a_sum(activation: str, dtype: torch.dtype, layout: str) -> None:
    """y.sum().backward() sends one value, expanded: nothing but its strides is special."""
    case = Case((3, 5, 4, 3), dtype, layout, activation, "contiguous")
    gradients = []
    for send in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        data = case.data()
        leaves = [t.requires_grad_() for t in data.differentiable()]
        gradients.append(torch.autograd.grad(send(case.call(data)), leaves))
    for expanded, dense in zip(*gradients, strict=True):
        assert torch.equal(expanded, dense)


@pytest.mark.parametrize("case", PLANES, ids=str)
def test_planes_together(case: Case) -> None:
    check_backward(case)


@given(case=cases())
def test_any_case(case: Case) -> None:
    check_backward(case)
