"""First derivatives, backward and forward, and functorch; the second: test_double_backward.py."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import BOTH, NAMES, Statistics, composed, double, ours
from strategies import LAYOUTS
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from batchnorm_ext import BatchNorm1d, BatchNormAct1d, batch_norm

# ---- against finite differences ----


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, training: bool, layout: str) -> None:
    """All four inputs, float64; forward-mode AD beside it."""
    torch.manual_seed(3)
    x = LAYOUTS[layout](double(3, 2, 3)).requires_grad_()
    residual = (4.0 * double(3, 2, 3)).requires_grad_()  # spreads z over all branches
    weight, bias = double(2).requires_grad_(), double(2).requires_grad_()
    statistics: Statistics = (None, None) if training else (double(2), double(2).square() + 0.5)

    def call(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours(x, *statistics, w, b, training, eps=1e-3, residual=r, name=name)

    leaves = (x, residual, weight, bias)
    assert gradcheck(call, leaves, check_forward_ad=True, fast_mode=False)
    # A second derivative of 0 throughout needs no check against differences.
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2, 2), (2, 2, 2, 1, 2)], ids=str)
def test_gradcheck_of_other_ranks(shape: tuple[int, ...], training: bool) -> None:
    x, weight = double(*shape).requires_grad_(), double(2).requires_grad_()
    statistics: Statistics = (None, None) if training else (double(2), double(2).square() + 0.5)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return batch_norm(x, *statistics, w, None, training)

    assert gradcheck(call, (x, weight))
    assert gradgradcheck(call, (x, weight))


# ---- which gradients are computed ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str
)
def test_only_what_is_needed(wanted: tuple[bool, ...], name: str, training: bool) -> None:
    """Every subset of inputs that require a gradient: the same numbers, None for the others."""
    shape, c = (4, 3, 5), 3
    values = [torch.randn(shape), torch.randn(shape), torch.rand(c) + 0.5, torch.randn(c)]
    statistics: Statistics = (None, None) if training else (torch.randn(c), torch.rand(c) + 0.5)
    dy = torch.randn(shape)

    def run(required: tuple[bool, ...]) -> list[Tensor | None]:
        leaves = [v.clone().requires_grad_(r) for v, r in zip(values, required, strict=True)]
        x, residual, weight, bias = leaves
        y = ours(x, *statistics, weight, bias, training, residual=residual, name=name)
        y.backward(dy)
        return [leaf.grad for leaf in leaves]

    everything = run((True,) * 4)
    for gradient, expected, required in zip(run(wanted), everything, wanted, strict=True):
        assert (gradient is not None) == required
        if gradient is not None:
            assert expected is not None
            assert torch.equal(gradient, expected)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)), ids=str)
def test_operator_leaves_out_what_is_not_asked_for(wanted: tuple[bool, ...]) -> None:
    x, r, dy = (torch.randn(4, 3, 5) for _ in range(3))
    got = torch.ops.batchnorm_ext.backward(
        dy,
        x,
        r,
        torch.ones(3),
        torch.zeros(3),
        torch.zeros(3).double(),
        torch.ones(3).double(),
        None,
        True,
        "relu",
        0.0,
        wanted,
    )
    for gradient, asked in zip(got, wanted, strict=True):
        assert (gradient.numel() > 0) == asked


def test_gradient_of_some_inputs_only() -> None:
    """autograd.grad with a subset, of a graph that could give all."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.rand(3, requires_grad=True)
    y = batch_norm(x, None, None, w, None, True, activation="relu").square().sum()
    together = torch.autograd.grad(y, [x, w], retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], together[0])
    assert torch.equal(torch.autograd.grad(y, w)[0], together[1])


def test_gradients_accumulate() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    sums = []
    for _ in range(2):
        batch_norm(x, None, None, training=True, activation="relu").square().sum().backward()
        assert x.grad is not None
        sums.append(x.grad.clone())
    assert torch.equal(sums[1], sums[0] + sums[0])


def test_the_residuals_gradient_is_nobodys_alias() -> None:
    """Without an activation it equals dy; accumulating into it must not change dy."""
    x = torch.randn(4, 3, requires_grad=True)
    residual = torch.randn(4, 3, requires_grad=True)
    dy = torch.ones(4, 3)
    y = batch_norm(x, None, None, training=True, residual=residual)
    y.backward(dy)
    assert residual.grad is not None
    residual.grad.add_(1.0)
    assert torch.equal(dy, torch.ones(4, 3))


@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
def test_residual_is_the_input(name: str) -> None:
    """y = act(BN(x) + x): both gradients arrive."""
    x, dy = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    results = []
    for function in (ours, composed):
        y = function(x, None, None, training=True, residual=x, name=name)
        results.append(torch.autograd.grad(y, x, dy)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_retain_graph() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    for name, residual in (("relu", torch.randn(4, 3, 5)), ("silu", None)):
        y = ours(x, None, None, training=True, residual=residual, name=name).square().sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], first)
        assert torch.equal(torch.autograd.grad(y, x)[0], first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x)


