"""What only a GPU can show, in order of worth: where time is short, the last ones are left out.

The tests that are made of cases run there, too, with BATCHNORM_EXT_TEST_DEVICE=cuda. Both are
steps of `make gpu-check`.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import DTYPES
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

import batchnorm_ext
from batchnorm_ext import _C

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if not _C.build_info()["cuda"]:
    pytest.skip("built without CUDA", allow_module_level=True)

#: Whatever a plan can force; what a call cannot follow is left to the planner.
STRATEGIES = ("block", "cluster", "grid", "two_kernels")
SHAPES = [(16, 64, 28, 28), (8, 33, 7, 7), (64, 128, 14, 14), (4096, 256), (3, 5, 1001)]


@contextmanager
def forced(**fields: Any) -> Iterator[None]:
    """The CUDA plan's fields for the calls inside."""
    _C.force_cuda_plan(**fields)
    try:
        yield
    finally:
        _C.force_cuda_plan()


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_first": Tensor.contiguous,
    "channels_last": channels_last,
}


def module(channels: int, rank: int, activation: str, **settings: Any) -> nn.Module:
    name = f"BatchNormAct{max(rank - 2, 1)}d"
    built: nn.Module = getattr(batchnorm_ext, name)(channels, activation=activation, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return built


def step(norm: nn.Module, x: Tensor, residual: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = norm(x, residual)
    names = ["input", "residual", *(name for name, _ in norm.named_parameters())]
    leaves = [x, residual, *norm.parameters()]
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"output": y, **dict(zip(names, gradients, strict=True)), **dict(norm.named_buffers())}


def labelled(name: str) -> Callable[[str], str]:
    """Puts the name before assert_close's own words."""
    return lambda text: f"{name}: {text}"


@functools.cache
def normal() -> Tensor:
    """Drawn once, since that takes longer on a CPU than all that a GPU does with it."""
    return torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))


def tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> list[Tensor]:
    """Input, residual and the output's gradient, on the CPU: stretches of the same values."""
    count = math.prod(shape)
    starts = range(seed, seed + 3)
    made = [normal()[1013 * start :][:count].view(shape) for start in starts]
    made[0] = 2 * made[0] + 1
    # Copies: some tests write to them.
    return [LAYOUTS[layout](t.to(dtype, copy=True)) for t in made]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("shape", [(8, 16, 7, 7), (32, 64, 56, 56)], ids=str)
