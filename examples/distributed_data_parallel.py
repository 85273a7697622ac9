"""DistributedDataParallel on two processes, with two forwards before each backward.

    python examples/distributed_data_parallel.py

A critic sees real and made-up images in calls of their own, so DDP broadcasts the buffers of
process 0 twice before backward. No buffer is kept for backward here, so that hinders nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm_ext as bx

WORLD = 2


def critic() -> nn.Sequential:
    """(N, 3, 16, 16) images to (N, 1) scores."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)),
    )


def work(rank: int, store: str) -> None:
    """What each process does; process 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)  # other images in each process; DDP gives all the same parameters
    model = DistributedDataParallel(bx.fuse_batchnorm(critic()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        real, fake = model(torch.randn(8, 3, 16, 16) + 1), model(torch.randn(8, 3, 16, 16))
        (fake.mean() - real.mean()).backward()
        optimizer.step()
    model.eval()(torch.zeros(1, 3, 16, 16))  # a forward begins with process 0's running statistics
    for name, tensor in model.module[1].state_dict().items():
        every = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(every, tensor)
        if rank == 0:
            print(f"{name} is the same in both processes: {torch.equal(*every)}")
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(str(Path(folder, "store")),), nprocs=WORLD)
