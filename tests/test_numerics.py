"""Where floating point hurts: against the oracle, and nowhere worse than torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import tolerances
import torch
from strategies import (
    ACTIVATION_PARAMS,
    DTYPES,
    HAS_CUDA_KERNELS,
    LAYOUTS,
    Case,
    Data,
    activation_arguments,
    available_capabilities,
    check_backward,
    check_forward,
    covering_cases,
    cpu_capability,
    forced_plan,
)
from test_reference import TORCHS
from torch import Tensor
from torch.nn import functional as F

from batchnorm_ext import functional, reference

BOTH = ("contiguous", "channels_last")


# ---- far from zero ----


def _errors_of_torch(case: Case, oracle: reference.Forward) -> dict[str, float]:
    """Largest errors of torch's own batch norm against the oracle, by what they are of."""
    data = case.data()
    assert data.running_mean is not None and data.running_var is not None
    old = data.running_mean.clone(), data.running_var.clone()
    leaves = [t.requires_grad_() for t in data.differentiable()]
    y = F.batch_norm(
        data.input, data.running_mean, data.running_var, data.weight, data.bias, True, 0.1, case.eps
    )
    got = [y, *torch.autograd.grad(y, leaves, data.grad_output)]
    return _errors(case, data, oracle, old, got)


def _errors(
    case: Case,
    data: Data,
    oracle: reference.Forward,
    old: tuple[Tensor, Tensor],
    got: list[Tensor],
) -> dict[str, float]:
    gradients = reference.backward(
        data.grad_output,
        data.input,
        data.weight,
        oracle.mean,
        oracle.invstd,
        oracle.pre_activation,
        training=True,
    )
    running = reference.update_running_statistics(*old, oracle.mean, oracle.var, case.count, 0.1)
    assert data.running_mean is not None and data.running_var is not None
    expected = [oracle.output, gradients.input, gradients.weight, gradients.bias, *running]
    got = [*got, data.running_mean, data.running_var]
    names = ["output", "dx", "dweight", "dbias", "running_mean", "running_var"]
    return {
        name: float((a.detach().double() - b).abs().max())
        for name, a, b in zip(names, got, expected, strict=True)
    }


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("shape", [(33, 17), (4, 3, 150), (64, 5, 4, 4), (1, 2, 3000)], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e5, 1e6])
def test_large_mean(ratio: float, shape: tuple[int, ...], layout: str) -> None:
    """|mean| / std up to 1e6: within bounds that hardly know the ratio, so below torch's error."""
    case = Case(shape, layout=layout, offset=ratio, scale=1.0, seed=int(ratio))
    check_forward(case)
    check_backward(case)
    data = case.data()
    oracle = case.oracle(data)
    bounds = case.bounds(data, oracle)
    assert data.running_mean is not None and data.running_var is not None
    old = data.running_mean.clone(), data.running_var.clone()
    leaves = [t.requires_grad_() for t in data.differentiable()]
    y = case.call(data)
    ours = _errors(case, data, oracle, old, [y, *torch.autograd.grad(y, leaves, data.grad_output)])
    torchs = _errors_of_torch(case, oracle)
    # Where both are down at the rounding of the result, either may be ahead: 3 u of what the sums
    # and the output are made of.
    dims = [d for d in range(data.input.dim()) if d != 1]
    u = 3.0 * tolerances.unit_roundoff(torch.float32)
    dy = data.grad_output.abs().double()
    floor = {
        "output": float(bounds.output.max()),
        "dx": 4.0 * u * float(dy.max() * oracle.invstd.max()) * 3.0,
        "dweight": u * float((dy * oracle.pre_activation.abs()).sum(dims).max()),
        "dbias": u * float(dy.sum(dims).max()),
        "running_mean": u * float(data.running_mean.abs().max()),
        "running_var": u * float(data.running_var.abs().max()),
    }
    for name, error in ours.items():
        assert error <= max(torchs[name], floor[name]), f"{name}: {error} > {torchs[name]}"


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [(torch.float64, 1e10), (torch.float32, 1e7), (torch.bfloat16, 60.0), (torch.float16, 500.0)],
    ids=str,
)
def test_as_far_as_the_dtype_goes(dtype: torch.dtype, ratio: float, layout: str) -> None:
    """Values that are only a few units in the last place apart."""
    for shape in ((40, 3), (3, 5, 49)):
        order = tolerances.RANDOM_ORDER
        case = Case(shape, dtype, layout, offset=ratio, scale=1.0, eps=1e-3, order=order)
        check_forward(case)
        check_backward(case)


