"""The tables of a result, drawn after the timing."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.candidates import OURS
from benchmarks.console import say, show, simple_table
from benchmarks.environment import device_name
from benchmarks.limits import FASTEST
from benchmarks.results import CASE_KEYS, incomplete_text
from benchmarks.shapes import BASELINES, DIRECTIONS
from benchmarks.timing import Ratio, Stats

# Share of the control's pairs that the rule may call different before a run counts as disturbed.
DISTURBED = 0.1
LIMIT_HEAD = "at copy\nlimit"
SHORT = {
    "channels_first": "first",
    "channels_last": "last",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float64": "fp64",
}


def time_text(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def ratio_text(speedup: dict[str, Any] | None) -> str:
    """The ratio; ~ where the quartiles overlap; empty where there is none."""
    return str(Ratio(speedup["ratio"], speedup["decided"])) if speedup else ""


def _baselines(result: dict[str, Any]) -> list[str]:
    return [b for b in BASELINES if any(b in case["speedup"] for case in result["cases"])]


def case_table(result: dict[str, Any]) -> Table:
    """One line per group: our time, the baselines' times over it, the fraction of the limit."""
    baselines = _baselines(result)
    title = (
        "ours: time, times as fast as " + ", ".join(baselines) + ", fraction of the fastest copy"
    )
    table = simple_table(title)
    for name in ("shape", "layout", "dtype", "op", "thr"):
        table.add_column(name)
    shown = [d for d in DIRECTIONS if any(c["direction"] == d for c in result["cases"])]
    for direction in shown:
        table.add_column(direction, justify="right")
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for case in result["cases"]:
        key = tuple(case[k] for k in ("shape", "layout", "dtype", "op", "threads"))
        if OURS not in case["timings"]:
            cell = "[red]wrong result[/red]"
        else:
            ratios = (ratio_text(case["speedup"].get(b)) for b in baselines)
            parts = [time_text(case["timings"][OURS]["median"])]
            parts += [f"{ratio:>5}" for ratio in ratios]
            parts.append(f"{case['fraction'][OURS][FASTEST]:.2f}")
            cell = " ".join(parts)
        lines.setdefault(key, {})[case["direction"]] = cell
    for key, cells in lines.items():
        fields = (SHORT.get(str(value), str(value)) for value in key)
        table.add_row(*fields, *(cells.get(direction, "") for direction in shown))
    return table


def summary_table(result: dict[str, Any]) -> Table:
    """Geometric mean and worst case of every (op, direction, layout, dtype, threads)."""
    table = simple_table("Times as fast, over the shapes")
    for name in ("op", "direction", "layout", "dtype", "thr", "against"):
        table.add_column(name)
    for name in ("mean", LIMIT_HEAD, "~", "worst", "worst shape", "clone", "fastest\ncopy"):
        table.add_column(name, justify="right")
    for row in result["summary"]:
        for baseline, values in row["speedup"].items():
            fraction = row["beyond_cache"]
            table.add_row(
                row["op"],
                row["direction"],
                SHORT[row["layout"]],
                SHORT.get(row["dtype"], row["dtype"]),
                str(row["threads"]),
                baseline,
                f"{values['geometric_mean']:.2f}x",
                f"{values['at_limit']:.2f}x",
                f"{values['undecided']}/{values['cases']}",
                f"{values['worst']:.2f}x",
                values["worst_shape"],
                *(f"{fraction[k]:.2f}" if k in fraction else "" for k in ("clone", FASTEST)),
            )
    table.caption = (
        "mean: geometric, over all cases as measured, those with overlapping quartiles (~) too. "
        "at copy limit: that mean for a kernel as fast as the fastest copy of the same bytes. "
        "clone, fastest copy: fraction of it, tensors larger than the last-level cache only."
    )
    return table


def overhead_tables(result: dict[str, Any]) -> list[Table]:
    """Host time per call, and bytes kept for backward."""
    host = simple_table("Host time per call, input (2,4,2,2)")
    for name in ("direction", "ours", "nn.BatchNorm2d", "ours / theirs"):
        host.add_column(name, justify="left" if name == "direction" else "right")
    for row in result["host_time"]:
        host.add_row(
            row["direction"],
            time_text(row["timings"][OURS]["median"]),
            time_text(row["timings"]["eager"]["median"]),
            f"{row['ours_over_eager']:.2f}" if row["decided"] else "~",
        )
    saved = simple_table("Bytes kept for backward, over the input's bytes")
    for name in ("op", "candidate", "besides input, parameters", "besides the output too", "all"):
        saved.add_column(name, justify="left" if name in ("op", "candidate") else "right")
    for row in result["saved_bytes"]:
        shares = (row[key] / row["tensor_bytes"] for key in ("kept", "hidden", "total"))
        saved.add_row(row["op"], row["candidate"], *(f"{share:.4f}" for share in shares))
    return [table for table in (host, saved) if table.row_count]


