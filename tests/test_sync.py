"""SyncBatchNorm on gloo processes, against one process that has the whole batch in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import NEEDS_GLOO, Run, processes
from rotation import STEPS, drawn
from strategies import ACTIVATION_PARAMS
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.nn import functional as F

import batchnorm_ext as bx
from batchnorm_ext import functional, synchronized

pytestmark = NEEDS_GLOO
C = 3
two, three, four = processes(2), processes(3), processes(4)
#: Sizes of the parts: batches, and (where they differ) planes.
PARTS: dict[str, list[tuple[int, ...]]] = {
    "equal": [(4, C, 5), (4, C, 5)],
    "one empty": [(0, C, 5), (4, C, 5)],
    "three": [(2, C, 3, 4), (5, C, 3, 4), (1, C, 3, 4)],
    "other planes": [(2, C, 3, 4), (1, C, 7, 2), (3, C, 1, 1)],
    "uneven": [(7, C, 2), (1, C, 2), (0, C, 2), (3, C, 2)],
    "single values": [(1, C), (0, C), (1, C), (1, C)],
}


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Run:
    """As many processes as the test has parts, 2 without."""
    case = getattr(request.node, "callspec", None)
    size = len(PARTS[case.params["parts"]]) if case and "parts" in case.params else 2
    return request.getfixturevalue({2: "two", 3: "three", 4: "four"}[size])


def _parts(parts: str, seed: int = 0) -> list[Tensor]:
    """The inputs of all processes, the same on each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = PARTS[parts]
    return [torch.randn(s, generator=generator, dtype=torch.float64) * 2 + 1 for s in sizes]


def _joined(parts: list[Tensor]) -> Tensor:
    """(values, C): what a single process normalises."""
    return torch.cat([part.movedim(1, -1).reshape(-1, C) for part in parts])


def _split(values: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """`_joined` undone."""
    pieces = values.split([part.numel() // C for part in parts])
    shapes = [part.movedim(1, -1).shape for part in parts]
    return [p.reshape(s).movedim(-1, 1) for p, s in zip(pieces, shapes, strict=True)]


def _reference(name: str, residual: bool, **options: Any) -> tuple[nn.BatchNorm1d, Any]:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(C, **options).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)

    def call(x: Tensor, r: Tensor) -> Tensor:
        return functional._activate(norm(x) + (r if residual else 0), name, ACTIVATION_PARAMS[name])

    return norm, call


def _layer(norm: nn.BatchNorm1d, name: str, **options: Any) -> Any:
    given = {"leaky_relu": "negative_slope", "elu": "alpha"}
    kwargs: dict[str, Any] = {given[name]: ACTIVATION_PARAMS[name]} if name in given else {}
    if name == "gelu_tanh":
        name, kwargs = "gelu", {"approximate": "tanh"}
    layer = bx.SyncBatchNormAct(C, name, momentum=norm.momentum, **kwargs, **options).double()
    layer.load_state_dict(norm.state_dict())
    return layer


def _same_on_all(tensor: Tensor) -> bool:
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor)
    return all(torch.equal(each, tensor) for each in every)


def _ten_steps(rank: int, parts: str, name: str, residual: bool, momentum: float | None) -> None:
    norm, call = _reference(name, residual, momentum=momentum)
    layer = _layer(norm, name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (norm, layer)]
    for step in range(10):
        inputs, residuals, weights = (_parts(parts, 3 * step + i) for i in range(3))
        whole = [_joined(p).requires_grad_() for p in (inputs, residuals)]
        output = call(*whole)
        wanted = torch.autograd.grad(
            (output * _joined(weights)).sum(), [*whole, *norm.parameters()], materialize_grads=True
        )
        x, r = (p[rank].clone().requires_grad_() for p in (inputs, residuals))
        y = layer(x, r if residual else None)
        torch.testing.assert_close(y, _split(output, inputs)[rank])
        found = torch.autograd.grad(
            (y * weights[rank]).sum(), [x, r, *layer.parameters()], materialize_grads=True
        )
        for got, expected in zip(found[:2], wanted[:2], strict=True):
            torch.testing.assert_close(got, _split(expected, inputs)[rank])
        for gradient, parameters in ((found, layer), (wanted, norm)):
            for value, parameter in zip(gradient[2:], parameters.parameters(), strict=True):
                parameter.grad = value.clone()
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
    for key, expected in norm.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], expected)
        if key.startswith("running"):
            assert _same_on_all(layer.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "residual"),
    drawn(STEPS, [(n, r) for n in ("identity", "relu", "silu") for r in (False, True)][::-1]),
)
@pytest.mark.parametrize("parts", PARTS)
def test_ten_steps(run: Run, parts: str, name: str, residual: bool) -> None:
    run(_ten_steps, parts, name, residual, 0.1)


