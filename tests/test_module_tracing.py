"""The modules under torch.compile and torch.fx."""

from __future__ import annotations

import copy

import pytest
import torch
from module_pairs import (
    C,
    sample,
    scramble,
)
from torch import Tensor, fx, nn

import batchnorm_ext as bx

pytestmark = pytest.mark.usefixtures("float64_by_default")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiles_without_graph_break(mode: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = bx.BatchNorm2d(C, momentum=None)
            self.second = bx.BatchNormAct2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x), x)

    eager = Block().train(mode == "train")
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for step in range(2):
        x = sample(2, step)
        y, y_compiled = eager(x), compiled(x)
        torch.testing.assert_close(y_compiled, y)
        y.square().sum().backward()
        y_compiled.square().sum().backward()
    torch.testing.assert_close(other.state_dict(), eager.state_dict())
    torch.testing.assert_close(
        [p.grad for p in other.parameters()], [p.grad for p in eager.parameters()]
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm: nn.Module = bx.BatchNorm2d(C)
        self.act = bx.BatchNormAct2d(C, "silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)), x)


def test_symbolic_trace_keeps_modules() -> None:
    """One node per module, so that a traced network still follows train() and eval()."""
    model = Residual()
    twin = copy.deepcopy(model)
    traced = fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes] == [
        ("placeholder", "x"),
        ("call_module", "conv"),
        ("call_module", "norm"),
        ("call_module", "act"),
        ("output", "output"),
    ]
    for step, training in enumerate([True, False, True]):
        traced.train(training)
        twin.train(training)
        x = sample(2, step)
        assert torch.equal(traced(x), twin(x))
    assert traced.get_buffer("norm.num_batches_tracked").item() == 2
    torch.testing.assert_close(traced.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_symbolic_trace_gives_torchs_graph() -> None:
    ours = nn.Sequential(nn.Conv2d(3, C, 1), bx.BatchNorm2d(C), nn.ReLU())
    torchs = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    assert fx.symbolic_trace(ours).code == fx.symbolic_trace(torchs).code


def test_symbolic_trace_of_a_bare_module() -> None:
    """As the root it can't be a node of its own graph: one function call on its tensors."""
    module = bx.BatchNorm2d(C)
    scramble(module)
    twin = copy.deepcopy(module)
    traced = fx.symbolic_trace(module)
    assert sum(n.op == "call_function" for n in traced.graph.nodes) == 1
    for step in range(2):
        x = sample(2, step)
        assert torch.equal(traced(x), twin(x))
    assert torch.equal(traced.get_buffer("running_var"), twin.get_buffer("running_var"))


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_symbolic_trace_applies_hooks_once(kind: str) -> None:
    model = Residual()
    if kind == "pre":
        model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 3 + 1,))
    else:
        model.norm.register_forward_hook(lambda module, args, output: output * 3 + 1)
    twin = copy.deepcopy(model)
    x = sample(2, 0)
    assert torch.equal(fx.symbolic_trace(model)(x), twin(x))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_symbolic_trace_of_the_function() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.norm
            y = bx.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return bx.batch_norm(y, None, None, training=True, residual=x, activation="relu")

    model = Functional()
    scramble(model)
    traced = fx.symbolic_trace(model)
    calls = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert calls == [bx.batch_norm, bx.batch_norm]
    assert torch.equal(traced(sample(2, 0)), model(sample(2, 0)))
