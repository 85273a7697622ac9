"""torch.compile: one graph, and the results of eager: outputs, gradients, buffers, counter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from networks import KINDS, Checkpointed, Network, assert_same, gradients, images
from rotation import COMPILED, drawn
from torch import Tensor, nn
from torch._inductor import metrics

import batchnorm_ext as bx
from batchnorm_ext import functional

#: inductor takes seconds, and for evaluation shows nothing that aot_eager doesn't.
MODULE_RUNS = [
    ("eager", "train"),
    ("eager", "eval"),
    ("aot_eager", "train"),
    ("aot_eager", "eval"),
    ("inductor", "train"),
]
#: Compiled code calls the same kernels, so that they agree to the bit; code around them that
#: inductor fuses may round differently.
SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Everything(nn.Module):
    """All modules and kinds of activation in one graph, so that it is compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = bx.BatchNorm2d(6)
        self.cumulative = bx.BatchNorm2d(6, momentum=None)
        self.bare = bx.BatchNorm2d(6, affine=False, track_running_stats=False)
        self.relu = bx.BatchNormAct2d(6, "relu")
        self.added = bx.BatchNormAct2d(6, "relu")
        self.silu = bx.BatchNormAct2d(6, "silu", track_running_stats=False)
        self.gelu = bx.BatchNormAct2d(6, "gelu", approximate="tanh")
        self.last = bx.BatchNorm1d(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Residuals, a layer in channels-last, a float64 layer on float32 input, an (N, C) one."""
        y = self.cumulative(self.first(x) * 1.5)
        y = self.relu(y) + self.bare(x)
        y = self.added(y, x)
        y = self.silu(y.to(memory_format=torch.channels_last), y)
        y = self.gelu(y.contiguous(), y)
        return self.last(y.mean((2, 3))) * 0.5


def _run(module: nn.Module, function: Callable[..., Tensor], batches: list[Tensor]) -> list[Tensor]:
    """Two steps: outputs and gradients of the input and of all parameters, then the buffers."""
    found = []
    for batch in batches:
        x = batch.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(x)
        parameters = [p for p in module.parameters() if p.requires_grad]
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]
    return [*found, *(b.clone() for b in module.buffers())]


def _compare(module: nn.Module, backend: str, batches: list[Tensor], **options: Any) -> None:
    other = copy.deepcopy(module)
    expected = _run(module, module, batches)
    compiled = torch.compile(other, backend=backend, fullgraph=True, **options)
    got = _run(other, compiled, batches)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize(("backend", "mode"), MODULE_RUNS)
def test_modules(backend: str, mode: str) -> None:
    torch.manual_seed(2)
    module = Everything().train(mode == "train")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    batches = [torch.randn(4, 6, 5, 3), torch.randn(4, 6, 5, 3) + 1]
    _compare(module, backend, batches)
    if mode == "train":
        assert module.first.num_batches_tracked == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dynamic_shapes(backend: str) -> None:
    """One compilation for every batch size and resolution."""
    module = nn.Sequential(bx.BatchNorm2d(6), bx.BatchNormAct2d(6, "relu"))
    sizes = [(4, 5, 7), (8, 5, 7), (2, 9, 3), (3, 11, 13)]  # at first no two alike
    batches = [torch.randn(n, 6, h, w) for n, h, w in sizes]
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    other = copy.deepcopy(module)
    expected = _run(module, module, batches)
    compiled = torch.compile(other, backend=counter, fullgraph=True, dynamic=True)
    compiled(batches[0].clone().requires_grad_())
    compilations = counter.frame_count
    other.load_state_dict(module.state_dict())
    for name, buffer in other.named_buffers():
        buffer.copy_(torch.ones_like(buffer) if "var" in name else torch.zeros_like(buffer))
    for a, b in zip(_run(other, compiled, batches), expected, strict=True):
        torch.testing.assert_close(a, b, **SAME)
    assert counter.frame_count == compilations, "compiled again for another shape"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_function(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Bit for bit what eager gives, strides too."""

    def function(
        x: Tensor, residual: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor
    ) -> Tensor:
        return bx.batch_norm(
            x, mean, var, w, b, True, residual=residual, activation="leaky_relu", negative_slope=0.2
        )

    x, residual, dy = (torch.randn(4, 3, 5, 2, dtype=dtype) for _ in range(3))
    x = x.to(memory_format=layout)
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach(), residual, torch.linspace(0.5, 1.5, 3), torch.linspace(-1, 1, 3)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        mean, var = torch.zeros(3), torch.ones(3)
        y = call(leaves[0], leaves[1], leaves[2], leaves[3], mean, var)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
        assert eager.stride() == compiled.stride()


def test_one_operator_in_the_graph() -> None:
    """The op is not taken apart, and the buffers need no copies in Python."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    module = bx.BatchNormAct1d(3, "relu")
    torch.compile(module, backend=record, fullgraph=True)(torch.randn(4, 3))
    calls = [n for g in graphs for n in g.graph.nodes if n.op.startswith("call_")]
    tensors = [str(n.target) for n in calls if isinstance(n.meta.get("example_value"), Tensor)]
    assert tensors == ["batchnorm_ext.batch_norm.default"]


def test_empty_batch() -> None:
    module = bx.BatchNorm1d(3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert compiled(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    assert not module.get_buffer("running_mean").any()


def test_errors_stay_errors() -> None:
    """From the fake kernels, while tracing."""
    module = bx.BatchNorm1d(3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="should contain 4 elements"):
        compiled(torch.randn(2, 4, 5))
    with pytest.raises(Exception, match="more than 1 value per channel"):
        compiled(torch.randn(1, 3))
    assert module.num_batches_tracked == 0


def test_without_gradients() -> None:
    module = bx.BatchNormAct2d(3, "silu").eval()
    x = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), module(x))


def test_forward_mode_is_not_mistaken() -> None:
    """Tracing sees functorch as eager does."""

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(
            lambda t: bx.batch_norm(t, None, None, training=True, activation="silu"), (x,), (x,)
        )[1]

    x = torch.randn(4, 3)
    compiled = torch.compile(tangent, backend="aot_eager")
    torch.testing.assert_close(compiled(x), tangent(x), **SAME)


def test_activation_names_are_specialised() -> None:
    """A change of activation compiles again instead of keeping the old one."""

    def function(x: Tensor, name: str) -> Tensor:
        return bx.batch_norm(x, None, None, training=True, activation=name)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    x = torch.randn(4, 3)
    for name in functional.ACTIVATIONS:
        if name != "gelu_tanh":
            assert torch.equal(compiled(x, name), function(x, name))


# ---- whole networks, beside torch's ----


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_become_dynamic_by_themselves(kind: str) -> None:
    """Without dynamic=True: the first size, then one graph for every batch and resolution.

    Nor does the counter of the batches, read for the cumulative average, ask for another graph.
    """
    model = Network(kind, momentum=None).double()
    counter = torch._dynamo.testing.CompileCounter()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend=counter, fullgraph=True)
    for n, size in [(4, (6, 5)), (7, (9, 8)), (3, (5, 11)), (9, (4, 7))]:
        x = nn.functional.interpolate(images(n, n), size)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 2
    torch.testing.assert_close(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpoint(backend: str) -> None:
    """Gradients as in eager mode; the statistics move once, as torch's do when compiled."""
    models = [Checkpointed(kind).double() for kind in ("fused", "torch", "fused")]
    for model in models[:2]:
        torch.compile(model, backend=backend, fullgraph=True)(images(0)).square().sum().backward()
    models[2](images(0)).square().sum().backward()
    assert_same(models[0], models[1])
    torch.testing.assert_close(gradients(models[0]), gradients(models[2]))
    for model, count in zip(models, (1, 1, 2), strict=True):
        assert model.get_buffer("second.num_batches_tracked").item() == count


@pytest.mark.parametrize(
    ("kind", "training"), drawn(COMPILED, [(k, t) for t in (True, False) for k in KINDS])
)
def test_reduce_overhead(kind: str, training: bool) -> None:
    """Three steps, since the first two of a CUDA graph are others than those after."""
    model = Network(kind).double().train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, mode="reduce-overhead", fullgraph=True)
    for seed in range(3):
        torch.testing.assert_close(compiled(images(seed)), model(images(seed)))
        for function in (compiled, model):
            function(images(seed)).square().sum().backward()
    assert_same(other, model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mask_in_the_layout_that_inductor_chooses(training: bool) -> None:
    """It makes convolutions channels-last, whatever layout was traced."""
    import torch._inductor.lowering  # how the operators are called depends on it

    conv = nn.Conv2d(6, 6, 3, padding=1, dtype=torch.float64)
    norm = bx.BatchNormAct2d(6, dtype=torch.float64).train(training)

    def function(x: Tensor) -> Tensor:
        return norm(conv(x), x)

    x = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    expected, got = (
        torch.autograd.grad(f(x).square().sum(), [*conv.parameters(), *norm.parameters()])
        for f in (function, torch.compile(function, fullgraph=True))
    )
    torch.testing.assert_close(got, expected)


class _Block(nn.Module):
    """act(norm(conv(x))), and with a residual act(norm(conv(x)) + x), which keeps a mask."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = bx.BatchNormAct2d(6)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), x if self.residual else None)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_copies_between_convolutions(training: bool, residual: bool) -> None:
    """What is generated for a layer is a copy of the convolution's weight, and with a residual the
    sum of its input's two gradients."""

    def generated(depth: int) -> int:
        model = nn.Sequential(*(_Block(residual) for _ in range(depth))).train(training)
        x = torch.randn(4, 6, 12, 15)
        torch._dynamo.reset()
        metrics.reset()
        y = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(y, copy.deepcopy(model)(x))
        y.sum().backward()
        return metrics.generated_kernel_count

    assert generated(4) - generated(2) == (4 if residual else 2)