def test_cumulative_average(run: Run) -> None:
    run(_ten_steps, "equal", "identity", False, None)


def _sums(rank: int) -> None:
    torch.manual_seed(rank)
    group = bx.SyncBatchNorm(1)._group()
    assert group is not None
    values = torch.randn(1001, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (1001,))
    sums = [synchronized._all_reduce(values, group) for _ in range(3)]
    assert all(torch.equal(each, sums[0]) and _same_on_all(each) for each in sums)


def test_backward_sums_have_the_same_bits_everywhere(four: Run) -> None:
    four(_sums)


# ---- double backward ----


class _Shared(torch.autograd.Function):
    """A value that all processes have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Summed.apply(gradient)


class _Summed(torch.autograd.Function):
    """The sum of all processes' values, which all use in the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Shared.apply(gradient)


def _second_derivatives(rank: int, name: str, residual: bool) -> None:
    torch.manual_seed(0)
    x, r = (torch.randn(5, 2, 2, dtype=torch.float64) for _ in range(2))
    r = (3 * r).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64).requires_grad_() for _ in range(2))
    layer = bx.SyncBatchNormAct(2, name, track_running_stats=False).double()

    def call(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mine = slice(0, 2) if rank == 0 else slice(2, 5)
        parameters = {"weight": _Shared.apply(w), "bias": _Shared.apply(b)}
        arguments = (_Shared.apply(x)[mine], _Shared.apply(r)[mine] if residual else None)
        part = torch.func.functional_call(layer, parameters, arguments)
        whole = F.pad(part, (0, 0, 0, 0, *((0, 3) if rank == 0 else (2, 0))))
        return _Summed.apply(whole)

    leaves = (x.requires_grad_(), r, weight, bias)
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize(
    ("name", "residual"),
    drawn(STEPS, [(n, r) for r in (False, True) for n in ("identity", "leaky_relu", "silu")]),
)
def test_gradgradcheck(run: Run, name: str, residual: bool) -> None:
    run(_second_derivatives, name, residual)


def _with_a_graph(rank: int, name: str, residual: bool) -> None:
    x, r, dy = (_parts("equal", seed)[rank].requires_grad_() for seed in range(3))
    layer = bx.SyncBatchNormAct(C, name).double()
    leaves = [x, *([r] if residual else []), *layer.parameters()]
    y = layer(x, r if residual else None)
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    derivable = torch.autograd.grad(y, leaves, dy, create_graph=True)
    for a, b in zip(derivable, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
def test_create_graph_changes_no_gradient(run: Run, name: str, residual: bool) -> None:
    run(_with_a_graph, name, residual)


def _kept(rank: int) -> None:
    x, r = (torch.randn(4, 8, 32, 32, requires_grad=True) for _ in range(2))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        bx.SyncBatchNormAct(8)(x, r)
    assert sum(kept.values()) <= x.nbytes + x.numel() // 8 + 1024


def test_a_bit_is_kept_of_the_residual(run: Run) -> None:
    run(_kept)


# ---- dtypes, accuracy, policies ----


def _half(rank: int) -> None:
    parts = _parts("equal")
    layer = bx.SyncBatchNorm(C)
    x = parts[rank].bfloat16().requires_grad_()
    y = layer(x)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y) + x.detach())
    assert y.dtype == g.dtype == torch.bfloat16
    whole = _joined([p.bfloat16().double() for p in parts]).requires_grad_()
    expected = F.batch_norm(whole, None, None, training=True)
    (wanted,) = torch.autograd.grad(expected, whole, 1 + whole.detach().bfloat16().double())
    for found, exact in ((y, expected), (g, wanted)):
        torch.testing.assert_close(found.double(), _split(exact, parts)[rank], rtol=1e-2, atol=1e-2)


def test_half_precision_input(run: Run) -> None:
    run(_half)


def _far_from_zero(rank: int) -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(64, C) + 1e4 + 10 * r) for r in range(2)]
    layer = bx.SyncBatchNorm(C, momentum=1.0)
    y = layer(parts[rank])
    whole = torch.cat(parts).double()
    torch.testing.assert_close(
        layer.get_buffer("running_var").double(), whole.var(0), rtol=1e-5, atol=0
    )
    expected = F.batch_norm(whole, None, None, training=True)[64 * rank : 64 * rank + 64]
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