def goal_table(goals: list[dict[str, Any]]) -> Table:
    """The project's goals against this run, and against what the copy limit would allow."""
    table = simple_table("Goals")
    table.add_column("goal", overflow="fold", max_width=48)
    for name in ("target", LIMIT_HEAD, "measured", "cases", "reached"):
        table.add_column(name, justify="right")
    for row in goals:
        limit = row["at_limit"]
        beyond = limit is not None and limit < row["target"]
        missed = "[red]beyond limit[/red]" if beyond else "[red]no[/red]"
        figures = (row["target"], limit, row["measured"])
        cells = ("" if figure is None else f"{figure:.2f}" for figure in figures)
        table.add_row(row["goal"], *cells, str(row["cases"]), "yes" if row["reached"] else missed)
    table.caption = "at copy limit: what a kernel as fast as the fastest copy would reach here."
    return table


def environment_text(result: dict[str, Any]) -> str:
    """Where a result comes from: processor, threads, torch, instruction set, allocator."""
    environment, settings = result["environment"], result["settings"]
    ours = environment["batchnorm_ext"]
    threads = "/".join(map(str, settings.get("threads", ())))
    parts = [
        device_name(environment),
        *([f"{threads} thread{'' if threads == '1' else 's'}"] if threads else []),
        f"torch {environment['torch']}",
        f"batchnorm_ext {ours['version']} ({ours['cpu_capability']})",
    ]
    if environment["torch_allocator"] != "default":
        parts.append(f"allocator: {environment['torch_allocator']}")
    return ", ".join(parts)


def control_text(result: dict[str, Any]) -> str:
    """How the rule of the quartiles fared on two candidates that are the same."""
    control = result["control"]
    return (
        f"Control: x.clone() was timed twice in each case; the quartiles kept apart "
        f"{control['claimed']} of {control['cases']} such pairs, half of the ratios lie in "
        f"{control['ratio_q1']:.2f}-{control['ratio_q3']:.2f}."
    )


def _was_busy(result: dict[str, Any]) -> bool:
    """Whether more wanted to run than there are processors, or equal copies came out different."""
    processors = int(result["environment"]["cpu"].get("CPU(s)", 1))
    load = result["settings"].get("load_average_before", 0)
    control = result["control"]
    return bool(load > processors or control["claimed"] > DISTURBED * control["cases"])


def show_warnings(result: dict[str, Any], console: Console) -> None:
    """What keeps a result from being whole or right; nothing where it is."""
    if _was_busy(result):
        text = "The machine was busy with something else: do not quote this run."
        say(console, text, "yellow")
    if incomplete := incomplete_text(result):
        say(console, f"{incomplete} The result file names them.", "yellow")
    for failure in result["peer_failures"]:
        say(console, f"peer left out: {failure}", "yellow")
    for failure in result["failures"]:
        say(console, f"check failed: {failure}", "red")


def print_report(result: dict[str, Any], console: Console) -> None:
    """Everything about one result."""
    say(console, environment_text(result))
    if any(case["timings"] for case in result["cases"]):
        show(console, case_table(result), summary_table(result))
    show(console, *overhead_tables(result))
    if result["control"]["cases"]:
        say(console, control_text(result))
    say(console, f"Note: {result['notes'][-1]}", "dim")
    show_warnings(result, console)


def _quartiles(timing: dict[str, Any]) -> str:
    return f"{time_text(timing['q1'])} - {time_text(timing['q3'])}"


def _trial_row(row: dict[str, Any]) -> tuple[str, ...]:
    first = next(iter(row["chosen"].values()))
    fields = ", ".join(f"{key} {first[key]} / {value}" for key, value in row["forced"].items())
    work = f"{row['mode']} {row['shape']} {SHORT[row['layout']]}"
    times = (time_text(row["timings"][name]["median"]) for name in ("chosen", "forced"))
    ratio = ratio_text(row["forced_over_chosen"])
    return (row["threshold"], work, str(row["threads"]), *times, ratio, fields)


def micro_tables(result: dict[str, Any]) -> list[Table]:
    """What `micro` measured: memory, the plan's thresholds, the kernels of one core."""
    memory = simple_table(f"One thread, {result['memory'][0]['bytes'] / 1e6:.0f} MB")
    for name in ("what", "median", "quartiles"):
        memory.add_column(name, justify="left" if name == "what" else "right")
    for row in result["memory"]:
        timing = row["timing"]
        memory.add_row(row["what"], time_text(timing["median"]), _quartiles(timing))
    plans = simple_table("Plans, float32: the one chosen against another")
    for name in ("threshold", "work", "thr", "chosen", "forced", "ratio", "chosen / forced"):
        left = name in ("threshold", "work", "chosen / forced")
        plans.add_column(name, justify="left" if left else "right")
    for row in result["plans"]:
        plans.add_row(*_trial_row(row))
    plans.caption = (
        "train: forward and backward. ratio: how many times as long the forced one takes."
    )
    costs = simple_table("Kernels, one core, data in L2: nanoseconds per 16 elements")
    for name in ("dtype", "kernel"):
        costs.add_column(name)
    levels = list(dict.fromkeys(row["cpu_capability"] for row in result["kernels"]))
    for level in levels:
        costs.add_column(level, justify="right")
    cells = {(row["dtype"], row["cpu_capability"]): row["costs"] for row in result["kernels"]}
    for dtype in dict.fromkeys(dtype for dtype, _ in cells):
        for kernel in cells[dtype, levels[0]]:
            found = (cells[dtype, level][kernel] for level in levels)
            texts = (f"{cost['ns']:.2f} ± {cost['spread']:.2f}" for cost in found)
            costs.add_row(SHORT[dtype], kernel, *texts)
    costs.caption = "From the difference of two lengths, which is free of the cost of a call."
    return [memory, plans, costs]


