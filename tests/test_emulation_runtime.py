"""The emulated CUDA device itself (tests/emulation): what it supplies, and what it reports.

Small right kernels must give right results in every build, and small wrong ones must be found by
the build that is there to find them.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest
from emulation.build import CACHE, FLAVOURS, HERE, build, cuda_includes, require_everything
from objects import Missing

try:
    require_everything()
    MISSING = ""
except Missing as error:
    MISSING = f"THE CUDA KERNELS ARE NOT TESTED ON THE CPU: {error}"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


SANITIZERS = ["plain", "asan", "tsan"]


@functools.cache
def program(name: str, flavour: str) -> Path:
    return build(flavour, [HERE / f"{name}.cpp"], CACHE / flavour / name)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    options = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | options,
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("name", "least"), [("runtime_selftest", 4000), ("device_selftest", 80)])
def test_right_kernels(name: str, least: int, flavour: str) -> None:
    result = run(program(name, flavour))
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    found = re.search(r"^(\d+) checks, 0 failures$", result.stdout, re.MULTILINE)
    assert found is not None, result.stdout
    assert int(found[1]) >= least


@pytest.mark.parametrize("flavour", ["plain", "asan"])
def test_fibers_of_the_c_library(flavour: str) -> None:
    """What processors without a switch of ours have."""
    output = CACHE / flavour / "ucontext_selftest"
    source = HERE / "runtime_selftest.cpp"
    result = run(build(flavour, [source], output, defines=["EMULATION_UCONTEXT"]))
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert re.search(r"^\d+ checks, 0 failures$", result.stdout, re.MULTILINE), result.stdout


# What broke a rule of the execution model is found in every build.
FAILURES = {
    "divergent_barrier": r"a divergent barrier: .*:\d+, while others are at .*:\d+",
    "divergent_shuffle": r"a divergent barrier: .* \(mask 0xffffffff\), while",
    "shuffle_of_half_a_warp": r"a deadlock.*\n.*block \(0, 0, 0\):\n"
    r" +48 at the block barrier at .*:\d+\n +16 at the shuffle at .*:\d+ \(mask 0xffffffff\)",
    "return_before_barrier": r"a deadlock.*\n.*\n +63 at the block barrier at .*\n +1 returned",
    "lane_outside_its_mask": r"the calling lane is not in the mask\n +in thread \(\d+, 0, 0\)",
    "grid_barrier": r"the launch is not cooperative",
    "cluster_arrives_twice": r"arrives again without having waited",
    "cluster_waits_without_arriving": r"waits without having arrived",
    "clusters_of_old_code": r"the code is for less than 9.0",
    "no_such_cluster_rank": r"the cluster has no block 2",
    "poll_forever": r"a livelock",
    "too_much_static_shared": r"more than 48 KiB of static shared memory",
    "too_many_threads": r"more than \d+ threads at a time",
}

WRONG = r"^WRONG"
RACE = r"WARNING: ThreadSanitizer: data race"
OVERFLOW = r"AddressSanitizer: heap-buffer-overflow"

# The others, by the builds that must find them.
FOUND_BY = {
    "missing_block_barrier": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "missing_barrier_before_reuse": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "missing_warp_barrier": {"tsan": RACE},
    "missing_grid_barrier": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "missing_cluster_barrier": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "relaxed_cluster_barrier": {"tsan": RACE},
    "missing_cluster_barrier_at_the_end": {
        "plain": WRONG,
        "asan": r"AddressSanitizer: use-after-poison",
        "tsan": WRONG,
    },
    "missing_fence": {"tsan": RACE},
    "two_blocks_one_output": {"tsan": RACE},
    "past_the_end_of_global": {"asan": OVERFLOW},
    "past_the_end_of_dynamic_shared": {"asan": OVERFLOW},
    "past_the_end_of_static_shared": {"asan": OVERFLOW + r"|index 64 out of bounds"},
    "misaligned_vector": {"asan": r"runtime error: store to misaligned address"},
    "uninitialised_shared": {"plain": WRONG, "asan": WRONG, "tsan": WRONG},
    "too_deep": {"asan": r"AddressSanitizer: stack-overflow"},
}


@pytest.mark.parametrize("flavour", SANITIZERS)
@pytest.mark.parametrize("name", FAILURES)
def test_broken_rules_are_reported(name: str, flavour: str) -> None:
    result = run(program("planted_mistakes", flavour), name)
    assert result.returncode == 3, result.stdout + result.stderr[-4000:]
    assert re.search(FAILURES[name], result.stdout), result.stdout


@pytest.mark.parametrize(
    ("name", "flavour", "report"),
    [(name, flavour, report) for name, by in FOUND_BY.items() for flavour, report in by.items()],
)
def test_mistakes_are_found(name: str, flavour: str, report: str) -> None:
    result = run(program("planted_mistakes", flavour), name)
    output = result.stdout + result.stderr
    assert result.returncode not in (0, 2, 3, 5), output[-4000:]
    assert re.search(report, output, re.MULTILINE), output[-4000:]


def test_no_mistake_is_forgotten() -> None:
    names = run(program("planted_mistakes", "plain"), "list").stdout.split()
    assert sorted(names) == sorted([*FAILURES, *FOUND_BY])


def test_unchanged_sources_are_not_compiled_again() -> None:
    output = program("device_selftest", "plain")
    before = output.stat().st_mtime_ns
    build("plain", [HERE / "device_selftest.cpp"], output)
    assert output.stat().st_mtime_ns == before


def test_shared_needs_a_function(tmp_path: Path) -> None:
    """Every thread would have its own copy of a __shared__ variable, and nobody would notice."""
    source = tmp_path / "raw_shared.cpp"
    source.write_text(
        "#include <cuda_runtime.h>\n__global__ void kernel() { __shared__ float row[32]; }\n"
    )
    command = ["g++", "-std=c++20", f"-I{HERE / 'runtime'}", "-fsyntax-only"]
    command += [word for path in cuda_includes() for word in ("-isystem", str(path))]
    result = run(*command, source)
    assert result.returncode != 0
    assert "use block_shared<T>() or dynamic_shared<T>()" in result.stderr


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("emulation.build.cuda_include_candidates", lambda: [tmp_path])
    with pytest.raises(Missing, match=r"pip install nvidia-cuda-runtime"):
        cuda_includes()
