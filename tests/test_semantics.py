"""What torch's batch norm means by its arguments; torch itself is the judge."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import pytest
import torch
from strategies import ACTIVATION_PARAMS, DTYPES, LAYOUTS, activation_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm_ext import batch_norm, functional

BOTH = ("contiguous", "channels_last")
#: Two float32 computations of the same formula on values of size one.
SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def _apply(x: Tensor, **changes: Any) -> Tensor:
    """What modules call, with their defaults."""
    arguments: dict[str, Any] = {
        "residual": None,
        "weight": None,
        "bias": None,
        "running_mean": None,
        "running_var": None,
        "num_batches_tracked": None,
        "use_batch_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "activation": "identity",
        "activation_param": 0.0,
    }
    return functional._apply(x, **(arguments | changes))


def _buffers(c: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "running_mean": torch.zeros(c, dtype=dtype),
        "running_var": torch.ones(c, dtype=dtype),
        "num_batches_tracked": torch.tensor(0),
    }


# ---- momentum and the counter ----


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0, 1.5])
def test_momentum(momentum: float | None, layout: str) -> None:
    """Five batches, as torch's module counts and averages them."""
    module = nn.BatchNorm1d(7, momentum=momentum)
    buffers = _buffers(7)
    for step in range(5):
        x = LAYOUTS[layout](torch.randn(6, 7, 3) * (step + 1) + step)
        ours = _apply(x, **buffers, momentum=momentum)
        torch.testing.assert_close(ours, module(x), **SAME)
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, getattr(module, name), **SAME)
    assert buffers["num_batches_tracked"].item() == 5
    assert buffers["num_batches_tracked"].dtype == torch.int64


def test_momentum_of_one_is_the_batch() -> None:
    """Not a trace of what was there, not even nan's cousin: 0 * old is 0 for finite values."""
    x = torch.randn(50, 3)
    mean, var = torch.full((3,), 1e30), torch.full((3,), 1e30)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x.mean(0), **SAME)
    torch.testing.assert_close(var, x.var(0), **SAME)


def test_momentum_of_zero_leaves_the_buffers() -> None:
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    batch_norm(torch.randn(50, 3), mean, var, training=True, momentum=0.0)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_cumulative_average_without_a_counter_changes_nothing() -> None:
    """As torch's module with num_batches_tracked = None, whose factor is then 0."""
    buffers = _buffers(3)
    del buffers["num_batches_tracked"]
    _apply(torch.randn(5, 3), **buffers, momentum=None)
    assert torch.equal(buffers["running_mean"], torch.zeros(3))
    assert torch.equal(buffers["running_var"], torch.ones(3))


def test_counter_beyond_32_bits() -> None:
    buffers = _buffers(3)
    buffers["num_batches_tracked"].fill_(2**33)
    _apply(torch.randn(5, 3), **buffers, momentum=None)
    assert buffers["num_batches_tracked"].item() == 2**33 + 1
    assert (buffers["running_mean"].abs() < 1e-8).all()


def test_counter_without_buffers() -> None:
    counter = torch.tensor(3)
    _apply(torch.randn(5, 3), num_batches_tracked=counter)
    assert counter.item() == 4


class _Recorder(TorchDispatchMode):
    """Names of the operators that reach a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_operator_does_it_all(momentum: float | None) -> None:
    """Statistics, output, buffers and counter: nothing is launched beside it."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    buffers = _buffers(3)
    with _Recorder() as recorder:
        y = _apply(x, **buffers, weight=weight, bias=bias, momentum=momentum, activation="relu")
    assert recorder.names == ["batchnorm_ext.forward_train.default"]
    dy = torch.randn_like(y)
    with _Recorder() as recorder:
        torch.autograd.grad(y, [x, weight, bias], dy)
    assert [n for n in recorder.names if "batchnorm" in n] == ["batchnorm_ext.backward.default"]
    assert not [n for n in recorder.names if "detach" not in n and "batchnorm" not in n]


# ---- running statistics ----


def test_running_variance_is_unbiased() -> None:
    """n / (n - 1), down to n = 2, while the output is normalised by the biased one."""
    x = torch.tensor([[1.0], [4.0]])
    mean, var = torch.zeros(1), torch.zeros(1)
    y = batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-12)
    assert mean.item() == 2.5
    assert var.item() == 4.5
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_reads_only(dtype: torch.dtype) -> None:
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    before, version = (mean.clone(), var.clone()), (mean._version, var._version)
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    batch_norm(x, mean, var).sum().backward()
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    assert (mean._version, var._version) == version


def test_training_is_seen_as_a_write() -> None:
    """Autograd must know that the buffers have changed."""
    buffers = _buffers(3)
    versions = {name: buffer._version for name, buffer in buffers.items()}
    for x in (torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)):
        _apply(x, **buffers)
        for name, buffer in buffers.items():
            assert buffer._version > versions[name], name
            versions[name] = buffer._version


