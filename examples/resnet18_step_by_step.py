"""A ResNet-18 on the CPU: converted, fused, in channels_last and compiled, timed at each step.

    python examples/resnet18_step_by_step.py [--steps 10] [--batch 8] [--size 128] [--no-compile]

Prints what was fused, how far each step's loss is from that of torch's batch norm, and the time of
a training step. It is the processor's time of one thread, so that what else runs on the machine
disturbs it little. Random images; two minutes, of which compiling takes most.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm_ext as bx


# --8<-- [start:network]
class BasicBlock(nn.Module):
    """conv-BN-ReLU, conv-BN, add, ReLU."""

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


def resnet18(classes: int = 1000) -> nn.Sequential:
    """The layers of He et al., "Deep Residual Learning for Image Recognition" (2015), table 1."""
    blocks: list[nn.Module] = []
    planes = 64
    for width in (64, 128, 256, 512):
        blocks += [BasicBlock(planes, width, width // planes), BasicBlock(width, width, 1)]
        planes = width
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(planes, classes),
    )
    # --8<-- [end:network]


# Any, because the types that torch declares for Module.to leave memory_format out.
def steps_of(torchs: Any, compiling: bool) -> dict[str, nn.Module]:
    """The network after each step, by the step's name; all of the same weights."""
    # --8<-- [start:convert]
    converted = bx.convert_batchnorm(copy.deepcopy(torchs))
    # --8<-- [end:convert]
    # --8<-- [start:fuse]
    fused = bx.fuse_batchnorm(copy.deepcopy(torchs))  # converts too
    print(bx.fusion_report(fused))
    # --8<-- [end:fuse]
    # --8<-- [start:channels_last]
    last = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    # --8<-- [end:channels_last]
    torchs_last = copy.deepcopy(torchs).to(memory_format=torch.channels_last)
    models = {
        "torch's": torchs,
        "converted": converted,
        "fused": fused,
        "fused, channels_last": last,
        "torch's, channels_last": torchs_last,
    }
    if compiling:
        # --8<-- [start:compile]
        compiled = torch.compile(copy.deepcopy(last), fullgraph=True)
        # --8<-- [end:compile]
        models["fused, channels_last, compiled"] = compiled
        models["torch's, channels_last, compiled"] = torch.compile(
            copy.deepcopy(torchs_last), fullgraph=True
        )
    return models


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item()


def main() -> None:
    """Prints the report, the differences and the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each network")
    parser.add_argument("--batch", type=int, default=8, help="images in a mini-batch")
    parser.add_argument("--size", type=int, default=128, help="height and width of an image")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(1000, (options.batch,))
    images_last = images.to(memory_format=torch.channels_last)

    models = steps_of(resnet18(), not options.no_compile)
    inputs = {name: images_last if "channels_last" in name else images for name in models}
    losses = {name: train_step(model, inputs[name], labels) for name, model in models.items()}

    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.steps):  # in turns, so that all see the same machine
        for name, model in models.items():
            begin = time.process_time()
            train_step(model, inputs[name], labels)
            times[name].append(1e3 * (time.process_time() - begin))

    print(
        f"\ntorch {torch.__version__}, 1 thread, "
        f"{torch.backends.cpu.get_cpu_capability()}; {options.batch} images of "
        f"{options.size}x{options.size}; {options.steps} steps of each, in turns\n"
    )
    print(f"{'a training step':<32} {'median':>9} {'quartiles':>17}  speed  loss off by")
    first, *_ = models
    for name, measured in times.items():
        low, median, high = quartiles(measured)
        speed = statistics.median(times[first]) / median
        print(
            f"{name:<32} {median:6.0f} ms {f'{low:.0f} to {high:.0f} ms':>17} "
            f"{speed:5.2f}x  {abs(losses[name] - losses[first]):.0e}"
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The quarter, the half and three quarters of the values lie below."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


if __name__ == "__main__":
    main()
