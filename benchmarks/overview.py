"""What a run says at once, in a dozen lines; all else is in its files.

`python -m benchmarks overview` (`make benchmark`) adds a short training run to it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.console import make_console, name_file, say, show, simple_table
from benchmarks.report import environment_text, show_warnings
from benchmarks.shapes import DIRECTIONS, LAYOUTS, Selection
from benchmarks.summary import Case, speedup
from benchmarks.timing import geometric_mean

PRESET = "quick"
FORMATS = ["json", "txt", "plot"]
#: What a drop-in replacement changes, and what fusing adds to it.
KINDS = {"plain": ("bn",), "fused": ("bn_relu", "bn_add_relu")}


def _cell(cases: list[Case]) -> str:
    ratios = [speedup(case, "eager") for case in cases]
    return f"{geometric_mean(ratios):.2f}x ({min(ratios):.2f}x)" if ratios else ""


def speed_table(result: dict[str, Any]) -> Table:
    """How many times as fast as torch, by layout and pass: the geometric mean, and the worst."""
    timed = [case for case in result["cases"] if "eager" in case["speedup"]]
    dtypes = " and ".join(dict.fromkeys(case["dtype"] for case in timed))
    table = simple_table(
        "Times as fast as torch's batch norm: typical (worst case)",
        f"2x: half of torch's time. Typical: geometric mean; {len(timed)} cases in all, {dtypes}. "
        "Fused: with ReLU, or add and ReLU.",
    )
    table.show_edge = False
    for name in ("", "layout", *DIRECTIONS):
        table.add_column(name, justify="right" if name in DIRECTIONS else "left")
    for kind, ops in KINDS.items():
        for layout in LAYOUTS:
            cases = [c for c in timed if c["op"] in ops and c["layout"] == layout]
            cells = [_cell([c for c in cases if c["direction"] == d]) for d in DIRECTIONS]
            if any(cells):
                table.add_row(kind, layout.replace("_", "-"), *cells)
    return table


def print_run(run: measure.Run, console: Console) -> None:
    """Where it ran, how fast, and what is wrong with it."""
    say(console, environment_text(run.result))
    table = speed_table(run.result)
    if table.row_count:
        show(console, table)
    show_warnings(run.result, console)


def name_files(run: measure.Run, console: Console) -> None:
    """The files of a run; the result file itself has the tables' name."""
    heads = {"txt": "All tables", "plot": "Picture", "csv": "Cases", "md": "Markdown"}
    for wanted, head in heads.items():
        for path in run.files.get(wanted, [])[:1]:  # the others show the same
            name_file(console, head, path)


def _python() -> Path:
    """This Python as it can be typed here."""
    python = Path(sys.executable)
    return python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python


def run(output: Path | None) -> int:
    """The quick benchmark, then training beside torch.

    The exit status is the benchmark's, or 1 where the training is not equal to torch's. After a
    failed check or an interruption there is no training.
    """
    console = make_console()
    measured = measure.run(PRESET, Selection(), None, None, None, output, FORMATS)
    print_run(measured, console)
    status = measured.status
    try:
        if status in (0, measure.INCOMPLETE) and not _trains(measured, output, console):
            status = 1
    finally:
        name_files(measured, console)
    if status in (0, measure.INCOMPLETE):
        say(console, f"Next: {_python()} examples/fuse_resnet.py")
    return status


def _trains(measured: measure.Run, output: Path | None, console: Console) -> bool:
    """Whether it trains as torch does; the numbers come under the other tables."""
    from benchmarks.training import run as training
    from benchmarks.training.against_torch import AgainstTorch

    experiment = AgainstTorch()
    result = training.run_one(experiment, PRESET, "cpu")
    training.write(experiment, result, output)
    say(console, experiment.summary(result))
    with measured.files["txt"][0].open("a", encoding="utf-8") as file:
        training.print_report(experiment, result, make_console(file))
    return experiment.passed(result)
