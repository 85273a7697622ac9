"""The benchmarks: checks and times, training runs, their tables and pictures.

torch is loaded by the commands only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from benchmarks import shapes

if TYPE_CHECKING:
    from benchmarks.measure import Run

ALLOCATORS = ("default", "huge-pages")
TRAIN_DEVICES = ("auto", *shapes.DEVICES)
EXPERIMENT_HELP = "repeatable; all (the default) or one of those in docs/why-batch-norm.md"
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def _choices(text: str | None, known: Sequence[str], option: str) -> tuple[str, ...]:
    """The comma-separated values of an option, each one of `known`; 'all' means every one."""
    if not text:
        return ()
    values = tuple(known) if text == "all" else tuple(part.strip() for part in text.split(","))
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"--{option}: {value!r} is not one of {', '.join(known)}")
    return values


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise typer.BadParameter(f"--threads: expected positive numbers such as 1,2, got {text!r}")
    return values


def _require_extension() -> None:
    try:
        import batchnorm_ext  # noqa: F401
    except ImportError as error:
        print(
            f"benchmarks: batchnorm_ext cannot be imported ({error}); build it first: make build",
            file=sys.stderr,
        )
        raise typer.Exit(2) from None


def _require_device(device: str) -> None:
    import torch

    from batchnorm_ext import _C

    if device != "cuda":
        return
    if not torch.cuda.is_available():
        problem = "torch sees no GPU"
    elif not _C.build_info()["cuda"]:
        problem = "batchnorm_ext was built without CUDA"
    else:
        return
    print(f"benchmarks: --device cuda, but {problem}", file=sys.stderr)
    raise typer.Exit(2)


def _read(path: Path) -> dict[str, Any]:
    from benchmarks.results import read_json

    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def overview(
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
) -> None:
    """Time the quick preset, train beside torch, and say what it shows: 2 minutes on 2 cores.

    Exit status: that of `run`, and 1 where the training is not equal to torch's.
    """
    _require_extension()
    from benchmarks import overview as summing_up

    raise typer.Exit(summing_up.run(output))


@app.command()
def run(
    preset: Annotated[str, typer.Option(help=", ".join(shapes.PRESETS))] = "quick",
    device: Annotated[str, typer.Option(help=", ".join(shapes.DEVICES))] = "cpu",
    dtype: Annotated[str | None, typer.Option(help=", ".join(shapes.DTYPES))] = None,
    layout: Annotated[str | None, typer.Option(help=", ".join(shapes.LAYOUTS))] = None,
    mode: Annotated[str | None, typer.Option(help="train (forward, backward), eval")] = None,
    op: Annotated[str | None, typer.Option(help=", ".join(shapes.OPS))] = None,
    direction: Annotated[str | None, typer.Option(help=", ".join(shapes.DIRECTIONS))] = None,
    shape: Annotated[list[str] | None, typer.Option(help="32x64x56x56; repeatable")] = None,
    threads: Annotated[str | None, typer.Option(help="such as 1,2")] = None,
    baseline: Annotated[str | None, typer.Option(help=", ".join(shapes.BASELINES))] = None,
    allocator: Annotated[
        str, typer.Option(help="huge-pages: torch's allocator asks for them, for all candidates")
    ] = "default",
    budget: Annotated[float | None, typer.Option(help="seconds for the cases")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="seconds after which the cases left are skipped")
    ] = None,
    lines: Annotated[
        Path | None, typer.Option(help="new file: what is found, a JSON line each, at once")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
    json: Annotated[
        bool, typer.Option(help="write the result file, and its tables as text")
    ] = True,
    csv: Annotated[bool, typer.Option(help="write every case as CSV")] = False,
    md: Annotated[bool, typer.Option(help="write the tables as Markdown")] = False,
    plot: Annotated[bool, typer.Option(help="draw the result (PNG and SVG)")] = False,
) -> None:
    """Check and time the cases of a preset, narrowed by comma-separated options ('all' works).

    Exit status: 1 where a check failed, 3 where the time was up before the last case. A run that
    is interrupted (Ctrl-C, SIGTERM) writes what it has and exits with 130 or 143.
    """
    if preset not in shapes.PRESETS:
        raise typer.BadParameter(f"--preset: {preset!r} is not one of {', '.join(shapes.PRESETS)}")
    if allocator not in ALLOCATORS:
        raise typer.BadParameter(f"--allocator: {allocator!r} is not one of {ALLOCATORS}")
    if device not in shapes.DEVICES:
        raise typer.BadParameter(f"--device: {device!r} is not one of {', '.join(shapes.DEVICES)}")
    if lines is not None and lines.exists():
        raise typer.BadParameter(f"--lines: {lines} exists already")
    modes = _choices(mode, tuple(shapes.MODES), "mode")
    directions = _choices(direction, shapes.DIRECTIONS, "direction")
    if modes:
        allowed = [d for name in modes for d in shapes.MODES[name]]
        directions = tuple(d for d in allowed if not directions or d in directions)
        if not directions:
            raise typer.BadParameter(f"--mode {mode} has no direction {direction}")
    try:
        sizes = tuple(shapes.find_shape(text) for text in shape or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    selection = shapes.Selection(
        shapes=sizes,
        layouts=_choices(layout, shapes.LAYOUTS, "layout"),
        dtypes=_choices(dtype, shapes.DTYPES, "dtype"),
        ops=_choices(op, shapes.OPS, "op"),
        directions=directions,
        baselines=_choices(baseline, shapes.BASELINES, "baseline"),
        threads=_numbers(threads),
        device=device,
    )
    if allocator == "huge-pages":  # read by torch at its first allocation
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    _require_extension()
    _require_device(device)
    from benchmarks import measure

    formats = {"json": json, "txt": json, "csv": csv, "md": md, "plot": plot}
    wanted = [name for name, chosen in formats.items() if chosen]
    _show(measure.run(preset, selection, budget, limit, lines, output, wanted))


def _show(finished: Run) -> NoReturn:
    from benchmarks import overview as summing_up
    from benchmarks.console import make_console

    console = make_console()
    summing_up.print_run(finished, console)
    summing_up.name_files(finished, console)
    raise typer.Exit(finished.status)


@app.command()
def collect(
    lines: Annotated[Path, typer.Argument(help="what `run --lines` wrote")],
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
    md: Annotated[bool, typer.Option(help="write the tables as Markdown")] = False,
) -> None:
    """Make the result file of a run from its lines, also of a run that was killed."""
    from benchmarks import measure, record

    try:
        entries = record.read(lines)
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    _show(measure.write(entries, output, ["json", "txt", "md"] if md else ["json", "txt"]))


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="one result file, or two to compare")],
    candidate: Annotated[str, typer.Option(help="whose times, with two files")] = "ours",
    goals: Annotated[
        bool, typer.Option("--goals", help="of one file: what the project set itself, too")
    ] = False,
) -> None:
    """Show the tables of one result file, or two files side by side."""
    from benchmarks import console as consoles
    from benchmarks import goals as targets
    from benchmarks import report, results

    if len(files) > 2:
        raise typer.BadParameter("compare takes one or two files")
    documents = [_read(path) for path in files]
    console = consoles.make_console()
    if len(documents) == 1:
        report.print_report(documents[0], console)
        if goals:
            consoles.show(console, report.goal_table(targets.goals(documents[0])))
        return
    first, second = (document["environment"] for document in documents)
    for key in ("cpu", "torch", "torch_allocator", "cpu_capability"):
        pair = [env.get(key, env["batchnorm_ext"].get(key)) for env in (first, second)]
        if pair[0] != pair[1]:
            consoles.say(console, f"different {key}: {pair[0]} | {pair[1]}", "yellow")
    consoles.say(
        console, "Two runs are not interleaved: the machine's state differs between them.", "dim"
    )
    frames = [results.frame(document) for document in documents]
    try:
        table = report.compare_table(frames[0], frames[1], candidate, ["first", "second"])
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    consoles.show(console, table)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="a result file")],
    output: Annotated[Path | None, typer.Option(help="folder; default: the file's own")] = None,
) -> None:
    """Draw a result file: PNG and SVG."""
    from benchmarks import plots

    for path in plots.draw(_read(file), (output or file.parent) / file.stem):
        print(path)


@app.command()
def kernels() -> None:
    """Show which CUDA kernels each candidate runs."""
    _require_extension()
    _require_device("cuda")
    from benchmarks import kernels as profiling
    from benchmarks.console import make_console, show

    show(make_console(), profiling.table(profiling.run()))


@app.command()
def env() -> None:
    """Show what a result file records about this machine, and torch's own report."""
    _require_extension()
    from rich import print_json
    from torch.utils import collect_env

    from benchmarks import environment

    print_json(data={"git": environment.git_state(), **environment.collect()})
    print(collect_env.get_pretty_env_info())


