"""Activation checkpointing: running statistics that move once in a step, as they should, not twice.

python examples/checkpointing.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm_ext as bx


def one_step(block: nn.Sequential, images: Tensor, checkpointed: bool) -> tuple[int, Tensor]:
    """Batches that the norm has counted after a forward and backward pass, and its mean."""
    block = copy.deepcopy(block)
    x = images.clone().requires_grad_()
    y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    y.square().mean().backward()
    return int(block.get_buffer("1.num_batches_tracked")), block.get_buffer("1.running_mean")


def main() -> None:
    """Prints how far the statistics of three ways are from those without checkpointing."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    torchs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    default = bx.convert_batchnorm(copy.deepcopy(torchs))
    once = bx.set_policies(copy.deepcopy(default), recomputation="skip")

    _, expected = one_step(torchs, images, checkpointed=False)
    for name, block in (("torch", torchs), ("default", default), ("recomputation=skip", once)):
        batches, mean = one_step(block, images, checkpointed=True)
        error = float((mean - expected).abs().max())
        print(f"{name:<20} batches counted: {batches}, running_mean is off by {error:.4f}")


if __name__ == "__main__":
    main()
