"""Conversion of whole models: what changes class, what stays, and what is said about the rest."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import batchnorm_ext as bx

PAIRS: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (nn.BatchNorm1d, bx.BatchNorm1d),
    (nn.BatchNorm2d, bx.BatchNorm2d),
    (nn.BatchNorm3d, bx.BatchNorm3d),
    (nn.LazyBatchNorm1d, bx.LazyBatchNorm1d),
    (nn.LazyBatchNorm2d, bx.LazyBatchNorm2d),
    (nn.LazyBatchNorm3d, bx.LazyBatchNorm3d),
]


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """What these tests ask is exact; rounding is the subject of others. Tolerances of 1e-7."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


def make(cls: type[nn.Module]) -> nn.Module:
    return cls() if "Lazy" in cls.__name__ else cls(3)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width, momentum=None)])
        self.paths = nn.ModuleDict({"shortcut": nn.BatchNorm2d(width, affine=False)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](torch.relu(self.norms[0](self.conv(x))))
        return torch.relu(y + self.paths["shortcut"](x))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        Block(4),
        nn.Flatten(2),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.LazyBatchNorm1d(),
    )


def images(seed: int) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules()]


# --- what changes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("torchs", "ours"), PAIRS, ids=lambda cls: cls.__name__)
def test_every_class_as_the_model_itself(torchs: type[nn.Module], ours: type[nn.Module]) -> None:
    module = make(torchs)
    assert bx.convert_batchnorm(module) is module
    assert type(module) is ours
    assert bx.revert_batchnorm(module) is module
    assert type(module) is torchs


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d.__init__).parameters,
    reason="this torch's batch norm has no bias argument",
)
@pytest.mark.parametrize(("torchs", "ours"), PAIRS, ids=lambda cls: cls.__name__)
def test_modules_without_bias(torchs: type[nn.Module], ours: type[nn.Module]) -> None:
    """bias=False leaves a weight and an empty place: both stay, and no bias appears in it."""
    arguments: tuple[int, ...] = () if "Lazy" in torchs.__name__ else (3,)
    module, expected = (torchs(*arguments, bias=False) for _ in range(2))
    text, weight = repr(module), module.get_parameter("weight")
    assert repr(bx.convert_batchnorm(module)) == text and type(module) is ours
    x = torch.randn(4, 3, *[2] * int(torchs.__name__[-2]))
    for _ in range(2):  # the first call materialises the lazy ones
        torch.testing.assert_close(module(x), expected(x))
    assert repr(bx.revert_batchnorm(module)) == repr(expected)
    assert type(module) is type(expected)
    assert [p is weight for p in module.parameters()] == [True] and module.bias is None


def test_nested_and_back() -> None:
    model = network()
    before, text = classes(model), repr(model)
    bx.convert_batchnorm(model)
    table = dict(PAIRS)
    assert classes(model) == [table.get(cls, cls) for cls in before]
    assert sum(cls in table for cls in before) == 6
    assert repr(model) == text
    bx.revert_batchnorm(model)
    assert classes(model) == before


def test_converting_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = bx.convert_batchnorm(network())
    once = classes(model)
    bx.convert_batchnorm(model)
    assert classes(model) == once
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_converted_modules_run_our_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def torchs_forward(*_: object) -> None:
        raise AssertionError("torch's forward was called")

    monkeypatch.setattr(_BatchNorm, "forward", torchs_forward)
    model = bx.convert_batchnorm(network())
    assert model(images(0)).shape == (8, 5)
    assert type(model[-1]) is bx.BatchNorm1d  # materialised on that call
    with pytest.raises(AssertionError, match="torch's forward was called"):
        bx.revert_batchnorm(model)(images(0))


def test_traced_model() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    expected = copy.deepcopy(model)(images(0))
    bx.convert_batchnorm(model)
    assert type(model.get_submodule("1")) is bx.BatchNorm2d
    torch.testing.assert_close(model(images(0)), expected)


def test_reverted_model_can_be_scripted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bx.BatchNorm2d(4)).eval()
    expected = model(images(0))
    torch.testing.assert_close(torch.jit.script(bx.revert_batchnorm(model))(images(0)), expected)