@app.command()
def train(
    experiment: Annotated[list[str] | None, typer.Option(help=EXPERIMENT_HELP)] = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="more seeds and steps, for a page to keep")
    ] = False,
    device: Annotated[str, typer.Option(help=", ".join(TRAIN_DEVICES))] = "auto",
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown file made of the results")] = None,
) -> None:
    """Show what batch norm does for training: experiments with figures, on real data."""
    _require_extension()
    from benchmarks.training import run as training
    from benchmarks.training.registry import EXPERIMENTS

    if device not in TRAIN_DEVICES:
        raise typer.BadParameter(f"--device: {device!r} is not one of {', '.join(TRAIN_DEVICES)}")
    if page is not None and not page.resolve().parent.is_dir():
        raise typer.BadParameter(f"--page: there is no folder {page.resolve().parent}")
    _require_device(device)
    names = list(EXPERIMENTS) if not experiment or "all" in experiment else experiment
    for name in names:
        if name not in EXPERIMENTS:
            known = ", ".join(("all", *EXPERIMENTS))
            raise typer.BadParameter(f"--experiment: {name!r} is not one of {known}")
    size = "full" if full else "quick"
    raise typer.Exit(training.run(list(dict.fromkeys(names)), size, device, output, page))


@app.command()
def micro(
    budget: Annotated[float, typer.Option(help="seconds for each comparison")] = 0.7,
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
) -> None:
    """Measure what single choices rest on: page faults, the plan's thresholds, the kernels."""
    _require_extension()
    from benchmarks import micro as measurements

    measurements.run(output, budget)


