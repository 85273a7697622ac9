"""benchmarks/device_facts.cu on the emulated device: that it runs to its end, stays within its
memory and says what it measures. What it measures there means nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulation.build import CACHE, HERE, ROOT, build, require_everything
from objects import Missing

try:
    require_everything()
    MISSING = ""
except Missing as error:
    MISSING = f"DEVICE_FACTS IS NOT RUN ON THE CPU: {error}"

SOURCE = ROOT / "benchmarks" / "device_facts.cu"
Fact = dict[str, Any]


def run(megabytes: int) -> subprocess.CompletedProcess[str]:
    if MISSING:
        pytest.skip(MISSING)
    host = HERE / "device_facts_host.cpp"
    program = build("asan", [SOURCE, host], CACHE / "asan" / "device_facts")
    environment = os.environ | {"ASAN_OPTIONS": "allocator_may_return_null=1"}
    command = [str(program), str(megabytes)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def found() -> tuple[list[Fact], str]:
    done = run(1)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def of(facts: list[Fact], name: str) -> Iterator[Fact]:
    return (fact for fact in facts if fact["fact"] == name)


def test_every_figure_is_there(found: tuple[list[Fact], str]) -> None:
    facts, _ = found
    assert facts[0] == {"fact": "device", "name": "emulated", "multiprocessors": 2, "l2_MB": 0.0}
    figures = [value for fact in facts for value in fact.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in figures)
    rows = {(f["row_bytes"], f["neighbours_together"]) for f in of(facts, "copy of columns")}
    assert rows == {(n, t) for n in (32, 64, 128, 256, 512, 4096) for t in (False, True)}
    assert [f["tenths"] for f in of(facts, "copy by a part of the device")] == list(range(2, 11))
    again = [(f["l2_eighths"], f["reverses"]) for f in of(facts, "read again")]
    assert again == [(n, reverses) for n in range(1, 13) for reverses in (False, True)]
    assert [f["blocks_per_multiprocessor"] for f in of(facts, "grid barrier")] == [1, 2]
    loads = [(f["loads"], f["in_turn"]) for f in of(facts, "cold loads")]
    assert loads == [(1, True), (2, True), (4, True), (2, False), (4, False)]
    assert [f["cooperative"] for f in of(facts, "node of a graph")] == [False, True]


def test_clusters_of_every_size_are_asked_for(found: tuple[list[Fact], str]) -> None:
    """With the shared memory that the kernels take: of 2 multiprocessors, 2 or 4 blocks fit."""
    facts, _ = found
    keys = ("blocks", "blocks_per_multiprocessor")
    active = {tuple(f[key] for key in keys): f for f in of(facts, "active clusters")}
    assert set(active) == {(size, each) for size in range(2, 9) for each in (1, 2)}
    assert active[2, 1]["clusters"] == 1
    assert active[2, 2]["clusters"] == 2
    assert active[3, 1]["clusters"] == 0
    timed = {tuple(f[key] for key in keys) for f in of(facts, "cluster barrier")}
    assert timed == {key for key, fact in active.items() if fact["clusters"] > 0}


def test_what_is_measured_is_said_first(found: tuple[list[Fact], str]) -> None:
    said = found[1].split("\n")
    for name in ("device", "copies", "second readings", "grid barriers", "clusters", "cold loads"):
        assert name in said


def test_what_fails_says_so_and_the_rest_is_measured() -> None:
    done = run(10**9)  # so much memory there is not
    assert done.returncode == 1
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    errors = {fact["fact"]: fact["error"] for fact in facts if "error" in fact}
    assert set(errors) == {"copies", "cold loads"}
    assert all("cudaErrorMemoryAllocation" in text for text in errors.values())
    assert any(of(facts, "read again")) and any(of(facts, "node of a graph"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="DEVICE_FACTS IS NOT COMPILED: no nvcc")
def test_nvcc_has_nothing_to_say(tmp_path: Path) -> None:
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror,-Wno-unknown-pragmas", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "facts")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