# --- what stays ------------------------------------------------------------------------------


def test_the_very_same_objects_stay() -> None:
    model = network()
    modules, tensors = list(model.modules()), list(model.state_dict(keep_vars=True).values())
    attributes = [dict(vars(m)) for m in modules]
    for exchange in (bx.convert_batchnorm, bx.revert_batchnorm):
        exchange(model)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        now = model.state_dict(keep_vars=True).values()
        assert all(a is b for a, b in zip(now, tensors, strict=True))
        for module, old in zip(modules, attributes, strict=True):
            assert vars(module).keys() == old.keys()
            assert all(vars(module)[k] is v for k, v in old.items())


def test_flags_dtypes_and_foreign_attributes_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, device="meta"))
    model[0].eval()
    model[0].get_parameter("weight").requires_grad_(False)
    model[1].to(torch.bfloat16)
    marker: Any = object()
    model[1].qconfig = marker
    bx.convert_batchnorm(model)
    assert [m.training for m in model] == [False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    kinds = [(m.weight.dtype, m.running_var.dtype, m.weight.device.type) for m in model]
    assert kinds == [
        (torch.float64, torch.float64, "cpu"),
        (torch.bfloat16, torch.bfloat16, "cpu"),
        (torch.float64, torch.float64, "meta"),
    ]
    assert model[1].qconfig is marker


def test_shared_modules_and_parameters_stay_shared() -> None:
    shared = nn.BatchNorm2d(3)
    other = nn.BatchNorm2d(3)
    other.weight = shared.weight
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, other), "c": other})
    bx.convert_batchnorm(model)
    inner = model["b"]
    assert isinstance(inner, nn.Sequential)
    assert model["a"] is shared and inner[0] is shared and inner[1] is other
    assert type(shared) is bx.BatchNorm2d and type(other) is bx.BatchNorm2d
    assert other.weight is shared.weight
    assert len(list(model.parameters())) == 3


