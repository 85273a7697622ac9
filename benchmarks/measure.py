"""One run from the selection to the files: the part between the command line and the runner."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import overhead, report, results
from benchmarks.environment import cache_bytes
from benchmarks.runner import Runner
from benchmarks.shapes import PRESETS, Group, Preset, Selection

ENDINGS = {
    "json": [".json"],
    "csv": [".csv"],
    "md": [".md"],
    "plot": ["-speedup.png", "-speedup.svg", "-limit.png", "-limit.svg"],
}


def thread_counts(preset: Preset, selection: Selection) -> tuple[int, ...]:
    """The counts to run with: as asked; else torch's own, and 1 too in the larger presets."""
    if selection.threads:
        return selection.threads
    if selection.device != "cpu":
        return (1,)
    usual = torch.get_num_threads()
    return (1, usual) if preset.all_thread_counts and usual > 1 else (usual,)


def measure(name: str, selection: Selection, budget_s: float | None) -> dict[str, Any]:
    """Run the groups with a progress bar that moves between them, never while timing."""
    preset = PRESETS[name]
    counts = thread_counts(preset, selection)
    groups = selection.groups(preset, counts)
    load = os.getloadavg()[0]
    limit_s = preset.limit_s if budget_s is None else math.inf
    budget_s = preset.budget_s if budget_s is None else budget_s
    runner = Runner(budget_s, limit_s, preset.rounds, cache_bytes(selection.device))
    columns = (
        *(TextColumn("{task.description}"), BarColumn()),
        *(MofNCompleteColumn(), TimeElapsedColumn()),
    )
    # No refresh thread: it would take turns with the candidates.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("host time", total=len(groups))
        progress.refresh()
        host = overhead.host_time(preset.host_rounds, selection.device)
        saved = overhead.saved_bytes()
        started = False

        def before(group: Group) -> None:
            nonlocal started
            progress.update(task, description=str(group), advance=int(started))
            progress.refresh()
            started = True

        runner.run(groups, before)
        progress.update(task, description="done", advance=1)
        progress.refresh()
    settings = {
        "preset": name,
        "device": selection.device,
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "threads": list(counts),
        "budget_s": budget_s,
        "rounds": list(preset.rounds),
        "load_average_before": load,
    }
    troubles = {
        "failures": runner.failures,
        "peer_failures": runner.peer_failures,
        "skipped": runner.skipped,
    }
    return results.build_result(settings, runner.cases, host, saved, troubles)


def run(
    name: str,
    selection: Selection,
    budget_s: float | None,
    output: Path | None,
    formats: list[str],
) -> int:
    """Measure, report, write; the exit status: 1 where a check failed."""
    result = measure(name, selection, budget_s)
    console = report.make_console()
    report.print_report(result, console)
    endings = [ending for wanted in formats for ending in ENDINGS[wanted]]
    stem = results.free_stem(output or results.RESULTS, results.stem_for(result), endings)
    written: list[Path] = []
    if "json" in formats:
        written.append(results.write_json(result, Path(f"{stem}.json")))
    if "csv" in formats:
        written.append(Path(f"{stem}.csv"))
        results.frame(result).to_csv(written[-1], index=False, mode="x", float_format="%.4f")
    if "md" in formats:
        written.append(results.write_markdown(result, Path(f"{stem}.md")))
    if "plot" in formats:
        from benchmarks import plots

        written.extend(plots.draw(result, stem))
    for path in written:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return 1 if result["failures"] else 0