@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_not_kept_for_backward(training: bool) -> None:
    """Overwritten in between (by DDP, by another forward), they neither fail nor matter."""
    x, dy = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    gradients = []
    for disturb in (False, True):
        leaf = x.clone().requires_grad_()
        weight = torch.full((3,), 1.5, requires_grad=True)
        mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
        y = batch_norm(leaf, mean, var, weight, None, training, activation="silu")
        if disturb:
            mean.fill_(100.0)
            var.mul_(7.0)
        gradients.append(torch.autograd.grad(y, [leaf, weight], dy))
    for undisturbed, disturbed in zip(*gradients, strict=True):
        assert torch.equal(undisturbed, disturbed)


@pytest.mark.parametrize("training", [True, False])
def test_double_precision_buffers_are_not_kept_either(training: bool) -> None:
    """The dtype of the saved statistics: a conversion that copies nothing would alias them."""
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = batch_norm(leaf, mean, var, None, None, training)
    (expected,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
    mean.add_(5.0)
    var.add_(5.0)
    (got,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(got, expected)


def test_two_forwards_before_a_backward() -> None:
    """One pair of buffers, two graphs; each gradient is that of its own batch."""
    mean, var = torch.zeros(3), torch.ones(3)
    batches = [torch.randn(5, 3, 4, requires_grad=True) for _ in range(2)]
    outputs = [batch_norm(x, mean, var, training=True, activation="relu") for x in batches]
    loss = outputs[0].square().sum() + outputs[1].square().sum()
    together = torch.autograd.grad(loss, batches)
    for x, got in zip(batches, together, strict=True):
        y = batch_norm(x, None, None, training=True, activation="relu")
        (alone,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.equal(got, alone)


def test_one_buffer_for_both_layers_of_a_chain() -> None:
    """A module used twice in one graph."""
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(5, 3, 4, requires_grad=True)
    y = batch_norm(batch_norm(x, mean, var, training=True), mean, var, training=True)
    y.square().sum().backward()
    m, v = torch.zeros(3), torch.ones(3)
    z = F.batch_norm(F.batch_norm(x, m, v, training=True), m, v, training=True)
    torch.testing.assert_close(y, z, **SAME)
    torch.testing.assert_close(mean, m, **SAME)
    torch.testing.assert_close(var, v, **SAME)


# ---- which parameters there are ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("layout", BOTH)
def test_affine(layout: str, given: tuple[str, ...], training: bool) -> None:
    x = LAYOUTS[layout](torch.randn(4, 5, 6)).requires_grad_()
    parameters: dict[str, Any] = {n: torch.randn(5, requires_grad=True) for n in given}
    leaves, dy = [x, *parameters.values()], torch.randn(4, 5, 6)
    mean, var = torch.randn(5), torch.rand(5) + 0.5
    results = []
    for function in (batch_norm, F.batch_norm):
        y = function(x, mean.clone(), var.clone(), training=training, **parameters)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, **SAME)


def test_statistics_of_the_batch_in_evaluation() -> None:
    """track_running_stats=False: no buffers, in either mode of the module."""
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(
        _apply(x, use_batch_stats=True), nn.BatchNorm1d(5, track_running_stats=False).eval()(x)
    )


def test_no_activation_by_both_names() -> None:
    x = torch.randn(4, 5, 6)
    none = batch_norm(x, None, None, training=True)
    assert torch.equal(none, batch_norm(x, None, None, training=True, activation="identity"))


@pytest.mark.parametrize("name", ACTIVATION_PARAMS)
def test_activation_is_torchs(name: str) -> None:
    """The separate operators, in float32; `approximate`, slopes and alphas by torch's names."""
    x, residual = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    param = ACTIVATION_PARAMS[name]
    ours = batch_norm(
        x, None, None, training=True, residual=residual, **activation_arguments(name, param)
    )
    separate = F.batch_norm(x, None, None, training=True) + residual
    torch.testing.assert_close(ours, functional._activate(separate, name, param), **SAME)


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "gelu"])
def test_defaults_of_activations(activation: str) -> None:
    x = torch.randn(4, 5, 6)
    ours = batch_norm(x, None, None, training=True, activation=activation)
    separate = getattr(F, activation)(F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(ours, separate, **SAME)


# ---- sizes ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_batch(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool, activation: str, training: bool
) -> None:
    """An empty output with torch's gradients: of parameters 0, not None; buffers untouched."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    added = torch.randn(shape, dtype=dtype, requires_grad=True) if residual else None
    weight, bias = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    mean, var = torch.full((3,), 2.0), torch.full((3,), 3.0)
    y = batch_norm(x, mean, var, weight, bias, training, residual=added, activation=activation)
    assert y.shape == x.shape and y.dtype == x.dtype
    leaves = [t for t in (x, added, weight, bias) if t is not None]
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        assert (gradient == 0).all()
    assert (mean == 2.0).all() and (var == 3.0).all()


def test_empty_batch_is_counted() -> None:
    """Like torch's module, which counts before it looks."""
    module = nn.BatchNorm1d(3, momentum=None)
    module(torch.randn(0, 3))
    buffers = _buffers(3)
    _apply(torch.randn(0, 3), **buffers, momentum=None)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, getattr(module, name)), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 4), (0, 0)])
