"""Which calls in a forward are joined, and which forwards are left: one batch norm each."""

from __future__ import annotations

import builtins
import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from fusable import Bottleneck, Site, images, outcome
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm_ext as bx
from batchnorm_ext import joined


def view_written(m: Any, y: Any, x: Any) -> Any:
    """Writes to z through a view of it, by an operator that has an out-of-place form."""
    z = x * 1.0
    w = z.mT
    w *= 2
    return F.relu(y) * z


def alias_written(m: Any, y: Any, x: Any) -> Any:
    z = x * 1.0
    w = z
    z -= 3
    return F.relu(y) * w


@pytest.mark.parametrize(
    ("then", "activation", "residual"),
    [
        (view_written, "relu", False),
        (alias_written, "relu", False),
        (lambda m, y, x: torch.relu(y), "relu", False),
        (lambda m, y, x: torch.relu_(y), "relu", False),
        (lambda m, y, x: y.relu(), "relu", False),
        (lambda m, y, x: F.relu6(y), "relu6", False),
        (lambda m, y, x: F.leaky_relu(y), "leaky_relu", False),
        (lambda m, y, x: F.leaky_relu(y, 0.3), "leaky_relu", False),
        (lambda m, y, x: F.leaky_relu_(y, negative_slope=0.3), "leaky_relu", False),
        (lambda m, y, x: F.elu(y, alpha=0.3, inplace=True), "elu", False),
        (lambda m, y, x: F.silu(y, inplace=True), "silu", False),
        (lambda m, y, x: F.gelu(y), "gelu", False),
        (lambda m, y, x: F.gelu(y, approximate="tanh"), "gelu_tanh", False),
        (lambda m, y, x: F.hardswish(y), "hardswish", False),
        (lambda m, y, x: y + x, "identity", True),
        (lambda m, y, x: m.act(x + y), "relu", True),
        (lambda m, y, x: y.add(x).relu(), "relu", True),
        (lambda m, y, x: y.add_(x).relu_(), "relu", True),
        (lambda m, y, x: F.silu(operator.iadd(y, x)), "silu", True),
        (lambda m, y, x: (lambda z: z * F.relu(z))(y + x), "identity", True),
        (lambda m, y, x: m.act(y + m.gate), "relu", True),  # broadcast: added separately
        (lambda m, y, x: m.act(y + m.scale), "relu", True),
        (lambda m, y, x: m.act(y + x[:, :1]), "relu", True),
        (lambda m, y, x: m.act(y + x.float()), "relu", True),
        (lambda m, y, x: m.act(y + x.transpose(2, 3)), "relu", True),
        (lambda m, y, x: m.act(y + x.shape[0]), "relu", True),  # a number
    ],
)
def test_fused_forms(then: Callable[..., Any], activation: str, residual: bool) -> None:
    report = outcome(Site(then))
    assert report.fused == (("", "bn", activation, residual),)


def test_of_two_batch_norms_the_later_takes_the_add() -> None:
    report = bx.fusion_report(Bottleneck(4, 4))
    assert [f.norm for f in report.fused] == ["bn1", "bn2", "bn3"]
    assert [left.norm for left in report.unpaired] == ["bn_s"]


def into_another(m: Any, y: Any, x: Any) -> Any:
    z = x * 1.0
    z += y
    return F.relu(z)


def written_later(m: Any, y: Any, x: Any) -> Any:
    z = x * 1.0
    w = z
    z += y
    return F.relu(z) + w


@pytest.mark.parametrize(
    "then",
    [
        into_another,
        written_later,
        lambda m, y, x: y + y,
        lambda m, y, x: y + 1.0,
        lambda m, y, x: torch.add(y, x, alpha=2),
        lambda m, y, x: F.conv2d(y, m.conv.weight),
        lambda m, y, x: torch.sigmoid(y),
        lambda m, y, x: y,
    ],
)
def test_forms_with_nothing_to_fuse(then: Callable[..., Any]) -> None:
    """An add that writes to another tensor than the batch norm's output is not taken along."""
    report = outcome(Site(then))
    assert not report.fused and "bn" in [left.norm for left in report.unpaired]


