"""Synchronised batch norm: seconds per training step, bytes sent, and what a collective costs.

`--procs` processes of a gloo group (NCCL on CUDA) train a small convolutional network under
DistributedDataParallel: with torch's batch norm, with this package's, and with statistics over all
processes. On CUDA `torch.nn.SyncBatchNorm` takes part too; on the CPU torch has none. The
candidates take turns, step by step.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import timer

import batchnorm_ext as bx
from batchnorm_ext import synchronized
from benchmarks import report, results
from benchmarks.console import make_console, show
from benchmarks.timing import Ratio, Stats

IMAGES = (16, 3, 64, 64)  # of one process
WIDTHS = (64, 128, 256)
#: Numbers of float64 in one collective: those of so many channels, and next to none.
CHANNELS = (1, 64, 512, 2048)
WARM_UP = 3
Call = Callable[[], object]
PLAIN, SYNCHRONIZED = "torch's BatchNorm2d", "SyncBatchNorm"


def network() -> nn.Sequential:
    """Three times convolution, batch norm and ReLU, then 10 scores."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def candidates(device: torch.device) -> dict[str, nn.Module]:
    """The networks, of equal parameters."""
    torch.manual_seed(0)
    plain = network().to(device)
    models: dict[str, nn.Module] = {
        PLAIN: plain,
        "BatchNorm2d": bx.fuse_batchnorm(copy.deepcopy(plain)),
        SYNCHRONIZED: bx.convert_sync_batchnorm(bx.fuse_batchnorm(copy.deepcopy(plain))),
    }
    if device.type == "cuda":
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
        models["torch's SyncBatchNorm"] = theirs
    return models


def _step(model: nn.Module, device: torch.device) -> Call:
    parallel = DistributedDataParallel(model, device_ids=None)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
    x = torch.randn(IMAGES, device=device)

    def step() -> None:
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()

    return step


def _in_turns(calls: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Every process makes the same calls; what this one measures, from a barrier on."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-WARM_UP, rounds):
        for name in calls if turn % 2 else reversed(calls):
            dist.barrier()
            start = timer()
            calls[name]()
            if turn >= 0:
                samples[name].append(timer() - start)
    return {name: Stats.of(times).as_dict() for name, times in samples.items()}


def sent_in(step: Call) -> dict[str, int]:
    """Collectives of one step for statistics, and the bytes that this process puts into them."""
    exchange, payloads = synchronized._exchange, []

    def counted(collective: str, values: Tensor, *rest: Any, **options: Any) -> Tensor:
        payloads.append(values.nbytes)
        return exchange(collective, values, *rest, **options)

    with mock.patch.object(synchronized, "_exchange", counted):
        step()
    return {"collectives": len(payloads), "bytes": sum(payloads)}


def _collectives(device: torch.device) -> dict[str, Call]:
    group = bx.SyncBatchNorm(1)._group()
    assert group is not None
    calls: dict[str, Call] = {}
    for channels in CHANNELS:
        values = torch.randn(2 * channels + 1, dtype=torch.float64, device=device)
        for name in ("all_gather", "all_reduce"):
            function = getattr(synchronized, f"_{name}")
            calls[f"{name} {channels}"] = functools.partial(function, values, group)
    return calls


def _work(rank: int, procs: int, store: str, kind: str, rounds: int, answer: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // procs))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=procs)
    steps = {name: _step(model, device) for name, model in candidates(device).items()}
    found = {
        "steps": _in_turns(steps, rounds),
        "collectives": _in_turns(_collectives(device), 10 * rounds),
        "sent": sent_in(steps[SYNCHRONIZED]),
    }
    if rank == 0:
        torch.save(found, answer)
    dist.destroy_process_group()


def measure(procs: int, device: str, rounds: int) -> dict[str, Any]:
    """What process 0 measured, as a result document."""
    settings = {
        "preset": f"sync-{procs}",
        "device": device,
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "rounds": rounds,
        "load_average_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = str(Path(folder, "answer"))
        arguments = (procs, str(Path(folder, "store")), device, rounds, answer)
        mp.spawn(_work, args=arguments, nprocs=procs)
        found = torch.load(answer)
    gradients = sum(p.nbytes for p in network().parameters())
    baseline = Stats(**found["steps"][PLAIN])
    for name, timing in found["steps"].items():
        ratio = Ratio.of(Stats(**timing), baseline)
        found["steps"][name] = {
            "timing": timing,
            "times_as_long": {"ratio": round(ratio.value, 4), "decided": ratio.decided},
        }
    return {**results.header(settings), "procs": procs, "gradient_bytes": gradients, **found}


def run(procs: int, device: str, rounds: int, output: Path | None) -> None:
    """Measure, show, write."""
    result = measure(procs, device, rounds)
    show(make_console(), *report.sync_tables(result))
    print("written:", results.write_result(result, output))
