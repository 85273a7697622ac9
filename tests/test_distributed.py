"""Two processes on the CPU: DistributedDataParallel, FSDP2, shared memory.

Torch's own batch norm under the same wrapper is the judge. Each process compares on its side.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import KINDS, Network, assert_same, gradients, images, pair
from processes import NEEDS_GLOO, Run, processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = NEEDS_GLOO
WORLD = 2
OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
run = processes(WORLD)


# ---- DistributedDataParallel ----


def _ten_steps(rank: int, kind: str, options: dict[str, Any]) -> None:
    models = pair(kind)
    for model in models:
        parallel = DistributedDataParallel(model, **options)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
        for step in range(10):
            optimizer.zero_grad()
            unused = bool(options.get("find_unused_parameters")) and step % 3 == 1
            parallel(images(10 * step + rank), unused).square().mean().backward()
            optimizer.step()
    assert_same(*models)
    weight = models[0].get_parameter("first.weight").detach()
    weights = [torch.empty_like(weight) for _ in range(WORLD)]
    dist.all_gather(weights, weight)
    assert torch.equal(*weights), "the processes have drifted apart"


@pytest.mark.parametrize(
    "options",
    [{}, {"broadcast_buffers": False}, {"find_unused_parameters": True}],
    ids=["broadcast", "local buffers", "unused parameters"],
)
@OF_EVERY_KIND
def test_data_parallel(run: Run, kind: str, options: dict[str, Any]) -> None:
    """Ten steps on different batches: parameters, gradients and buffers of every process."""
    run(_ten_steps, kind, options)


def _two_forwards(rank: int, kind: str, training: bool) -> None:
    ours, torchs = pair(kind)
    # Buffers start alike, so that they matter to no gradient: torch's may stay local, because in
    # torch 2.11 backward refuses buffers that a second forward's broadcast has overwritten.
    for model, broadcast in ((ours, True), (torchs, False)):
        parallel = DistributedDataParallel(model.train(training), broadcast_buffers=broadcast)
        real, fake = parallel(images(rank)), parallel(images(rank + 10))
        (real.square().mean() - fake.mean()).backward()
    torch.testing.assert_close(gradients(ours), gradients(torchs))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@OF_EVERY_KIND
def test_two_forwards_before_a_backward(run: Run, kind: str, training: bool) -> None:
    """A GAN's discriminator with broadcast buffers: no "modified by an inplace operation"
    (pytorch#175024), since nothing of ours keeps a buffer for backward."""
    run(_two_forwards, kind, training)


# ---- FSDP2 ----


def _shard(model: nn.Module, parts: list[nn.Module], **options: Any) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in [*parts, model]:
        fully_shard(part, mesh=mesh, **options)


def _whole(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and gradients, put together from both processes."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    return (
        {name: p.full_tensor().detach() for name, p in parameters.items()},
        {name: p.grad.full_tensor() for name, p in parameters.items()},
    )


def _sharded_steps(rank: int, kind: str, norms_apart: bool) -> None:
    models = pair(kind)
    for model in models:
        _shard(model, [model.first, model.second] if norms_apart else [])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            model(images(10 * step + rank)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(_whole(models[0]), _whole(models[1]))
    torch.testing.assert_close(dict(models[0].named_buffers()), dict(models[1].named_buffers()))


@pytest.mark.parametrize("norms_apart", [False, True])
@OF_EVERY_KIND
def test_sharded(run: Run, kind: str, norms_apart: bool) -> None:
    run(_sharded_steps, kind, norms_apart)


def _sharded_in_bfloat16(rank: int, kind: str) -> None:
    x = images(rank, dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours, torchs = Network(kind), Network("torch")
    # Torch's batch norm on the CPU refuses bfloat16 parameters beside float32 buffers. Shards of
    # its own in float32, as torch recommends, are what it is compared with.
    in_float32 = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (WORLD,))
    for norm in (torchs.first, torchs.second):
        fully_shard(norm, mesh=mesh, mp_policy=in_float32)
    results = []
    for model in (ours, torchs):
        _shard(model, [], mp_policy=policy)
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        results.append((y.detach(), *_whole(model), dict(model.named_buffers())))
        assert model.get_buffer("second.running_var").dtype == torch.float32
    # A chain of about 8 roundings of half of eps each, as in test_workflows.py, and those of
    # weights and biases, of values up to 2.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(*results, rtol=6 * eps, atol=6 * eps)


@OF_EVERY_KIND
def test_sharded_in_bfloat16(run: Run, kind: str) -> None:
    """Parameters, activations and gradients in bfloat16, the buffers in float32."""
    run(_sharded_in_bfloat16, kind)


# ---- shared memory ----


def _step_elsewhere(rank: int, model: Network) -> Tensor:
    assert all(t.is_shared() for t in model.state_dict().values())
    if rank == 0:
        model(images(0)).sum().backward()
    return model.get_buffer("second.num_batches_tracked").clone()


@OF_EVERY_KIND
def test_shared_memory(run: Run, kind: str) -> None:
    """Another process's step writes to the very buffers of this one."""
    model = Network(kind).double()
    expected = copy.deepcopy(model)
    expected(images(0))
    assert run(_step_elsewhere, model.share_memory())[0].item() == 1
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()))
