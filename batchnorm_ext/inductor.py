"""How inductor calls the operators: what it is told of them, once it is loaded.

By default it hands an operator that it does not know the strides that eager mode would. It also
makes convolutions channels-last whatever a model's layout is, so that a copy would come before each
batch norm of a contiguous model, and another after it. The kernels take both layouts. Only a mask
on CUDA has the shape of its layout, so that a call with one is as in eager mode.

The names taken from inductor are private. Where one is missing, the default stays, which is right
too, but slower.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["tell_inductor"]

_OPERATORS = ("forward_train", "forward_eval", "backward", "moments")
_PRIVATE = ("FALLBACK_ALLOW_LIST", "add_layout_constraint", "constrain_to_fake_tensors")


def tell_inductor() -> None:
    """Tell inductor, if it is loaded, to call the operators, and in which layouts.

    Listed as a fallback an operator is called even if it has a decomposition; otherwise inductor
    refuses that where the variable CI is set.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if not all(hasattr(lowering, name) for name in _PRIVATE):
        return
    if f"batchnorm_ext::{_OPERATORS[0]}" in lowering.FALLBACK_ALLOW_LIST:
        return
    for name in _OPERATORS:
        operator = getattr(torch.ops.batchnorm_ext, name).default
        lowering.add_layout_constraint(operator, _constrain)
        lowering.FALLBACK_ALLOW_LIST.add(f"batchnorm_ext::{name}")


def _constrain(node: fx.Node, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, in eager mode's strides where a mask has the shape of those."""
    if not _has_shaped_mask(node) or "eager_input_vals" not in node.meta:
        return args, kwargs
    from torch._inductor.lowering import constrain_to_fake_tensors

    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given, named = node.meta["eager_input_vals"]
    eager = dict(zip(names, given, strict=False)) | named
    positional = tuple(eager.get(name) for name in names[: len(args)])
    return constrain_to_fake_tensors(args, kwargs, positional, {k: eager.get(k) for k in kwargs})


def _has_shaped_mask(node: fx.Node) -> bool:
    """Whether a mask with the shape of a layout is among arguments or outputs."""
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    outputs = node.meta["val"]
    values += outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return any(isinstance(v, Tensor) and v.dtype == torch.uint8 and v.dim() > 1 for v in values)
