"""The modules against torch's: the same state, the same numbers, the same errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_pairs import (
    CONFIGS,
    FUSED,
    LAZY,
    OURS,
    RANKS,
    SPATIAL,
    TORCHS,
    TORCHS_LAZY,
    C,
    assert_same_state,
    assert_same_step,
    error_of,
    named,
    pair,
    sample,
    scramble,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.optim.swa_utils import update_bn

import batchnorm_ext as bx

pytestmark = pytest.mark.usefixtures("float64_by_default")


# --- construction and state ------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("rank", RANKS)
def test_constructor_repr_and_state_are_torchs(rank: int, config: dict[str, Any]) -> None:
    ours, torchs = OURS[rank](C, **config), TORCHS[rank](C, **config)
    assert isinstance(ours, TORCHS[rank])
    assert repr(ours) == repr(torchs)
    assert_same_state(ours, torchs)
    assert inspect.signature(type(ours).__init__) == inspect.signature(type(torchs).__init__)
    assert list(vars(ours)) == list(vars(torchs))  # no state of our own


@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("classes", [OURS, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("rank", RANKS)
def test_checkpoints_load_in_both_directions(
    classes: dict[int, type[nn.Module]], rank: int, config: dict[str, Any]
) -> None:
    ours, torchs = classes[rank](C, **config), TORCHS[rank](C, **config)
    scramble(torchs, seed=1)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    assert_same_state(ours, torchs)
    scramble(ours, seed=2)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours, torchs)


@pytest.mark.parametrize("classes", [OURS, FUSED], ids=["plain", "fused"])
def test_checkpoint_without_counter(classes: dict[int, type[nn.Module]]) -> None:
    """Version 1 of the format has no num_batches_tracked; the module keeps its own."""
    ours, torchs = classes[2](C), TORCHS[2](C)
    scramble(torchs)
    old = {k: v for k, v in torchs.state_dict().items() if k != "num_batches_tracked"}
    ours.get_buffer("num_batches_tracked").fill_(5)
    ours.load_state_dict(dict(old), strict=True)
    torchs.get_buffer("num_batches_tracked").fill_(5)
    assert_same_state(ours, torchs)
    # A current checkpoint (it says so) that lacks the counter is refused, as by torch.
    current = torchs.state_dict()
    del current["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"num_batches_tracked"'):
        ours.load_state_dict(current, strict=True)


@pytest.mark.parametrize("make", [lambda: bx.BatchNorm2d(C), lambda: bx.BatchNormAct2d(C, "elu")])
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(saved(m), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(make: Callable[[], nn.Module], duplicate: Callable[[nn.Module], nn.Module]) -> None:
    module = make()
    scramble(module)
    twin = duplicate(module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert_same_state(twin, module)
    x = sample(2, 0)
    assert torch.equal(twin(x), module(x))
    assert_same_state(twin, module)
    assert twin.weight is not module.weight


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("classes", [OURS, FUSED], ids=["plain", "fused"])
def test_reset_parameters(classes: dict[int, type[nn.Module]], config: dict[str, Any]) -> None:
    module = classes[2](C, **config)
    scramble(module)
    module.reset_parameters()  # type: ignore[operator]
    assert_same_state(module, nn.BatchNorm2d(C, **config))


def test_device_and_dtype_arguments() -> None:
    for cls in (bx.BatchNorm2d, bx.BatchNormAct2d):
        module = cls(C, device="meta", dtype=torch.bfloat16)
        kinds = {k: (v.device.type, v.dtype) for k, v in module.state_dict().items()}
        assert kinds.pop("num_batches_tracked") == ("meta", torch.int64)
        assert set(kinds.values()) == {("meta", torch.bfloat16)}


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("rank", RANKS)
def test_steps_like_torch(rank: int, config: dict[str, Any]) -> None:
    """Training and evaluation in turn: each mode sees what the other left behind."""
    ours, torchs = pair(rank, config)
    for step, training in enumerate([True, True, False, True, False, False, True]):
        ours.train(training)
        torchs.train(training)
        assert_same_step(ours, torchs, sample(rank, step))


def test_two_dimensional_input() -> None:
    ours, torchs = pair(1, {})
    for step in range(2):
        assert_same_step(ours, torchs, sample(1, step)[:, :, 0])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(rank: int, training: bool) -> None:
    ours, torchs = pair(rank, {})
    ours.train(training)
    torchs.train(training)
    assert_same_step(ours, torchs, sample(rank, 0, n=0))


def test_momentum_none_is_the_average_over_batches() -> None:
    ours = bx.BatchNorm2d(C, momentum=None)
    batches = [sample(2, seed) for seed in range(5)]
    for x in batches:
        ours(x)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.var((0, 2, 3), correction=1) for x in batches])
    torch.testing.assert_close(ours.running_mean, means.mean(0))
    torch.testing.assert_close(ours.running_var, variances.mean(0))
    assert ours.num_batches_tracked is not None and ours.num_batches_tracked.item() == 5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_counter(momentum: float | None) -> None:
    """Modules from before the counter: the estimates move only if there is a momentum."""
    ours, torchs = pair(2, {"momentum": momentum})
    for module in (ours, torchs):
        module.register_buffer("num_batches_tracked", None)
    before = ours.get_buffer("running_mean").clone()
    for step in range(3):
        assert_same_step(ours, torchs, sample(2, step))
    assert torch.equal(ours.get_buffer("running_mean"), before) == (momentum is None)
    assert ours.num_batches_tracked is None


def test_track_running_stats_switched_off_later() -> None:
    """Buffers that are there but not tracked: unread in training, read in evaluation."""
    ours, torchs = pair(2, {})
    module: Any
    for module in (ours, torchs):
        module.track_running_stats = False
    before = copy.deepcopy(ours.state_dict())
    assert_same_step(ours, torchs, sample(2, 0))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    assert_same_step(ours.eval(), torchs.eval(), sample(2, 1))


def test_frozen_parameters_get_no_gradient() -> None:
    ours, torchs = pair(2, {})
    for module in (ours, torchs):
        module.get_parameter("weight").requires_grad_(False)
    assert_same_step(ours, torchs, sample(2, 0))
    x = sample(2, 1).requires_grad_()
    ours(x).square().sum().backward()
    assert ours.get_parameter("weight").grad is None
    assert ours.get_parameter("bias").grad is not None


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", range(7))
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("classes", [OURS, FUSED], ids=["plain", "fused"])
def test_wrong_rank(classes: dict[int, type[nn.Module]], rank: int, ndim: int) -> None:
    if ndim == rank + 2 or (rank == 1 and ndim == 2):
        return
    module = classes[rank](3)
    x = torch.zeros((3,) * ndim)
    kind, text = error_of(lambda: module(x))
    assert (kind, text) == error_of(lambda: TORCHS[rank](3)(x))
    assert kind is ValueError and f"(got {ndim}D input)" in text
    assert_same_state(module, TORCHS[rank](3))


@pytest.mark.parametrize("classes", [OURS, FUSED], ids=["plain", "fused"])
def test_one_value_per_channel(classes: dict[int, type[nn.Module]]) -> None:
    x = torch.ones(1, C, 1, 1)
    module, torchs = classes[2](C), nn.BatchNorm2d(C)
    kind, text = error_of(lambda: module(x))
    assert (kind, text) == error_of(lambda: torchs(x))
    assert text.startswith("Expected more than 1 value per channel when training, got input size")
    # Torch has counted the batch it then refuses; here nothing is written.
    assert_same_state(module, nn.BatchNorm2d(C))
    # Evaluation needs no batch statistics unless there are no others.
    assert module.eval()(x).shape == x.shape
    untracked = classes[2](C, track_running_stats=False).eval()
    assert error_of(lambda: untracked(x)) == (kind, text)


def test_not_a_tensor() -> None:
    assert error_of(lambda: bx.BatchNorm2d(3)([1.0])) == error_of(lambda: nn.BatchNorm2d(3)([1.0]))


def test_plain_modules_take_no_residual() -> None:
    x = sample(2, 0)
    with pytest.raises(TypeError, match="residual"):
        bx.BatchNorm2d(C)(x, residual=x)


# --- lazy modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("rank", RANKS)
def test_lazy_becomes_ours(rank: int, config: dict[str, Any]) -> None:
    lazy, torchs = LAZY[rank](**config), TORCHS_LAZY[rank](**config)
    assert repr(lazy) == repr(torchs)
    assert isinstance(lazy, TORCHS_LAZY[rank])
    assert list(lazy.state_dict()) == list(torchs.state_dict())
    x = sample(rank, 0)
    torch.testing.assert_close(lazy(x), torchs(x))
    assert type(lazy) is OURS[rank]
    assert repr(lazy) == repr(torchs)
    assert lazy.num_features == torchs.num_features  # C; torch leaves 0 where nothing has a size
    torch.testing.assert_close(lazy.state_dict(), torchs.state_dict())
    if lazy.track_running_stats:
        assert lazy.get_buffer("num_batches_tracked").item() == 1
    assert_same_step(lazy, torchs, sample(rank, 1))


@pytest.mark.parametrize("rank", RANKS)
def test_lazy_first_call_goes_through_our_forward(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call runs the forward of the lazy class, not of the one it becomes."""

    def torchs_forward(*_: object) -> None:
        raise AssertionError("torch's forward was called")

    monkeypatch.setattr(_BatchNorm, "forward", torchs_forward)
    lazy = LAZY[rank]()
    assert lazy(sample(rank, 0)).shape == (4, C, *SPATIAL[rank])


