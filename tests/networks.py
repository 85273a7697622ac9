"""One small network, with torch's batch norm and with this package's in three ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm_ext as bx

#: Constructed; converted from torch's; fused with the activation and the residual.
KINDS = ("plain", "converted", "fused")
_NORMS: dict[str, type[nn.Module]] = {
    "torch": nn.BatchNorm2d,
    "plain": bx.BatchNorm2d,
    "converted": nn.BatchNorm2d,
    "fused": bx.BatchNormAct2d,
}
CHANNELS = 6


class Network(nn.Module):
    """conv, norm, relu; conv, norm, + shortcut, relu; mean, linear. (N, 3, H, W) to (N, 4).

    `options` are those of the norms. Parameters and buffers have the same names and, for the same
    seed, the same values whatever the kind of norm.
    """

    def __init__(self, kind: str, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False)
        self.first = _NORMS[kind](CHANNELS, **options)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.second = _NORMS[kind](CHANNELS, **options)
        self.head = nn.Linear(CHANNELS, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in self.state_dict(keep_vars=True).values():
                if value.is_floating_point() and not value.is_meta:
                    noise = torch.randn(value.shape, generator=generator)
                    value.copy_(0.3 * noise if value.dim() > 1 else 0.5 + 0.3 * noise.abs())
        if kind == "converted":
            bx.convert_batchnorm(self)

    def forward(self, x: Tensor, short: bool = False) -> Tensor:
        """With `short`, the second half takes no part."""
        y = self.start(x)
        return self.head((y if short else self.block(y)).mean((2, 3)))

    def start(self, x: Tensor) -> Tensor:
        """The first three layers, (N, 3, H, W) to (N, CHANNELS, H, W)."""
        y = self.first(self.stem(x))
        return y if isinstance(self.first, bx.BatchNormAct2d) else F.relu(y)

    def block(self, x: Tensor) -> Tensor:
        """The residual block, (N, CHANNELS, H, W) to the same."""
        y = self.conv(x)
        if isinstance(self.second, bx.BatchNormAct2d):
            return self.second(y, x)
        return F.relu(self.second(y) + x)


class Checkpointed(Network):
    """The residual block is computed again in backward."""

    use_reentrant = False

    def block(self, x: Tensor) -> Tensor:
        """As in the base class."""
        result = checkpoint(super().block, x, use_reentrant=self.use_reentrant)
        assert isinstance(result, Tensor)
        return result


def images(seed: int, n: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images (n, 3, 6, 5), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 5, generator=generator, dtype=dtype) + 0.5


def pair(kind: str, **options: Any) -> tuple[Network, Network]:
    """Ours and torch's, in float64: what is compared is exact but for its order of additions."""
    return Network(kind, **options).double(), Network("torch", **options).double()


def assert_same(ours: nn.Module, torchs: nn.Module, **tolerance: Any) -> None:
    """Parameters, their gradients and buffers agree, by name; by default to 1e-7 in float64."""
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), **tolerance)
    torch.testing.assert_close(gradients(ours), gradients(torchs), **tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that there are, by the parameter's name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
