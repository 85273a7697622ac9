"""Classes derived from torch's batch norm whose own forward goes on, as timm's `BatchNormAct2d`."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from fusable import NormAct, assert_same, conv, images, outcome, two_steps
from torch import Tensor, fx, nn
from torch.nn import functional as F

import batchnorm_ext as bx


class Leaky(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.3)


class Unnamed(nn.BatchNorm2d):
    """A derived class that changes nothing."""


class Dropped(NormAct):
    def __init__(self, width: int) -> None:
        super().__init__(width, nn.ReLU())
        self.drop = nn.Dropout(0.0)


def silu() -> Any:
    return NormAct(3, nn.SiLU(inplace=True))


@pytest.mark.parametrize(
    ("make", "fused", "unpaired"),
    [
        (silu, ["silu"], []),
        (lambda: Leaky(3), ["leaky_relu"], []),
        (lambda: NormAct(3, nn.ELU(0.5)), ["elu"], []),
        (lambda: NormAct(3, nn.Tanh()), [], ["a Tanh comes after it"]),
        (lambda: Dropped(3), [], ["a Dropout comes after it"]),
        (lambda: NormAct(3, nn.Identity()), ["relu6"], []),  # joined by the Sequential
        (lambda: Unnamed(3), ["relu6"], []),
    ],
)
def test_they_run_on_the_kernels(
    make: Callable[[], nn.Module], fused: list[str], unpaired: list[str]
) -> None:
    model: Any = nn.Sequential(conv(3, 3), make(), nn.ReLU6())
    report = outcome(model)
    assert [f.activation for f in report.fused] == fused
    assert {f.norm for f in report.fused} <= {"1"}
    assert [left.reason for left in report.unpaired] == unpaired
    assert not report.refused and isinstance(model[1], type(make()))
    with mock.patch.object(torch, "batch_norm", side_effect=AssertionError("torch's")):
        model(images())


def test_without_statistics_or_parameters() -> None:
    for options in ({"affine": False}, {"track_running_stats": False}):
        norm = silu()
        nn.BatchNorm2d.__init__(norm, 3, **options)
        norm.drop, norm.act = nn.Identity(), nn.SiLU()
        assert len(outcome(nn.Sequential(norm)).fused) == 1


def test_the_module_stays_what_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Sequential(silu(), NormAct(3, nn.Identity())).double()
    plain, x = copy.deepcopy(model), images()
    modules, keys = list(model.modules()), list(model.state_dict())
    with caplog.at_level(logging.WARNING, "batchnorm_ext"):
        bx.fuse_batchnorm(model)
    assert not caplog.records
    assert list(model.modules()) == modules and list(model.state_dict()) == keys
    assert type(model[0]).__name__ == "FusedNormAct" and isinstance(model[0], NormAct)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert bx.fusion_report(other) == bx.fusion_report(model) == bx.fusion_report(plain)
    plain.load_state_dict(model.state_dict())
    assert_same([plain.eval()(x)], [model.eval()(x)])
    bx.unfuse_batchnorm(model)
    assert [type(m) for m in model] == [NormAct, NormAct]
    assert torch.equal(model(x), plain(x))


def test_they_can_be_frozen_and_have_policies(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = bx.fuse_batchnorm(nn.Sequential(silu(), silu()))
    bx.set_policies(model, single_value="running")
    assert model(torch.ones(1, 3, 1, 1)).isfinite().all()
    bx.set_policies(model, single_value="error")
    model[0].freeze()
    with caplog.at_level(logging.WARNING, "batchnorm_ext"):
        bx.unfuse_batchnorm(model)
    assert type(model[0]).__name__ == "FusedNormAct" and type(model[1]) is NormAct
    assert "not reverted: 0" in caplog.text
    model[0].unfreeze()
    assert type(bx.unfuse_batchnorm(model)[0]) is NormAct


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("path", ["0", "0.act"])
def test_hooks_run(path: str, late: bool) -> None:
    model, x = nn.Sequential(silu(), nn.Tanh()).double(), images()
    expected, calls = two_steps(copy.deepcopy(model), x), list[str]()

    def listen() -> None:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda *_: calls.append(path))

    if not late:
        listen()
        refused = [left.reason for left in bx.fusion_report(model).refused]
        assert bool(refused) == (path == "0.act") and all("hooks" in text for text in refused)
    bx.fuse_batchnorm(model)
    if late:
        listen()
    assert_same(two_steps(model, x), expected)
    assert len(calls) == 3


def test_an_exchanged_activation_is_followed() -> None:
    model: Any = bx.fuse_batchnorm(nn.Sequential(silu()).double())
    for act in (nn.Hardswish(), nn.Tanh(), nn.Identity()):
        model[0].act = act
        y = model(images() * 0 + torch.arange(8.0).double())
        plain = bx.unfuse_batchnorm(copy.deepcopy(model))
        torch.testing.assert_close(y, plain(images() * 0 + torch.arange(8.0).double()))


def test_traced_by_fx_and_compiled() -> None:
    norms = silu(), Leaky(3), NormAct(3, nn.Tanh())
    model, x = bx.fuse_batchnorm(nn.Sequential(conv(3, 3), *norms).double()), images()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert [str(n.target) for n in traced.graph.find_nodes(op="call_module")] == [
        "0",
        "1",
        "2",
        "3",
    ]
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    expected = two_steps(model, x)
    assert_same(two_steps(traced, x), expected)
    assert_same(two_steps(compiled, x), expected)
    torch._dynamo.reset()
    alone = fx.symbolic_trace(bx.fuse_batchnorm(silu()).double().eval())
    torch.testing.assert_close(alone(x), silu().double().eval()(x))


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class Weighted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Gated(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * input


class InTraining(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return F.relu(y) if self.training else y


class Asks(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if isinstance(input, Tensor) else input


class Two(nn.BatchNorm2d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.relu(super().forward(input))


class Pair(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Any:
        return (super().forward(input),)


class Rooted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Scaled, "not torch's batch norm"),
        (Weighted, "not torch's batch norm"),
        (Gated, "takes something else"),
        (InTraining, "training or the gradient mode"),
        (Asks, "type of its input"),
        (Two, "or has several"),
        (Pair, "something else than a tensor"),
        (Rooted, "no known activation"),
        (nn.SyncBatchNorm, "derived from none of them"),
    ],
)
def test_refused_classes(cls: type[nn.Module], reason: str) -> None:
    model: Any = nn.Sequential(conv(3, 3), cls(3), nn.ReLU())
    report = bx.fusion_report(bx.fuse_batchnorm(model))
    assert not report.fused and type(model[1]) is cls
    (left,) = report.refused
    assert left.norm == "1" and cls.__qualname__ in left.reason and reason in left.reason


def test_cumulative_average_is_refused() -> None:
    """It asks for the count, which a trace does not have."""
    norm = silu()
    norm.momentum = None
    assert "can't be traced" in bx.fusion_report(norm).refused[0].reason