def test_large_running_mean_in_evaluation() -> None:
    for layout in BOTH:
        for ratio in (1e3, 1e6):
            case = Case((5, 17, 9), layout=layout, mode="eval", offset=ratio, scale=1.0)
            check_forward(case)
            check_backward(case)


# ---- constant channels ----


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3333, 1234.567, 6e4, 1e-6])
def test_constant_channels(value: float, dtype: torch.dtype, layout: str) -> None:
    """Variance exactly 0, so running_var only shrinks, and the output is exactly the bias."""
    for shape in ((2, 3), (333, 3), (70, 3, 5), (1, 3, 1001), (9, 3, 7, 7), (130, 33)):
        c = shape[1]
        x = LAYOUTS[layout](torch.full(shape, value, dtype=dtype))
        bias = torch.linspace(-1, 1, c).to(dtype)
        mean, var = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
        for plan in ({}, {"threads": 3, "cooperative": True}, {"scheme": "planes"}):
            with forced_plan(**plan):
                y, m, invstd, _ = torch.ops.batchnorm_ext.forward_train(
                    x, None, None, bias, mean, var, None, 1.0, 1e-5, "identity", 0.0, False
                )
            assert torch.equal(m, x.reshape(-1)[0].double().expand(c))
            assert torch.equal(mean, m)
            assert (var == 0).all()
            assert torch.equal(invstd, torch.full_like(invstd, 1 / math.sqrt(1e-5)))
            assert torch.equal(y, bias.view(1, c, *([1] * (x.dim() - 2))).expand_as(y))


# ---- nan and inf ----


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 17), (5, 3, 49), (9, 5, 3, 3), (2, 33, 2)], ids=str)
def test_poison_stays_in_its_channel(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, poison: float
) -> None:
    """Every other channel is bit for bit what it is without."""
    for mode, name in (("train", "input"), ("train", "grad_output"), ("eval", "grad_output")):
        case = Case(shape, dtype, layout, "relu", "contiguous", mode=mode)
        clean, dirty = case.data(), case.data()
        victim = shape[1] // 2
        index = (shape[0] - 1, victim, *([0] * (len(shape) - 2)))
        getattr(dirty, name)[index] = poison
        results = []
        for data in (clean, dirty):
            leaves = [t.requires_grad_() for t in data.differentiable()]
            y = case.call(data)
            gradients = torch.autograd.grad(y, leaves, data.grad_output)
            buffers = [data.running_mean, data.running_var]
            results.append([y.detach(), *gradients, *(b for b in buffers if b is not None)])
        keep = torch.arange(shape[1]) != victim
        for wanted, got in zip(*results, strict=True):
            dim = 1 if got.dim() > 1 else 0
            kept = keep.nonzero().view(-1)
            assert torch.equal(got.index_select(dim, kept), wanted.index_select(dim, kept))
        if name == "input":
            y, dx, *_ = results[1]
            assert y.select(1, victim).isnan().all()
            assert dx.select(1, victim).isnan().all()
            assert not bool(results[1][-2][victim].isfinite())
            assert not bool(results[1][-1][victim].isfinite())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["identity", "relu", "relu6", "leaky_relu"])
