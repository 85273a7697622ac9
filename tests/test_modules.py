"""The modules against torch's: the same state, the same numbers, the same errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.optim.swa_utils import update_bn

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


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """What these tests ask is exact; rounding is the subject of others. Tolerances of 1e-7."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


def named(value: Any) -> str:
    """A test id: the arguments as they are written in a call."""
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


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


# --- fused modules ---------------------------------------------------------------------------


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


def test_fused_is_not_torchs_batch_norm() -> None:
    """Whatever replaces or treats `_BatchNorm` modules must not get hold of an activation."""
    for cls in FUSED.values():
        assert not issubclass(cls, _BatchNorm)


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


# --- torch.fx --------------------------------------------------------------------------------


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
