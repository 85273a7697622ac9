"""One run from the selection to the files: the part between the command line and the runner."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import interrupts, overhead, report, results
from benchmarks.console import make_console, progress_bar, say
from benchmarks.environment import cache_bytes
from benchmarks.record import Entry, Record
from benchmarks.runner import Runner
from benchmarks.shapes import PRESETS, Group, Preset, Selection

ENDINGS = {
    "json": [".json"],
    "txt": [".txt"],
    "csv": [".csv"],
    "md": [".md"],
    "plot": ["-speedup.png", "-speedup.svg", "-limit.png", "-limit.svg"],
}

TIME_UP = "the time was up (--limit SECONDS sets it)"
# The exit status of a run whose checks passed, but that measured only a part of what was asked.
INCOMPLETE = 3


def thread_counts(preset: Preset, selection: Selection) -> tuple[int, ...]:
    """The counts to run with: as asked; else torch's own, and 1 too in the larger presets."""
    if selection.threads:
        return selection.threads
    if selection.device != "cpu":
        return (1,)
    usual = torch.get_num_threads()
    return (1, usual) if preset.all_thread_counts and usual > 1 else (usual,)


def limits_of(preset: Preset, budget_s: float | None, limit_s: float | None) -> tuple[float, float]:
    """Seconds to spend on the groups, and seconds after which those that are left are skipped.

    Without a limit of the caller's, a budget of the caller's lifts the preset's limit.
    """
    if limit_s is None:
        limit_s = preset.limit_s if budget_s is None else math.inf
    return min(preset.budget_s if budget_s is None else budget_s, limit_s), limit_s


def measure(groups: Sequence[Group], preset: Preset, device: str, runner: Runner) -> str:
    """Run the groups with a progress bar that moves between them, never while timing.

    Returns why some were skipped; "" where none was.
    """
    # No refresh thread: it would take turns with the candidates.
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("host time", total=len(groups))
        progress.refresh()
        for row in overhead.host_time(preset.host_rounds, device):
            runner.record.add("host_time", row)
        for row in overhead.saved_bytes():
            runner.record.add("saved_bytes", row)
        started = False

        def before(group: Group) -> None:
            nonlocal started
            progress.update(task, description=group.shape.name, advance=int(started))
            progress.refresh()
            started = True

        if not runner.run(groups, before):
            return TIME_UP
        progress.update(task, description="done", advance=1)
        progress.refresh()
    return ""


@dataclass(frozen=True)
class Run:
    """A run that has ended: its result, the files of it by format, and the exit status."""

    result: dict[str, Any]
    files: dict[str, list[Path]]
    status: int


def run(
    name: str,
    selection: Selection,
    budget_s: float | None,
    limit_s: float | None,
    lines: Path | None,
    output: Path | None,
    formats: list[str],
) -> Run:
    """Measure and write, also what there is when a signal or an error ends the run.

    The exit status is write's, or after a signal 128 and its number, after an error 1.
    """
    preset = PRESETS[name]
    counts = thread_counts(preset, selection)
    groups = selection.groups(preset, counts)
    budget_s, limit_s = limits_of(preset, budget_s, limit_s)
    text = f"timing {len(groups)} groups of cases against torch, about {budget_s:.0f} s ..."
    say(make_console(), text)
    record = Record(lines)
    runner = Runner(budget_s, limit_s, preset.rounds, cache_bytes(selection.device), record)
    settings = {
        "preset": name,
        "device": selection.device,
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "threads": list(counts),
        "budget_s": budget_s,
        "limit_s": limit_s if math.isfinite(limit_s) else None,
        "rounds": list(preset.rounds),
        "load_average_before": os.getloadavg()[0],
    }
    record.add("header", results.header(settings))
    for group in groups:
        record.add("planned", str(group))
    status = 0
    try:
        with interrupts.raised():
            end = measure(groups, preset, selection.device, runner)
    except interrupts.Interrupted as interruption:
        end, status = str(interruption), interruption.status
    except Exception as error:
        traceback.print_exc()
        end, status = f"{type(error).__name__}: {error}".splitlines()[0], 1
    record.add("end", end)
    written = write(record.entries, output, formats)
    return replace(written, status=status or written.status)


def write(entries: Sequence[Entry], output: Path | None, formats: list[str]) -> Run:
    """Write the result of a run.

    The exit status: 1 where a check failed, INCOMPLETE where something was skipped, else 0.
    """
    result = results.build_result(entries)
    endings = [ending for wanted in formats for ending in ENDINGS[wanted]]
    stem = results.free_stem(output or results.RESULTS, results.stem_for(result), endings)
    files = {wanted: _write(wanted, result, stem) for wanted in formats}
    status = 1 if result["failures"] else INCOMPLETE if result["incomplete"] else 0
    return Run(result, files, status)


def _write(wanted: str, result: dict[str, Any], stem: Path) -> list[Path]:
    """The files of one format."""
    if wanted == "plot":
        from benchmarks import plots

        return plots.draw(result, stem)
    path = Path(f"{stem}{ENDINGS[wanted][0]}")
    if wanted == "json":
        results.write_json(result, path)
    elif wanted == "csv":
        results.frame(result).to_csv(path, index=False, mode="x", float_format="%.4f")
    elif wanted == "md":
        results.write_markdown(result, path)
    else:
        with path.open("x", encoding="utf-8") as file:
            report.print_report(result, make_console(file))
    return [path]
