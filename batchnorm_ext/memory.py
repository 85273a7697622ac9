"""The memory that large outputs and gradients on the CPU come from.

torch gives every large block back to the operating system when its tensor is gone, and the next one
is cleared page by page before an operator may write to it: as long as a batch norm takes, and more.
This package keeps the blocks of its own outputs in training and of gradients, from 128 KiB on, and
of outputs in inference from 32 MiB on, for the next call. With what is in use, what is kept is
never more than what was in use at once during the last one to two thousand calls. The names are
those of `torch.cuda`.

The environment variable `BATCHNORM_EXT_CPU_CACHE` is a first limit, in bytes, read at import; 0
turns it all off. It is off, too, where another allocator was chosen for the process: jemalloc,
tcmalloc or mimalloc by LD_PRELOAD, or one set in torch.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from batchnorm_ext.ops import _C

__all__ = ["MemoryStats", "empty_cache", "memory_stats", "set_cache_limit"]


class MemoryStats(NamedTuple):
    """What `memory_stats` found.

    Attributes:
        in_use: bytes of the tensors that are there.
        cached: bytes that are kept for the next ones.
        allocations: blocks that were asked for.
        reused: those of them that were there already.
    """

    in_use: int
    cached: int
    allocations: int
    reused: int


def memory_stats() -> MemoryStats:
    """How much is in use, and kept.

    Examples:
        ```python
        x = torch.randn(8, 64, 56, 56)
        y = batchnorm_ext.BatchNorm2d(64)(x)  # in training mode
        assert batchnorm_ext.memory.memory_stats().in_use >= y.nbytes
        ```
    """
    found = _C.pool_statistics()
    return MemoryStats(found["in_use"], found["kept"], found["allocations"], found["reused"])


def empty_cache() -> None:
    """Give back what is kept. Tensors that are there are not touched."""
    _C.empty_pool()


def set_cache_limit(limit: int | None) -> None:
    """Keep so many bytes at most.

    Args:
        limit: bytes; 0 keeps nothing, and outputs come from torch's allocator again. None: what was
            in use at once.

    Raises:
        ValueError: a negative limit.
    """
    _C.set_pool_limit(limit)


def _read_environment() -> None:
    """The first limit, where the environment names one."""
    setting = os.environ.get("BATCHNORM_EXT_CPU_CACHE", "")
    if not setting:
        return
    if not setting.isdecimal():
        raise ValueError(
            f"BATCHNORM_EXT_CPU_CACHE should be a number of bytes such as 1000000000, but got "
            f"{setting!r}"
        )
    set_cache_limit(min(int(setting), 2**63 - 1))


_read_environment()
