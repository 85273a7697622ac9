"""Runs experiments: workers, result files, tables, figures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import plots, results
from benchmarks.environment import device_slug
from benchmarks.plots import STYLE, plt
from benchmarks.report import make_console, simple_table
from benchmarks.training.experiment import Experiment, Settings, take_turns
from benchmarks.training.figures import WIDTH
from benchmarks.training.registry import EXPERIMENTS

THREADS = 1  # more of them mostly wait for each other on planes of 8x8


def choose_device(wanted: str) -> str:
    """`auto` is a GPU where torch and this build have one, and the CPU elsewhere."""
    from batchnorm_ext import _C

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() and _C.build_info()["cuda"] else "cpu"


def workers(device: str) -> int:
    """A core for each on the CPU; a GPU has one process."""
    return 1 if device == "cuda" else max(len(os.sched_getaffinity(0)) // THREADS, 1)


def _measure(name: str, settings: Settings, device: str) -> Settings:
    torch.set_num_threads(THREADS)
    return {**settings, **EXPERIMENTS[name].measure(settings, device)}


def _records(
    experiment: Experiment, runs: list[Settings], device: str, console: Console
) -> Iterator[Settings]:
    """The record of each run, in the order of the runs, with a bar as they come."""
    columns = (TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("runs"), TimeElapsedColumn())  # fmt: skip
    pool = Parallel(n_jobs=workers(device), return_as="generator")
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(experiment.name, total=len(runs))
        for record in pool(delayed(_measure)(experiment.name, s, device) for s in runs):
            progress.advance(bar)
            yield record


def run_one(experiment: Experiment, size: str, device: str, console: Console) -> dict[str, Any]:
    """Do every run of an experiment, then time its steps: the result document."""
    begin = time.perf_counter()
    arguments = experiment.sizes[size]
    settings = {"experiment": experiment.name, "size": size, "device": device,
                "threads": THREADS, **arguments}  # fmt: skip
    document = results.header(settings)
    records = list(_records(experiment, experiment.runs(arguments), device, console))
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    groups = experiment.timed(device, arguments)
    timings = {
        name: take_turns(steps, arguments["turns"], device) for name, steps in groups.items()
    }
    torch.set_num_threads(before)
    seconds = round(time.perf_counter() - begin, 1)
    return {**document, "seconds": seconds, "timings": timings, "records": records}


def draw(experiment: Experiment, result: dict[str, Any], stem: Path) -> list[Path]:
    """The figure of a result: PNG and SVG."""
    with plt.rc_context(STYLE):
        figure: Figure = plt.figure(figsize=(WIDTH, experiment.height), layout="constrained")
        experiment.draw(figure, result)
        return plots.save(figure, stem)


def show(experiment: Experiment, result: dict[str, Any], console: Console) -> None:
    """The finding and the table behind it."""
    heads, rows = experiment.table(result)
    table = simple_table(experiment.title)
    for index, head in enumerate(heads):
        cell = rows[0][index]
        names = bool(cell) and not any(letter.isdigit() for letter in cell[:3])
        table.add_column(head, justify="left" if names else "right", no_wrap=names)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(experiment.finding(result), highlight=False)


def run(names: list[str], size: str, device: str, output: Path | None, page: Path | None) -> int:
    """The command: every experiment named; 1 where one finds the package itself wrong."""
    from benchmarks.training import page as pages

    console = make_console()
    device = choose_device(device)
    passed = True
    files = []
    for experiment in (EXPERIMENTS[name] for name in names):
        result = run_one(experiment, size, device, console)
        show(experiment, result, console)
        passed = passed and experiment.passed(result)
        slug = device_slug(result["environment"])
        name = f"{slug}-{result['created'][:10]}-train-{experiment.name}-{size}"
        stem = results.free_stem(output or results.RESULTS, name, (".json", ".png", ".svg"))
        files.append(results.write_json(result, Path(f"{stem}.json"), indent=None))
        for path in (files[-1], *draw(experiment, result, stem)):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if page is not None:
        page.write_text(pages.make(files, page), encoding="utf-8")
        console.print(f"written: {page}", highlight=False, soft_wrap=True)
    return 0 if passed else 1