def test_a_graph_replays_with_updated_buffers(
    shape: tuple[int, ...], layout: str, momentum: float | None
) -> None:
    """Forward and backward in a CUDA graph; each replay updates the buffers once more."""
    x, residual, dy = (t.cuda() for t in tensors(shape, torch.float32, layout))
    x.requires_grad_()
    captured = module(shape[1], 4, "relu", momentum=momentum).cuda()
    eager = module(shape[1], 4, "relu", momentum=momentum).cuda()

    def run(norm: nn.Module) -> tuple[Tensor, Tensor]:
        y = norm(x, residual)
        return y, torch.autograd.grad(y, x, dy)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(captured)
    for _ in range(3):  # the capture itself has run nothing
        run(eager)
    for _ in range(4):
        with torch.no_grad():
            x.mul_(1.25).add_(0.5)
        graph.replay()
        for got, expected in zip(outputs, run(eager), strict=True):
            assert torch.equal(got, expected)
        for (name, got), expected in zip(captured.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(got, expected), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams_at_once(strategy: str) -> None:
    """Calls on two streams share no memory, also where both fill the device."""
    shape = (32, 64, 56, 56)
    samples = [
        [t.cuda() for t in tensors(shape, torch.float32, "channels_last", s)] for s in (0, 1)
    ]
    with forced(strategy=strategy):
        alone = [step(module(64, 4, "relu").cuda(), *sample) for sample in samples]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for _ in range(10):
            together = []
            for stream, sample in zip(streams, samples, strict=True):
                norm = module(64, 4, "relu").cuda()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    together.append(step(norm, *sample))
            torch.cuda.synchronize()
            for got, expected in zip(together, alone, strict=True):
                for name, value in expected.items():
                    assert torch.equal(got[name], value), name


def test_the_host_never_waits() -> None:
    """No call synchronises, whatever the momentum."""
    norms = [module(64, 4, "relu", momentum=m).cuda() for m in (0.1, None)]
    x, residual, dy = (t.cuda() for t in tensors((8, 64, 14, 14), torch.float32, "channels_first"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for norm in norms:
            step(norm, x, residual, dy)
            norm.eval()
            norm(x, residual)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(2, 1, 2**30 + 16), (3, 16, 2**26 - 16, 1), (2**27 + 3, 16)])
def test_more_than_two_to_the_31_elements(shape: tuple[int, ...]) -> None:
    needed = 5 * 2 * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    pattern = (torch.arange(-8, 8, dtype=torch.float32) / 4).to("cuda", torch.bfloat16)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    x.view(-1, 16).copy_(pattern.expand(x.numel() // 16, 16))
    y = batchnorm_ext.batch_norm(x, None, None, training=True)
    if len(shape) == 2:  # each channel holds one value
        expected = torch.zeros(16, device="cuda")
    else:
        values = pattern.float()
        expected = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
    rows = y.view(-1, 16)
    torch.testing.assert_close(rows[0].float(), expected, rtol=2**-8, atol=0)
    for part in rows.split(2**24):
        assert (part == rows[0]).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    sample = tensors((8, 64, 14, 14), torch.float32, "channels_first")
    expected = step(module(64, 4, "relu").to("cuda:0"), *(t.to("cuda:0") for t in sample))
    with torch.cuda.device(0):
        got = step(module(64, 4, "relu").to("cuda:1"), *(t.to("cuda:1") for t in sample))
    for name, value in expected.items():
        assert torch.equal(got[name].cpu(), value.cpu()), name


@pytest.mark.parametrize("cpu_argument", ["weight", "running_mean", "residual"])
def test_tensors_of_two_devices_are_refused(cpu_argument: str) -> None:
    x = torch.randn(4, 3, 5, device="cuda")
    arguments: dict[str, Any] = {
        "running_mean": torch.zeros(3, device="cuda"),
        "running_var": torch.ones(3, device="cuda"),
        "weight": torch.ones(3, device="cuda"),
        "residual": torch.zeros_like(x),
    }
    arguments[cpu_argument] = arguments[cpu_argument].cpu()
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        batchnorm_ext.batch_norm(x, training=True, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_same_bits_on_every_run(layout: str, strategy: str) -> None:
    sample = [t.cuda() for t in tensors((32, 64, 28, 28), torch.bfloat16, layout)]
    runs = []
    for _ in range(5):
        with forced(strategy=strategy):
            runs.append(step(module(64, 4, "relu").cuda(), *sample))
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(run[name], value), name


@pytest.mark.parametrize("momentum", [0.1, None])
def test_reduce_overhead_records_graphs(momentum: float | None) -> None:
    """In training: the buffers that are written are a module's, which torch allows."""
    torch._dynamo.reset()
    counters.clear()
    norm = module(16, 4, "relu", momentum=momentum).cuda()
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # two to warm up and record, two to replay
        sample = [t.cuda() for t in tensors((8, 16, 7, 7), torch.float32, "channels_first", seed)]
        torch.compiler.cudagraph_mark_step_begin()
        results = []
        for call, owner in ((norm, norm), (compiled, other)):
            leaves = [*(t.detach().requires_grad_() for t in sample[:2]), *owner.parameters()]
            y = call(*leaves[:2])
            gradients = torch.autograd.grad(y, leaves, sample[2])
            # Copies: the next replay writes to the same memory.
            results.append([t.detach().clone() for t in (y, *gradients, *owner.buffers())])
        torch.testing.assert_close(*results)
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    assert manager.new_graph_id().id > 0, "nothing was recorded"


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_cpu(
    shape: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    layout: str,
    strategy: str | None,
) -> None:
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    norm = module(shape[1], len(shape), activation, dtype=parameters)
    on_gpu = module(shape[1], len(shape), activation, dtype=parameters).cuda()
    sample = tensors(shape, dtype, layout)
    if activation == "relu":  # elements whose derivative the last bit of z decides are no test
        with torch.no_grad():
            y = norm(*sample[:2])
            sample[2][(y.abs() < 0.05) & (y >= 0)] = 0
            norm = module(shape[1], len(shape), activation, dtype=parameters)
    expected = step(norm, *sample)
    with forced(**({} if strategy is None else {"strategy": strategy})):
        got = step(on_gpu, *(t.cuda() for t in sample))
    unit = torch.finfo(dtype).eps
    for name, value in expected.items():
        rtol = 2 * unit if value.dtype == dtype else 1e-5
        atol = 64 * unit if value.dtype == dtype else 1e-4
        if value.dtype == torch.float64:
            rtol = atol = 1e-10
        torch.testing.assert_close(got[name].cpu(), value, rtol=rtol, atol=atol, msg=labelled(name))


#: One call of each strategy, forward and backward, for compute-sanitizer.
SANITIZED = """
import torch, batchnorm_ext
from batchnorm_ext import _C
for strategy in ("block", "cluster", "grid", "two_kernels"):
    _C.force_cuda_plan(strategy=strategy)
    for shape in ((4, 8, 9, 9), (5, 3, 7, 7), (40, 24)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            name = "BatchNormAct%dd" % max(len(shape) - 2, 1)
            norm = getattr(batchnorm_ext, name)(shape[1]).cuda()
            norm(x, torch.randn_like(x)).sum().backward()
            norm.eval()(x)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer")
    command = [program, "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", SANITIZED]
    # torch keeps blocks of memory for itself, which would hide what lies beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
