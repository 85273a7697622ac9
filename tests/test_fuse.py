"""Fusing whole models: what is fused and what is left, and that the model stays what it was."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusable import (
    IMAGE,
    MODELS,
    BasicBlock,
    ResNet,
    Site,
    assert_same,
    build,
    conv,
    images,
    outcome,
    two_steps,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F

import batchnorm_ext as bx
from batchnorm_ext import joined, progress


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the same results, and the same model -------------------------------------------------------


def test_results_are_the_same(name: str) -> None:
    model, x = build(name)
    expected = two_steps(copy.deepcopy(model), x)
    assert bx.fuse_batchnorm(model) is model
    assert_same(two_steps(model, x), expected)


def test_float32_channels_last() -> None:
    model, x = build("resnet18")
    fused = bx.fuse_batchnorm(copy.deepcopy(model))
    settings: dict[str, Any] = {"dtype": torch.float32, "memory_format": torch.channels_last}
    y = fused.to(**settings).eval()(x.to(**settings))
    # u = 6e-8, a dozen roundings per layer, twelve layers deep.
    torch.testing.assert_close(y, model.eval()(x).float(), rtol=1e-5, atol=1e-5)


def test_who_waits_is_told_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    model, _ = build("resnet18")
    for stream, patience, speaks in (
        (Terminal(), -1.0, True),
        (Terminal(), 60.0, False),
        (io.StringIO(), -1.0, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "_PATIENCE", patience)
        bx.fusion_report(model)
        assert ("reading forwards: 1 of " in stream.getvalue()) is speaks
        assert not speaks or stream.getvalue().endswith(f"\r{'':<60}\r")


def test_report(name: str) -> None:
    model, _ = build(name)
    before = bx.fusion_report(model)
    counts = len(before.fused), sum(f.residual for f in before.fused)
    assert (*counts, len(before.unpaired), len(before.refused)) == MODELS[name][2]
    paths = {path for path, _ in model.named_modules()}
    assert {entry.norm for kind in before for entry in kind} <= paths
    assert bx.fusion_report(bx.fuse_batchnorm(model)) == before
    assert bx.fusion_report(bx.unfuse_batchnorm(model)) == before
    assert len(str(before).splitlines()) == sum(map(len, before))


def test_the_kernels_are_called_that_often(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name)
    bx.fuse_batchnorm(model)
    calls: list[tuple[bool, str]] = []
    forward = joined._forward

    def counted(norm: Any, input: Tensor, residual: Any, activation: str, param: float) -> Tensor:
        calls.append((residual is not None, activation))
        return forward(norm, input, residual, activation, param)

    monkeypatch.setattr(joined, "_forward", counted)
    model(x)
    expected = [(f.residual, f.activation) for f in bx.fusion_report(model).fused]
    assert sorted(calls) == sorted(expected)


def test_the_model_stays_what_it_was(name: str) -> None:
    model, _ = build(name)
    modules, classes = dict(model.named_modules()), [type(m) for m in model.modules()]
    tensors = {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    keys = list(model.state_dict())
    bx.fuse_batchnorm(model)
    assert dict(model.named_modules()) == modules
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert list(model.state_dict()) == keys
    once = [type(m) for m in model.modules()]
    assert once != classes
    bx.fuse_batchnorm(model)
    assert [type(m) for m in model.modules()] == once
    bx.unfuse_batchnorm(model)
    assert [type(m) for m in model.modules()] == classes


def test_unfused_is_the_original_to_the_bit(name: str) -> None:
    model, x = build(name)
    expected = two_steps(copy.deepcopy(model), x)
    actual = two_steps(bx.unfuse_batchnorm(bx.fuse_batchnorm(model)), x)
    assert all(map(torch.equal, actual, expected))


def test_checkpoints_both_ways() -> None:
    plain, x = build("resnet50")
    fused = bx.fuse_batchnorm(copy.deepcopy(plain))
    two_steps(fused, x)
    plain.load_state_dict(fused.state_dict())
    assert_same([plain.eval()(x)], [fused.eval()(x)])
    two_steps(plain, x)
    fused.load_state_dict(plain.state_dict())
    assert_same([fused.eval()(x)], [plain.eval()(x)])


def test_copies_and_pickles(name: str) -> None:
    model, x = build(name)
    bx.fuse_batchnorm(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert bx.fusion_report(other) == bx.fusion_report(model)
    separate = copy.deepcopy(model)
    two_steps(separate, x)
    assert not all(map(torch.equal, separate.buffers(), model.buffers()))


FX = ["resnet18", "efficientnet", "volume", "unet", "mlp", "branches"]


@pytest.mark.parametrize("name", FX)
def test_traced_by_fx(name: str) -> None:
    model, x = build(name)
    bx.fuse_batchnorm(model)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    count = sum(node.target is joined.norm_act for node in traced.graph.nodes)
    assert count == len(bx.fusion_report(model).fused)
    assert_same(two_steps(traced, x), two_steps(model, x))
    if name != "unet":  # fx does not pickle a graph with annotations like those of this file
        again = pickle.loads(pickle.dumps(traced))
        assert torch.equal(again(x), traced(x))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "efficientnet", "unet", "branches", "asking densenet", "norm and activation"],
)
def test_compiled_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model, x = build(name)
    bx.fuse_batchnorm(model)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_same(two_steps(compiled, x), two_steps(model, x))
    torch._dynamo.reset()


# --- what is done to the model afterwards -------------------------------------------------------


def small() -> Any:  # attributes of its children are reached by name
    return nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), BasicBlock(3, 3)
    ).double()


@pytest.mark.parametrize("path", ["1", "2", "3.bn1", "3.relu", "3.bn2"])
@pytest.mark.parametrize("late", [True, False])
def test_hooks_run(path: str, late: bool) -> None:
    model, x = small(), images()
    expected = two_steps(copy.deepcopy(model), x)
    calls: list[str] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(path)

    if not late:
        model.get_submodule(path).register_forward_hook(hook)
        report = bx.fusion_report(model)
        assert report.refused and all("hooks" in left.reason for left in report.refused)
    bx.fuse_batchnorm(model)
    if late:
        model.get_submodule(path).register_forward_hook(hook)
    assert_same(two_steps(model, x), expected)
    assert len(calls) == (6 if path == "3.relu" else 3)


def test_backward_and_global_hooks_run() -> None:
    model, x, calls = bx.fuse_batchnorm(small()), images(), []
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model(x).sum().backward()
    assert calls == ["backward"]
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert {type(m) for m in seen} >= {bx.BatchNorm2d, nn.SiLU, nn.ReLU}
    assert sum(isinstance(m, bx.BatchNorm2d) for m in seen) == 3


@pytest.mark.parametrize("change", ["activation", "unknown", "norm", "reverted", "alpha"])
def test_exchanged_modules_are_followed(change: str) -> None:
    model, x = small(), images()
    model[2] = nn.ELU()
    bx.fuse_batchnorm(model)
    bn = model[1]
    if change == "activation":
        model[2] = model[3].relu = nn.Hardswish()
    elif change == "unknown":
        model[2] = model[3].relu = nn.Tanh()
    elif change == "norm":
        model[1] = model[3].bn2 = nn.GroupNorm(3, 3).double()
    elif change == "alpha":
        model[2].alpha = 0.3
    else:
        bx.revert_batchnorm(model)
        assert type(bn) is nn.BatchNorm2d
    y = model(x)
    torch.testing.assert_close(bx.unfuse_batchnorm(model)(x), y)


def test_used_piecewise_nothing_is_applied_twice() -> None:
    """Slices, iteration and single calls see modules that do their own part only."""
    model, x = small().eval(), images()
    expected = model(x)
    bx.fuse_batchnorm(model)
    assert type(model).__name__ == "FusedSequential"
    assert type(model[:2]) is nn.Sequential and len(model[1:]) == 3
    torch.testing.assert_close(model[2:](model[:2](x)), expected)
    y = x
    for layer in model:
        y = layer(y)
    torch.testing.assert_close(y, expected)


def test_mode_follows_and_dtype_and_requires_grad() -> None:
    model, x = bx.fuse_batchnorm(small()), images()
    before = model[1].running_mean.clone()
    model.eval()(x)
    assert torch.equal(model[1].running_mean, before)
    model.train()(x)
    assert not torch.equal(model[1].running_mean, before)
    model[3].requires_grad_(False)
    model(x).sum().backward()
    assert model[3].bn1.weight.grad is None and model[1].weight.grad is not None
    assert model.float()(x.float()).dtype == torch.float32


def test_new_instances_of_a_fused_class_are_plain() -> None:
    block = bx.fuse_batchnorm(BasicBlock(3, 3))
    assert type(block).__name__ == "FusedBasicBlock" and isinstance(block, BasicBlock)
    assert type(type(block)(3, 4)) is BasicBlock


# --- which modules ------------------------------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize("make", [OwnNorm, nn.SyncBatchNorm])
def test_other_batch_norms_are_left_and_named(
    make: Callable[[int], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(make(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    with caplog.at_level(logging.INFO, "batchnorm_ext"):
        bx.fuse_batchnorm(model)
    assert type(model[0]) is make and type(model[2]) is bx.BatchNorm2d
    report = bx.fusion_report(model)
    assert [f.norm for f in report.fused] == ["2"]
    assert make.__qualname__ in report.refused[0].reason
    texts = [r.getMessage() for r in caplog.records]
    assert "batch norm calls fused: 1" in texts
    assert any(t.startswith("batch norm calls not fused: 0 (it is a") for t in texts)


def test_modules_that_cannot_be_given_a_class() -> None:
    class Registered(BasicBlock):
        def __init_subclass__(cls) -> None:
            raise AssertionError("derived")

    class Reduced(BasicBlock):
        def __reduce__(self) -> Any:
            return (BasicBlock, (3, 3))

    patched = BasicBlock(3, 3)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    parametrized = BasicBlock(3, 3)
    parametrized.scale = nn.Parameter(torch.ones(3))
    nn.utils.parametrize.register_parametrization(parametrized, "scale", nn.Identity())
    cases = {
        "__init_subclass__": Registered(3, 3),
        "pickled": Reduced(3, 3),
        "forward of its own": patched,
        "parametrized": parametrized,
    }
    for reason, block in cases.items():
        model = nn.Sequential(block, nn.BatchNorm2d(3), nn.ReLU())
        classes = type(block)
        report = bx.fusion_report(bx.fuse_batchnorm(model))
        assert [left.norm for left in report.refused] == ["0.bn1", "0.bn2"]
        assert all(
            left.reason.startswith("0: ") and reason in left.reason for left in report.refused
        )
        assert type(block) is classes and len(report.fused) == 1


class Shared(nn.Module):
    """One batch norm called at two places in different ways, and one block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.block = conv(3, 3), nn.BatchNorm2d(3), BasicBlock(3, 3)
        self.tail = nn.Sequential(self.bn, nn.Hardswish(), self.block)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.conv(x)))
        return self.block(y) + self.bn(y)


