"""How far a result may be from the float64 oracle, and why.

Every bound is a tensor of the result's shape, derived from what the kernels do:

* values are computed in the *accumulate type*, float32 (float64 for float64 input), whatever their
  storage type, and rounded once to the storage type when they are written;
* sums run over at most ``LONGEST_CHAIN`` terms in the accumulate type and are then combined in
  float64, so that their error doesn't grow with the length n of the reduction beyond that;
* differences from the mean are taken before anything is squared or scaled, so that |mean| / std
  enters only through the rounding of the reference point (see :func:`statistics`).

``u`` is the unit roundoff of a type, half of its ``eps``. Bounds for float64 hold the oracle's own
error too, which is of the same kind: they are doubled. Conditions that a bound depends on (the
size of z, of the terms of a sum, ...) are taken from the oracle, element by element.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm_ext import reference

#: Terms that a reduction adds up in the accumulate type before it goes on in float64: rows of a
#: chunk of a column, or elements of a run that share a vector's lane.
LONGEST_CHAIN = 64

#: Rounding errors of a chain of k operations add up like a random walk: to less than
#: WALK * sqrt(k) * u of the sum of magnitudes, but for odds of about exp(-WALK^2 / 2) (Higham and
#: Mary, "A new approach to probabilistic rounding error analysis", 2019). Tests make some 10^6
#: comparisons.
WALK = 5.0

#: sum((x - K)^2) / sum((x - mean)^2) for the reference point K of a chain, which is the mean of the
#: first eighth of the values: 1 + 1/8 on average in random order, 2 in bad luck (2.8 sigma), and 8
#: in the worst order that there is (an outlier among the first). Short runs, of less than 128
#: values, take the first value for K; their ratios are larger (up to n), but their chains are
#: shorter by more (n / 64 terms, and 3 to join the vectors).
RANDOM_ORDER = 2.0
WORST_ORDER = 8.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to dtype."""
    return torch.finfo(dtype).eps / 2.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of a storage dtype are computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _u(dtype: torch.dtype) -> float:
    return unit_roundoff(accumulate_dtype(dtype))


def _with_oracle(dtype: torch.dtype) -> float:
    """Room for the oracle's own rounding, where it computes in the same type."""
    return 2.0 if dtype == torch.float64 else 1.0


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of storing values in dtype: u of the value, or half of the smallest subnormal number.

    One per cent more, since a 16-bit type may be rounded to by way of float32. bfloat16 may lose
    all of a subnormal number: the processor's conversion (AVX512_BF16) takes those for 0.
    """
    info = torch.finfo(dtype)
    smallest = info.smallest_normal
    if dtype != torch.bfloat16:
        smallest *= info.eps / 2.0
    return 1.01 * unit_roundoff(dtype) * values.abs() + smallest


def summation(dtype: torch.dtype, n: int) -> float:
    """Error of a sum of n terms, relative to the sum of their magnitudes.

    A chain of k additions in the accumulate type, then float64 (for float64 input that makes one
    chain of all n): k u at the very most, and less than a random walk's WALK sqrt(k) u.
    """
    chain = max(n if dtype == torch.float64 else min(n, LONGEST_CHAIN), 1)
    return min(float(chain), WALK * math.sqrt(chain)) * _u(dtype)


class StatisticsBound(NamedTuple):
    """Errors of the batch's statistics, (C,)."""

    mean: Tensor  # absolute
    var: Tensor  # relative
    invstd: Tensor  # relative