def test_lazy_loads_a_checkpoint_first() -> None:
    lazy: nn.Module = bx.LazyBatchNorm2d()
    full = nn.BatchNorm2d(C)
    scramble(full)
    lazy.load_state_dict(full.state_dict())
    assert_same_state(lazy, full)
    assert_same_step(lazy, full, sample(2, 0))
    assert type(lazy) is bx.BatchNorm2d


def test_lazy_without_parameters_or_buffers() -> None:
    lazy = bx.LazyBatchNorm2d(affine=False, track_running_stats=False)
    x = sample(2, 0)
    torch.testing.assert_close(lazy(x), nn.BatchNorm2d(C, affine=False)(x))


def test_lazy_wrong_rank() -> None:
    x = torch.zeros(2, 3, 4)
    assert error_of(lambda: bx.LazyBatchNorm2d()(x)) == error_of(lambda: nn.LazyBatchNorm2d()(x))


# --- torch's tools ---------------------------------------------------------------------------


def test_conv_bn_fusion() -> None:
    conv = nn.Conv2d(3, C, 3).eval()
    ours, torchs = pair(2, {})
    fused = fuse_conv_bn_eval(conv, ours.eval())  # type: ignore[arg-type]
    expected = fuse_conv_bn_eval(conv, torchs.eval())  # type: ignore[arg-type]
    assert torch.equal(fused.weight, expected.weight)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused(x), ours(conv(x)))


