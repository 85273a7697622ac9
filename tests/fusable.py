"""Models in the forms that are in use, small, and how two of them are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm_ext as bx


def conv(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(a, b, stride=stride), nn.BatchNorm2d(b)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(b, b), nn.BatchNorm2d(b)
        self.downsample = (
            nn.Sequential(conv(a, b, 1, stride), nn.BatchNorm2d(b)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(a, b, 1), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = conv(b, b, 3, stride), nn.BatchNorm2d(b)
        self.conv3, self.bn3 = conv(b, 4 * b, 1), nn.BatchNorm2d(4 * b)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut, self.bn_s = conv(a, 4 * b, 1, stride), nn.BatchNorm2d(4 * b)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.bn_s(self.shortcut(x))
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out = torch.add(out, identity)
        return out.relu_()


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """MobileNetV3's and EfficientNet's block: no activation after the add."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.expand = nn.Sequential(conv(width, 8, 1), nn.BatchNorm2d(8), activation())
        self.depthwise, self.bn1 = conv(8, 8, groups=8), nn.BatchNorm2d(8, momentum=0.01)
        self.act, self.se = activation(), SqueezeExcite(8)
        self.project, self.bn2 = conv(8, width, 1), nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.act(self.bn1(self.depthwise(self.expand(x)))))
        return x + self.bn2(self.project(y))


class DenseLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), conv(width, 4, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], 1)


def double_conv(a: int, b: int) -> nn.Sequential:
    relu = nn.LeakyReLU(0.2, inplace=True)  # one object at two places
    return nn.Sequential(conv(a, b), nn.BatchNorm2d(b), relu, conv(b, b), nn.BatchNorm2d(b), relu)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([double_conv(3, 4), double_conv(4, 8)])
        self.up, self.merge = nn.ConvTranspose2d(8, 4, 2, 2), double_conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down[0](x)
        y = self.up(self.down[1](F.max_pool2d(skip, 2)))
        return self.merge(torch.cat([skip, y], 1))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.norms = nn.ModuleDict({"a": nn.BatchNorm3d(4), "b": nn.BatchNorm3d(4)})
        self.act = nn.ELU(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norms["a"](self.conv(x)))
        y = F.gelu(self.norms["b"](y), approximate="tanh")
        return F.elu(y, 2.0)


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for activation in (nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Identity()):
        layers += [nn.Linear(6, 6), nn.BatchNorm1d(6, affine=len(layers) > 0), activation]
    return nn.Sequential(*layers)


class AskingLayer(DenseLayer):
    """torchvision's way: the layers before come as a list, or as one tensor."""

    def joined(self, features: list[Tensor]) -> Tensor:
        return self.conv1(F.relu(self.norm1(torch.cat(features, 1))))

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        y = self.joined([x] if isinstance(x, Tensor) else x)
        return self.conv2(torch.relu(self.norm2(y)))


class AskingDenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = AskingLayer(3), AskingLayer(5)
        self.features = nn.Sequential(conv(7, 4), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        features = [x, self.first(x)]
        features.append(self.second(features))
        return F.relu(self.features(torch.cat(features, 1)), inplace=True)


class Branches(nn.Module):
    """Batch norms at the ends of Sequentials, and what follows outside: an add, an activation."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Sequential(conv(a, b), nn.BatchNorm2d(b), nn.ReLU6(inplace=True)),
            nn.Sequential(conv(b, b), nn.BatchNorm2d(b)),
        )
        self.shortcut = nn.Sequential() if a == b else nn.Sequential(conv(a, b), nn.BatchNorm2d(b))
        self.project = nn.Sequential(conv(b, b), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.branch(x) + self.shortcut(x))
        return y + self.project(y)


class NormAct(nn.BatchNorm2d):
    """timm's way: a batch norm whose own forward goes on."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__(width)
        self.drop: nn.Module = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"4 dimensions, not {x.ndim}")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        kept = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(self.drop(x))


class NormActBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, 8), NormAct(8, nn.SiLU(inplace=True))
        self.conv2, self.bn2 = conv(8, width), NormAct(width, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.bn = BasicBlock(3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return F.relu(self.bn(x)) if x.mean() > -1e9 else x


IMAGE, VOLUME, ROWS = (4, 3, 8, 8), (4, 2, 4, 4, 4), (16, 6)

#: The model, its input, and how many places are fused (of them with a residual), unpaired, refused.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int, int, int]]] = {
    "resnet18": (
        lambda: ResNet(BasicBlock(4, 4), BasicBlock(4, 8, 2), width=8),
        IMAGE,
        (5, 2, 1, 0),
    ),
    "resnet50": (
        lambda: ResNet(Bottleneck(4, 4), Bottleneck(16, 4, 2), width=16),
        IMAGE,
        (7, 2, 2, 0),
    ),
    "mobilenetv3": (
        lambda: nn.Sequential(Inverted(3, nn.Hardswish), Inverted(3, nn.ReLU)),
        IMAGE,
        (6, 2, 0, 0),
    ),
    "efficientnet": (lambda: Inverted(3, nn.SiLU), IMAGE, (3, 1, 0, 0)),
    "densenet": (
        lambda: nn.Sequential(DenseLayer(3), DenseLayer(5), nn.BatchNorm2d(7), nn.ReLU()),
        IMAGE,
        (5, 0, 0, 0),
    ),
    "asking densenet": (AskingDenseNet, IMAGE, (5, 0, 0, 0)),
    "branches": (
        lambda: nn.Sequential(Branches(3, 4), Branches(4, 4)),
        IMAGE,
        (6, 4, 1, 0),
    ),
    "norm and activation": (lambda: NormActBlock(3), IMAGE, (2, 1, 0, 0)),
    "unet": (UNet, IMAGE, (6, 0, 0, 0)),
    "volume": (Volume, VOLUME, (2, 0, 0, 0)),
    "mlp": (mlp, ROWS, (4, 0, 1, 0)),
    "data dependent": (DataDependent, IMAGE, (2, 1, 0, 1)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model in float64, with affine parameters that are not 1 and 0, and an input."""
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model, torch.randn(shape, dtype=torch.float64)


def two_steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, input and parameter gradients of two training steps, buffers, the output in eval."""
    results = []
    model.train()
    for step in range(2):
        leaf = (x + step).requires_grad_()
        y = model(leaf * 1.0)  # not a leaf, so that it may be written to
        model.zero_grad()
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert leaf.grad is not None
        gradients = {n: p.grad for n, p in sorted(model.named_parameters()) if p.grad is not None}
        results += [y.detach(), leaf.grad, *gradients.values()]
    results += [b.clone() for _, b in sorted(model.named_buffers())]
    with torch.no_grad():
        results.append(model.eval()(x))
    return results


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """To rounding. float64 leaves 1e-16, which a few layers and small batches' 1 / std magnify.

    A true gradient of zero (a bias before a batch norm) is rounding alone: hence the absolute part.
    """
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


class Site(nn.Module):
    """conv -> bn -> whatever `then` does with the module, the output, and the input."""

    def __init__(self, then: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.act, self.gate = nn.ReLU(), nn.Parameter(torch.randn(3, 1, 1))
        self.scale = nn.Buffer(torch.ones(3, 1, 1))
        self.seen: list[Any] = []
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.bn(self.conv(x)), x)


def outcome(model: nn.Module) -> bx.FusionReport:
    """Check results against the model as it was; the report."""
    model = model.double()
    x = images()
    expected = two_steps(copy.deepcopy(model), x)
    bx.fuse_batchnorm(model)
    assert_same(two_steps(model, x), expected)
    return bx.fusion_report(model)


def images() -> Tensor:
    return torch.randn(IMAGE, dtype=torch.float64)