def test_no_channels(shape: tuple[int, ...], training: bool) -> None:
    """torch fails with an IndexError from its insides; an error or an empty output is right."""
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        y = batch_norm(torch.randn(shape), torch.zeros(0), torch.ones(0), training=training)
        assert y.shape == shape


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1), (1, 1)])
def test_one_value_per_channel(shape: tuple[int, ...]) -> None:
    """torch's error in training; in evaluation a value like any other."""
    x = torch.randn(shape)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    messages = []
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(ValueError) as caught:
            function(x, mean, var, training=True)
        messages.append(str(caught.value).split("\n")[0])
    assert messages[0] == messages[1]
    assert torch.equal(mean, torch.zeros_like(mean)) and torch.equal(var, torch.ones_like(var))
    torch.testing.assert_close(batch_norm(x, mean, var), F.batch_norm(x, mean, var))


def test_six_dimensions() -> None:
    """torch's function takes any number of them."""
    x = torch.randn(2, 3, 2, 1, 2, 3)
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True), **SAME
    )


# ---- eps ----


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-5, 1.0, 1e10])
def test_eps(eps: float) -> None:
    x, mean, var = torch.randn(4, 3, 5), torch.randn(3), torch.rand(3) + 0.1
    # Not F.batch_norm, which refuses 0 in torch 2.11. The operator beneath takes it everywhere.
    torchs = torch.batch_norm(x, None, None, mean, var, False, 0.0, eps, False)
    torch.testing.assert_close(batch_norm(x, mean, var, eps=eps), torchs, **SAME)
    if eps > 0:
        ours = batch_norm(x, None, None, training=True, eps=eps)
        torch.testing.assert_close(
            ours, F.batch_norm(x, None, None, training=True, eps=eps), **SAME
        )


def test_variance_of_zero_without_eps() -> None:
    """Division by zero: not finite, and confined to that channel."""
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    ours = batch_norm(x, torch.ones(2), torch.tensor([0.0, 4.0]), eps=0.0)
    assert not ours[:, 0].isfinite().any()
    assert torch.equal(ours[:, 1], torch.tensor([0.0, 0.5]))


# ---- the modes of torch ----


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(guard: Any, training: bool) -> None:
    x, weight = torch.randn(4, 3, 5), torch.ones(3, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    with guard():
        y = batch_norm(x, mean, var, weight, None, training, activation="relu")
        assert not y.requires_grad and y.grad_fn is None
    expected = batch_norm(
        x, torch.zeros(3), torch.ones(3), weight, None, training, activation="relu"
    )
    assert torch.equal(y, expected)
    assert not torch.equal(mean, torch.zeros(3)) if training else torch.equal(mean, torch.zeros(3))


def test_inference_tensors() -> None:
    """Made in inference mode, used there again, buffers too."""
    with torch.inference_mode():
        buffers = _buffers(3)
        _apply(torch.randn(4, 3), **buffers)
        assert buffers["num_batches_tracked"].item() == 1
        del buffers["num_batches_tracked"]
        y = _apply(torch.randn(4, 3), **buffers, use_batch_stats=False)
    assert y.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Like torch's: the dtype of the input decides."""
    x = torch.randn(4, 3, 5, dtype=dtype)
    mean, var, weight = torch.zeros(3), torch.ones(3), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours = batch_norm(x, mean, var, weight, training=True)
        torchs = F.batch_norm(x, mean, var, weight, weight, training=True)
    assert ours.dtype == torchs.dtype == dtype
    assert torch.equal(ours, batch_norm(x, mean, var, weight, training=True))


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(4, 3, 5, requires_grad=True)
        batch_norm(x, None, None, training=True, activation="relu").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_output_is_nobodys_alias() -> None:
    """Even where there is nothing to do; and writing to it breaks no gradient."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    residual = torch.randn(4, 3, 5, requires_grad=True)
    for activation in ("identity", "relu", "silu"):
        y = batch_norm(x, None, None, training=True, residual=residual, activation=activation)
        assert y.data_ptr() not in (x.data_ptr(), residual.data_ptr())
        assert not y._is_view()
        expected = torch.autograd.grad(y.sum(), [x, residual], retain_graph=True)
        written = y.mul_(1.0).add_(3.0)
        got = torch.autograd.grad(written.sum(), [x, residual])
        for ours, wanted in zip(got, expected, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_changed_inputs_are_noticed(name: str) -> None:
    """What backward needs may not be overwritten in between: an error, no wrong gradient."""
    leaves = {"x": torch.randn(4, 3), "weight": torch.rand(3)}
    tensors = {key: (leaf.requires_grad_() * 1.0) for key, leaf in leaves.items()}
    y = batch_norm(tensors["x"], None, None, tensors["weight"], None, True)
    with torch.no_grad():
        tensors[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensor_functions_are_asked() -> None:
    """Subclasses with __torch_function__ see the call."""

    class Watcher(torch.Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            cls.seen.append(getattr(func, "__name__", ""))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    x = torch.randn(4, 3).as_subclass(Watcher)
    batch_norm(x, None, None, training=True, activation="relu")
    assert "batch_norm" in Watcher.seen