def test_sync_conversion_takes_plain_and_leaves_fused() -> None:
    model = nn.Sequential(bx.BatchNorm2d(C), bx.BatchNormAct2d(C, "silu"))
    plain, fused = model[0], model[1]
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert synced[1] is fused
    assert type(fused) is bx.BatchNormAct2d and fused.activation == "silu"
    assert type(synced[0]) is nn.SyncBatchNorm
    assert synced[0].weight is plain.weight
    assert synced[0].running_mean is plain.running_mean


def test_update_bn() -> None:
    batches = [sample(2, seed) for seed in range(3)]
    ours, torchs = pair(2, {})
    update_bn(batches, nn.Sequential(ours))
    update_bn(batches, nn.Sequential(torchs))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    assert ours.momentum == 0.1


def test_functional_call() -> None:
    """torch.func puts other tensors in the place of parameters and buffers for one call."""
    ours, torchs = pair(2, {})
    ours.eval()
    torchs.eval()
    values = {k: v.detach() * 2 for k, v in ours.state_dict().items()}
    x = sample(2, 0)
    actual = torch.func.functional_call(ours, values, (x,))
    torch.testing.assert_close(actual, torch.func.functional_call(torchs, values, (x,)))
    assert not torch.allclose(actual, ours(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrised_weight() -> None:
    ours, torchs = pair(2, {})
    for module in (ours, torchs):
        parametrize.register_parametrization(module, "weight", Doubled())
    assert isinstance(ours, bx.BatchNorm2d)
    assert_same_step(ours, torchs, sample(2, 0))


def test_pruned_weight() -> None:
    ours, torchs = pair(2, {})
    mask = torch.tensor([1.0, 0, 1, 0, 1, 1])
    for module in (ours, torchs):
        prune.custom_from_mask(module, "weight", mask)
    assert_same_step(ours, torchs, sample(2, 0))
    y = ours(sample(2, 1))
    bias = ours.get_parameter("bias")
    torch.testing.assert_close(y[:, 1], bias[1].expand_as(y[:, 1]))
