"""SyncBatchNorm on GPUs: two processes on one over gloo, and over NCCL where there are two."""

from __future__ import annotations

import pytest
import torch
from processes import Run, processes
from torch import Tensor, nn

import batchnorm_ext as bx
from batchnorm_ext import _C

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if not _C.build_info()["cuda"]:
    pytest.skip("built without CUDA", allow_module_level=True)

NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
over_gloo = processes(2)
over_nccl = processes(2, "nccl")
SHAPE = (6, 16, 9, 7)


def _parts(sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, *SHAPE[1:], generator=generator) + 1 for n in sizes]


def _agrees(rank: int, sizes: tuple[int, int]) -> None:
    """With one process that has the whole mini-batch, on the CPU in float64."""
    parts = _parts(sizes)
    whole = torch.cat(parts).double().requires_grad_()
    reference = nn.BatchNorm2d(SHAPE[1]).double()
    expected = reference(whole).relu()
    (wanted,) = torch.autograd.grad((expected**2).sum(), whole)
    layer = bx.SyncBatchNormAct(SHAPE[1]).cuda()
    x = parts[rank].cuda().requires_grad_()
    y = layer(x)
    (g,) = torch.autograd.grad((y**2).sum(), x)
    for found, exact in ((y, expected), (g, wanted)):
        mine = exact.split(sizes)[rank].float()
        torch.testing.assert_close(found.cpu(), mine, rtol=1e-4, atol=1e-4)
    for key, value in reference.state_dict().items():
        found = layer.state_dict()[key].cpu()
        torch.testing.assert_close(found, value.to(found.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 1), (0, 6)], ids=str)
def test_two_processes_on_one_gpu(over_gloo: Run, sizes: tuple[int, int]) -> None:
    over_gloo(_agrees, sizes)


@NEEDS_TWO
@pytest.mark.parametrize("sizes", [(6, 6), (5, 1), (0, 6)], ids=str)
def test_nccl(over_nccl: Run, sizes: tuple[int, int]) -> None:
    over_nccl(_agrees, sizes)


def _step(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return torch.autograd.grad((y**2).sum(), x)[0]


def _captured(rank: int) -> None:
    sizes = (6, 0)
    layers = [bx.SyncBatchNorm(SHAPE[1]).cuda() for _ in range(2)]
    x = _parts(sizes)[rank].cuda().requires_grad_()
    for _ in range(3):
        _step(layers[0], x)
        _step(layers[1], x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = _step(layers[0], x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _step(layers[1], x)
    graph.replay()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


@NEEDS_TWO
def test_a_graph_captures_it(over_nccl: Run) -> None:
    """One process with nothing; and the host waits for nothing."""
    over_nccl(_captured)
