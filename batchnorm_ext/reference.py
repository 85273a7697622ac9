"""The float64 oracle: every formula of the package in plain torch, written to be read.

Nothing here is fast and nothing here is shared with the kernels, so that the two can be compared.
All computation is in float64 whatever the dtype of the arguments; results are float64 unless a
function says otherwise.

Shapes: the input is ``(N, C, *)`` with any number of trailing dimensions, also none; parameters,
buffers and statistics are ``(C,)``. ``n`` is the number of values per channel, that is
``input.numel() / C``. The forward pass is

    mean   = sum(x) / n                      (of the batch, or running_mean in evaluation)
    var    = sum((x - mean)^2) / n           (biased; or running_var in evaluation)
    invstd = 1 / sqrt(var + eps)
    xhat   = (x - mean) * invstd
    z      = weight * xhat + bias + residual
    y      = act(z)

Source: S. Ioffe and C. Szegedy, "Batch Normalization", 2015, and the documentation of
``torch.nn.BatchNorm2d`` for the running statistics; the activations are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "PIECEWISE_LINEAR",
    "Activation",
    "Forward",
    "Gradients",
    "backward",
    "batch_statistics",
    "forward",
    "update_running_statistics",
]

_Elementwise = Callable[[Tensor, float], Tensor]


class Activation(NamedTuple):
    """An elementwise function of ``(z, parameter)`` and its derivative with respect to ``z``."""

    function: _Elementwise
    derivative: _Elementwise


def _gelu_erf(z: Tensor, _: float) -> Tensor:
    # erfc keeps the relative accuracy of the left tail, which 1 + erf would cancel away.
    return 0.5 * z * torch.erfc(-z * math.sqrt(0.5))


def _gelu_erf_derivative(z: Tensor, _: float) -> Tensor:
    cumulative = 0.5 * torch.erfc(-z * math.sqrt(0.5))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return cumulative + z * density


_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


def _gelu_tanh(z: Tensor, _: float) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh(_TANH_SCALE * (z + _TANH_CUBIC * z**3)))


def _gelu_tanh_derivative(z: Tensor, _: float) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBIC * z**3))
    inner_derivative = _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBIC * z * z)
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner_derivative


def _silu_derivative(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


def _hardswish_derivative(z: Tensor, _: float) -> Tensor:
    return torch.where(z <= -3.0, 0.0, torch.where(z < 3.0, z / 3.0 + 0.5, 1.0))


#: Formula and derivative of each activation. At a kink the derivative is the one that torch's own
#: backward takes; so is the derivative at nan, where relu and relu6 let the gradient through.
#: The parameter is ``negative_slope`` for leaky_relu, ``alpha`` for elu, unused otherwise.
ACTIVATIONS: dict[str, Activation] = {
    # y = z, y' = 1
    "identity": Activation(lambda z, _: z, lambda z, _: torch.ones_like(z)),
    # y = max(z, 0), y' = [z > 0]
    "relu": Activation(lambda z, _: z.clamp(min=0.0), lambda z, _: (~(z <= 0.0)).to(z.dtype)),
    # y = min(max(z, 0), 6), y' = [0 < z < 6]
    "relu6": Activation(
        lambda z, _: z.clamp(min=0.0, max=6.0),
        lambda z, _: (~((z <= 0.0) | (z >= 6.0))).to(z.dtype),
    ),
    # y = z if z > 0 else slope z
    "leaky_relu": Activation(
        lambda z, slope: torch.where(z > 0.0, z, slope * z),
        lambda z, slope: torch.where(z > 0.0, 1.0, slope).to(z.dtype),
    ),
    # y = z if z > 0 else alpha (exp(z) - 1), y' = 1 if z > 0 else alpha exp(z)
    "elu": Activation(
        lambda z, alpha: torch.where(z <= 0.0, alpha * torch.expm1(z), z),
        lambda z, alpha: torch.where(z <= 0.0, alpha * torch.exp(z), 1.0),
    ),
    # y = z s(z), y' = s (1 + z (1 - s)), s the logistic function
    "silu": Activation(lambda z, _: z * torch.sigmoid(z), _silu_derivative),
    # y = z Phi(z), y' = Phi(z) + z phi(z), Phi and phi the normal distribution and density
    "gelu": Activation(_gelu_erf, _gelu_erf_derivative),
    # y = z/2 (1 + t), t = tanh(sqrt(2/pi) (z + 0.044715 z^3))
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
    # y = z min(max(z + 3, 0), 6) / 6, y' = 0 | z/3 + 1/2 | 1
    "hardswish": Activation(
        lambda z, _: z * (z + 3.0).clamp(min=0.0, max=6.0) / 6.0, _hardswish_derivative
    ),
}

#: Activations before which the kernels round z to the storage dtype, as torch's separate
#: operators do, so that the gradient's mask is theirs bit for bit.
PIECEWISE_LINEAR = frozenset({"identity", "relu", "relu6", "leaky_relu"})


class Forward(NamedTuple):
    """What :func:`forward` returns, all float64.

    ``output`` and ``pre_activation`` (z) have the input's shape; ``mean`` and ``invstd`` are what
    normalised the input, ``(C,)``; ``var`` is the biased variance, ``(C,)``.
    """

    output: Tensor
    pre_activation: Tensor
    mean: Tensor
    var: Tensor
    invstd: Tensor


class Gradients(NamedTuple):
    """What :func:`backward` returns, all float64: the gradients of the four differentiable inputs.

    ``input`` and ``residual`` have the input's shape, ``weight`` and ``bias`` are ``(C,)``.
    """

    input: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """A view of (C,) that broadcasts against (N, C, *)."""
    return values.double().view(1, -1, *([1] * (like.dim() - 2)))


def _reduced_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float64 (C,).

    Three passes: the mean, its correction by the mean of the deviations (which makes the mean of
    a constant channel that constant, exactly), and the variance about the corrected mean.
    Zero values per channel give nan for both.
    """
    x = input.detach().double()
    dims = _reduced_dims(x)
    rough = x.mean(dims)
    correction = (x - _per_channel(rough, x)).mean(dims)
    # A channel with an infinite value has no finite correction; its mean is the rough one.
    mean = torch.where(torch.isfinite(rough), rough + correction, rough)
    var = (x - _per_channel(mean, x)).square().mean(dims)
    return mean, var