def test_undefined_gradient() -> None:
    """A part of the graph that sends no gradient at all."""
    x = torch.randn(4, 3, requires_grad=True)
    y = batch_norm(x, None, None, training=True)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None

    z = Nothing.apply(y).sum() + (0.0 * x).sum()
    z.backward()
    assert x.grad is not None and (x.grad == 0).all()


def _bytes_kept(function: Callable[[], Tensor]) -> int:
    """Of distinct tensors that autograd saves for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_memory_kept_for_backward(residual: bool, name: str, dtype: torch.dtype) -> None:
    """x, a bit per element where a residual hides the mask, and per-channel values: no y."""
    x = torch.randn(8, 16, 12, 12, dtype=dtype, requires_grad=True)
    weight, bias = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    added = torch.randn(x.shape, dtype=dtype, requires_grad=True) if residual else None
    kept = _bytes_kept(lambda: ours(x, None, None, weight, bias, True, residual=added, name=name))
    mask = x.numel() // 8 if residual and name != "identity" else 0
    assert kept <= x.nbytes + mask + 16 * 64


# ---- forward mode and functorch: torch's own path, torch's answers ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name: str, training: bool) -> None:
    c = 3
    primals = (double(4, c, 5), double(4, c, 5), double(c), double(c))
    tangents = tuple(torch.randn_like(p) for p in primals)
    statistics: Statistics = (None, None) if training else (double(c), double(c).square() + 0.5)
    results = []
    for function in (ours, composed):
        with forward_ad.dual_level():
            x, r, w, b = map(forward_ad.make_dual, primals, tangents)
            y = function(x, *statistics, w, b, training, residual=r, name=name)
            dual = forward_ad.unpack_dual(y)
            assert dual.tangent is not None
            results.append((dual.primal, dual.tangent))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


Transformed = Callable[[Callable[[Tensor], Tensor], Tensor], Any]
TRANSFORMS: dict[str, Transformed] = {
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x + 1])),
    "vmap of the last dimension": lambda f, x: vmap(f, in_dims=-1)(torch.stack([x, 3 * x], -1)),
    "grad": lambda f, x: grad(lambda t: f(t).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(x)),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x) * 0.5,)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda t: f(t).square().sum())(x),
    "grad of grad": lambda f, x: grad(lambda t: grad(lambda u: f(u).pow(3).sum())(t).sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda t: f(t).square().sum()))(torch.stack([x, -x])),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["identity", "relu", "gelu_tanh"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch(transform: str, name: str, training: bool) -> None:
    x, residual, weight = double(3, 2, 2), double(3, 2, 2), double(2)
    statistics: Statistics = (None, None) if training else (double(2), double(2).square() + 0.5)
    results = []
    for function in (ours, composed):

        def call(t: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(t, *statistics, weight, None, training, residual=residual, name=name)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operators without a batching rule of their own
            results.append(TRANSFORMS[transform](call, x))
    for got, wanted in zip(*(torch.utils._pytree.tree_leaves(r) for r in results), strict=True):
        torch.testing.assert_close(got, wanted)


def test_per_sample_gradients_of_a_module() -> None:
    """The usual recipe: functional_call under vmap(grad), in evaluation."""
    modules = BatchNorm1d(3).double().eval(), torch.nn.BatchNorm1d(3).double().eval()
    modules[0].get_buffer("running_mean").add_(0.25)
    modules[1].load_state_dict(modules[0].state_dict())
    parameters = {name: p.detach() for name, p in modules[0].named_parameters()}
    x = double(4, 2, 3)
    results = []
    for module in modules:

        def loss(parameters: dict[str, Tensor], x: Tensor, m: Any = module) -> Tensor:
            return functional_call(m, (parameters, dict(m.named_buffers())), (x,)).square().sum()

        results.append(vmap(grad(loss), (None, 0))(parameters, x))
    for name, wanted in results[1].items():
        torch.testing.assert_close(results[0][name], wanted)


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: jvp(f, (x,), (x,))])
def test_captured_buffers_are_refused_as_torch_does(transform: Any) -> None:
    """A transform can't see a write to a buffer from outside; an error, not a lost update."""
    for module in (BatchNorm1d(3), torch.nn.BatchNorm1d(3)):
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            transform(lambda t, m=module: m(t).square().sum())(torch.randn(4, 3))
        assert module.get_buffer("num_batches_tracked").item() == 0


def test_fused_module_under_jvp() -> None:
    module = BatchNormAct1d(3, "silu", track_running_stats=False).double()
    x, tangent, residual = double(4, 3), double(4, 3), double(4, 3)

    def separate(t: Tensor) -> Tensor:
        return F.silu(F.batch_norm(t, None, None, module.weight, module.bias, True) + residual)

    got = jvp(lambda t: module(t, residual), (x,), (tangent,))
    for a, b in zip(got, jvp(separate, (x,), (tangent,)), strict=True):
        torch.testing.assert_close(a, b)
