"""The memory of large CPU outputs: that they are tensors like any other, and that it is bounded."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from strategies import HAS_CUDA_KERNELS
from torch import Tensor

from batchnorm_ext import memory
from batchnorm_ext.functional import batch_norm

MIB = 2**20
pytestmark = pytest.mark.skipif(HAS_CUDA_KERNELS, reason="the CPU's memory")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    gc.collect()
    memory.set_cache_limit(None)
    memory.empty_cache()
    yield
    memory.set_cache_limit(None)
    memory.empty_cache()


def output(elements: int = MIB) -> Tensor:
    """A training step's output, float32 of so many elements."""
    x = torch.arange(elements, dtype=torch.float32).view(-1, 1) % 7
    arguments = (*(None,) * 6, 0.1, 1e-5, "identity", 0.0, False)
    return torch.ops.batchnorm_ext.forward_train(x, *arguments)[0]


@functools.cache
def expected(elements: int = MIB) -> Tensor:
    """What is in it."""
    return output(elements).clone()


def test_a_block_is_used_again() -> None:
    y = output()
    address, before = y.data_ptr(), memory.memory_stats()
    assert before.in_use >= y.nbytes and before.cached == 0
    del y
    assert memory.memory_stats().cached >= 4 * MIB
    y = output()
    after = memory.memory_stats()
    assert y.data_ptr() == address and after.reused == before.reused + 1
    assert after.cached == 0 and after.in_use == before.in_use
    assert torch.equal(y, expected())


