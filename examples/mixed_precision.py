"""Train a fused network under autocast, in bfloat16 and in float16 with a GradScaler.

    python examples/mixed_precision.py

The convolutions give 16-bit values, the norm's parameters and buffers stay float32, and the
statistics are summed up in more than either.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import batchnorm_ext as bx


def network() -> nn.Sequential:
    """For (N, 3, 16, 16) images, ten classes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), bx.BatchNormAct2d(16, "relu")),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def train(dtype: torch.dtype, scaler: torch.amp.GradScaler) -> None:
    """Prints what the norm returns and what it keeps, and how the training went."""
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    model = network()
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, scales = [], []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    print(f"norm: {seen[0]} out, {model[1].weight.dtype} weight, ", end="")
    print(f"{model[1].running_var.dtype} running_var")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, scale {scales[0]:g} -> {scales[-1]:g}")


if __name__ == "__main__":
    train(torch.bfloat16, torch.amp.GradScaler("cpu", enabled=False))
    # Too large a scale to begin with: steps are left out until the gradients fit float16.
    train(torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**24))
