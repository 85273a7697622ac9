"""BatchNormAct against torch's batch norm, addition and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_pairs import (
    CONFIGS,
    FUSED,
    HAS_BIAS_ARGUMENT,
    RANKS,
    TORCHS,
    C,
    assert_same_state,
    assert_same_step,
    named,
    needs_bias_argument,
    sample,
    scramble,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm_ext as bx

# The activations' names and arguments, and torch's own function for each.
ACTIVATIONS: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"activation": None}, lambda x: x),
    ({"activation": "identity"}, lambda x: x),
    ({}, F.relu),
    ({"activation": "relu"}, F.relu),
    ({"activation": "relu6"}, F.relu6),
    ({"activation": "leaky_relu"}, F.leaky_relu),
    ({"activation": "leaky_relu", "negative_slope": 0.3}, lambda x: F.leaky_relu(x, 0.3)),
    ({"activation": "elu"}, F.elu),
    ({"activation": "elu", "alpha": 1.7}, lambda x: F.elu(x, 1.7)),
    ({"activation": "silu"}, F.silu),
    ({"activation": "gelu"}, F.gelu),
    ({"activation": "gelu", "approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ({"activation": "hardswish"}, F.hardswish),
]

pytestmark = pytest.mark.usefixtures("float64_by_default")


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("arguments", "function"), ACTIVATIONS, ids=named)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rank", RANKS)
def test_fused_is_norm_then_residual_then_activation(
    rank: int,
    training: bool,
    arguments: dict[str, Any],
    function: Callable[[Tensor], Tensor],
    with_residual: bool,
) -> None:
    fused = FUSED[rank](C, **arguments).train(training)
    norm = TORCHS[rank](C).train(training)
    scramble(norm)
    fused.load_state_dict(norm.state_dict())
    x, residual = sample(rank, 0), sample(rank, 1)
    leaves = [t.clone().requires_grad_() for t in (x, residual, x, residual)]
    actual = fused(leaves[0], leaves[1]) if with_residual else fused(leaves[0])
    expected = function(norm(leaves[2]) + leaves[3] if with_residual else norm(leaves[2]))
    torch.testing.assert_close(actual, expected)
    weight = torch.linspace(-1, 2, x.numel()).reshape(x.shape)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[2].grad)
    torch.testing.assert_close(leaves[1].grad, leaves[3].grad)
    torch.testing.assert_close(
        [p.grad for p in fused.parameters()], [p.grad for p in norm.parameters()]
    )
    torch.testing.assert_close(dict(fused.named_buffers()), dict(norm.named_buffers()))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, "relu"),
        ({"activation": None}, "identity"),
        ({"activation": "leaky_relu"}, "leaky_relu, negative_slope=0.01"),
        ({"activation": "elu", "alpha": 0.5}, "elu, alpha=0.5"),
        ({"activation": "gelu"}, "gelu"),
        ({"activation": "gelu", "approximate": "tanh"}, "gelu, approximate=tanh"),
    ],
    ids=named,
)
def test_fused_repr(arguments: dict[str, Any], shown: str) -> None:
    inside = nn.BatchNorm2d(C).extra_repr()
    assert (
        repr(bx.BatchNormAct2d(C, **arguments)) == f"BatchNormAct2d({inside}, activation={shown})"
    )


class NormThenReLU(nn.BatchNorm2d):
    """What a fused module with its default activation computes, from torch's parts."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_fused_takes_torchs_options(config: dict[str, Any]) -> None:
    fused, norm = bx.BatchNormAct2d(C, **config), NormThenReLU(C, **config)
    assert fused.extra_repr() == f"{norm.extra_repr()}, activation=relu"
    scramble(norm)
    fused.load_state_dict(norm.state_dict())
    for step, training in enumerate([True, True, False]):
        assert_same_step(fused.train(training), norm.train(training), sample(2, step))


@needs_bias_argument
@pytest.mark.parametrize("rank", RANKS)
def test_fused_without_bias_keeps_the_weight(rank: int) -> None:
    fused = FUSED[rank](C, bias=False)
    absent = {name: value is None for name, value in fused._parameters.items()}
    assert absent == {"weight": False, "bias": True}
    assert "bias=False" in repr(fused) and "bias=True" in repr(FUSED[rank](C, bias=True))


@pytest.mark.skipif(HAS_BIAS_ARGUMENT, reason="this torch's batch norm has a bias argument")
def test_fused_bias_argument_is_refused_as_by_torch() -> None:
    """Where torch's modules always have a bias, so do the fused ones."""
    for cls in (nn.BatchNorm2d, bx.BatchNormAct2d):
        with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
            cls(C, bias=False)
    assert_same_state(bx.BatchNormAct2d(C, bias=True), nn.BatchNorm2d(C))


@pytest.mark.parametrize(
    "arguments",
    [{"activation": "tanh"}, {"activation": "ReLU"}, {"activation": "gelu", "approximate": "erf"}],
    ids=named,
)
def test_unknown_activation(arguments: dict[str, Any]) -> None:
    wrong = list(arguments.values())[-1]
    with pytest.raises(ValueError, match=wrong):
        bx.BatchNormAct2d(C, **arguments)


def test_activation_may_be_assigned() -> None:
    module, x = bx.BatchNormAct2d(C), sample(2, 0)
    module.activation = "silu"
    torch.testing.assert_close(module(x), F.silu(nn.BatchNorm2d(C)(x)))
    assert "activation=silu" in repr(module)


def test_fused_in_half_precision_keeps_dtype() -> None:
    module = bx.BatchNormAct2d(C, dtype=torch.float32)
    x = sample(2, 0).bfloat16()
    y = module(x, x)
    assert y.dtype is torch.bfloat16
    expected = F.relu(nn.BatchNorm2d(C)(x.double()) + x.double())
    # One rounding to 8 bits, after float32 arithmetic on values below 10.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


def test_fused_is_not_torchs_batch_norm() -> None:
    """Whatever replaces or treats `_BatchNorm` modules must not get hold of an activation."""
    for cls in FUSED.values():
        assert not issubclass(cls, _BatchNorm)
