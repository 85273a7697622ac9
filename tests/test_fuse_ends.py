"""Batch norms at the end of an `nn.Sequential`, joined with what its caller does next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from fusable import assert_same, images, outcome, two_steps
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm_ext as bx
from batchnorm_ext import joined


def conv_norm(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), *between, nn.BatchNorm2d(3))


class Ends(nn.Module):
    """A Sequential that ends with a batch norm, and whatever `then` does with it and the input."""

    def __init__(
        self, branch: nn.Module, then: Callable[[Any, Any], Any], other: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch, self.other, self.act = branch, other or nn.Conv2d(3, 3, 1), nn.SiLU()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x * 1.0)


def in_place(m: Any, x: Any) -> Any:
    y = m.branch(x)
    y += x
    return y


class Derived(nn.Sequential):
    """As torchvision's Conv2dNormActivation: a class of its own, the forward of nn.Sequential."""


def kernel_calls(model: nn.Module) -> int:
    """How many joined calls a call of `model` makes."""
    with mock.patch.object(joined, "_forward", wraps=joined._forward) as kernels:
        model(images())
    return kernels.call_count


def added(m: Any, x: Any) -> Any:
    return F.relu(m.branch(x) + x)


def added_after_other(m: Any, x: Any) -> Any:
    return F.relu(m.branch(x) + m.other(x))


@pytest.mark.parametrize(
    ("branch", "then", "expected"),
    [
        (conv_norm(), added, ("branch.1", "relu", True)),
        (conv_norm(), lambda m, x: x + m.branch(x), ("branch.1", "identity", True)),
        (conv_norm(), in_place, ("branch.1", "identity", True)),
        (conv_norm(), lambda m, x: m.act(m.branch(x)), ("branch.1", "silu", False)),
        (conv_norm(nn.Dropout(0.0)), lambda m, x: F.elu(m.branch(x)), ("branch.2", "elu", False)),
        (nn.Sequential(conv_norm()), added, ("branch.0.1", "relu", True)),
        (nn.Sequential(nn.Tanh(), conv_norm()), added, ("branch.1.1", "relu", True)),
        (Derived(*conv_norm()), added, ("branch.1", "relu", True)),
        (nn.Sequential(nn.BatchNorm2d(3)), added, ("branch.0", "relu", True)),
        (conv_norm(), added_after_other, ("branch.1", "relu", True)),
    ],
)
def test_joined_ends(
    branch: nn.Module, then: Callable[[Any, Any], Any], expected: tuple[str, str, bool]
) -> None:
    model = Ends(branch, then)
    report = outcome(model)
    assert report == ((("", *expected),), (), ())
    assert kernel_calls(model) == 1


@pytest.mark.parametrize(
    ("branch", "then", "reason"),
    [
        (conv_norm(), lambda m, x: torch.sigmoid(m.branch(x)), "sigmoid takes its output"),
        (conv_norm(), lambda m, x: m.branch(x), "output takes its output"),
        (conv_norm(), lambda m, x: (lambda y: F.relu(y) * y)(m.branch(x)), "used in 2 places"),
        # What the branch hands to its batch norm may be x, which the other may write to.
        (conv_norm(nn.Dropout(0.0)), added_after_other, "other comes between"),
        (nn.Sequential(nn.BatchNorm2d(3)), added_after_other, "other comes between"),
    ],
)
def test_ends_that_stay(branch: nn.Module, then: Callable[[Any, Any], Any], reason: str) -> None:
    report = outcome(Ends(branch, then))
    assert not report.fused and len(report.unpaired + report.refused) == 1
    assert reason in (report.unpaired + report.refused)[0].reason


def test_a_forward_of_its_own_has_no_end() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    report = outcome(Ends(Doubled(*conv_norm()), added))
    assert report.unpaired == (("branch.1", "mul takes its output"),)


def test_of_two_ends_the_later_takes_the_add() -> None:
    report = outcome(Ends(conv_norm(), added_after_other, conv_norm()))
    assert [f.norm for f in report.fused] == ["other.1"]
    assert [left.norm for left in report.unpaired] == ["branch.1"]


@pytest.mark.parametrize("hooked", [False, True])
def test_only_the_batch_norm_moves(hooked: bool) -> None:
    """What is before it draws its random numbers where it did, and so do Sequentials with hooks."""
    branch = conv_norm(nn.Dropout(0.5), nn.Conv2d(3, 3, 1))
    model, x = Ends(branch, added_after_other, nn.Dropout(0.5)).double(), images()
    plain = copy.deepcopy(model)
    assert len(bx.fusion_report(bx.fuse_batchnorm(model)).fused) == 1
    if hooked:
        model.branch.register_forward_hook(lambda *_: None)
    results = []
    for each in (model, plain):
        torch.manual_seed(0)
        results.append(each(x))
    torch.testing.assert_close(*results)


def test_a_sequential_in_a_sequential() -> None:
    model = nn.Sequential(nn.Sequential(conv_norm()), nn.ReLU(), conv_norm(), nn.Tanh())
    report = outcome(model)
    assert report.fused == (("", "0.0.1", "relu", False),)
    assert report.unpaired == (("2.1", "nothing comes after it"),)
    assert kernel_calls(model) == 1


def sees(model: nn.Module, path: str, calls: list[Any]) -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(output.detach().clone())

    model.get_submodule(path).register_forward_hook(hook)


@pytest.mark.parametrize("path", ["branch", "branch.1", "branch.1.1", "act"])
@pytest.mark.parametrize("late", [True, False])
def test_hooks_see_what_they_saw(path: str, late: bool) -> None:
    branch = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    branch.append(conv_norm())
    model, x = Ends(branch, lambda m, x: m.act(m.branch(x) + x)).double(), images()
    plain, seen, expected = copy.deepcopy(model), list[Any](), list[Any]()
    sees(plain, path, expected)
    if not late:
        sees(model, path, seen)
        assert any("hooks" in left.reason for left in bx.fusion_report(model).refused)
    bx.fuse_batchnorm(model)
    if late:
        sees(model, path, seen)
    assert_same(two_steps(model, x), two_steps(plain, x))
    assert_same(seen, expected)
    assert len(seen) == 3


def test_global_hooks_see_every_module() -> None:
    model: Any = bx.fuse_batchnorm(Ends(conv_norm(), added).double())
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(images())
    finally:
        handle.remove()
    assert seen == [model.branch[0], model.branch[1], model.branch, model]


@pytest.mark.parametrize("change", ["norm", "appended", "emptied", "branch", "reverted"])
def test_exchanged_ends_are_followed(change: str) -> None:
    model: Any = bx.fuse_batchnorm(Ends(conv_norm(), added).double())
    x = images()
    if change == "norm":
        model.branch[1] = nn.GroupNorm(3, 3).double()
    elif change == "appended":
        model.branch.append(nn.Tanh())
    elif change == "emptied":
        del model.branch[:]
    elif change == "branch":
        model.branch = nn.Conv2d(3, 3, 1).double()
    else:
        bx.revert_batchnorm(model)
    y = model(x)
    torch.testing.assert_close(y, bx.unfuse_batchnorm(model)(x))


def test_called_otherwise_it_is_only_itself() -> None:
    model: Any = Ends(conv_norm(), added).double().eval()
    x = images()
    expected = model.branch(x)
    bx.fuse_batchnorm(model)
    torch.testing.assert_close(model.branch(x), expected)
    torch.testing.assert_close(model.branch[1](model.branch[0](x)), expected)
