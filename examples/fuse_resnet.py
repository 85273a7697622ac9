"""Fuse a small ResNet whose blocks are written as torchvision's, and time a training step.

    python examples/fuse_resnet.py [--steps 20]

Prints what was fused and what was left, how far the results are from the unfused model's, and the
time per step of the model with torch's batch norm, converted, and fused. Random data; seconds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm_ext as bx


class BasicBlock(nn.Module):
    """conv-BN-ReLU, conv-BN, add, ReLU; one ReLU module for both."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) -> (N, planes, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet() -> nn.Sequential:
    """Four blocks for (N, 3, 32, 32) images, ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 32, 2),
        BasicBlock(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def main() -> None:
    """Prints the report, the difference and the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    torchs = resnet()
    models: dict[str, nn.Module] = {
        "torch": torchs,
        "converted": bx.convert_batchnorm(copy.deepcopy(torchs)),
        "fused": bx.fuse_batchnorm(copy.deepcopy(torchs)),
    }
    print(bx.fusion_report(models["fused"]))
    losses = {name: float(step(model, images, labels)) for name, model in models.items()}
    print(f"\nloss of torch's {losses['torch']:.6f}, of the fused one {losses['fused']:.6f}\n")

    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(steps):  # in turns, so that all see the same disturbances
        for name, model in models.items():
            begin = time.perf_counter()
            step(model, images, labels)
            times[name].append(1e3 * (time.perf_counter() - begin))
    torchs_time = statistics.median(times["torch"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:<10} {median:6.2f} ms per step, {torchs_time / median:.2f} times as fast")


if __name__ == "__main__":
    main()
