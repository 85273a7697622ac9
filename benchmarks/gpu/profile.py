"""What Nsight Compute says of four kernels: how full the device is, and what it waits for.

python -m benchmarks.gpu.profile            under ncu: each metric is a line of the journal
python -m benchmarks.gpu.profile calls      the calls alone
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable, Iterator

from benchmarks.gpu import journal

SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis"),
    *("SchedulerStats", "WarpStateStats", "InstructionStats"),
)
#: Forward and backward along planes and along columns, more than a second-level cache holds.
SIZES = (128, 256, 56, 56)
DTYPE, OP = "bfloat16", "bn_relu"
LAYOUTS, DIRECTIONS = ("channels_first", "channels_last"), ("forward", "backward")
COLUMNS = {"Kernel Name": "kernel", "Section Name": "section", "Metric Name": "metric",
           "Metric Unit": "unit", "Metric Value": "value"}  # fmt: skip


def rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The metrics in what `ncu --csv --page details` prints among other lines."""
    table = (line for line in lines if line.startswith('"'))
    for row in csv.DictReader(table):
        if row.get("Metric Name"):
            found = {ours: row.get(theirs) or "" for theirs, ours in COLUMNS.items()}
            yield {**found, "kernel": f"{row['ID']} {found['kernel']}"}


def calls() -> None:
    """Each call once before it is profiled."""
    import torch

    from benchmarks.gpu import device
    from benchmarks.gpu.tensors import Samples

    here = device.here()
    samples = Samples(here.name)
    for layout in LAYOUTS:
        for direction in DIRECTIONS:
            print(f"{layout} {direction}", flush=True)
            call = samples.of(SIZES, layout, DTYPE, OP, 0).call(direction)
            call()
            here.synchronize()
            torch.cuda.profiler.start()
            call()
            here.synchronize()
            torch.cuda.profiler.stop()


def main() -> int:
    """The exit status: ncu's."""
    if sys.argv[1:] == ["calls"]:
        calls()
        return 0
    sections = [word for name in SECTIONS for word in ("--section", name)]
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", *sections]
    command += ["--csv", "--page", "details", sys.executable, "-m", "benchmarks.gpu.profile"]
    process = subprocess.Popen([*command, "calls"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = journal.Journal.of_the_check()

    def shown(text: Iterable[str]) -> Iterator[str]:
        for line in text:
            print(line, end="", flush=True)
            yield line

    for row in rows(shown(process.stdout)):
        lines.write("metric", **row)
    return process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