def penalty_table(result: dict[str, Any]) -> Table:
    """What `penalty` measured: torch's step and ours, layer by layer and for the critic."""
    table = simple_table("Gradient penalty: backward with a graph, and backward through it")
    for name in ("step", "shape", "layout", "dtype", "torch", "ours", "times as fast"):
        left = name in ("step", "shape", "layout", "dtype")
        table.add_column(name, justify="left" if left else "right")
    for row in result["penalty"]:
        keys = (row["what"], row["shape"], SHORT[row["layout"]], SHORT[row["dtype"]])
        times = (time_text(row["timings"][name]["median"]) for name in ("eager", OURS))
        table.add_row(*keys, *times, ratio_text(row["speedup"]))
    table.caption = f"Geometric mean: {result['geometric_mean']:.2f} times as fast."
    return table


def networks_table(result: dict[str, Any]) -> Table:
    """What `networks` measured: a line for each network, layout, dtype and way."""
    table = simple_table("Training steps of whole networks")
    lefts = ("network", "layout", "dtype", "way")
    times = ("step", "times as fast", "batch norm", "of torch's", "with add and activation")
    for name in (*lefts, *times, "of torch's", "all but products", "of torch's", "peak"):
        table.add_column(name, justify="left" if name in lefts else "right")
    for row in result["networks"]:
        keys = (row["network"], SHORT[row["layout"]], SHORT[row["dtype"]])
        for way, operators in row["operators"].items():
            median = time_text(row["timings"][way]["median"])
            cells = [*keys, way, median, ratio_text(row["speedup"].get(way))]
            for kinds in (("norm",), ("norm", "pointwise"), ("norm", "pointwise", "others")):
                ours, torchs = (
                    sum(some[kind] for kind in kinds)
                    for some in (operators, row["operators"]["torch"])
                )
                share = f"{ours / torchs:.2f}" if way != "torch" and torchs else ""
                cells += [time_text(ours), share]
            peak = row["peak_bytes"].get(way)
            table.add_row(*cells, f"{peak / 1e6:.0f} MB" if peak else "")
    table.caption = (
        "Times of operators are their own, by the profiler; products: convolutions, matrices."
    )
    return table


def sync_tables(result: dict[str, Any]) -> list[Table]:
    """What `sync` measured: steps of every candidate, and single collectives."""
    steps = simple_table(f"One training step on {result['procs']} processes")
    for name in ("batch norm", "median", "quartiles", "times as long"):
        steps.add_column(name, justify="left" if name == "batch norm" else "right")
    for name, row in result["steps"].items():
        timing = row["timing"]
        ratio = ratio_text(row["times_as_long"])
        steps.add_row(name, time_text(timing["median"]), _quartiles(timing), ratio)
    sent = result["sent"]
    steps.caption = (
        f"SyncBatchNorm puts {sent['bytes']} bytes into {sent['collectives']} collectives, "
        f"DistributedDataParallel {result['gradient_bytes']} bytes of gradients."
    )
    single = simple_table("One collective of 2 C + 1 float64")
    for name in ("collective", "C", "median", "quartiles"):
        single.add_column(name, justify="left" if name == "collective" else "right")
    for name, timing in result["collectives"].items():
        quartiles = _quartiles(timing)
        single.add_row(*name.split(), time_text(timing["median"]), quartiles)
    return [steps, single]


def compare_table(a: pd.DataFrame, b: pd.DataFrame, candidate: str, labels: list[str]) -> Table:
    """`candidate`'s cases that both frames hold: time in each, and how many times as fast b is."""
    picked = [data[data["candidate"] == candidate] for data in (a, b)]
    both = picked[0].merge(picked[1], on=CASE_KEYS, suffixes=("_a", "_b"))
    if both.empty:
        raise ValueError(f"the two files have no case of {candidate} in common")
    table = simple_table(f"{candidate}: second file against first")
    for name in CASE_KEYS:
        table.add_column(name if name != "threads" else "thr")
    for name in (*labels, "times as fast"):
        table.add_column(name, justify="right")
    for _, row in both.iterrows():
        stats = [
            Stats(row[f"median_us_{side}"], row[f"q1_us_{side}"], row[f"q3_us_{side}"], 0.0, 0, 0)
            for side in ("a", "b")
        ]
        keys = (SHORT.get(str(row[key]), str(row[key])) for key in CASE_KEYS)
        times = (time_text(value.median * 1e-6) for value in stats)
        table.add_row(*keys, *times, str(Ratio.of(stats[0], stats[1])))
    return table