@app.command()
def penalty(
    budget: Annotated[float, typer.Option(help="seconds for each comparison")] = 1.5,
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
) -> None:
    """Time the step of a gradient penalty (double backward), layers and a critic, against torch."""
    _require_extension()
    from benchmarks import penalty as measurements

    measurements.run(output, budget)


@app.command()
def networks(
    network: Annotated[str | None, typer.Option(help="names, by commas; all of them")] = None,
    layout: Annotated[str | None, typer.Option(help=", ".join(shapes.LAYOUTS))] = None,
    dtype: Annotated[str, typer.Option(help="float32; bfloat16 is mixed precision")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="through torch.compile")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="steps of each candidate")] = 11,
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
) -> None:
    """Time training steps of whole networks: torch's batch norm, converted, fused."""
    _require_extension()
    from benchmarks import networks as measurements

    names = _choices(network or "all", tuple(measurements.NETWORKS), "network")
    layouts = _choices(layout or "all", shapes.LAYOUTS, "layout")
    dtypes = _choices(dtype, shapes.DTYPES[:2], "dtype")
    measurements.run(names, layouts, dtypes, compiled, rounds, output)


@app.command()
def sync(
    procs: Annotated[int, typer.Option(min=2, help="processes; GPUs with --device cuda")] = 2,
    device: Annotated[str, typer.Option(help=", ".join(shapes.DEVICES))] = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="steps of each candidate")] = 30,
    output: Annotated[Path | None, typer.Option(help="default: benchmarks/results")] = None,
) -> None:
    """Time training steps of several processes, with and without synchronised statistics."""
    if device not in shapes.DEVICES:
        raise typer.BadParameter(f"--device: {device!r} is not one of {', '.join(shapes.DEVICES)}")
    _require_extension()
    _require_device(device)
    from benchmarks import sync as measurements

    measurements.run(procs, device, rounds, output)


@app.command()
def predict(
    batch: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help=", ".join(shapes.DTYPES))] = "bfloat16",
    device: Annotated[str, typer.Option(help="a name that the command plan knows")] = "h200",
) -> None:
    """Print what the CUDA plans of ResNet-50 would move, and how long at a copy's rate."""
    _require_extension()
    from benchmarks import predict as predictions

    try:
        print(predictions.report(dtype, batch, device))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
