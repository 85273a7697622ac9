"""Single layers, their inputs and their buffers, where the tests have their tensors (DEVICE)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import KINDS
from strategies import DEVICE
from torch import Tensor, nn

import batchnorm_ext as bx

OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(4, 6), (5, 6, 3), (4, 6, 5, 3), (40, 6, 2, 2)]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])


def norm_for(shape: tuple[int, ...], act: bool = False, **options: Any) -> Any:
    """A layer for inputs of this shape, with running statistics that are not the initial ones."""
    name = f"BatchNorm{'Act' if act else ''}{max(len(shape) - 2, 1)}d"
    norm = getattr(bx, name)(shape[1], **options).to(DEVICE)
    norm.running_mean.copy_(torch.linspace(-1, 1, shape[1]))
    norm.running_var.copy_(torch.linspace(0.5, 2, shape[1]))
    return norm


def values(shape: tuple[int, ...], channels_last: bool = False, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, **options).to(DEVICE)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def buffers(norm: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}