class Frozen:
    """What a forward does besides computing."""

    @staticmethod
    def appends(m: Any, y: Any, x: Any) -> Any:
        m.seen.append(y)
        return F.relu(y)

    @staticmethod
    def assigns(m: Any, y: Any, x: Any) -> Any:
        m.last = y.shape
        return F.relu(y)

    @staticmethod
    def draws(m: Any, y: Any, x: Any) -> Any:
        return F.relu(y) if torch.rand(()) < 2 else y

    @staticmethod
    def no_grad(m: Any, y: Any, x: Any) -> Any:
        with torch.no_grad():
            z = x * 2
        return F.relu(y) + z

    @staticmethod
    def no_autocast(m: Any, y: Any, x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return F.relu(y)

    @staticmethod
    def asks_of_result(m: Any, y: Any, x: Any) -> Any:
        return F.relu(y) if isinstance(y, Tensor) else y

    @staticmethod
    def hands_to_torch(m: Any, y: Any, x: Any) -> Any:
        """What isn't overloaded reads a tensor's memory, and a proxy must not look like one."""
        return F.relu(y) + torch.as_tensor(x)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda m, y, x: F.relu(y) + y, "used in 2 places"),
        (lambda m, y, x: F.relu(y) if m.training else y, "training or the gradient mode"),
        (lambda m, y, x: F.dropout(F.relu(y), 0.0, m.training), "training or the gradient mode"),
        (lambda m, y, x: F.relu(y) if torch.is_grad_enabled() else y.clamp(0), "gradient mode"),
        (lambda m, y, x: F.relu(y) if x.sum() < 1e9 else y, "can't be traced"),
        (lambda m, y, x: F.relu(y) + torch.ones(3, 1, 1), "neither parameter nor buffer"),
        (Frozen.appends, "assigns to seen"),
        (Frozen.assigns, "assigns to last"),
        (Frozen.draws, "random numbers"),
        (Frozen.no_grad, "gradient or autocast mode"),
        (Frozen.no_autocast, "gradient or autocast mode"),
        (Frozen.asks_of_result, "the type of something that it computed"),
        (Frozen.hands_to_torch, "can't be traced"),
    ],
)
def test_refused_forms(then: Callable[..., Any], reason: str) -> None:
    model = Site(then)
    state, attributes = torch.get_rng_state(), dict(vars(model))
    report = bx.fusion_report(model)
    assert torch.equal(torch.get_rng_state(), state) and vars(model) == attributes
    assert not report.fused and any(reason in left.reason for left in report.refused)
    assert not model.seen
    outcome(model)


