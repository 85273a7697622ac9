"""Networks with batch norm in plain torch, whose whole training steps are measured.

Layers and widths are those of the papers that are named, heads and initialisation torch's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.networks import TORCH, Normalization, Transformer

Activation = Callable[[], nn.Module]


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *,
    groups: int = 1, activation: Activation | None = _relu,
) -> nn.Sequential:  # fmt: skip
    """A convolution that keeps the image's size (divided by the stride), batch norm, activation."""
    padding = (kernel - 1) // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    last = [] if activation is None else [activation()]
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *last)


class Residual(nn.Module):
    """act(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to what the body makes of it."""
        return self.activation(self.body(x) + self.shortcut(x))


def _head(features: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 1000)]


# ---- ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385) ----


def _basic(inputs: int, width: int, stride: int) -> tuple[nn.Module, int]:
    layers = conv_norm(inputs, width, 3, stride), conv_norm(width, width, 3, activation=None)
    return nn.Sequential(*layers), width


def _bottleneck(inputs: int, width: int, stride: int) -> tuple[nn.Module, int]:
    narrow = conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride)
    return nn.Sequential(*narrow, conv_norm(width, 4 * width, 1, activation=None)), 4 * width


def _resnet(
    depths: Iterable[int], body: Callable[[int, int, int], tuple[nn.Module, int]]
) -> nn.Sequential:
    layers: list[nn.Module] = [conv_norm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            layer, outputs = body(inputs, 64 << stage, stride)
            same = stride == 1 and inputs == outputs
            shortcut = conv_norm(inputs, outputs, 1, stride, activation=None)
            layers.append(Residual(layer, nn.Identity() if same else shortcut, _relu()))
            inputs = outputs
    return nn.Sequential(*layers, *_head(inputs))


def resnet18() -> nn.Module:
    """ResNet-18 for images (N, 3, H, W)."""
    return _resnet((2, 2, 2, 2), _basic)


def resnet50() -> nn.Module:
    """ResNet-50 for images (N, 3, H, W)."""
    return _resnet((3, 4, 6, 3), _bottleneck)


# ---- MobileNetV3 small (Howard et al. 2019, https://arxiv.org/abs/1905.02244, table 2) ----


class SqueezeExcite(nn.Module):
    """Weighs channels by what the means over the plane say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        means = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(means))))


def mobilenet_v3_small() -> nn.Module:
    """MobileNetV3 small for images (N, 3, H, W)."""
    # kernel, expanded, outputs, squeezed, hard swish, stride
    rows = (
        *((3, 16, 16, True, False, 2), (3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1)),
        *((5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1)),
        *((5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1), (5, 288, 96, True, True, 2)),
        *((5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1)),
    )
    layers: list[nn.Module] = [conv_norm(3, 16, 3, 2, activation=nn.Hardswish)]
    inputs = 16
    for kernel, expanded, outputs, squeezed, swish, stride in rows:
        activation: Activation = nn.Hardswish if swish else _relu
        body = nn.Sequential(
            *([conv_norm(inputs, expanded, 1, activation=activation)] if expanded > inputs else []),
            conv_norm(expanded, expanded, kernel, stride, groups=expanded, activation=activation),
            *([SqueezeExcite(expanded)] if squeezed else []),
            conv_norm(expanded, outputs, 1, activation=None),
        )
        same = stride == 1 and inputs == outputs
        layers.append(Residual(body, nn.Identity(), nn.Identity()) if same else body)
        inputs = outputs
    layers.append(conv_norm(inputs, 576, 1, activation=nn.Hardswish))
    return nn.Sequential(*layers, *_head(576))


# ---- DenseNet-121 (Huang et al. 2016, https://arxiv.org/abs/1608.06993) ----


def _norm_conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), _relu(), conv)


class Dense(nn.Module):
    """x with `growth` channels more."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm_conv(inputs, 4 * growth, 1), _norm_conv(4 * growth, growth, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + growth, H, W)."""
        return torch.cat([x, self.layers(x)], 1)


def densenet121(growth: int = 32) -> nn.Module:
    """DenseNet-121 for images (N, 3, H, W)."""
    channels = 2 * growth
    layers: list[nn.Module] = [conv_norm(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage > 0:
            layers += [_norm_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(Dense(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), _relu(), *_head(channels))


# ---- U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597), with batch norm ----


class UNet(nn.Module):
    """Segments images (N, 3, H, W) whose sides 16 divides."""

    def __init__(self, width: int = 32, levels: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            self._twice(before, after) for before, after in itertools.pairwise([3, *widths])
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * after, after, 2, 2) for after in reversed(widths[:-1])
        )
        self.join = nn.ModuleList(self._twice(2 * after, after) for after in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv_norm(inputs, outputs, 3), conv_norm(outputs, outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 2, H, W)."""
        kept = []
        for layer in self.down[:-1]:
            x = layer(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


def transformer() -> nn.Module:
    """An encoder with batch norm over tokens: (N, 1, 196, 64)."""
    return Transformer(Normalization(TORCH), pixels=64, length=196, width=256, layers=4)


@dataclass(frozen=True)
class Whole:
    """A network, and the sizes of its input."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]


NETWORKS = {
    "resnet18": Whole(resnet18, (8, 3, 224, 224)),
    "resnet50": Whole(resnet50, (8, 3, 224, 224)),
    "mobilenet_v3_small": Whole(mobilenet_v3_small, (16, 3, 224, 224)),
    "densenet121": Whole(densenet121, (4, 3, 224, 224)),
    "unet": Whole(UNet, (2, 3, 128, 128)),
    "transformer": Whole(transformer, (16, 1, 196, 64)),
}