def test_shared_modules() -> None:
    model = nn.Sequential(Shared(), BasicBlock(3, 3))
    model.append(model[1])
    report = outcome(model)
    sites = [(f.module, f.norm, f.activation) for f in report.fused]
    assert sites == [
        ("0", "0.bn", "silu"),
        ("0", "0.bn", "identity"),
        ("0.block", "0.block.bn1", "relu"),
        ("0.block", "0.block.bn2", "relu"),
        ("1", "1.bn1", "relu"),
        ("1", "1.bn2", "relu"),
    ]


def test_lazy_parametrized_and_own_norms() -> None:
    x = torch.randn(IMAGE)
    norms = [nn.LazyBatchNorm2d(), nn.BatchNorm2d(3), bx.BatchNorm2d(3)]
    nn.utils.parametrize.register_parametrization(norms[1], "weight", nn.Softplus())
    for norm in norms:
        model = bx.fuse_batchnorm(nn.Sequential(norm, nn.ReLU()))
        assert len(bx.fusion_report(model).fused) == 1
        for _ in range(2):
            y = model(x)
        expected = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))
        torch.testing.assert_close(y, expected)


def test_identities_drop_out_and_nothing_to_do() -> None:
    class WithIdentity(Site):
        def __init__(self) -> None:
            super().__init__(lambda m, y, x: m.act(m.drop(y)))
            self.drop = nn.Identity()

    assert len(outcome(WithIdentity()).fused) == 1
    for model in (nn.Linear(2, 2), nn.BatchNorm2d(3), nn.ModuleList([nn.BatchNorm2d(3)])):
        assert bx.fuse_batchnorm(model) is model
        assert not bx.fusion_report(model).fused
    assert str(bx.fusion_report(nn.Linear(2, 2))) == "no batch norm"


def test_autocast_and_no_grad_around_the_model() -> None:
    model = bx.fuse_batchnorm(ResNet(BasicBlock(4, 4), width=4)).eval()
    plain = bx.unfuse_batchnorm(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = model(torch.ones(IMAGE)), plain(torch.ones(IMAGE))
    assert y.dtype == expected.dtype == torch.bfloat16
    # Six roundings to bfloat16 (4e-3 each) on the way, at other places than torch's.
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
