"""A call of batch norm with activation and residual: ours, and torch's separate operators."""

from __future__ import annotations

from typing import Any

import torch
from strategies import ACTIVATION_PARAMS, activation_arguments
from torch import Tensor
from torch.nn import functional as F

from batchnorm_ext import batch_norm, functional

#: Activations whose second derivative exists (but for points that random values don't hit).
NAMES = list(ACTIVATION_PARAMS)
BOTH = ("contiguous", "channels_last")
Statistics = tuple[Tensor | None, Tensor | None]


def composed(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    name: str = "identity",
) -> Tensor:
    """torch's separate operators."""
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return functional._activate(y, name, ACTIVATION_PARAMS[name])


def ours(*args: Any, name: str = "identity", **kwargs: Any) -> Tensor:
    """Our function, with the activation by its operator's name."""
    kwargs |= activation_arguments(name, ACTIVATION_PARAMS[name])
    return batch_norm(*args, **kwargs)


def double(*shape: int) -> Tensor:
    """Random values."""
    return torch.randn(*shape, dtype=torch.float64)
