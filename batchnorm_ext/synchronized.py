"""Batch norm whose mini-batch is spread over the processes of a group.

Forward, each process:
    1. mean, sum of squared deviations and count of its own part, per channel   (moments)
    2. one all_gather of these, 2 C + 1 numbers of float64
    3. those of the whole mini-batch, in the order of ranks, and the running statistics
       (combine_moments)
    4. y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)         (forward_eval)

Backward, with dz = dy * act'(z):
    1. sums of dz * xhat and dz over its own part: its gradients of weight and bias
    2. one all_reduce of these, 2 C numbers
    3. dx = weight * invstd * (dz - [sum(dz) + xhat * sum(dz * xhat)] / n) with the sums of all

The device is never waited for. Collectives are functional ones, by the group's name, which is what
torch.compile takes; they are issued for every process, one with an empty part included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm_ext.functional import _activate
from batchnorm_ext.ops import _PIECEWISE_LINEAR

_ops = torch.ops.batchnorm_ext


class Group(NamedTuple):
    """Whom a layer shares its statistics with."""

    name: str  # of the process group
    size: int
    layer: str  # for messages


def apply_synchronized(
    group: Group,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_param: float,
    *flags: bool,
) -> tuple[Tensor, Tensor]:
    """As `functional._apply` in training, over the processes of `group`.

    Returns:
        The output for this process's `input`, and the count of values per channel on all, (1,).
    """
    _check_eps(eps)
    with torch.no_grad():
        gathered = _all_gather(_ops.moments(input), group)
        statistics = _ops.combine_moments(
            gathered,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
            input.shape,
            *flags,
        )
    output = _Normalize.apply(
        input, residual, weight, bias, *statistics, eps, activation, activation_param, group
    )
    return output, statistics[3]


def _check_eps(eps: float) -> None:
    # Before anything is sent: a process that refuses alone would leave the others waiting.
    if not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def _all_gather(values: Tensor, group: Group) -> Tensor:
    """(n,) of each process, to (group.size, n) on every one."""
    gathered = _exchange("all_gather_into_tensor", values, group.size, group=group)
    return gathered.view(group.size, -1)


def _all_reduce(values: Tensor, group: Group) -> Tensor:
    return _exchange("all_reduce", values.contiguous(), "sum", group=group)


def _exchange(collective: str, *arguments: Any, group: Group) -> Tensor:
    functions = torch.ops._c10d_functional
    function = getattr(functions, collective)
    if torch.compiler.is_compiling():
        return functions.wait_tensor(function(*arguments, group.name))
    try:
        return functions.wait_tensor(function(*arguments, group.name))
    except RuntimeError as error:
        raise RuntimeError(
            f"{group.layer}: exchanging statistics with the other {group.size - 1} processes of "
            f"its group failed; has one of them ended, or not called this layer? ({error})"
        ) from error


class _AllReduce(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AllReduce.apply(gradient, ctx.group), None


class _Normalize(torch.autograd.Function):
    """The output by given statistics, which are functions of the inputs of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        invstd: Tensor,
        count: Tensor,
        eps: float,
        activation: str,
        activation_param: float,
        group: Group,
    ) -> Tensor:
        masked = residual is not None and activation in _PIECEWISE_LINEAR
        output, mask = _ops.forward_eval(
            input, residual, weight, bias, mean, var, eps, activation, activation_param, masked
        )
        kept = None if masked or activation == "identity" else residual
        ctx.save_for_backward(input, kept, weight, bias, mean, invstd, count, mask)
        ctx.eps, ctx.group = eps, group
        ctx.activation = activation, activation_param
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        nothing = (None,) * 8
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, grad_output), *nothing
        input, residual, weight, bias, mean, invstd, count, mask = ctx.saved_tensors
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        # In float64, as the sums are to be.
        parameters = (
            one if weight is None else weight.double(),
            zero if bias is None else bias.double(),
        )
        call = (grad_output, input, residual, *parameters, mean, invstd, mask, True)
        totals = grad_weight = grad_bias = None
        if needs_input or needs_weight or needs_bias:
            sums = _ops.backward(*call, *ctx.activation, (False, False, True, True))[2:]
            if needs_input:
                reduced = _all_reduce(torch.cat([s.reshape(-1) for s in sums]), ctx.group)
                totals = torch.cat([reduced, count])
            if needs_weight:
                grad_weight = sums[0].reshape(weight.shape).to(weight.dtype)
            if needs_bias:
                grad_bias = sums[1].reshape(bias.shape).to(bias.dtype)
        wanted = (needs_input, needs_residual, False, False)
        grad_input, grad_residual = _ops.backward(*call, *ctx.activation, wanted, totals)[:2]
        return (
            grad_input if needs_input else None,
            grad_residual if needs_residual else None,
            grad_weight,
            grad_bias,
            *nothing,
        )


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    """What create_graph=True asks for, by torch's operators, communication among them."""
    input, residual, weight, bias, mean, _, count, _ = ctx.saved_tensors
    activation, param = ctx.activation
    if activation in _PIECEWISE_LINEAR:
        slope = param if activation == "leaky_relu" else 0.0
        dropped = grad_output * slope if slope else torch.zeros_like(grad_output)
        grad_output = torch.where(_is_kept(ctx, grad_output), grad_output, dropped)
        activation = "identity"
    if activation == "identity":
        residual = None  # nothing but its own gradient depends on it
    # Views, so that the derivative stops here.
    arguments: list[Any] = [
        v if v is None else v.view_as(v) for v in (input, residual, weight, bias)
    ]
    needed = ctx.needs_input_grad[:4]
    wanted = [v for v, n in zip(arguments, needed, strict=True) if n and v is not None]
    output = _by_torch(arguments, mean, count, ctx.eps, activation, param, ctx.group)
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    gradients = [
        next(found) if n and v is not None else None for v, n in zip(arguments, needed, strict=True)
    ]
    if needed[1] and residual is None:
        gradients[1] = grad_output
    return gradients


def _is_kept(ctx: Any, grad_output: Tensor) -> Tensor:
    """Where a piecewise-linear activation let an element pass in forward, as the kernels saw it."""
    *saved, mean, invstd, _, mask = ctx.saved_tensors
    ones = torch.ones_like(grad_output)
    with torch.no_grad():
        wanted = (False, True, False, False)
        call = (ones, *saved, mean, invstd, mask, True, ctx.activation[0], 0.0, wanted)
        return _ops.backward(*call)[1] == 1


def _by_torch(
    arguments: list[Any],
    mean: Tensor,
    count: Tensor,
    eps: float,
    activation: str,
    activation_param: float,
    group: Group,
) -> Tensor:
    """The output of input, residual, weight and bias, with the statistics as part of the graph."""
    input, residual, weight, bias = arguments
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    dims = [0, *range(2, input.dim())]
    per_channel = (1, -1, *[1] * (input.dim() - 2))

    def average(values: Tensor) -> Tensor:
        total = _AllReduce.apply(values.sum(dims), group)
        return (total / count.to(dtype)).reshape(per_channel)

    # The mean as a constant first, which changes no derivative and keeps the digits of x.
    centered = input.to(dtype) - mean.to(dtype).reshape(per_channel)
    centered = centered - average(centered)
    output = centered * (average(centered.square()) + eps).rsqrt()
    if weight is not None:
        output = output * weight.to(dtype).reshape(per_channel)
    if bias is not None:
        output = output + bias.to(dtype).reshape(per_channel)
    if residual is not None:
        output = output + residual.to(dtype)
    return _activate(output.to(input.dtype), activation, activation_param)
