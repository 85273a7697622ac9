"""The operators `torch.ops.batchnorm_ext.*`: loads them and describes them to tracing.

A fake kernel tells `torch.compile`, `torch.export` and meta tensors what an operator returns,
without data. Schemas stand in csrc/bindings/schema.h.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm_ext.inductor import tell_inductor

_REBUILD = "pip install --force-reinstall --no-deps ."

try:
    from batchnorm_ext import _C
except ImportError as error:
    raise ImportError(
        f"batchnorm_ext: its compiled part cannot be loaded with torch {torch.__version__} "
        f"({error}). It has to be built for the torch that is installed; in the source folder: "
        f"{_REBUILD}"
    ) from error

_built_for = str(_C.build_info()["torch_version"]).partition("+")[0]
if _built_for != torch.__version__.partition("+")[0]:
    raise ImportError(
        f"batchnorm_ext: built for torch {_built_for}, but torch {torch.__version__} is "
        f"installed; in the source folder: {_REBUILD}"
    )

if "BATCHNORM_EXT_CPU" in os.environ:
    _C.set_cpu_capability(os.environ["BATCHNORM_EXT_CPU"])

__all__ = ["batch_norm"]

#: The differentiable operator behind every module and function of this package.
batch_norm = torch.ops.batchnorm_ext.batch_norm.default


def _is_channels_last(tensor: Tensor) -> bool:
    """True where elements lie in memory as those of a contiguous (N, *, C) tensor."""
    expected = 1
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if tensor.size(dim) > 1:
            if tensor.stride(dim) != expected:
                return False
            expected = expected * tensor.size(dim)
    return True


def _in_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    """An output of this shape and dtype in one of the two layouts that kernels know."""
    if not channels_last:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    n, c, *spatial = tensor.shape
    rows = torch.empty((n, *spatial, c), dtype=tensor.dtype, device=tensor.device)
    return rows.movedim(-1, 1)


def _empty_like(tensor: Tensor) -> Tensor:
    """An output for this input: in its memory layout if that is one of the two that kernels know.

    Mirrors in_some_layout() of csrc/bindings/layout.h.
    """
    if tensor.is_contiguous():
        return _in_layout(tensor, channels_last=False)
    neighbours = tensor.size(1) > 1 and tensor.stride(1) == 1
    return _in_layout(tensor, channels_last=neighbours or _is_channels_last(tensor))


_PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu")


def _is_host_memory(tensor: Tensor) -> bool:
    """Mirrors kHostMemory of the backends in csrc/bindings."""
    return tensor.device.type != "cuda"


def _empty_mask(output: Tensor, wanted: bool, activation: str) -> Tensor:
    """Mirrors mask_shape() of csrc/bindings/operators.h."""
    n, c = output.shape[:2]
    s = math.prod(output.shape[2:])
    flat = _is_host_memory(output)
    rows: tuple[int, ...]
    if not (wanted and activation in _PIECEWISE_LINEAR):
        return torch.empty(0, dtype=torch.uint8, device=output.device)
    if c == 1:
        rows = (1, 1, (n * s + 7) // 8)
    elif s == 1:
        rows = (n, (c + 7) // 8)
    elif flat:
        rows = (n, (c + 7) // 8, (s + 7) // 8, 8)
    elif output.is_contiguous():
        rows = (n, c, (s + 7) // 8)
    else:
        rows = (n * s, (c + 7) // 8)
    shape = (math.prod(rows) + 1,) if flat else rows
    return torch.empty(shape, dtype=torch.uint8, device=output.device)


def _check_device(input: Tensor, name: str, value: Tensor) -> None:
    torch._check(
        value.device == input.device,
        lambda: (
            f"Expected all tensors to be on the same device, but {name} is on {value.device} "
            f"and input is on {input.device}"
        ),
    )


def _check_channels(input: Tensor, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None:
            _check_device(input, name, value)
            torch._check(
                value.numel() == input.size(1),
                lambda name=name, value=value: (
                    f"{name} should contain {input.size(1)} elements not {value.numel()}"
                ),
            )


def _check_residual(input: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    _check_device(input, "residual", residual)
    torch._check(
        residual.shape == input.shape and residual.dtype == input.dtype,
        lambda: (
            f"residual should have the shape and dtype of input, {tuple(input.shape)} "
            f"{input.dtype}, but got {tuple(residual.shape)} {residual.dtype}"
        ),
    )


@torch.library.register_fake("batchnorm_ext::forward_train")
def _(
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
    save_mask: bool,
    skip_nonfinite: bool = False,
    skip_recomputation: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tell_inductor()
    _check_channels(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    _check_residual(input, residual)
    if num_batches_tracked is not None:
        _check_device(input, "num_batches_tracked", num_batches_tracked)
    output = _empty_like(input)
    mean = torch.empty(input.size(1), dtype=torch.float64, device=input.device)
    return output, mean, torch.empty_like(mean), _empty_mask(output, save_mask, activation)


@torch.library.register_fake("batchnorm_ext::forward_eval")
def fake_forward_eval(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    activation_param: float,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    tell_inductor()
    _check_channels(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    _check_residual(input, residual)
    output = _empty_like(input)
    return output, _empty_mask(output, save_mask, activation)


@torch.library.register_fake("batchnorm_ext::eval_statistics")
def _(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = torch.empty(running_mean.numel(), dtype=torch.float64, device=running_mean.device)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("batchnorm_ext::backward")
def _(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    training: bool,
    activation: str,
    activation_param: float,
    output_mask: Sequence[bool],
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tell_inductor()

    def gradient(needed: bool, like: Tensor | None) -> Tensor:
        if needed and like is not None:
            return torch.empty_like(like)
        return grad_output.new_empty(0)

    dense = _empty_like(grad_output if input is None else input)
    return (
        gradient(output_mask[0], dense),
        gradient(output_mask[1], dense),
        gradient(output_mask[2], weight),
        gradient(output_mask[3], bias),
    )


@torch.library.register_fake("batchnorm_ext::moments")
def _(input: Tensor) -> Tensor:
    tell_inductor()
    return torch.empty(2 * input.size(1) + 1, dtype=torch.float64, device=input.device)


@torch.library.register_fake("batchnorm_ext::combine_moments")
def _(
    gathered: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    input_size: Sequence[int],
    skip_nonfinite: bool = False,
    skip_recomputation: bool = False,
    allow_single_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = gathered.size(1) // 2
    _check_channels(gathered[:, :channels], running_mean=running_mean, running_var=running_var)
    mean = gathered.new_empty(channels)
    return mean, torch.empty_like(mean), torch.empty_like(mean), gathered.new_empty(1)
