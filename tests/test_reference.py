"""The oracle itself, against torch's own float64 operators and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import ACTIVATION_PARAMS
from torch import Tensor
from torch.nn import functional as F

from batchnorm_ext import functional, reference

TORCHS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, _: F.hardswish(z),
}
SHAPES = [(5, 3), (1, 2, 7), (4, 1, 3), (2, 3, 4, 5), (2, 2, 3, 1, 2)]
#: Two float64 computations of the same formula; the tensors are of size one and small.
SAME: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_names_are_those_of_the_operators() -> None:
    assert tuple(reference.ACTIVATIONS) == functional.ACTIVATIONS
    assert set(TORCHS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_and_derivative(name: str) -> None:
    param = ACTIVATION_PARAMS[name]
    grid = [-40.0, -8.0, -6.0, -3.0, -1e-9, 0.0, 1e-9, 3.0, 6.0, 8.0, 40.0]
    z = torch.cat([torch.linspace(-9, 9, 1001, dtype=torch.float64), torch.tensor(grid).double()])
    z.requires_grad_()
    expected = TORCHS[name](z, param)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    activation = reference.ACTIVATIONS[name]
    torch.testing.assert_close(activation.function(z.detach(), param), expected.detach(), **SAME)
    torch.testing.assert_close(activation.derivative(z.detach(), param), slope, **SAME)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardswish"])
def test_derivative_at_kinks_is_torchs(name: str) -> None:
    param = ACTIVATION_PARAMS[name]
    z = torch.tensor([-3.0, 0.0, -0.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(TORCHS[name](z, param).sum(), z)
    ours = reference.ACTIVATIONS[name].derivative(z.detach(), param)
    assert torch.equal(ours, slope)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_nan_goes_through(name: str) -> None:
    value = reference.ACTIVATIONS[name].function(torch.tensor([math.nan]).double(), 0.5)
    assert value.isnan().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_forward_and_backward(name: str, shape: tuple[int, ...], training: bool) -> None:
    """Output and all four gradients of the composed torch operators, by autograd."""
    param, c = ACTIVATION_PARAMS[name], shape[1]
    x, residual = _double(*shape).requires_grad_(), _double(*shape).requires_grad_()
    weight, bias = _double(c).requires_grad_(), _double(c).requires_grad_()
    mean, var, dy = _double(c), _double(c).square() + 0.5, _double(*shape)
    m, v = (None, None) if training else (mean, var)
    z = F.batch_norm(x, m, v, weight, bias, training, 0.1, 1e-3) + residual
    expected = TORCHS[name](z, param)
    expected_gradients = torch.autograd.grad(expected, [x, residual, weight, bias], dy)
    settings: dict[str, Any] = {"training": training, "activation": name, "activation_param": param}
    ours = reference.forward(
        x, weight, bias, residual=residual, running_mean=mean, running_var=var, eps=1e-3, **settings
    )
    torch.testing.assert_close(ours.output, expected.detach(), **SAME)
    gradients = reference.backward(
        dy, x, weight, ours.mean, ours.invstd, ours.pre_activation, **settings
    )
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, **SAME)


def test_without_parameters() -> None:
    x, dy = _double(4, 3, 5).requires_grad_(), _double(4, 3, 5)
    expected = F.batch_norm(x, None, None, training=True)
    (wanted,) = torch.autograd.grad(expected, x, dy)
    ours = reference.forward(x, training=True)
    torch.testing.assert_close(ours.output, expected.detach(), **SAME)
    got = reference.backward(
        dy, x, None, ours.mean, ours.invstd, ours.pre_activation, training=True
    )
    torch.testing.assert_close(got.input, wanted, **SAME)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_running_statistics(momentum: float | None) -> None:
    """Two steps of torch's own module."""
    module = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    mean, var = torch.zeros(3), torch.ones(3)
    for step in (1, 2):
        x = _double(5, 3, 2) * step + 1
        module(x)
        mean, var = reference.update_running_statistics(
            mean, var, *reference.batch_statistics(x), 10, momentum, step
        )
    torch.testing.assert_close(mean, module.running_mean, **SAME)
    torch.testing.assert_close(var, module.running_var, **SAME)


def test_running_statistics_of_nothing() -> None:
    mean, var = torch.tensor([1.0]), torch.tensor([2.0])
    nan = torch.tensor([math.nan])
    new = reference.update_running_statistics(mean, var, nan, nan, 0, 0.1)
    assert torch.equal(new[0], mean.double()) and torch.equal(new[1], var.double())
    kept = reference.update_running_statistics(mean, var, mean, var, 5, None, None)
    assert torch.equal(kept[0], mean.double()) and torch.equal(kept[1], var.double())


@pytest.mark.parametrize("value", [0.1, 1e-30, 7e37, -3.3333])
@pytest.mark.parametrize("n", [2, 3, 49, 1001])
def test_statistics_of_a_constant_are_exact(value: float, n: int) -> None:
    x = torch.full((n, 2), value, dtype=torch.float32)
    mean, var = reference.batch_statistics(x)
    assert torch.equal(mean, x[0].double())
    assert torch.equal(var, torch.zeros(2, dtype=torch.float64))


def test_statistics_far_from_zero() -> None:
    """|mean| / std = 1e10: integers, so that the true statistics are known exactly."""
    x = torch.arange(101, dtype=torch.float64) + 1e12
    mean, var = reference.batch_statistics(x.view(101, 1))
    assert mean.item() == 1e12 + 50
    assert var.item() == 850.0  # (101^2 - 1) / 12


def test_evaluation_needs_statistics() -> None:
    with pytest.raises(ValueError, match="running_mean"):
        reference.forward(torch.zeros(2, 3), training=False)
