"""`python -m benchmarks sync`: what it writes and shows."""

from __future__ import annotations

import json
from pathlib import Path

from bench_cases import invoke
from processes import NEEDS_GLOO

from benchmarks import sync


@NEEDS_GLOO
def test_result_and_tables(tmp_path: Path) -> None:
    found = invoke("sync", "--rounds", "3", "--output", str(tmp_path))
    assert found.exit_code == 0, found.output
    (path,) = tmp_path.glob("*-sync-2.json")
    result = json.loads(path.read_text())
    assert list(result["steps"]) == [sync.PLAIN, "BatchNorm2d", sync.SYNCHRONIZED]
    # Of each layer 2 C + 1 numbers forward and 2 C backward.
    expected = sum(8 * (4 * width + 1) for width in sync.WIDTHS)
    assert result["sent"] == {"collectives": 2 * len(sync.WIDTHS), "bytes": expected}
    assert len(result["collectives"]) == 2 * len(sync.CHANNELS)
    assert all(row["times_as_long"]["ratio"] > 0 for row in result["steps"].values())
    for text in ("SyncBatchNorm", "all_reduce", "2048", "bytes of gradients"):
        assert text in found.output
