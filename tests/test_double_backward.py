"""Second derivatives and higher: backward with create_graph=True, and backward through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from calls import BOTH, NAMES, Statistics, composed, double, ours
from strategies import DTYPES, LAYOUTS
from torch import Tensor
from torch.nn import functional as F

import batchnorm_ext as bx
from batchnorm_ext import BatchNormAct1d, batch_norm


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_torchs(name: str, training: bool, layout: str) -> None:
    """The gradient of a penalty on the gradient, with respect to everything, dy too."""
    shape, c = (4, 3, 5), 3
    x = LAYOUTS[layout](double(*shape)).requires_grad_()
    leaves = [x, double(*shape), double(c), double(c), double(*shape)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    statistics: Statistics = (None, None) if training else (double(c), double(c).square() + 0.5)
    results = []
    for function in (ours, composed):
        x, residual, weight, bias, dy = leaves
        y = function(x, *statistics, weight, bias, training, residual=residual, name=name)
        first = torch.autograd.grad(y, leaves[:4], dy, create_graph=True)
        penalty = sum(g.square().sum() for g in first) + y.sum()
        results.append([*first, *torch.autograd.grad(penalty, leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_create_graph_changes_no_gradient(name: str, dtype: torch.dtype) -> None:
    """The differentiable formula and the kernel agree to the rounding of the dtype."""
    shape, c = (4, 3, 5), 3
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    weight, bias = torch.rand(c) + 0.5, torch.randn(c)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y = ours(x, None, None, weight, bias, True, residual=residual, name=name)
    kernel = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    formula = torch.autograd.grad(y, leaves, dy, create_graph=True)
    eps = 4 * torch.finfo(dtype).eps
    for got, wanted in zip(formula, kernel, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=max(eps, 1e-5), atol=max(eps, 1e-5))


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5])
def test_create_graph_far_from_zero(ratio: float) -> None:
    """|mean| / std in float32: the differentiable formula needs the statistics as exactly."""
    x = (torch.randn(64, 3, 5) + ratio).requires_grad_()
    dy = torch.randn(64, 3, 5)
    y = batch_norm(x, None, None, training=True)
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (got,) = torch.autograd.grad(y, x, dy, create_graph=True)
    z = F.batch_norm(x, None, None, training=True)
    (torchs,) = torch.autograd.grad(z, x, dy, create_graph=True)
    error = float((got - expected).detach().abs().max())
    assert error <= max(float((torchs - expected).detach().abs().max()), 1e-5)


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_create_graph_takes_the_same_mask(name: str, residual: bool, layout: str) -> None:
    """Where z is 0 but for rounding, both backward passes must decide alike."""
    x = LAYOUTS[layout](torch.full((37, 3, 11), 0.1) + torch.tensor([0.0, 1e3, -7.0])[:, None])
    x.requires_grad_()
    bias = torch.tensor([0.0, 0.0, 6.0])
    added = torch.zeros(x.shape, requires_grad=True) if residual else None
    y = ours(x, None, None, None, bias, True, residual=added, name=name)
    leaves = [x, added] if added is not None else [x]
    dy = torch.ones_like(y)
    kernel = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    formula = torch.autograd.grad(y, leaves, dy, create_graph=True)
    for got, wanted in zip(formula, kernel, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_penalties_on_all_gradients(batched: bool, training: bool) -> None:
    """Of the parameters', too: third derivatives, or the second ones of a batch of gradients. As of
    the formula in elementary operators, since torch's third derivative is wrong (below)."""
    leaves = [t.requires_grad_() for t in (double(4, 3, 5), double(3), double(3))]
    statistics: Statistics = (None, None) if training else (double(3), double(3).square() + 0.5)
    dy = double(2, 4, 3, 5)

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = statistics
        if mean is None or var is None:
            mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
        scale = weight * (var + 1e-5).rsqrt()
        return (x - mean[:, None]) * scale[:, None] + bias[:, None]

    def ours_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, *statistics, weight, bias, training)

    results = []
    for function in (ours_of, formula):
        y = function(*leaves)
        if batched:
            found = torch.autograd.grad(y, leaves, dy, create_graph=True, is_grads_batched=True)
        else:
            found = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            penalty = torch.stack([g.pow(3).sum() for g in found]).sum()
            found = torch.autograd.grad(penalty, leaves, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in found]).sum()
        results.append([*found, *torch.autograd.grad(penalty, leaves, allow_unused=True)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_third_derivative() -> None:
    """Of the formula in elementary operators: torch's own is wrong here (2.13 takes the saved
    statistics for constants in its second derivative)."""
    x = double(5, 2).requires_grad_()

    def formula(x: Tensor) -> Tensor:
        centered = x - x.mean(0)
        return centered * (centered.square().mean(0) + 1e-5).rsqrt()

    results = []
    for function in (lambda t: batch_norm(t, None, None, training=True), formula):
        value = function(x).pow(3).sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            value = value.pow(2).sum()
        results.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-8)


def test_double_backward_after_the_buffers_changed() -> None:
    x, dy = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    results = []
    for disturb in (False, True):
        mean, var = torch.zeros(3), torch.ones(3)
        y = batch_norm(x, mean, var, activation="silu")
        if disturb:
            mean.add_(9.0)
            var.add_(9.0)
        (g,) = torch.autograd.grad(y, x, dy, create_graph=True)
        results.append((g, torch.autograd.grad(g.square().sum(), x)[0]))
    for undisturbed, disturbed in zip(*results, strict=True):
        assert torch.equal(undisturbed, disturbed)


# ---- the formulas, part by part ----


def cubed(gradients: Sequence[Tensor]) -> Tensor:
    """What is derived again: not linear, so that a gradient's own value matters."""
    return torch.stack([(g**3).sum() for g in gradients]).sum()


SECOND = [w for w in itertools.product((False, True), repeat=4) if any(w)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["identity", "leaky_relu", "gelu"])
@pytest.mark.parametrize("used", SECOND, ids=str)
def test_of_any_first_gradients(used: tuple[bool, ...], name: str, training: bool) -> None:
    """Any of the four gradients may enter what is derived again."""
    shape, c = (3, 2, 4), 2
    leaves = [double(*shape), double(*shape), double(c), double(c), double(*shape)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    statistics: Statistics = (None, None) if training else (double(c), double(c).square() + 0.5)
    seeds = [torch.randn_like(leaf) for leaf in leaves]
    results = []
    for function in (ours, composed):
        x, residual, weight, bias, dy = leaves
        y = function(x, *statistics, weight, bias, training, residual=residual, name=name)
        first = torch.autograd.grad(y, leaves[:4], dy, create_graph=True)
        some = [(g, s) for g, s, u in zip(first, seeds, used, strict=False) if u]
        outputs, weights = (list(part) for part in zip(*some, strict=True))
        results.append(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@pytest.mark.parametrize("required", SECOND, ids=str)
def test_for_any_arguments(required: tuple[bool, ...], name: str, training: bool) -> None:
    """Any of the arguments may require a gradient; so may dy alone, by a layer after this one."""
    shape, c = (3, 2, 4), 2
    values = [double(*shape), double(*shape), double(c), double(c)]
    statistics: Statistics = (None, None) if training else (double(c), double(c).square() + 0.5)
    dy = double(*shape).requires_grad_()
    results = []
    for function in (ours, composed):
        leaves = [v.clone().requires_grad_(r) for v, r in zip(values, required, strict=True)]
        x, residual, weight, bias = leaves
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        y = function(x, *statistics, weight, bias, training, residual=residual, name=name)
        first = torch.autograd.grad(y, needed, dy, create_graph=True)
        results.append(torch.autograd.grad(cubed(first), [dy, *needed], materialize_grads=True))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 2), (2, 3, 4, 5), (2, 3, 2, 3, 2)], ids=str)
