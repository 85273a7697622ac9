"""Processes that stay: a group whose members call functions, gloo's or NCCL's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing  # lets tensors cross between processes

NEEDS_GLOO = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
#: A call takes a second; a process that waits for one that failed has to be given up at some time.
PATIENCE = timedelta(seconds=60)

Run = Callable[..., list[Any]]


def of_one_import() -> Any:
    """Starts processes from one that has imported torch, for which each would take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch.multiprocessing", "batchnorm_ext"])
    return context


def _join(rank: int, world: int, store: Path, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE
    )


class Processes:
    """`world` of them, which live as long as they answer: each takes seconds to import torch."""

    def __init__(self, world: int, folder: Path, backend: str) -> None:
        self.world, self.folder, self.backend, self.starts = world, folder, backend, 0
        self.pools: list[Any] = []

    def stop(self) -> None:
        while self.pools:
            self.pools.pop().terminate()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(rank, *arguments) in each; results by rank, or the first error."""
        context = of_one_import()
        if not self.pools:
            self.starts += 1
            store = self.folder / f"store-{self.starts}"
            self.pools.extend(
                context.Pool(1, _join, (rank, self.world, store, self.backend))
                for rank in range(self.world)
            )
        try:
            waiting = [p.apply_async(function, (r, *arguments)) for r, p in enumerate(self.pools)]
            return [answer.get(PATIENCE.total_seconds()) for answer in waiting]
        except BaseException:
            self.stop()
            raise


def processes(world: int, backend: str = "gloo") -> Any:
    """A fixture of one module: `Processes`."""

    @pytest.fixture(scope="module")
    def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
        them = Processes(world, tmp_path_factory.mktemp(f"processes-{world}"), backend)
        yield them
        them.stop()

    return run