def test_poisoned_elements_in_evaluation(name: str, poison: float) -> None:
    """Alone in their place, with the value and the gradient that torch's operators give."""
    x = torch.tensor([[0.5, poison], [-0.5, 2.0]], requires_grad=True)
    ours = functional.batch_norm(
        x, torch.zeros(2), torch.ones(2), eps=0.0, **activation_arguments(name, 0.125)
    )
    # Not F.batch_norm, which refuses an eps of 0 in torch 2.11.
    norm = torch.batch_norm(x, None, None, torch.zeros(2), torch.ones(2), False, 0.0, 0.0, False)
    torchs = TORCHS[name](norm, 0.125)
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    dy = torch.full_like(x, 3.0)
    got, wanted = (torch.autograd.grad(y, x, dy)[0] for y in (ours, torchs))
    torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF])
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_of_any_bits_stays_one(dtype: torch.dtype, layout: str, bits: int) -> None:
    """Rounded by an addition, some would be infinite, or zero."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for name, mode in (
        *(("weight", "train"), ("bias", "train"), ("weight", "eval"), ("bias", "eval")),
        *(("running_mean", "eval"), ("running_var", "eval")),
    ):
        for capability in available_capabilities():
            case = Case((3, 17, 7), dtype, layout, "identity", layout, mode=mode)
            data = case.data()
            replaced = torch.ones(17)
            replaced[5] = nan
            setattr(data, name, replaced)
            for other in ("weight", "bias", "running_mean", "running_var"):
                if other != name:
                    setattr(data, other, torch.ones(17))
            with cpu_capability(capability):
                y = case.call(data)
            assert torch.equal(y.isnan().all(2).any(0).nonzero(), torch.tensor([[5]])), name


def test_poisoned_residual() -> None:
    for layout in BOTH:
        case = Case((3, 4, 5), layout=layout, residual=layout)
        clean, dirty = case.data(), case.data()
        assert dirty.residual is not None
        dirty.residual[1, 2, 3] = math.nan
        wanted, got = case.call(clean), case.call(dirty)
        assert torch.equal(got.isnan().nonzero(), torch.tensor([[1, 2, 3]]))
        assert torch.equal(got.nan_to_num(0.0)[got.isnan() == 0], wanted[got.isnan() == 0])


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_derivative_is_that_of_the_stored_output(
    dtype: torch.dtype, layout: str, activation: str
) -> None:
    """Where z rounds to 0, or to 6, it is not 1: kept as a bit, and computed again."""
    tie = torch.tensor([2.0**-25, 2.0**-134, 6 - 2.0**-9, 6 - 2.0**-6])
    around = [tie, tie.nextafter(torch.tensor(9.0)), tie.nextafter(torch.tensor(-9.0))]
    bias = torch.cat([*around, -tie, torch.tensor([0.0, 6.0, 1.0, 2.0**-24, 2.0**-133])])
    c = len(bias)
    x = LAYOUTS[layout](torch.zeros(2, c, 19, dtype=dtype))
    operators = torch.ops.batchnorm_ext
    mean, var = torch.zeros(c), torch.ones(c)
    statistics = operators.eval_statistics(mean, var, 0.0)
    for capability in available_capabilities():
        with cpu_capability(capability):
            y, mask = operators.forward_eval(
                x, None, None, bias, mean, var, 0.0, activation, 0.25, True
            )
            wanted = torch.where(y > 0, 1.0, 0.25 if activation == "leaky_relu" else 0.0)
            if activation == "relu6":
                wanted[y >= 6] = 0
            for kept in (mask, None):
                _, gradient, _, _ = operators.backward(
                    torch.ones_like(x), x, None, None, bias, *statistics, kept,
                    False, activation, 0.25, [False, True, False, False],
                )  # fmt: skip
                assert torch.equal(gradient, wanted.to(dtype)), (capability, kept is None)


# ---- magnitudes ----


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float32, 1e18),
        (torch.float32, 3e-20),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e4),
        (torch.float16, 1e-6),
        (torch.float64, 1e140),
        (torch.float64, 1e-140),
    ],
    ids=str,
)
def test_magnitudes(dtype: torch.dtype, scale: float, layout: str) -> None:
    """float32 sums of squares overflow here; neither statistics nor gradients may."""
    if HAS_CUDA_KERNELS and dtype != torch.float64 and scale >= 1e18:
        pytest.skip("the CUDA kernels sum in float32, as torch's do")
    for shape in ((40, 17), (3, 5, 49)):
        for offset in (0.0, scale):
            case = Case(
                shape, dtype, layout, parameters="none", mode="batch", offset=offset, scale=scale
            )
            check_forward(case)
            check_backward(case)


@pytest.mark.parametrize("layout", BOTH)
def test_small_values_with_a_small_eps(layout: str) -> None:
    """invstd far from 1."""
    for scale in (1e-15, 1e-10, 1e10, 1e15):
        for shape in ((40, 17), (3, 5, 49)):
            case = Case(shape, layout=layout, scale=scale, offset=scale, eps=1e-36, mode="batch")
            check_forward(case)
            check_backward(case)


# ---- sizes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1_000_000, 3), (3, 100_003), (2, 20_011, 2), (1, 1, 400_001)])
def test_extreme_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in BOTH[: 1 + (len(shape) > 2)]:
        case = Case(shape, dtype, layout, "relu", layout)
        check_forward(case)
        check_backward(case)


def test_running_mean_of_many_values() -> None:
    """No drift: float32 sums would stop growing at 2^24."""
    x = torch.ones(1, 1, 2**22) * 16777.0
    x[..., ::2] += 1.0
    mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert mean.item() == 16777.5
    assert var.item() == pytest.approx(0.25 * 2**22 / (2**22 - 1), rel=1e-12)


# ---- the order of values ----

ORDERS = {
    "outlier first": lambda x: _with_outlier(x, 0),
    "outlier second": lambda x: _with_outlier(x, 1),
    "outlier in the middle": lambda x: _with_outlier(x, x.shape[0] // 2),
    "outlier last": lambda x: _with_outlier(x, x.shape[0] - 1),
    "ascending": lambda x: x.sort(0).values,
    "descending": lambda x: x.sort(0, descending=True).values,
    "alternating": lambda x: (
        x.abs() * torch.tensor([1.0, -1.0]).repeat(x.shape[0])[: x.shape[0], None]
    ),
    "two levels": lambda x: torch.where(torch.arange(x.shape[0])[:, None] < 9, 1e4, 0.0) + x,
}


def _with_outlier(x: Tensor, at: int) -> Tensor:
    x = x.clone()
    x[at] = 1e4
    return x


@pytest.mark.parametrize("layout", ["rows", "planes", "both"])
@pytest.mark.parametrize("order", ORDERS)
def test_order_of_values(order: str, layout: str) -> None:
    """A method that trusts its first values loses half of its digits here."""
    for n in (40, 64, 72, 1000):
        for offset in (0.0, 1e4):
            values = ORDERS[order](torch.randn(n, 3)) + offset
            shape = {"rows": (n, 3), "planes": (1, 3, n), "both": (n // 8, 3, 8)}[layout]
            x = values if layout == "rows" else values.t().reshape(3, shape[0], -1).transpose(0, 1)
            _check_statistics(x.contiguous().view(shape))


def _check_statistics(x: Tensor) -> None:
    oracle = reference.forward(x, training=True)
    settings: dict[str, Any] = {"weight": None, "bias": None, "residual": None}
    bounds = tolerances.forward(
        x.dtype, x, oracle, training=True, eps=1e-5, order=tolerances.WORST_ORDER, **settings
    )
    y, mean, invstd, _ = torch.ops.batchnorm_ext.forward_train(
        x, None, None, None, None, None, None, 0.1, 1e-5, "identity", 0.0, False
    )
    tolerances.assert_within(mean, oracle.mean, bounds.statistics.mean, "mean")
    allowed = bounds.statistics.invstd * oracle.invstd
    tolerances.assert_within(invstd, oracle.invstd, allowed, "invstd")
    tolerances.assert_within(y, oracle.output, bounds.output, "output")


@pytest.mark.parametrize("plan", [{}, {"cooperative": True, "threads": 2, "unit_channels": 8}])
@pytest.mark.parametrize("capability", available_capabilities())
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("shape", [(9, 17, 5, 5), (6, 17, 64, 64), (70, 17)], ids=str)
@pytest.mark.parametrize(
    ("mean", "std"), [(50.0, 1.0), (1e4, 1.0), (1e30, 1e28), (3e36, 1e30), (0.0, 1e25)]
)
def test_first_values_far_from_the_others(
    mean: float, std: float, shape: tuple[int, ...], layout: str, capability: str, plan: Any
) -> None:
    """A black image first. The channel is reduced once more, and its neighbours keep their bits."""
    if len(shape) == 2 and layout == "channels_last":
        return
    x = torch.randn(shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    victim = 11
    arguments = (None,) * 6 + (0.1, 1e-5, "identity", 0.0, False)
    with cpu_capability(capability), forced_plan(**plan):
        clean = torch.ops.batchnorm_ext.forward_train(x, *arguments)
        x[:, victim] = x[:, victim] * std + mean
        x[0, victim] = 0.0
        dirty = torch.ops.batchnorm_ext.forward_train(x, *arguments)
        _check_statistics(x)
    others = [c for c in range(shape[1]) if c != victim]
    for wanted, got in zip(clean[:3], dirty[:3], strict=True):
        dim = min(got.dim() - 1, 1)
        keep = torch.tensor(others)
        assert torch.equal(got.index_select(dim, keep), wanted.index_select(dim, keep))


@pytest.mark.parametrize("layout", ["rows", "planes", "small planes"])
def test_first_values_far_from_a_constant(layout: str) -> None:
    """Squares of 0.1 are all rounded alike, and the variance is a thousandth of their sum."""
    values = torch.full((64_000, 3), 0.1)
    values[:64] = 0.0
    shape = {"rows": (64_000, 3), "planes": (1, 3, 64_000), "small planes": (2_560, 3, 25)}[layout]
    if layout != "rows":
        values = values.t().reshape(3, shape[0], -1).transpose(0, 1)
    _check_statistics(values.contiguous())


# ---- activations: z is x, exactly ----


def _exactly(x: Tensor, name: str, **changes: Any) -> Tensor:
    """act(x), by way of a batch norm that changes nothing."""
    c = x.shape[1]
    return functional.batch_norm(
        x,
        torch.zeros(c),
        torch.ones(c),
        eps=0.0,
        **activation_arguments(name, ACTIVATION_PARAMS[name]),
        **changes,
    )


def _grid(dtype: torch.dtype) -> Tensor:
    kinks = [-6.0, -3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0, 6.0]
    near = [k * (1 + s * tolerances.unit_roundoff(dtype) * 2) for k in kinks for s in (-1, 1)]
    large = [s * v for v in (10.0, 17.0, 50.0, 88.0, 104.0, 1e3, 6e4) for s in (1, -1)]
    small = [s * v for v in (1e-3, 1e-7, 1e-20, 2e-38) for s in (1, -1)]
    values = torch.cat(
        [
            torch.linspace(-12, 12, 2001).double(),
            torch.tensor([*kinks, *near, *large, *small]).double(),
        ]
    )
    return values.to(dtype).view(-1, 1)


@pytest.mark.parametrize("capability", available_capabilities())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATION_PARAMS)
def test_activation(name: str, dtype: torch.dtype, capability: str) -> None:
    """Value and derivative over a grid, at the kinks and beside them."""
    param = ACTIVATION_PARAMS[name]
    x = _grid(dtype).requires_grad_()
    with cpu_capability(capability):
        y = _exactly(x, name)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    z = x.detach().double()
    value = reference.ACTIVATIONS[name].function(z, param)
    u = tolerances.unit_roundoff(tolerances.accumulate_dtype(dtype))
    size = z.abs()
    if name == "elu":
        size = torch.maximum(size, param * size.clamp(max=1.0))
    tolerances.assert_within(y, value, 8 * u * size + tolerances.rounding(value, dtype), "value")
    slope = reference.ACTIVATIONS[name].derivative(z, param)
    allowed = tolerances.derivative(dtype, name, param, z) + tolerances.rounding(slope, dtype)
    tolerances.assert_within(dx, slope, allowed, "derivative")


@pytest.mark.parametrize("name", ACTIVATION_PARAMS)
def test_activation_of_enormous_values(name: str) -> None:
    """The limits hold up to the end of the range, wherever torch's own float32 functions reach."""
    param = ACTIVATION_PARAMS[name]
    sizes = torch.tensor([1e5, 1e8, 1e11, 1e15, 1e18, 1e20, 1e30, 1e37, 3e38])
    x = torch.cat([sizes, -sizes]).view(-1, 1).requires_grad_()
    theirs = TORCHS[name](x, param)
    (torchs_dx,) = torch.autograd.grad(theirs, x, torch.ones_like(x))
    ours = _exactly(x, name)
    (dx,) = torch.autograd.grad(ours, x, torch.ones_like(x))
    for got, wanted in ((ours, theirs), (dx, torchs_dx)):
        reached = wanted.isfinite()
        torch.testing.assert_close(got[reached], wanted[reached], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "elu"])
