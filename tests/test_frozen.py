"""Frozen layers: eval mode's results whatever train() says, and no input kept for backward."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Network, assert_same, gradients, images
from norms import LAYOUTS, OF_EVERY_KIND, SHAPES, buffers, norm_for, values
from strategies import DEVICE
from torch import Tensor, nn

import batchnorm_ext as bx

BYTE = 8  # channels whose bits fill one, in either layout
MARK = 1  # with which a mask on the CPU names its layout


def saved_bytes(norm: nn.Module, *arguments: Tensor) -> int:
    """Bytes that a call keeps for backward, beyond the values per channel."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > BYTE:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(*arguments)
    return sum(kept.values())


@LAYOUTS
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen(
    shape: tuple[int, ...], with_residual: bool, activation: str, channels_last: bool
) -> None:
    """Results of eval mode in training mode; gradients without the input, to the bit."""
    frozen, evaluated = (norm_for(shape, True, activation=activation) for _ in range(2))
    frozen.freeze()
    evaluated.eval()
    x, r, dy = values((3, *shape), channels_last=False).unbind()
    results = []
    for norm in (frozen, evaluated):
        leaves = [
            t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.clone()
            for t in ((x, r) if with_residual else (x,))
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        y = norm(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy), *norm.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("with_residual", [False, True])
def test_frozen_keeps_no_input(with_residual: bool) -> None:
    """Nothing without an activation, a bit per element with a piecewise-linear one."""
    x = torch.randn(4, BYTE, 8, 8, requires_grad=True, device=DEVICE)
    arguments = (x, x.detach().clone().requires_grad_()) if with_residual else (x,)
    size = x.numel() * 4
    mask = (size // 32, size // 32 + MARK)
    for activation, expected in (("identity", (0,)), ("relu", mask), ("leaky_relu", mask)):
        norm = bx.BatchNormAct2d(BYTE, activation).to(DEVICE)
        assert saved_bytes(norm, *arguments) >= size
        assert saved_bytes(norm.freeze(), *arguments) in expected
        assert saved_bytes(norm.freeze(affine=False), *arguments) >= size
    smooth = bx.BatchNormAct2d(BYTE, "silu").to(DEVICE).freeze()
    assert saved_bytes(smooth, *arguments) == size * len(arguments)


def test_the_gradient_of_bias_alone_needs_no_input() -> None:
    x = torch.randn(4, BYTE, 8, 8, device=DEVICE)
    norm = bx.BatchNormAct2d(BYTE).to(DEVICE).eval()
    expected = torch.autograd.grad(norm(x).sum(), norm.bias)
    norm.weight.requires_grad_(False)
    assert saved_bytes(norm, x) in (x.numel() // 8, x.numel() // 8 + MARK)
    torch.testing.assert_close(torch.autograd.grad(norm(x).sum(), norm.bias), expected)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_second_derivatives_of_a_frozen_one(activation: str) -> None:
    norm = norm_for((4, 6, 2), True, activation=activation).double().freeze()
    x = values((4, 6, 2), dtype=torch.float64).requires_grad_()
    r = values((4, 6, 2), dtype=torch.float64).flip(0).requires_grad_()
    torch.autograd.gradcheck(norm, (x, r))
    torch.autograd.gradgradcheck(norm, (x, r))


@OF_EVERY_KIND
def test_freezing_a_model(kind: str) -> None:
    """It survives train(), trains nothing of its own, and is undone without a trace."""
    model = Network(kind).double()
    reference = Network("torch").double().eval()
    model.get_parameter("first.bias").requires_grad_(False)
    before = buffers(model)
    assert bx.freeze_batchnorm(model) is model
    model.train()
    x = images(0)
    y = model(x)
    torch.testing.assert_close(y, reference(x))
    y.square().sum().backward()
    reference(x).square().sum().backward()
    mine, theirs = gradients(model), gradients(reference)
    assert set(theirs) - set(mine) == {
        f"{norm}.{name}" for norm in ("first", "second") for name in ("weight", "bias")
    }
    torch.testing.assert_close(mine, {name: theirs[name] for name in mine})
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)
    first = model.get_submodule("first")
    assert first.training and first.frozen and ", frozen" in repr(first)

    assert bx.unfreeze_batchnorm(model) is model
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, does in trained.items() if not does] == ["first.bias"]
    model(x)
    assert not torch.equal(first.get_buffer("running_mean"), before["first.running_mean"])


@OF_EVERY_KIND
def test_frozen_statistics_with_trained_weights(kind: str) -> None:
    """affine=False leaves weight and bias as they are; copies stay frozen."""
    model = copy.deepcopy(bx.freeze_batchnorm(Network(kind).double(), affine=False)).train()
    reference = Network("torch").double().eval()
    for m in (model, reference):
        m(images(1)).square().sum().backward()
    assert_same(model, reference)


def test_freezing_needs_running_statistics() -> None:
    """Found before any layer is frozen."""
    model = nn.Sequential(bx.BatchNorm1d(3), bx.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"needs running statistics, but 1 has none \(track_run"):
        bx.freeze_batchnorm(model)
    assert not model[0].frozen and model[0].weight.requires_grad


def test_freezing_a_parametrised_layer() -> None:
    norm = bx.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    norm.freeze()
    assert not any(p.requires_grad for p in norm.parameters())
    norm.freeze()  # twice is as good as once
    norm.unfreeze()
    assert all(p.requires_grad for p in norm.parameters())
