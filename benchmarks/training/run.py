"""Runs experiments: workers, result files, tables, figures."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import plots, results
from benchmarks.console import make_console, name_file, progress_bar, say, show, simple_table
from benchmarks.environment import device_slug
from benchmarks.plots import STYLE, plt
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


def _records(experiment: Experiment, runs: list[Settings], device: str) -> Iterator[Settings]:
    """The record of each run, in the order of the runs, with a bar as they come."""
    pool = Parallel(n_jobs=workers(device), return_as="generator")
    with progress_bar() as progress:
        bar = progress.add_task(experiment.name, total=len(runs))
        for record in pool(delayed(_measure)(experiment.name, s, device) for s in runs):
            progress.advance(bar)
            yield record


def run_one(experiment: Experiment, size: str, device: str) -> dict[str, Any]:
    """Do every run of an experiment, then time its steps: the result document."""
    begin = time.perf_counter()
    arguments = experiment.sizes[size]
    settings = {"experiment": experiment.name, "size": size, "device": device,
                "threads": THREADS, **arguments}  # fmt: skip
    document = results.header(settings)
    runs = experiment.runs(arguments)
    say(make_console(), f"{experiment.name}: {len(runs)} runs of training ...")
    records = list(_records(experiment, runs, device))
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


def table(experiment: Experiment, result: dict[str, Any]) -> Table:
    """The numbers behind the finding."""
    heads, rows = experiment.table(result)
    made = simple_table(experiment.title)
    for index, head in enumerate(heads):
        cell = rows[0][index]
        names = bool(cell) and not any(letter.isdigit() for letter in cell[:3])
        made.add_column(head, justify="left" if names else "right")
    for row in rows:
        made.add_row(*row)
    return made


def print_report(experiment: Experiment, result: dict[str, Any], console: Console) -> None:
    """The finding and the table behind it."""
    show(console, table(experiment, result))
    say(console, experiment.finding(result))


def write(
    experiment: Experiment, result: dict[str, Any], output: Path | None
) -> dict[str, list[Path]]:
    """The result file, its tables and its figure, by format."""
    slug = device_slug(result["environment"])
    name = f"{slug}-{result['created'][:10]}-train-{experiment.name}-{result['settings']['size']}"
    stem = results.free_stem(output or results.RESULTS, name, (".json", ".txt", ".png", ".svg"))
    text = Path(f"{stem}.txt")
    with text.open("x", encoding="utf-8") as file:
        print_report(experiment, result, make_console(file))
    return {
        "json": [results.write_json(result, Path(f"{stem}.json"), indent=None)],
        "txt": [text],
        "plot": draw(experiment, result, stem),
    }


def run(names: list[str], size: str, device: str, output: Path | None, page: Path | None) -> int:
    """The command: every experiment named; 1 where one finds the package itself wrong."""
    from benchmarks.training import page as pages

    console = make_console()
    device = choose_device(device)
    passed = True
    documents = []
    for experiment in (EXPERIMENTS[name] for name in names):
        result = run_one(experiment, size, device)
        print_report(experiment, result, console)
        passed = passed and experiment.passed(result)
        files = write(experiment, result, output)
        documents += files["json"]
        for path in itertools.chain(*files.values()):
            name_file(console, "written", path)
    if page is not None:
        page.write_text(pages.make(documents, page), encoding="utf-8")
        name_file(console, "written", page)
    return 0 if passed else 1