def test_ranks_and_absent_parameters(shape: tuple[int, ...], training: bool, affine: bool) -> None:
    x, dy = double(*shape).requires_grad_(), double(*shape).requires_grad_()
    parameters = [double(3).requires_grad_(), double(3).requires_grad_()] if affine else []
    statistics: Statistics = (None, None) if training else (double(3), double(3).square() + 0.5)
    results = []
    for function in (ours, composed):
        weight, bias = parameters or (None, None)
        y = function(x, *statistics, weight, bias, training)
        first = torch.autograd.grad(y, [x, *parameters], dy, create_graph=True)
        leaves = [x, dy, *parameters]
        results.append(torch.autograd.grad(cubed(first), leaves, materialize_grads=True))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_what_comes_in(layout: str, of: str) -> None:
    """x in one layout, dy and the gradient of the gradient in another."""
    shape, c = (3, 4, 5, 2), 4
    x = LAYOUTS[layout](double(*shape)).requires_grad_()
    dy, again = LAYOUTS[of](double(*shape)).requires_grad_(), LAYOUTS[of](double(*shape))
    weight = double(c).requires_grad_()
    results = []
    for function in (ours, composed):
        y = function(x, None, None, weight, None, True, name="leaky_relu")
        (g,) = torch.autograd.grad(y, x, dy, create_graph=True)
        results.append(torch.autograd.grad(g, [x, dy, weight], again))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_expanded_gradients() -> None:
    x = double(5, 3, 2).requires_grad_()
    results = []
    for function in (ours, composed):
        (g,) = torch.autograd.grad(
            function(x, None, None, training=True, name="silu").sum(), x, create_graph=True
        )
        results.append(torch.autograd.grad(g.sum() + (g * x).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_one_value_per_channel() -> None:
    """Of variance 0 by the policy: all derivatives of xhat are 0 but for those through dy."""
    layer = BatchNormAct1d(3, "silu").double()
    bx.set_policies(layer, single_value="zero_variance")
    x, dy = double(1, 3).requires_grad_(), double(1, 3).requires_grad_()
    parameters = list(layer.parameters())
    first = torch.autograd.grad(layer(x), [x, *parameters], dy, create_graph=True)
    found = torch.autograd.grad(cubed(first), [x, dy, *parameters])
    assert not found[0].any() and not found[2].any()
    slope = torch.func.vmap(torch.func.grad(F.silu))(layer.bias)
    torch.testing.assert_close(found[1], 3 * dy**2 * slope**3)


# ---- how it is done ----


def _nodes(tensor: Tensor) -> set[str]:
    """Names of the nodes of a tensor's graph."""
    names, open_nodes = set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            open_nodes += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
def test_the_graph_has_one_node_of_ours(name: str) -> None:
    """And no batch norm in elementary operators beside it."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = ours(x, None, None, torch.ones(3), None, True, name=name)
    (g,) = torch.autograd.grad(y, x, torch.randn(4, 3, 5, requires_grad=True), create_graph=True)
    names = _nodes(g)
    assert any("NormBackward" in name for name in names)
    assert not [name for name in names if name.startswith(("Mean", "Rsqrt", "Pow"))]


def test_calls_of_a_penalty() -> None:
    """Reduce gx and write dz's, reduce gx * dz, and three terms of x's."""
    x, dy = torch.randn(8, 4, 16, 16, requires_grad=True), torch.randn(8, 4, 16, 16)
    (g,) = torch.autograd.grad(
        batch_norm(x, None, None, torch.ones(4), training=True), x, dy, create_graph=True
    )
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(g, x, torch.randn_like(g))
    calls = [e for e in profile.events() if e.name.startswith("batchnorm_ext::")]
    assert len(calls) == 5, [e.name for e in calls]


def test_a_saved_tensor_written_to_is_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    z = x * 1.0
    (g,) = torch.autograd.grad(
        batch_norm(z, None, None, training=True).pow(2).sum(), x, create_graph=True
    )
    with torch.no_grad():
        z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize("name", ["identity", "relu"])
def test_without_the_input(name: str) -> None:
    """A frozen layer keeps none; the derivative with respect to dy is there."""
    x, dy = double(4, 3, 2).requires_grad_(), double(4, 3, 2).requires_grad_()
    statistics = (double(3), double(3).square() + 0.5)
    results = []
    for function in (ours, composed):
        y = function(x, *statistics, double(3).fill_(2.0), double(3).fill_(0.1), name=name)
        (g,) = torch.autograd.grad(y, x, dy, create_graph=True)
        results.append(torch.autograd.grad((g**2).sum(), [dy, x], materialize_grads=True))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
def test_batched_gradients(name: str) -> None:
    """is_grads_batched, whose results can be derived again as well."""
    x, many = double(4, 3, 2).requires_grad_(), double(5, 4, 3, 2)
    results = []
    for function in (ours, composed):
        y = function(x, None, None, training=True, name=name)
        (g,) = torch.autograd.grad(y, x, many, is_grads_batched=True, create_graph=True)
        results.append((g, torch.autograd.grad((g**2).sum(), x)[0]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


# ---- accuracy ----


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("name", ["identity", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_torch(dtype: torch.dtype, name: str, offset: float) -> None:
    """Against float64 on the same values, with the largest error of each gradient."""
    shape, c = (16, 4, 9, 9), 4
    x, dy, again = (torch.randn(shape).add(m).to(dtype) for m in (offset, 0.0, 0.0))
    weight = torch.rand(c) + 0.5

    def run(function: Callable[..., Tensor], to: torch.dtype, parameters: torch.dtype) -> Any:
        leaves = [x.to(to), dy.to(to), weight.to(parameters)]
        a, b, w = (leaf.detach().requires_grad_() for leaf in leaves)
        (g,) = torch.autograd.grad(
            function(a, None, None, w, None, True, name=name), a, b, create_graph=True
        )
        return torch.autograd.grad(g, [a, b, w], again.to(to))

    exact = run(composed, torch.float64, torch.float64)
    found, torchs = run(ours, dtype, torch.float32), run(composed, dtype, torch.float32)
    for a, b, e in zip(found, torchs, exact, strict=True):
        error, allowed = ((t.double() - e).abs().max() / e.abs().max() for t in (a, b))
        assert error <= max(allowed, 4 * torch.finfo(dtype).eps)