def test_large_mean(run: Run) -> None:
    run(_far_from_zero)


def _not_finite(rank: int) -> None:
    layer = bx.SyncBatchNorm(C)
    bx.set_policies(layer, nonfinite_statistics="skip")
    x = torch.randn(4, C)
    if rank == 1:
        x[0, 1] = torch.inf
    layer(x)
    mean, var, batches = (buffer.tolist() for buffer in layer.buffers())
    assert [mean[1], var[1], batches] == [0, 1, 1] and mean[0] != 0


def test_policy_of_what_is_not_finite(run: Run) -> None:
    run(_not_finite)


def _accumulate(rank: int) -> None:
    parts = [_parts("equal", seed) for seed in range(3)]
    layer = bx.SyncBatchNorm(C).double()
    with bx.accumulate_statistics(layer):
        for micro_batch in parts:
            layer(micro_batch[rank])
    once = nn.BatchNorm1d(C).double()
    once(torch.cat([_joined(p) for p in parts]))
    for key, expected in once.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], expected)


def test_accumulated_statistics(run: Run) -> None:
    run(_accumulate)


# ---- errors ----


def _one_value(rank: int) -> None:
    layer = bx.SyncBatchNorm(C)
    x = torch.randn(1 if rank == 1 else 0, C)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(x)
    assert layer.num_batches_tracked == 0
    bx.set_policies(layer, single_value="zero_variance")
    assert (layer(x) == 0).all() and layer.num_batches_tracked == 1
    bx.set_policies(layer, single_value="running")
    with pytest.raises(ValueError, match="single_value='running' needs"):
        layer(x)


def test_one_value_on_all_processes_together(run: Run) -> None:
    run(_one_value)


# ---- no communication ----


def _silent(rank: int) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was sent")

    mine, _ = (dist.new_group([r]) for r in (rank, 1 - rank))
    exchange, synchronized._exchange = synchronized._exchange, refuse
    try:
        x = torch.randn(4, C)
        local = bx.BatchNorm1d(C)
        layer = bx.SyncBatchNorm(C, process_group=mine)
        assert torch.equal(layer(x), local(x))
        layer.process_group = None
        with pytest.raises(AssertionError, match="was sent"):
            layer(x)
        assert torch.equal(layer.eval()(x), local.eval()(x))
        assert torch.equal(layer.train().freeze()(x), local(x))
    finally:
        synchronized._exchange = exchange


def test_what_sends_nothing(run: Run) -> None:
    run(_silent)


def test_without_a_process_group() -> None:
    x = torch.randn(4, C, 5)
    assert torch.equal(bx.SyncBatchNorm(C)(x), bx.BatchNorm1d(C)(x))


# ---- groups and copies ----


def _groups(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    layer = bx.SyncBatchNorm(C, process_group=mine).double()
    parts = _parts("uneven")
    members = parts[:2] if rank < 2 else parts[2:]
    expected = _split(F.batch_norm(_joined(members), None, None, training=True), members)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(each(parts[rank]), expected[rank % 2])
        assert each.process_group is mine
    lost = copy.deepcopy(layer)
    lost.process_group = type(pickle.loads(pickle.dumps(layer)).process_group)((1, 3))
    with pytest.raises(RuntimeError, match=r"no group of them.*new_group"):
        lost(parts[rank])


def test_groups_survive_copies(four: Run) -> None:
    four(_groups)


# ---- compile ----


def _compiled(rank: int, backend: str) -> None:
    torch._dynamo.reset()
    layers = [bx.SyncBatchNormAct(C, "relu") for _ in range(2)]
    call = torch.compile(layers[1], fullgraph=True, backend=backend)
    for seed, n in enumerate((4, 6)):
        torch.manual_seed(seed + rank)
        values, dy = torch.randn(n, C, 5), torch.randn(n, C, 5)
        found = []
        functions: tuple[Any, ...] = (layers[0], call)
        for layer, function in zip(layers, functions, strict=True):
            x = values.clone().requires_grad_()
            y = function(x)
            found.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    for key, expected in layers[0].state_dict().items():
        assert torch.equal(layers[1].state_dict()[key], expected), key


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_one_graph(run: Run, backend: str) -> None:
    run(_compiled, backend)