def test_small_results_keep_their_digits(name: str) -> None:
    """Relative, not absolute, accuracy: in the left tail, and next to 0 for elu.

    exp(-z^2 / 2) turns the rounding of z^2 into z^2 u of the result, exp(z) that of z into |z| u.
    """
    param = ACTIVATION_PARAMS[name]
    z = torch.linspace(-9, -1e-6, 3001).view(-1, 1)
    y = _exactly(z, name).double()
    value = reference.ACTIVATIONS[name].function(z.double(), param)
    u = tolerances.unit_roundoff(torch.float32)
    tolerances.assert_within(y, value, (16 + z.double().square()) * u * value.abs(), "value")


# ---- masks ----


@pytest.mark.parametrize(
    "case",
    covering_cases(
        {
            "shape": [(33, 17), (2, 3, 5), (9, 65, 7), (5, 3, 9, 9), (128, 3, 7), (2, 7)],
            "dtype": DTYPES,
            "layout": BOTH,
            "activation": ["relu", "relu6", "leaky_relu"],
            "residual": [None, "contiguous", "channels_last"],
            "mode": ["train", "eval"],
            "parameters": ["same", "none", "float64"],
            "plan": [(), (("threads", 2), ("cooperative", True)), (("unit_channels", 2),)],
        },
        3,
    ),
    ids=str,
)
def test_gradient_follows_the_rounded_output(case: Case) -> None:
    """The derivative that torch's activation takes, given the output that was stored.

    No element is left out: y > 0 is what decides, wherever rounding put it.
    """
    data = case.data()
    if data.residual is not None:  # sums that cancel, so that many z are 0 or next to it
        plain = replace(case, activation="identity", residual=None)
        copy = case.data()
        copy.residual = None
        opposite = -plain.call(copy)
        half = torch.arange(opposite.numel()).view_as(opposite) % 2 == 0
        data.residual = LAYOUTS[case.residual or ""](torch.where(half, opposite, data.residual))
    oracle = case.oracle(data)
    bounds = case.bounds(data, oracle)
    leaves = [t.requires_grad_() for t in data.differentiable()]
    y = case.call(data)
    got = torch.autograd.grad(y, leaves, data.grad_output)
    settings: dict[str, Any] = {
        "training": case.training,
        "activation": case.activation,
        "activation_param": case.activation_param,
    }
    expected = reference.backward(
        data.grad_output,
        data.input,
        data.weight,
        oracle.mean,
        oracle.invstd,
        y.detach(),
        **settings,
    )
    types = tuple(t.dtype if t is not None else case.dtype for t in (data.weight, data.bias))
    allowed = tolerances.backward(
        case.dtype,
        data.grad_output,
        data.input,
        oracle,
        expected,
        bounds,
        weight=data.weight,
        parameter_dtypes=(types[0], types[1]),
        **settings,
    )
    names = [n for n in ("input", "residual", "weight", "bias") if getattr(data, n) is not None]
    for name, gradient in zip(names, got, strict=True):
        tolerances.assert_within(
            gradient, getattr(expected, name), getattr(allowed, name), f"gradient of {name}"
        )
    if data.residual is not None and case.activation == "relu":
        kept = torch.where(y > 0, data.grad_output, 0.0)
        assert torch.equal(got[1], kept)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("residual", [None, "contiguous"])
