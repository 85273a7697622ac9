"""CUDA: calls as one graph over rotating tensors, so that neither the host nor a warm cache counts.

A graph holds several calls, each on tensors of its own; together they are at least four times the
second-level cache, so no call finds its inputs there. Outputs are kept apart too while the graph is
captured. The host's part of a call is measured by itself (`overhead.host_time`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

# A replay costs a few microseconds besides its kernels: enough calls make that small.
CALLS = 10
# More sets of tensors would only take memory: these are more than any call leaves in a cache.
MOST_SETS = 16
CACHES = 4
WARM_UP = 3
# Longer than on the CPU, since every block ends with waiting for the device.
BLOCK_S = 5e-3


def sets_needed(bytes_of_one: int, cache_bytes: int) -> int:
    """How many sets of tensors are at least `CACHES` times the cache; 2 at least."""
    return min(max(2, math.ceil(CACHES * cache_bytes / bytes_of_one)), MOST_SETS)


def calls_in_graph(sets: int) -> int:
    """A multiple of `sets`, so that every set is used as often as the others."""
    return sets * math.ceil(CALLS / sets)


def stream() -> torch.cuda.Stream:
    """The stream that graphs are captured on; whatever is captured must have been built on it."""
    global _stream
    if _stream is None:
        _stream = torch.cuda.Stream()
    return _stream


_stream: torch.cuda.Stream | None = None


def capture(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """One graph of the calls in turn, as a function that starts it, and how many calls it holds."""
    with torch.cuda.stream(stream()):
        for call in calls:
            for _ in range(WARM_UP):
                call()
    torch.cuda.synchronize()
    count = calls_in_graph(len(calls))
    graph = torch.cuda.CUDAGraph()
    outputs: list[object] = []  # a block that is given back would be the next call's output
    with torch.cuda.graph(graph, stream=stream()):
        outputs.extend(calls[i % len(calls)]() for i in range(count))
    outputs.clear()
    return graph.replay, count
