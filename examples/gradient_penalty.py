"""WGAN-GP's critic: the norm of a gradient is part of the loss, so backward is derived again.

    python examples/gradient_penalty.py

With `create_graph=True` too the gradients come from this package's kernels, and so do their
derivatives.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import batchnorm_ext as bx


def penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """How far the gradient between real and made-up images is from length 1."""
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def main() -> None:
    """Prints whether the penalty has torch's gradient, then how the critic learns."""
    torch.manual_seed(0)
    torchs = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)),
    )
    critic = bx.fuse_batchnorm(copy.deepcopy(torchs))
    images = torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8), torch.rand(16, 1, 1, 1)
    expected, found = (
        torch.autograd.grad(penalty(model, *images), model.get_parameter("0.weight"))[0]
        for model in (torchs, critic)
    )
    print("the penalty's gradient is torch's:", torch.allclose(found, expected, atol=1e-6))

    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    for step in range(30):
        optimizer.zero_grad()
        real, fake = torch.randn(16, 3, 8, 8) * 0.5 + 1, torch.randn(16, 3, 8, 8)
        scores = critic(torch.cat([real, fake])).chunk(2)  # one batch, so one set of statistics
        distance = scores[0].mean() - scores[1].mean()
        excess = penalty(critic, real, fake, torch.rand(16, 1, 1, 1))
        (10 * excess - distance).backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: distance {distance:.3f}, penalty {excess:.4f}")


if __name__ == "__main__":
    main()
