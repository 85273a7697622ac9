"""FSDP2 on two processes: bfloat16 parameters beside float32 buffers.

    python examples/sharded.py

Torch's batch norm on the CPU refuses that mixture; here nothing has to be wrapped apart.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import batchnorm_ext as bx

WORLD = 2


def work(rank: int, store: str) -> None:
    """What each process does; process 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)  # the same parameters everywhere
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), bx.BatchNormAct2d(8, "silu")),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        y = model(torch.randn(8, 3, 16, 16))
        y.float().square().mean().backward()
        optimizer.step()
    weight: Any = model.get_parameter("1.weight")  # a DTensor
    if rank == 0:
        print(f"output {y.dtype}, running_var {model.get_buffer('1.running_var').dtype}")
        print(f"weight {weight.dtype}, {weight.to_local().numel()} of {weight.numel()} here")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(str(Path(folder, "store")),), nprocs=WORLD)
