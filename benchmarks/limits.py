"""The copies that bound a memory-bound operation, timed beside it in the same run.

clone       x.clone(): allocation included, from torch's own allocator.
warm_copy   y.copy_(x) into a buffer that exists: no allocation, no page faults. The strict limit.
huge_clone  a copy into fresh huge pages, for tensors that glibc takes from the kernel anew at
            each call: what clone would take with the pages that batchnorm_ext asks for.
clone_again the same as clone: a control. Where the rule of the quartiles finds a difference
            between these two, the machine was disturbed, and other claims are doubtful too.

The tables show the fraction of the fastest copy: of a slow one, such as a clone that spends most of
its time on page faults which batchnorm_ext's huge pages avoid, a fraction above 1 is no merit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

LIMITS = ("clone", "warm_copy", "huge_clone")
CONTROL = "clone_again"
FASTEST = "fastest_copy"

# glibc's largest threshold for mmap (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits): a larger block comes
# from the kernel at each allocation, page faults included.
FRESH_PAGES_BYTES = 32 << 20


def copies(x: Tensor) -> dict[str, Callable[[], object]]:
    """The copies of `x`, by name."""
    source = x.detach()
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "clone": source.clone,
        "warm_copy": lambda: target.copy_(source),
        CONTROL: source.clone,
    }
    if (
        source.device.type == "cpu"
        and source.nbytes > FRESH_PAGES_BYTES
        and hasattr(mmap, "MADV_HUGEPAGE")
    ):
        calls["huge_clone"] = lambda: huge_empty_like(source).copy_(source)
    return calls


def huge_empty_like(source: Tensor) -> Tensor:
    """Memory for `source` in pages of 2 MB straight from the kernel, as far as it grants them."""
    # Private, which is not mmap's default: shared memory has a switch of its own for huge pages,
    # and that is off on most systems.
    pages = mmap.mmap(-1, source.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    fresh = torch.frombuffer(pages, dtype=source.dtype)
    return fresh.as_strided(source.shape, source.stride())