def test_ties_at_zero(residual: str | None, layout: str, create_graph: bool) -> None:
    """z is exactly 0 throughout, so relu lets nothing through: as torch's does."""
    x = LAYOUTS[layout](torch.full((5, 3, 7), 0.1)).requires_grad_()
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    r = torch.zeros(5, 3, 7, requires_grad=True) if residual else None
    y = functional.batch_norm(x, None, None, weight, bias, True, residual=r, activation="relu")
    assert (y == 0).all()
    leaves = [t for t in (x, weight, bias, r) if t is not None]
    dy = torch.ones_like(y)
    for gradient in torch.autograd.grad(y, leaves, dy, create_graph=create_graph):
        assert (gradient == 0).all()


def test_evaluation_recomputes_the_same_z() -> None:
    """Over 100,003 channels: the backward's invstd is the forward's, to the last bit."""
    case = Case((3, 100_003), activation="relu", mode="eval", parameters="same", seed=5)
    data = case.data()
    data.residual = None
    plain = replace(case, activation="identity")
    # Every z is 0 or next to it.
    data.residual = -plain.call(data).detach()
    data.residual.requires_grad_()
    y = case.call(data)
    dy = torch.ones_like(y)
    (dresidual,) = torch.autograd.grad(y, data.residual, dy)
    assert torch.equal(dresidual, (y > 0).to(y.dtype))
    data.residual = None
    assert data.bias is not None and data.weight is not None
    assert data.running_mean is not None and data.running_var is not None
    # x where z crosses 0, without a residual.
    std = (data.running_var + case.eps).sqrt()
    data.input = (data.running_mean - data.bias / data.weight * std).expand(3, -1).clone()
    data.input.requires_grad_()
    y = case.call(data)
    (dx,) = torch.autograd.grad(y, data.input, dy)
    assert torch.equal(dx != 0, y > 0)