def statistics(
    dtype: torch.dtype, n: int, mean: Tensor, var: Tensor, eps: float, order: float = RANDOM_ORDER
) -> StatisticsBound:
    """Bounds for mean, variance and invstd, given their true values.

    The mean is K + sum(x - K) / n: the sum's magnitudes are at most sqrt(order) std each, and the
    rounding of K itself costs nothing, because x - K is exact for x near K. It does move K by
    u |mean|, though, so that ``order`` grows by (u |mean| / std)^2: nothing at |mean| / std = 1e6
    in float32 (0.004), hardly anything at 1e7 (0.4).

    The variance is a sum of squares, ``order`` times as large as what remains after the
    subtraction of (mean - K)^2, and twice the error of the mean of a chain against the mean of
    all, which is also rounded to float64 before chains are combined: 2 u of |mean| / std.

    invstd = (var + eps)^(-1/2) has half of the variance's relative error, less where eps
    dominates, and float64 roundings.
    """
    u = _u(dtype)
    std = var.sqrt()
    ratio = torch.where(std > 0, mean.abs() / std, torch.zeros_like(std))
    order_here = order + (u * ratio).square()
    chain = summation(dtype, n) * _with_oracle(dtype)
    in_double = 8.0 * unit_roundoff(torch.float64)
    of_mean = chain * order_here.sqrt() * std + in_double * mean.abs()
    of_var = 2.0 * chain * order_here + in_double + 2.0 * unit_roundoff(torch.float64) * ratio
    of_invstd = 0.5 * of_var * (var / (var + eps)) + in_double
    # Of a constant channel the variance is 0 exactly, and 0 / (0 + 0) may stand here.
    return StatisticsBound(of_mean, of_var, torch.nan_to_num(of_invstd, nan=0.0))


class Slopes(NamedTuple):
    """Bounds on an activation's first and second derivative, and where the first one jumps."""

    first: float
    second: float
    kinks: tuple[float, ...]


def slopes(activation: str, param: float = 0.0) -> Slopes:
    """Maxima over all z, rounded up.

    silu' <= 1.0999 (at 2.4), silu'' <= 1/2 (at 0); gelu' <= 1.129 (at sqrt 2),
    gelu'' <= 2 phi(0) = 0.798 (at 0), both forms within 0.01; hardswish' < 3/2 (at 3),
    hardswish'' = 1/3; elu' and elu'' <= alpha left of 0.
    """
    table = {
        "identity": Slopes(1.0, 0.0, ()),
        "relu": Slopes(1.0, 0.0, (0.0,)),
        "relu6": Slopes(1.0, 0.0, (0.0, 6.0)),
        "leaky_relu": Slopes(max(1.0, abs(param)), 0.0, (0.0,)),
        "elu": Slopes(max(1.0, abs(param)), abs(param), () if param == 1.0 else (0.0,)),
        "silu": Slopes(1.1, 0.5, ()),
        "gelu": Slopes(1.13, 0.8, ()),
        "gelu_tanh": Slopes(1.14, 0.81, ()),
        "hardswish": Slopes(1.5, 0.34, (-3.0, 3.0)),
    }
    return table[activation]


def derivative(dtype: torch.dtype, activation: str, param: float, z: Tensor) -> Tensor:
    """Error of evaluating act'(z): 8 u for its largest value.

    With the logistic function s of an argument t(z), the derivative holds z t' s (1 - s), and 1 - s
    has the error of s, 2 u, however small it is itself: 2 u |z| t' more, up to where s rounds to 1
    (t = 17, in float64 37). t = z for silu; for gelu_tanh it is 1.6 (z + 0.0447 z^3), which gets
    there at z = 5, in float64 7.2.
    """
    u = _u(dtype) * _with_oracle(dtype)
    wide = dtype == torch.float64
    error = torch.full_like(z, 8.0 * u * slopes(activation, param).first)
    if activation == "silu":
        return error + 2.0 * u * z.abs().clamp(max=37.0 if wide else 17.0)
    if activation == "gelu_tanh":
        size = z.abs().clamp(max=7.2 if wide else 5.0)
        return error + 2.0 * u * size * (1.6 + 0.215 * size.square())
    return error


class Bounds(NamedTuple):
    """Of the forward pass: z before it is stored, y as it is stored; xhat and invstd relative."""

    statistics: StatisticsBound
    normalized: Tensor
    pre_activation: Tensor
    output: Tensor


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (like.dim() - 2)))


