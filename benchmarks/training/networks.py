"""The networks, with normalization as a switch.

Batch norm stands after the linear or convolution layer and before the activation, and the residual
is added between the two: act(BN(x) + residual). Without normalization a learned shift takes its
place, so that every layer has a bias in all variants. Normalization layers draw no random numbers:
networks of one seed start from the same weights, whatever is switched on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext

NONE, TORCH, OURS, FUSED = WAYS = ("none", "torch", "ours", "fused")
BEFORE, AFTER = "before", "after"

_CLASSES: dict[str, dict[int, type[nn.Module]]] = {
    TORCH: {1: nn.BatchNorm1d, 2: nn.BatchNorm2d},
    OURS: {1: batchnorm_ext.BatchNorm1d, 2: batchnorm_ext.BatchNorm2d},
    FUSED: {1: batchnorm_ext.BatchNormAct1d, 2: batchnorm_ext.BatchNormAct2d},
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "gelu": F.gelu,
    "identity": lambda x: x,
}


class Shift(nn.Module):
    """Adds a learned value to each channel: what is left of batch norm without normalization."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, C, *) to the same."""
        return x + self.bias.view(-1, *[1] * (x.dim() - 2))


class Disturbance(nn.Module):
    """Moves and scales every channel anew at each training step, by chance.

    Put behind batch norm it undoes what batch norm does for the distributions: the control of
    Santurkar et al. (2018, https://arxiv.org/abs/1805.11604).
    """

    SHIFT, SCALE = 0.5, 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, C, *) to the same; the identity in eval mode."""
        if not self.training:
            return x
        shift, scale = torch.rand(2, x.shape[1], *[1] * (x.dim() - 2), device=x.device) * 2 - 1
        return x * (1 + self.SCALE * scale) + self.SHIFT * shift


@dataclass(frozen=True)
class Normalization:
    """What stands behind each linear layer: `layer` makes it."""

    way: str = NONE
    place: str = BEFORE
    momentum: float | None = 0.1
    dropout: float = 0.0
    disturbed: bool = False

    def layer(self, features: int, dims: int, activation: str = "relu") -> NormAct:
        """A module (x, residual=None) -> y for x of shape (N, features, *) with `dims` in *."""
        return NormAct(self, features, dims, activation)


class NormAct(nn.Module):
    """act(norm(x) + residual), or norm(act(x + residual)) where the place is AFTER."""

    def __init__(self, how: Normalization, features: int, dims: int, activation: str) -> None:
        super().__init__()
        self.fused = how.way == FUSED
        self.after = how.place == AFTER
        if self.fused and (self.after or how.disturbed):
            raise ValueError("fused batch norm has nothing between itself and the activation")
        if how.way == NONE:
            self.norm: nn.Module = Shift(features)
        else:
            options = {"activation": activation} if self.fused else {}
            kind = _CLASSES[how.way][dims]
            self.norm = kind(features, momentum=how.momentum, **options)
        self.disturbance = Disturbance() if how.disturbed else nn.Identity()
        self.dropout = nn.Dropout(how.dropout)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shapes (N, C, *), all the same."""
        if self.fused:
            y = self.norm(x, residual)
        elif self.after:
            y = self.norm(self.activation(x if residual is None else x + residual))
        else:
            y = self.disturbance(self.norm(x))
            if residual is not None:
                y += residual
            y = self.activation(y)
        return self.dropout(y)


def he_initialisation(module: nn.Module) -> None:
    """Weights that keep the variance of the activations through ReLUs (He et al. 2015).

    Without it a network that has no batch norm would be judged by torch's default.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, how: Normalization) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = how.layer(outputs, 2)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = how.layer(outputs, 2)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), self.shortcut(x))


class ResidualCNN(nn.Module):
    """Stem, four residual blocks, mean over the plane, one linear layer: images (N, 1, H, W)."""

    def __init__(self, how: Normalization, channels: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        narrow, wide = channels
        self.stem = nn.Conv2d(1, narrow, 3, 1, 1, bias=False)
        self.norm = how.layer(narrow, 2)
        self.blocks = nn.Sequential(
            Block(narrow, narrow, 1, how),
            Block(narrow, narrow, 1, how),
            Block(narrow, wide, 2, how),
            Block(wide, wide, 1, how),
        )
        self.head = nn.Linear(wide, 10)
        he_initialisation(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


class MLP(nn.Module):
    """Linear layers of the same width: inputs (N, *) of `features` values each."""

    def __init__(
        self, how: Normalization, features: int = 64, width: int = 128, depth: int = 3, *,
        classes: int = 10, he: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = [features] + [width] * depth
        self.linears = nn.ModuleList(
            nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(how.layer(width, 1) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        if he:
            he_initialisation(self.linears)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        x = x.flatten(1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(linear(x))
        return self.head(x)


class OverTokens(nn.Module):
    """A layer for (N, C, L), applied to tokens (N, L, C) where they lie."""

    def __init__(self, layer: NormAct) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shapes (N, L, C), all the same."""
        other = None if residual is None else residual.transpose(1, 2)
        return self.layer(x.transpose(1, 2), other).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and two linear layers; batch norm over tokens in place of layer norm."""

    def __init__(self, how: Normalization, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.norm1 = OverTokens(how.layer(width, 1, "identity"))
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.norm2 = OverTokens(how.layer(2 * width, 1, "gelu"))
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm3 = OverTokens(how.layer(width, 1, "identity"))

    def forward(self, x: Tensor) -> Tensor:
        """x + norm(attention(x)), and to that + norm(down(gelu(norm(up(.))))): (N, L, width)."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = self.norm1(self.out(mixed.reshape(batch, length, width)), x)
        return self.norm3(self.down(self.norm2(self.up(x))), x)


class Transformer(nn.Module):
    """An encoder over the rows of an image, each a token: images (N, 1, L, pixels)."""

    def __init__(
        self, how: Normalization, pixels: int = 8, length: int = 8, width: int = 32, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        self.layers = nn.Sequential(*(EncoderLayer(how, width, heads=4) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.layers(self.embed(x.squeeze(1)) + self.position).mean(1))
