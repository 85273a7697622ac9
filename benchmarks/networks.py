"""Training steps of whole networks: what a user of the package feels, and where it comes from.

Three copies of a network, with torch's batch norm, converted and fused, take turns. A step is
forward, the mean of the squared outputs, backward. Beside the step's time stands what torch's
profiler finds of its own time of each kind of operator, since in most networks convolutions take
most of a step, and vary by more than batch norm takes. The peak of resident memory is that of a
process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import batchnorm_ext
from benchmarks import report, results
from benchmarks.candidates import in_layout
from benchmarks.console import make_console, progress_bar, show
from benchmarks.models import NETWORKS, Whole
from benchmarks.timing import Ratio, interleave

WAYS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "converted": batchnorm_ext.convert_batchnorm,
    "fused": batchnorm_ext.fuse_batchnorm,
}
#: With the pool for outputs, and without.
POOLS = {"converted": None, "fused": None, "converted, no pool": "0", "fused, no pool": "0"}
#: Which operators are of which kind, by the first pattern that finds something in the name.
KINDS = {
    "products": re.compile(r"conv|mm$|mm_|linear|matmul|attention"),
    "norm": re.compile(r"batch_?norm"),
    "pointwise": re.compile(
        r"::(add|relu|clamp_min|threshold|hardtanh|hardswish|silu|gelu|leaky_relu)"
    ),
    "others": re.compile(""),
}
PROFILED = 5
Step = Callable[[], None]


def step(model: nn.Module, x: Tensor, dtype: str) -> Step:
    """One training step without an optimiser, in mixed precision where the dtype is not float32."""
    mixed = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")

    def call() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with mixed:
            y = model(x)
        y.float().square().mean().backward()

    return call


def prepared(whole: Whole, layout: str) -> tuple[nn.Module, Tensor]:
    """The network and its input; the same numbers each time."""
    torch.manual_seed(0)
    model, x = whole.make(), torch.randn(whole.sizes)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = in_layout(parameter.data, layout)
    return model, in_layout(x, layout)


def kind_of(operator: str) -> str:
    """Of KINDS."""
    return next(kind for kind, pattern in KINDS.items() if pattern.search(operator))


def operator_seconds(call: Step) -> dict[str, float]:
    """The own time of each kind of operator in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def medians(calls: Mapping[str, Step]) -> dict[str, dict[str, float]]:
    """Of the profiles of PROFILED steps, taken in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(PROFILED):
        for name, call in calls.items():
            found[name].append(operator_seconds(call))
    return {
        name: {kind: float(np.median([profile[kind] for profile in profiles])) for kind in KINDS}
        for name, profiles in found.items()
    }


def peak_bytes(network: str, layout: str, dtype: str, way: str, pool: str | None) -> int:
    """Of resident memory, after three steps in a process of its own."""
    environment = dict(os.environ)
    if pool is not None:
        environment["BATCHNORM_EXT_CPU_CACHE"] = pool
    arguments = json.dumps([network, layout, dtype, way, torch.get_num_threads()])
    code = f"from benchmarks import networks; networks.print_peak(*{arguments})"
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    return int(output.split()[-1])


def print_peak(network: str, layout: str, dtype: str, way: str, threads: int) -> None:
    """What `peak_bytes` starts."""
    torch.set_num_threads(threads)
    model, x = prepared(NETWORKS[network], layout)
    call = step(WAYS[way](model), x, dtype)
    for _ in range(3):
        call()
    print(peak_of_this_process())


def peak_of_this_process() -> int:
    """Bytes of resident memory. Not getrusage's, which begins with those of who started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peaks(network: str, layout: str, dtype: str) -> dict[str, int]:
    """Torch's, and every way's with and without the pool."""
    found = {"torch": peak_bytes(network, layout, dtype, "torch", None)}
    for name, pool in POOLS.items():
        found[name] = peak_bytes(network, layout, dtype, name.partition(",")[0], pool)
    return found


def measure_network(
    network: str, layout: str, dtype: str, compiled: bool, rounds: int
) -> dict[str, Any]:
    """One row: times of steps, of operators, peaks of memory."""
    model, x = prepared(NETWORKS[network], layout)
    calls = {}
    for name, way in WAYS.items():
        candidate = way(copy.deepcopy(model))
        # Not its own compile(): that is of code which all modules share, and dynamo soon gives up.
        made: Any = torch.compile(candidate) if compiled else candidate
        calls[name] = step(made, x, dtype)
    with compiled_anew() if compiled else contextlib.nullcontext():
        timings = interleave(calls, budget_s=0, rounds=(rounds, rounds))
        operators = medians(calls)
    ratios = {name: Ratio.of(timings["torch"], timings[name]) for name in WAYS if name != "torch"}
    return {
        "network": network,
        "sizes": list(x.shape),
        "layout": layout,
        "dtype": dtype,
        "compiled": compiled,
        "timings": {name: stats.as_dict() for name, stats in timings.items()},
        "speedup": {
            name: {"ratio": round(ratio.value, 4), "decided": ratio.decided}
            for name, ratio in ratios.items()
        },
        "operators": operators,
        "peak_bytes": {} if compiled else peaks(network, layout, dtype),
    }


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Nothing compiled before counts, and nothing is left for others."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def run(
    names: Sequence[str],
    layouts: Sequence[str],
    dtypes: Sequence[str],
    compiled: bool,
    rounds: int,
    output: Path | None,
) -> None:
    """Measure, show, write."""
    settings = {
        "preset": "networks-compiled" if compiled else "networks",
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "rounds": rounds,
        "profiled": PROFILED,
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
    }
    header = results.header(settings)
    cases = list(itertools.product(names, dtypes, layouts))
    rows = []
    with progress_bar() as bar:
        task = bar.add_task("networks", total=len(cases))
        for network, dtype, layout in cases:
            bar.update(task, description=network)
            rows.append(measure_network(network, layout, dtype, compiled, rounds))
            bar.advance(task)
    result = {**header, "networks": rows}
    show(make_console(), report.networks_table(result))
    print("written:", results.write_result(result, output))
