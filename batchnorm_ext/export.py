"""The operator of an exported program in torch's own operators, for runtimes without this package.

`torch.onnx.export` finds the decomposition by itself, in torch's table of all; for other runtimes
`decompositions` gives it to `ExportedProgram.run_decompositions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import meta_table, register_decomposition

from batchnorm_ext.functional import _activate
from batchnorm_ext.ops import fake_forward_eval

__all__ = ["decompositions"]

_FORWARD_EVAL = torch.ops.batchnorm_ext.forward_eval.default


@register_decomposition(_FORWARD_EVAL)
def _forward_eval(
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
) -> Any:
    if save_mask:  # for a backward pass: only the kernels read and write masks
        return NotImplemented
    output, _, _ = torch.ops.aten._native_batch_norm_legit_no_training(
        input, weight, bias, running_mean, running_var, 0.0, eps
    )
    if residual is not None:
        output = output + residual
    output = _activate(output, activation, activation_param)
    return output, input.new_empty(0, dtype=torch.uint8)


# Where sizes are symbols, torch asks a decomposition for an output's strides, even if a fake kernel
# is there; but not where this table has one.
meta_table[_FORWARD_EVAL] = fake_forward_eval


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table that leaves core ATen operators alone of a program exported in eval mode.

        program = torch.export.export(model.eval(), (x,))
        program = program.run_decompositions(batchnorm_ext.decompositions())

    It is `torch.export.default_decompositions()` with this package's operator added: batch norm by
    the running statistics, the residual, then the activation. The program then needs neither this
    package nor its kernels. `torch.onnx.export` does the same without being told.

    Operators that normalise by statistics of the batch (in training mode, or without running
    statistics) stay what they are.

    The program takes the dtypes that torch's batch norm takes: parameters of the input's dtype, or
    float32 ones with a bfloat16 or float16 input.

    Returns:
        A new table, to be changed at will.
    """
    table = torch.export.default_decompositions()
    table[_FORWARD_EVAL] = _forward_eval
    return table