def forward(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool,
    eps: float = 1e-5,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> Forward:
    """act(BN(input) + residual), in float64.

    ``training`` uses the statistics of the batch, otherwise ``running_mean`` and ``running_var``
    do. Buffers are only read: see :func:`update_running_statistics`. Nothing is rounded to a
    storage dtype in between.
    """
    x = input.detach().double()
    if training:
        mean, var = batch_statistics(x)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("evaluation needs running_mean and running_var")
        mean, var = running_mean.detach().double(), running_var.detach().double()
    invstd = (var + eps).rsqrt()
    z = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    if weight is not None:
        z = z * _per_channel(weight.detach(), x)
    if bias is not None:
        z = z + _per_channel(bias.detach(), x)
    if residual is not None:
        z = z + residual.detach().double()
    output = ACTIVATIONS[activation].function(z, activation_param)
    return Forward(output, z, mean, var, invstd)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    pre_activation: Tensor,
    *,
    training: bool,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> Gradients:
    """The gradients by explicit formula, in float64.

    With ``dz = dy act'(z)`` and sums over the n values of a channel:

        dresidual = dz
        dbias     = sum(dz)
        dweight   = sum(dz xhat)
        dx        = weight invstd (dz - dbias / n - xhat dweight / n)      training
        dx        = weight invstd dz                                       evaluation

    ``mean`` and ``invstd`` are those that normalised the input and ``pre_activation`` is z, all
    three as :func:`forward` returns them (or z as some kernel rounded it).
    """
    x = input.detach().double()
    dims = _reduced_dims(x)
    slope = ACTIVATIONS[activation].derivative(pre_activation.double(), activation_param)
    dz = grad_output.detach().double() * slope
    xhat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    grad_bias = dz.sum(dims)
    grad_weight = (dz * xhat).sum(dims)
    scale = invstd.double() if weight is None else weight.detach().double() * invstd.double()
    grad_input = dz
    if training:
        count = max(x.numel() // max(x.shape[1], 1), 1)
        grad_input = grad_input - _per_channel(grad_bias / count, x)
        grad_input = grad_input - xhat * _per_channel(grad_weight / count, x)
    grad_input = grad_input * _per_channel(scale, x)
    return Gradients(grad_input, dz, grad_weight, grad_bias)


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    num_batches_tracked: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The new running mean and variance, float64; the arguments are left as they are.

        new = (1 - m) old + m batch

    ``var`` is the biased variance of ``count`` values, and the unbiased one,
    ``var count / (count - 1)``, goes into the buffer. ``m`` is ``momentum``, or with
    ``momentum=None`` one over ``num_batches_tracked``, the number of batches *with* this one: the
    plain average of all batches. Without values (``count == 0``) nothing changes, and without a
    counter ``momentum=None`` is a momentum of zero, as in torch's modules.
    """
    old_mean, old_var = running_mean.detach().double(), running_var.detach().double()
    if count == 0:
        return old_mean.clone(), old_var.clone()
    if momentum is None:
        momentum = 1.0 / num_batches_tracked if num_batches_tracked else 0.0
    unbiased = var.double() * (count / (count - 1)) if count > 1 else var.double() * math.nan
    new_mean = (1.0 - momentum) * old_mean + momentum * mean.double()
    new_var = (1.0 - momentum) * old_var + momentum * unbiased
    return new_mean, new_var
