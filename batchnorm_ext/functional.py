"""Batch normalization as a function, with the activation and a residual fused.

Formulas, per channel over the n = N * spatial elements of the mini-batch
(Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167; torch.nn.functional.batch_norm):

    mean = sum(x) / n                    var = sum((x - mean)^2) / n
    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)
    running_mean = (1 - momentum) * running_mean + momentum * mean
    running_var  = (1 - momentum) * running_var  + momentum * var * n / (n - 1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm_ext import ops

__all__ = ["ACTIVATIONS", "batch_norm"]

#: The names of the activations that the kernels fuse, as the operators know them. (To callers,
#: gelu_tanh is gelu with approximate="tanh".)
ACTIVATIONS = (
    "identity",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
)


def _resolve_activation(
    activation: str | None, negative_slope: float, alpha: float, approximate: str
) -> tuple[str, float]:
    """The operators' name of an activation, and its one parameter (0.0 where it has none)."""
    if activation is None:
        return "identity", 0.0
    if activation == "gelu":
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate argument must be either none or tanh, got {approximate}")
        return ("gelu" if approximate == "none" else "gelu_tanh"), 0.0
    if activation not in ACTIVATIONS or activation == "gelu_tanh":
        known = ", ".join(name for name in ACTIVATIONS if name != "gelu_tanh")
        raise ValueError(f"activation should be None or one of {known}, but got {activation!r}")
    return activation, {"leaky_relu": negative_slope, "elu": alpha}.get(activation, 0.0)


def _activate(input: Tensor, activation: str, param: float) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(input, param)
    if activation == "elu":
        return F.elu(input, param)
    if activation == "gelu_tanh":
        return F.gelu(input, approximate="tanh")
    return input if activation == "identity" else getattr(F, activation)(input)


def _apply_torch(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    use_batch_stats: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_param: float,
    skip_nonfinite: bool = False,
    skip_recomputation: bool = False,
    allow_single_value: bool = False,
) -> Tensor:
    """The same in torch's own operators, which have every derivative and transform."""
    if use_batch_stats and skip_recomputation and torch._C._current_graph_task_id() != -1:
        running_mean = running_var = num_batches_tracked = None
    if use_batch_stats and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    momentum = 0.0 if momentum is None else momentum
    # Copies, because backward asks for the buffers that it was given.
    skips = use_batch_stats and skip_nonfinite
    copies = [(b, b.clone()) for b in (running_mean, running_var) if skips and b is not None]
    mean, var = (copy for _, copy in copies) if copies else (running_mean, running_var)
    if use_batch_stats and allow_single_value and input.numel() == input.size(1):
        output = _normalize_single_values(input, weight, bias, mean, momentum)
    else:
        output = F.batch_norm(input, mean, var, weight, bias, use_batch_stats, momentum, eps)
    if copies:
        finite = torch.stack([copy.isfinite() for _, copy in copies]).all(0)
        for running, copy in copies:
            running.copy_(copy.where(finite, running))
    if residual is not None:
        output = output + residual
    return _activate(output, activation, activation_param)


def _normalize_single_values(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    momentum: float,
) -> Tensor:
    """Batch norm of one value per channel, of variance 0, which torch refuses."""
    if running_mean is not None:
        running_mean.lerp_(input.detach().reshape(-1).to(running_mean.dtype), momentum)
    per_channel = (1, -1, *[1] * (input.dim() - 2))
    output = input - input
    if weight is not None:
        output = output * weight.reshape(per_channel)
    return output if bias is None else output + bias.reshape(per_channel)


_transforms_active = torch._C._are_functorch_transforms_active


def _apply(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    use_batch_stats: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_param: float,
    *flags: bool,
) -> Tensor:
    """What modules and `batch_norm` share: one operator call.

    `flags`, none or three, are those of `Policies.flags`.

    Where a functorch transform or forward-mode AD is active, which a C++ autograd Function
    refuses, torch's own operators compute the same.
    """
    if forward_ad._current_level >= 0 or _transforms_active():
        apply = _apply_torch
    else:
        apply = ops.batch_norm
    return apply(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        use_batch_stats,
        momentum,
        eps,
        activation,
        activation_param,
        *flags,
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    approximate: str = "none",
) -> Tensor:
    """`torch.nn.functional.batch_norm`, then `+ residual`, then `activation`, in one pass.

    Args:
        input: (N, C) or (N, C, *), float32, float64, bfloat16 or float16, any strides.
        running_mean: (C,), of any floating dtype. Used where `training` is False, updated in place
            where it is True.
        running_var: as `running_mean`; where `training` is True both may be None.
        weight: (C,), of any floating dtype; None stands for 1.
        bias: (C,), of any floating dtype; None stands for 0.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance; must be positive in training.
        residual: like `input` in shape and dtype, added before the activation.
        activation: None, "identity", "relu", "relu6", "leaky_relu" (with `negative_slope`),
            "elu" (with `alpha`), "silu", "gelu" (with `approximate`, "none" or "tanh") or
            "hardswish".

    Returns:
        Shape, dtype and memory layout of `input`.

    Raises:
        ValueError: one value per channel in training, a bad `eps`, rank or `activation`.
        RuntimeError: a length, shape, dtype or device that doesn't fit `input`.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
            alpha=alpha,
            approximate=approximate,
        )
    name, param = _resolve_activation(activation, negative_slope, alpha, approximate)
    return _apply(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        None,
        training,
        momentum,
        eps,
        name,
        param,
    )