class Recorder:
    """One hook of every kind on a module, each counting its calls."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        module.register_forward_pre_hook(self.count("forward_pre", lambda m, args: (args[0] * 2,)))
        module.register_forward_hook(self.count("forward", lambda m, args, out: out + 1))
        module.register_full_backward_pre_hook(
            self.count("backward_pre", lambda m, grads: (grads[0] * 3,))
        )
        module.register_full_backward_hook(
            self.count("backward", lambda m, grads, outs: (grads[0] * 5,))
        )
        module.register_state_dict_pre_hook(self.count("state_pre", lambda *_: None))
        module.register_state_dict_post_hook(self.count("state", lambda *_: None))
        module.register_load_state_dict_pre_hook(self.count("load_pre", lambda *_: None))
        module.register_load_state_dict_post_hook(self.count("load", lambda *_: None))

    def count(self, kind: str, hook: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.calls[kind] += 1
            return hook(*args)

        return counted


def test_hooks_of_every_kind_stay() -> None:
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(3)
        recorder = Recorder(norm)
        if convert:
            bx.convert_batchnorm(norm)
        x = images(0).requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        norm.load_state_dict(norm.state_dict())
        assert set(recorder.calls.values()) == {1} and len(recorder.calls) == 8
        results.append((y.detach(), x.grad, norm.weight.grad, norm.running_mean))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[0][0], nn.BatchNorm2d(3)(images(0)))  # the hooks matter


def test_optimizer_made_before_stays_valid() -> None:
    """Convert in the middle of training: the same losses and weights as without."""
    losses: list[list[float]] = []
    states = []
    for convert in (False, True):
        model = network()
        model(images(0))  # materialise the lazy modules
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        history = []
        for step in range(6):
            if convert and step == 2:
                bx.convert_batchnorm(model)
            if convert and step == 5:
                bx.revert_batchnorm(model)
            optimizer.zero_grad()
            target = torch.arange(8) % 5
            loss = nn.functional.cross_entropy(model(images(step)), target)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
        states.append(model.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    torch.testing.assert_close(states[1], states[0], rtol=1e-7, atol=1e-9)


def test_lazy_modules_convert_before_they_materialise() -> None:
    expected = network()(images(0))
    model = network()
    lazy: Any = model[-1]
    weight: object = lazy.weight
    assert nn.parameter.is_lazy(lazy.weight)
    bx.convert_batchnorm(model)
    torch.testing.assert_close(model(images(0)), expected)
    assert lazy.weight is weight
    assert lazy.weight.shape == (5,)
    assert type(lazy) is bx.BatchNorm1d and lazy.num_features == 5


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrisations_stay() -> None:
    module: Any = nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", Doubled())
    copied = copy.deepcopy(module)
    expected = copy.deepcopy(module)(images(0))

    bx.convert_batchnorm(module)
    assert parametrize.type_before_parametrizations(module) is bx.BatchNorm2d
    assert repr(module).startswith("ParametrizedBatchNorm2d(")
    assert parametrize.is_parametrized(module, "weight")
    # Copies share the class that the module had before.
    assert parametrize.type_before_parametrizations(copied) is nn.BatchNorm2d
    torch.testing.assert_close(module(images(0)), expected)
    torch.testing.assert_close(module.weight, torch.full((3,), 2.0))
    again = copy.deepcopy(module)
    assert type(again) is type(module)

    bx.revert_batchnorm(again)
    assert parametrize.type_before_parametrizations(again) is nn.BatchNorm2d
    assert parametrize.type_before_parametrizations(module) is bx.BatchNorm2d

    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is bx.BatchNorm2d
    torch.testing.assert_close(module.weight.detach(), torch.full((3,), 2.0))


# --- what is left alone ----------------------------------------------------------------------


class Custom(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


class OnOurs(bx.BatchNorm2d):
    pass


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == "batchnorm_ext" and r.levelno == logging.WARNING
    ]


def test_unknown_subclasses_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        Custom(3),
        nn.Sequential(nn.SyncBatchNorm(3)),
        nn.InstanceNorm2d(3),
        OnOurs(3),
        bx.BatchNormAct2d(3),
    )
    before = classes(model)
    with caplog.at_level(logging.INFO, logger="batchnorm_ext"):
        bx.convert_batchnorm(model)
    after = classes(model)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a is not b]
    assert changed == [(nn.BatchNorm2d, bx.BatchNorm2d)]
    assert warnings_of(caplog) == [
        f"batch norm modules not converted: 1 ({__name__}.Custom), "
        "2.0 (torch.nn.modules.batchnorm.SyncBatchNorm)"
    ]
    assert "batch norm modules converted: 1" in caplog.text


def test_root_is_named(caplog: pytest.LogCaptureFixture) -> None:
    bx.convert_batchnorm(Custom(3))
    assert warnings_of(caplog) == [
        f"batch norm modules not converted: the model ({__name__}.Custom)"
    ]


def test_modules_with_their_own_forward_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A forward set on the object would hide ours: saying "converted" would be untrue."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].forward = lambda input: input + 1
    bx.convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert torch.equal(model(torch.zeros(1, 3, 1, 1)), torch.ones(1, 3, 1, 1))
    (message,) = warnings_of(caplog)
    assert message.endswith(": 0 (torch.nn.modules.batchnorm.BatchNorm2d with its own forward)")


def test_revert_leaves_fused_modules_and_names_them(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(bx.BatchNorm2d(3), bx.BatchNormAct2d(3), OnOurs(3), nn.BatchNorm2d(3))
    bx.revert_batchnorm(model)
    assert classes(model)[1:] == [nn.BatchNorm2d, bx.BatchNormAct2d, OnOurs, nn.BatchNorm2d]
    assert warnings_of(caplog) == [
        "batch norm modules not reverted: "
        f"1 (batchnorm_ext.modules.BatchNormAct2d), 2 ({__name__}.OnOurs)"
    ]


def test_nothing_to_say_about_other_models(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2), nn.GroupNorm(1, 2))
    bx.revert_batchnorm(bx.convert_batchnorm(model))
    assert warnings_of(caplog) == []
