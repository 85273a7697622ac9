"""Who runs which test, how many processes, and what a turn leaves out."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rotation
import workers

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("nodeid", "unit"),
    [
        ("tests/test_install.py::test_the_wheel", "install"),
        ("tests/test_cuda_kernels.py::test_races", "emulation tsan"),
        ("tests/test_cuda_kernels.py::test_results[0/4]", "emulation plain"),
        ("tests/test_emulation_runtime.py::test_right_kernels[a-1-asan]", "emulation asan"),
        ("tests/test_export.py::test_x[a::b]", "tests/test_export.py::test_x[a::b]"),
        ("tests/test_ops.py::test_backward[x]", "tests/test_ops.py"),
    ],
)
def test_what_goes_together(nodeid: str, unit: str) -> None:
    assert workers.unit_of(nodeid) == unit


def test_what_is_named_is_there() -> None:
    """A file that is renamed would lose its place without a word."""
    names = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    for _, pattern in workers.TOGETHER:
        for stem in re.findall(r"test_[a-z_]+(?=\\\.py)", pattern):
            assert f"{stem}.py" in names, pattern


@pytest.mark.parametrize(
    ("cores", "gib", "arguments", "capture", "processes"),
    [
        (2, 24.0, ["tests"], "fd", 2),
        (16, 24.0, [], "fd", 16),
        (16, 8.0, [], "fd", 5),  # memory for five
        (1, 24.0, [], "fd", 0),
        (2, 2.0, [], "fd", 0),
        (2, 24.0, [], "no", 0),
        (2, 24.0, ["tests/test_ops.py::test_backward"], "fd", 0),
    ],
)
def test_how_many(
    cores: int,
    gib: float,
    arguments: list[str],
    capture: str,
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "cores", lambda: cores)
    monkeypatch.setattr(workers, "memory_gib", lambda: gib)
    config: Any = SimpleNamespace(args=arguments, option=SimpleNamespace(capture=capture))
    assert workers.how_many(config) == processes


def test_all_turns_together_are_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [(i,) for i in range(10)]
    seen: list[int] = []
    for turn in range(rotation.PARTS[rotation.STEPS]):
        monkeypatch.setattr(rotation, "TURN", turn)
        drawn = rotation.drawn(rotation.STEPS, values)
        assert [p.values for p in drawn] == values
        seen += [p.values[0] for p in drawn if not p.marks]
    assert sorted(seen) == [i for (i,) in values]


def test_what_is_left_out_is_said() -> None:
    lines = rotation.left_out()
    assert len(lines) == len(rotation.PARTS)
    assert f"35 of 36 parts of {rotation.RACES}" in lines