def test_small_outputs_are_torchs() -> None:
    before = memory.memory_stats()
    kept = [output(MIB // 32 - 1) for _ in range(3)]
    assert memory.memory_stats() == before and len(kept) == 3
    kept = [output(MIB // 32)]
    assert memory.memory_stats().allocations == before.allocations + 1


def test_inference_has_torchs_memory() -> None:
    """But for what the C library maps anew each time."""
    before = memory.memory_stats()
    y = batch_norm(torch.zeros(MIB, 1), torch.zeros(1), torch.ones(1))
    assert memory.memory_stats() == before and y.nbytes == 4 * MIB
    large = batch_norm(torch.zeros(8 * MIB, 1), torch.zeros(1), torch.ones(1))
    assert memory.memory_stats().in_use - before.in_use >= large.nbytes == 32 * MIB


def test_gradients_and_layouts_come_from_it() -> None:
    x = torch.randn(2, 8, 128, 128).to(memory_format=torch.channels_last).requires_grad_()
    before = memory.memory_stats().in_use
    y = batch_norm(x, None, None, training=True, activation="relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert memory.memory_stats().in_use - before >= y.nbytes + dx.nbytes


def test_empty_cache_and_limit() -> None:
    tensors = [output() for _ in range(4)]
    del tensors
    assert memory.memory_stats().cached >= 16 * MIB
    memory.set_cache_limit(9 * MIB)
    assert 4 * MIB <= memory.memory_stats().cached <= 9 * MIB
    memory.empty_cache()
    assert memory.memory_stats().cached == 0
    memory.set_cache_limit(0)
    before = memory.memory_stats()
    assert torch.equal(output(), expected())
    assert memory.memory_stats() == before
    with pytest.raises(ValueError, match="at least 0"):
        memory.set_cache_limit(-1)


def test_what_is_freed_after_the_limit_is_0_is_given_back() -> None:
    y = output()
    memory.set_cache_limit(0)
    del y
    assert memory.memory_stats().cached == 0


def test_nothing_grows_without_bound() -> None:
    """10,000 random sizes, some of which live on for a while."""
    numbers = random.Random(0)
    for _ in range(2100):  # what other tests needed is forgotten
        output(1).resize_(MIB // 32)
    alive: list[Tensor] = []
    most = memory.memory_stats().in_use
    for _ in range(10_000):
        # What resize_ asks for comes from the same place, and is not written.
        alive.append(output(1).resize_(numbers.randrange(MIB // 4, 3 * MIB)))
        most = max(most, memory.memory_stats().in_use)
        while len(alive) > numbers.randrange(1, 8):
            alive.pop(numbers.randrange(len(alive)))
        stats = memory.memory_stats()
        assert stats.in_use + stats.cached <= most
        assert stats.in_use >= sum(t.nbytes for t in alive)
    assert memory.memory_stats().reused > 500


def test_what_was_needed_once_is_forgotten() -> None:
    tensors = [output() for _ in range(8)]
    del tensors
    assert memory.memory_stats().cached >= 32 * MIB
    for _ in range(2100):
        output(MIB // 4)
    assert memory.memory_stats().cached <= 2 * MIB


def test_resize_set_and_views() -> None:
    y = output()
    y.resize_(2 * MIB, 1)
    assert torch.equal(y[:MIB], expected())
    other = output()
    y.set_(other.untyped_storage(), 0, (MIB, 1))  # type: ignore[call-overload]
    view = y[3:, 0]
    address = other.data_ptr()
    del y, other
    assert torch.equal(view, expected()[3:, 0])
    again = output()
    assert again.data_ptr() != address  # the view still has it


def test_a_copy_at_the_first_write() -> None:
    """Torch copies by the allocator of what is copied."""
    y = output()
    lazy = torch._lazy_clone(y)
    assert torch._C._is_cow_tensor(lazy)  # type: ignore[attr-defined]
    lazy.add_(1)
    assert torch.equal(y, expected()) and torch.equal(lazy, expected() + 1)
    assert memory.memory_stats().in_use >= y.nbytes + lazy.nbytes


def test_numpy_and_dlpack_outlive_the_tensor() -> None:
    y = output()
    array, capsule = y.numpy(), torch.from_dlpack(y)
    del y
    for _ in range(3):
        output().fill_(-1.0)
    assert torch.equal(torch.from_numpy(array), expected())
    assert torch.equal(capsule, expected())


def test_share_memory_and_pickle() -> None:
    y = output().share_memory_()
    assert y.is_shared() and torch.equal(y, expected())
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected())


def _fill(tensor: Tensor) -> None:
    tensor.fill_(3.0)


def test_an_output_goes_to_another_process() -> None:
    y = output()
    process = torch.multiprocessing.get_context("spawn").Process(target=_fill, args=(y,))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and bool((y == 3.0).all())


def test_a_fork_begins_with_nothing_kept() -> None:
    y = output()
    output()
    assert memory.memory_stats().cached > 0
    pid = os.fork()
    if pid == 0:
        # One thread: OpenMP's others are not there after a fork.
        torch.set_num_threads(1)
        ok = memory.memory_stats().cached == 0 and torch.equal(y, expected())
        ok = ok and torch.equal(output(), expected())
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert memory.memory_stats().cached > 0 and torch.equal(y, expected())


def test_threads_free_what_others_allocated() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(60):
            with lock:
                shelf.append(output(numbers.choice([MIB // 4, MIB // 2, 3 * MIB // 4])))
                taken = shelf.pop(numbers.randrange(len(shelf)))
            if not torch.equal(taken, expected(taken.numel())):
                wrong.append(seed)

    before = memory.memory_stats().in_use
    shelf: list[Tensor] = []
    lock = threading.Lock()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert wrong == []
    shelf.clear()
    assert memory.memory_stats().in_use <= before


FAILING = """
import resource, torch
from batchnorm_ext import memory
from batchnorm_ext.functional import batch_norm
x = torch.zeros(24 * 2**20, 1)
call = lambda n: batch_norm(x[:n], None, None, training=True)
for n in range(1, 9):
    call(n * 2**20)
call(24 * 2**20)
kept = memory.memory_stats().cached
assert kept > 90 * 2**20, kept
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# Enough for the next one only where what is kept is given back.
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
y = call(23 * 2**20 // 2)
assert memory.memory_stats().cached < kept
try:
    batch_norm(x.expand(-1, 64), None, None, training=True)
except RuntimeError as error:
    print("refused:", error)
"""


def test_an_allocation_that_fails_is_tried_with_an_empty_cache() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FAILING],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "refused:" in result.stdout and "allocate" in result.stdout


@pytest.mark.parametrize(
    ("setting", "kept"), [("0", False), ("100000000", True), ("9" * 30, True), ("", True)]
)
def test_the_environment_variable(
    setting: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHNORM_EXT_CPU_CACHE", setting)
    memory._read_environment()
    output()
    assert (memory.memory_stats().cached > 0) is kept


@pytest.mark.parametrize("setting", ["1G", "-1", "abc", "1e9"])
def test_a_wrong_setting_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_EXT_CPU_CACHE", setting)
    with pytest.raises(ValueError, match=f"should be a number of bytes .* got '{setting}'"):
        memory._read_environment()


def test_the_environment_is_read_at_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import batchnorm_ext"],
        env={**os.environ, "BATCHNORM_EXT_CPU_CACHE": "1G"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "should be a number of bytes" in result.stderr and "'1G'" in result.stderr


def test_the_profiler_sees_it() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        y = output()
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert max(sizes) >= y.nbytes


def resident_bytes() -> int:
    """Now. A process's greatest would be of what ran before, or of who started it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_no_memory_is_lost() -> None:
    """Resident memory stays what it was over 300 calls."""
    for _ in range(50):
        output()
    before = resident_bytes()
    for _ in range(300):
        output()
    assert resident_bytes() - before < 32 * MIB