class Ordered(nn.Module):
    """Something happens between the batch norm and the add."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source, self.bn, self.relu = source, nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.bn(self.source(x))
        return F.silu(y + self.relu(x))


@pytest.mark.parametrize(
    ("source", "fused"),
    [(nn.Conv2d(3, 3, 1), True), (nn.Dropout(0.0), False)],
    ids=["conv", "drop"],
)
def test_the_order_is_kept(source: nn.Module, fused: bool) -> None:
    """Dropout hands its input through in eval, where the ReLU then writes to it."""
    model, x = Ordered(source).double().eval(), images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(bx.fuse_batchnorm(model)(x), expected)
    report = bx.fusion_report(model)
    assert len(report.fused) == fused
    assert fused or "relu comes between" in report.refused[0].reason


class Twice(Site):
    """The first call would move behind the second, and both move the running statistics."""

    def __init__(self) -> None:
        super().__init__(lambda m, y, x: F.relu(y + F.relu(m.bn(m.conv(x * 2)))))


def test_calls_of_one_batch_norm_keep_their_order() -> None:
    report = outcome(Twice())
    assert [f.residual for f in report.fused] == [False]
    assert "comes between" in report.refused[0].reason


# --- forwards that ask what their arguments are --------------------------------------------------


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, *, skip: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        return F.relu(y if skip is None else y + skip)


class Required(Optional):
    def forward(self, x: Tensor, *, skip: Tensor | None = None) -> Tensor:
        return F.relu(self.bn(x) + skip)


class Untraceable(Optional):
    """Without skip it asks for a value, which a trace does not have."""

    def forward(self, x: Tensor, *, skip: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        if skip is None:
            return F.relu(y) if x.sum() > 0 else y
        return F.relu(y + skip)


class AsksClass(Optional):
    def forward(self, x: Any, *, skip: Tensor | None = None) -> Tensor:
        if isinstance(x, (list, tuple)):
            x = torch.cat(x, 1) if isinstance(x, list) else x[0]
        elif isinstance(x, nn.Parameter):
            return self.bn(x)
        return F.relu(self.bn(x))


class AsksBoth(Optional):
    """The question for skip depends on what x is."""

    def forward(self, x: Any, *, skip: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor):
            return F.relu(self.bn(x))
        return F.silu(self.bn(x[0]) if skip is None else self.bn(x[0]) + skip)


class AsksThree(Optional):
    def forward(self, x: Any, *, skip: Any = None, gate: Any = None) -> Tensor:
        y = self.bn(x if isinstance(x, Tensor) else x[0])
        y = y if skip is None else y + skip
        return F.relu(y if gate is None else y * gate)


class AsksInEval(Optional):
    """In training it asks nothing."""

    def forward(self, x: Any, *, skip: Tensor | None = None) -> Tensor:
        if not self.training and isinstance(x, list):
            x = x[0]
        if not self.training and skip is None:
            x = x * 2
        return F.relu(self.bn(x))


class UsesType(Optional):
    def forward(self, x: Any, *, skip: Tensor | None = None) -> Tensor:
        return F.relu(self.bn(x[0] if type(x) is list else x))


class AfterStar(Optional):
    def forward(self, *xs: Tensor, skip: float = 1.0) -> Tensor:  # type: ignore[override]
        return F.relu(self.bn(xs[0])) * skip


class OwnTensor(Tensor):
    pass


X = torch.linspace(-2, 3, 96).view(2, 3, 4, 4)
IN_TWO = [X[:, :1], X[:, 1:]]


@pytest.mark.parametrize(
    ("make", "args", "options", "joined_calls"),
    [
        (Optional, (X,), {}, 1),
        (Optional, (X,), {"skip": None}, 1),
        (Optional, (X,), {"skip": X}, 1),
        (Required, (X,), {"skip": X}, 1),
        (Untraceable, (X,), {}, 0),
        (Untraceable, (X,), {"skip": X}, 1),
        (AsksClass, (X,), {}, 1),
        (AsksClass, (IN_TWO,), {}, 1),
        (AsksClass, ((X,),), {}, 1),
        (AsksClass, (nn.Parameter(X),), {}, 0),  # known by none of the questions: as it was
        (AsksClass, (X.as_subclass(OwnTensor),), {}, 0),
        (AsksBoth, (X,), {}, 1),
        (AsksBoth, (X,), {"skip": X}, 1),
        (AsksBoth, ([X],), {}, 1),
        (AsksBoth, ([X],), {"skip": X}, 1),
    ],
)
def test_the_way_is_that_of_the_arguments(
    make: type[nn.Module],
    args: tuple[Any, ...],
    options: dict[str, Any],
    joined_calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, model = make(), bx.fuse_batchnorm(make())
    expected = plain(*args, **options)
    kernels = mock.Mock(wraps=joined._forward)
    monkeypatch.setattr(joined, "_forward", kernels)
    actual = model(*args, **options)
    torch.testing.assert_close(actual, expected)
    assert kernels.call_count == joined_calls
    for a, e in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, e)
    assert torch.equal(pickle.loads(pickle.dumps(model))(*args, **options), actual)


def test_what_is_asked_in_one_mode_only() -> None:
    plain = AsksInEval()
    model = bx.fuse_batchnorm(copy.deepcopy(plain)).eval()
    for args in ((X,), ([X],)):
        for skip in (None, X):
            torch.testing.assert_close(model(*args, skip=skip), plain.eval()(*args, skip=skip))


def test_each_way_is_in_the_report_once() -> None:
    fused = bx.fusion_report(Optional()).fused
    assert {f[2:] for f in fused} == {("relu", False), ("relu", True)} and len(fused) == 2
    assert len(bx.fusion_report(AsksClass()).fused) == 1
    assert {f[2:] for f in bx.fusion_report(AsksBoth()).fused} == {
        ("relu", False),
        ("silu", False),
        ("silu", True),
    }


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (AsksThree, "depends on what"),
        (UsesType, "type()"),
        (AfterStar, "after *args"),
    ],
)
def test_refused_questions(make: type[nn.Module], reason: str) -> None:
    model = make()
    assert reason in bx.fusion_report(model).refused[0].reason
    expected = model(X)
    torch.testing.assert_close(bx.fuse_batchnorm(model)(X), expected)


def test_none_where_it_is_no_possible_value() -> None:
    """It is not asked for, then: there is one way, without a condition."""
    model: Any = bx.fuse_batchnorm(Required())
    assert [conditions for conditions, _ in model._program.ways] == [()]
    with pytest.raises(TypeError):
        model(X)


def test_isinstance_is_left_as_it_was() -> None:
    before = builtins.isinstance
    bx.fusion_report(AsksClass())
    bx.fusion_report(Site(Frozen.hands_to_torch))
    assert builtins.isinstance is before


def test_ways_are_compiled_as_one_graph() -> None:
    torch._dynamo.reset()
    model = bx.fuse_batchnorm(AsksClass())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x in (X, IN_TWO, (X,)):
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_annotations_are_not_carried_along() -> None:
    """A class known in the model's file only, or nowhere, would end in the pickle."""

    class Annotated(Optional):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.relu(self.bn(x))

    Annotated.forward.__annotations__["x"] = Annotated
    program = type(bx.fuse_batchnorm(Annotated()))._program  # type: ignore[attr-defined]
    ((_, source),) = program.ways
    assert "norm_act" in source.text and "Annotated" not in source.text
