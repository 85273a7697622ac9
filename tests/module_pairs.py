"""Modules of this package beside torch's: pairs with the same state, and what has to agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm_ext as bx

RANKS = (1, 2, 3)
OURS: dict[int, type[nn.Module]] = {1: bx.BatchNorm1d, 2: bx.BatchNorm2d, 3: bx.BatchNorm3d}
TORCHS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
FUSED: dict[int, type[nn.Module]] = {
    1: bx.BatchNormAct1d,
    2: bx.BatchNormAct2d,
    3: bx.BatchNormAct3d,
}
LAZY: dict[int, type[nn.Module]] = {
    1: bx.LazyBatchNorm1d,
    2: bx.LazyBatchNorm2d,
    3: bx.LazyBatchNorm3d,
}
TORCHS_LAZY: dict[int, type[nn.Module]] = {
    1: nn.LazyBatchNorm1d,
    2: nn.LazyBatchNorm2d,
    3: nn.LazyBatchNorm3d,
}
SPATIAL = {1: (7,), 2: (5, 3), 3: (2, 3, 4)}
C = 6

CONFIGS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-2, "momentum": 0.7},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
    {"dtype": torch.float64},
]
HAS_BIAS_ARGUMENT = "bias" in inspect.signature(nn.BatchNorm2d.__init__).parameters
if HAS_BIAS_ARGUMENT:  # not in torch 2.11
    CONFIGS += [{"bias": False}, {"bias": False, "affine": False}]
needs_bias_argument = pytest.mark.skipif(
    not HAS_BIAS_ARGUMENT, reason="this torch's batch norm has no bias argument"
)


def named(value: Any) -> str:
    """A test id: the arguments as they are written in a call, a function's name."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return getattr(value, "__name__", str(value))


def sample(rank: int, seed: int, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(n, C, *SPATIAL[rank], generator=generator) + 1.5


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Give parameters and buffers values that no default could produce by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(17)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def pair(rank: int, config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    ours, torchs = OURS[rank](C, **config), TORCHS[rank](C, **config)
    scramble(torchs)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """The state_dicts agree bit for bit: names, order, values, dtypes and version."""
    state_a, state_b = a.state_dict(), b.state_dict()
    assert list(state_a) == list(state_b)
    assert state_a._metadata == state_b._metadata  # type: ignore[attr-defined]
    for name, value in state_a.items():
        assert value.dtype == state_b[name].dtype, name
        assert torch.equal(value, state_b[name]), name


def assert_same_step(ours: nn.Module, torchs: nn.Module, x: Tensor) -> None:
    """One forward and backward of both: output, every gradient and every buffer."""
    x_ours, x_torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_torchs = ours(x_ours), torchs(x_torchs)
    torch.testing.assert_close(y_ours, y_torchs)
    weight = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    (y_ours * weight).sum().backward()
    (y_torchs * weight).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_torchs.grad)
    torch.testing.assert_close(
        {k: p.grad for k, p in ours.named_parameters()},
        {k: p.grad for k, p in torchs.named_parameters()},
    )
    torch.testing.assert_close(dict(ours.named_buffers()), dict(torchs.named_buffers()))
    ours.zero_grad()
    torchs.zero_grad()


def error_of(call: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)
