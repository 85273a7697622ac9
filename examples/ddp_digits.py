"""Handwritten digits on several processes, with statistics over all of them.

    torchrun --nproc-per-node 2 examples/ddp_digits.py

Mini-batches of 8 images on each process are small for batch norm; with `convert_sync_batchnorm`
each layer sees those of all processes as one. Runs on the CPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import batchnorm_ext as bx


def network() -> nn.Sequential:
    """(N, 1, 8, 8) images to (N, 10) scores."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def main() -> None:
    """Trains on one half of the digits; process 0 prints how many of the other half are right."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same order of images on every process
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)

    model = bx.convert_sync_batchnorm(bx.fuse_batchnorm(network()))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    half = len(images) // 2
    for epoch in range(3):
        for batch in torch.randperm(half).split(8 * world):
            mine = batch.tensor_split(world)[rank]  # the last ones differ in size
            optimizer.zero_grad()
            F.cross_entropy(parallel(images[mine]), labels[mine]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = (model(images[half:]).argmax(1) == labels[half:]).float().mean().item()
        model.train()
        if rank == 0:
            print(f"epoch {epoch + 1}: {right:.1%} right")
    statistics = model[1].get_buffer("running_var")
    every = [torch.empty_like(statistics) for _ in range(world)]
    dist.all_gather(every, statistics)
    if rank == 0:
        same = all(torch.equal(each, statistics) for each in every)
        print(f"{world} processes, the same statistics in each: {same}")
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