def forward(
    dtype: torch.dtype,
    input: Tensor,
    oracle: reference.Forward,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    activation: str = "identity",
    activation_param: float = 0.0,
    order: float = RANDOM_ORDER,
) -> Bounds:
    """Bounds for y = act(z), z = (x - center) scale + shift + residual.

    ``center`` is the mean in the accumulate type and ``shift`` carries the rest of it, so that no
    |mean| / std appears but for the rounding of that rest, u^2 |mean| / std. x - center, scale,
    the product and shift are rounded once each, and the additions of shift and of the residual
    once: 4 u of |weight xhat|, and u of bias, residual and z.

    An error of z costs at most act' as much in y. Piecewise linear activations see z rounded to
    the storage type; the others are evaluated to within 8 u of z (their elementary functions are
    accurate to a few ulp and |act(z)| <= |z| but for elu, whose negative side is as large as
    alpha). Then y is rounded to the storage type.
    """
    u, room = _u(dtype), _with_oracle(dtype)
    n = max(input.numel() // max(input.shape[1], 1), 1)
    if training:
        stats = statistics(dtype, n, oracle.mean, oracle.var, eps, order)
    else:
        zero = torch.zeros_like(oracle.mean)
        stats = StatisticsBound(zero, zero, zero + 8.0 * unit_roundoff(torch.float64))
    ones = torch.ones_like(oracle.mean)
    w = _rows(ones if weight is None else weight.detach().double().view(-1).abs(), input)
    b = _rows(ones * 0.0 if bias is None else bias.detach().double().view(-1).abs(), input)
    r = 0.0 if residual is None else residual.detach().double().abs()
    xhat = (input.detach().double() - _rows(oracle.mean, input)) * _rows(oracle.invstd, input)
    shifted = _rows((stats.mean + u * u * oracle.mean.abs()) * oracle.invstd, input)
    e_xhat = xhat.abs() * (_rows(stats.invstd, input) + 3.0 * u * room) + shifted
    z = oracle.pre_activation
    e_z = w * e_xhat + u * room * ((w * xhat).abs() + b + r + 2.0 * z.abs())
    first = slopes(activation, activation_param).first
    if activation == "identity":
        e_y = e_z
    elif activation in reference.PIECEWISE_LINEAR:
        e_y = first * (e_z + rounding(z, dtype)) + 2.0 * u * oracle.output.abs()
    else:
        size = z.abs()
        if activation == "elu":
            size = torch.maximum(size, abs(activation_param) * size.clamp(max=1.0))
        e_y = first * e_z + 8.0 * u * room * size
    e_y = e_y + rounding(oracle.output, dtype)
    return Bounds(stats, e_xhat, e_z, e_y)


def away_from_kinks(
    z: Tensor, bounds: Bounds, dtype: torch.dtype, activation: str, activation_param: float
) -> Tensor:
    """True where the sign of z - kink can't depend on rounding: there the derivative is certain.

    Elsewhere a test sets dy to 0; what happens there is tested with values that are exact.
    """
    certain = torch.ones_like(z, dtype=torch.bool)
    for kink in slopes(activation, activation_param).kinks:
        margin = 2.0 * (bounds.pre_activation + rounding(torch.full_like(z, kink), dtype))
        certain &= (z - kink).abs() > margin
    return certain


def backward(
    dtype: torch.dtype,
    grad_output: Tensor,
    input: Tensor,
    oracle: reference.Forward,
    gradients: reference.Gradients,
    bounds: Bounds,
    *,
    weight: Tensor | None,
    training: bool,
    activation: str = "identity",
    activation_param: float = 0.0,
    parameter_dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> reference.Gradients:
    """Bounds for the four gradients, given their true values and those of the forward pass.

    dz = dy act'(z): act'' times the error of z (away from kinks), the error of evaluating act',
    and u for the product. dbias and dweight are sums of dz and dz xhat, whose terms carry those
    errors; dx = weight invstd (dz - dbias / n - xhat dweight / n) is put together from them in the
    accumulate type with six roundings. Each is rounded once to the type it is stored in.
    """
    u, room = _u(dtype), _with_oracle(dtype)
    n = max(input.numel() // max(input.shape[1], 1), 1)
    dims = [d for d in range(input.dim()) if d != 1]
    s = slopes(activation, activation_param)
    dy = grad_output.detach().double().abs()
    xhat = (input.detach().double() - _rows(oracle.mean, input)) * _rows(oracle.invstd, input)
    dz, xhat = gradients.residual.abs(), xhat.abs()
    e_dz = u * room * dz
    if activation != "identity":
        evaluated = derivative(dtype, activation, activation_param, oracle.pre_activation)
        e_dz = e_dz + dy * (s.second * bounds.pre_activation + evaluated)
    chain = summation(dtype, n) * room
    e_bias = chain * dz.sum(dims) + e_dz.sum(dims)
    e_weight = ((chain + 2.0 * u) * dz * xhat + e_dz * xhat + dz * bounds.normalized).sum(dims)
    scale = oracle.invstd if weight is None else weight.detach().double().view(-1) * oracle.invstd
    e_inner = e_dz
    size = dz
    if training:
        mean_dz = _rows(gradients.bias.abs() / n, input)
        mean_dot = _rows(gradients.weight.abs() / n, input)
        e_inner = e_inner + _rows(e_bias / n, input) + xhat * _rows(e_weight / n, input)
        e_inner = e_inner + mean_dot * bounds.normalized
        size = size + mean_dz + xhat * mean_dot
    relative = _rows(bounds.statistics.invstd, input)
    e_input = _rows(scale.abs(), input) * (e_inner + (6.0 * u * room + relative) * size)
    return reference.Gradients(
        e_input + rounding(gradients.input, dtype),
        e_dz + rounding(gradients.residual, dtype),
        e_weight + rounding(gradients.weight, parameter_dtypes[0]),
        e_bias + rounding(gradients.bias, parameter_dtypes[1]),
    )


def running_statistics(
    new_mean: Tensor,
    new_var: Tensor,
    stats: StatisticsBound,
    mean: Tensor,
    var: Tensor,
    n: int,
    momentum: float,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor]:
    """Bounds for the buffers: momentum times the batch's errors, and one rounding on storing.

    ``new_mean`` and ``new_var`` are the true values, ``mean`` and ``var`` the batch's (biased).
    new = (1 - m) old + m batch is computed in float64, with an error of 3 u of both terms, of
    which the first is at most |new| + |m batch|.
    """
    u = 3.0 * unit_roundoff(torch.float64)
    from_mean = abs(momentum) * mean.abs()
    from_var = abs(momentum) * var * (n / max(n - 1, 1))
    e_mean = abs(momentum) * stats.mean + u * (new_mean.abs() + 2.0 * from_mean)
    e_var = stats.var * from_var + u * (new_var.abs() + 2.0 * from_var)
    return e_mean + rounding(new_mean, dtypes[0]), e_var + rounding(new_var, dtypes[1])


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Every element of actual is within its bound of expected; nan only where nan is expected."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    got = actual.detach().double()
    error = (got - expected).abs()
    same = (got == expected) | (got.isnan() & expected.isnan())
    ratio = torch.where(same, 0.0, error / bound)
    ratio = torch.where(ratio.isnan(), math.inf, ratio)
    if ratio.numel() == 0 or bool((ratio <= 1.0).all()):
        return
    at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    bad = int((ratio > 1.0).sum())
    raise AssertionError(
        f"{what}: {bad} of {ratio.numel()} elements out of bounds, worst at {at}: got "
        f"{got[at].item()!r}, expected {expected[at].item()!r}, error {error[at].item():.3g}, "
        f"allowed {bound.expand_as(expected)[at].item():.3g}"
    )
