"""`python -m benchmarks penalty`: what it writes, and that it refuses wrong gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_cases import invoke
from torch import nn

from benchmarks import penalty
from benchmarks.candidates import OURS
from benchmarks.shapes import LAYOUTS, Shape


def test_result_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(penalty, "SHAPES", (Shape("critic", (2, 3, 5, 5)),))
    monkeypatch.setattr(penalty, "IMAGES", Shape("images", (1, 3, 64, 64)))
    found = invoke("penalty", "--budget", "0", "--output", str(tmp_path))
    assert found.exit_code == 0, found.output
    (path,) = tmp_path.glob("*-penalty.json")
    result = json.loads(path.read_text())
    rows = result["penalty"]
    assert len(rows) == len(penalty.DTYPES) * len(LAYOUTS) * len(penalty.ACTIVATIONS) + len(LAYOUTS)
    for row in rows:
        assert set(row["timings"]) == {"eager", OURS}
        assert row["speedup"]["ratio"] > 0 and row["difference_float64"] < 1e-8
    assert result["geometric_mean"] > 0
    for text in ("critic", "leaky_relu", "2x3x5x5", "Geometric mean"):
        assert text in found.output


def test_wrong_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * (1 + 1e-6)

    monkeypatch.setattr(penalty, "fuse_batchnorm", lambda model: Wrong(3).double())
    with pytest.raises(RuntimeError, match="differ from torch's by"):
        penalty.compare({"what": "none"}, nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4), 0.0)


def test_the_penalty_of_the_critic_is_not_zero() -> None:
    gradients = penalty.step(penalty.critic(), torch.randn(2, 3, 64, 64))()
    assert all(g.abs().max() > 0 for g in gradients[:2])
