"""``python -m batchnorm_ext plan``: how a call would be cut into work, and why.

Plans are integers made of integers (csrc/core/plan.h, plan_cuda.h): no GPU is needed, any may be
named. For the CPU, the caches are those of the machine at hand.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import _C

LAYOUTS = ("channels_first", "channels_last")
DTYPES = ("float32", "float64", "bfloat16", "float16")
OPS = ("forward", "backward", "eval")

CPU = "cpu"

#: What each scheme does on the CPU; the fields are those of the plan.
_WHY_ON_CPU = {
    "planes": "The planes of a channel are summed up one after the other, those of a unit's "
    "{unit_channels} channels side by side for one n.",
    "columns": "Each row holds all channels of one element, so the columns are summed up.",
    "expanded": "Planes are too small for vectors of their own, so a row is all planes of a unit "
    "for one n, and its columns are summed up.",
}
_READ_AGAIN = {
    "none": "Nothing is read twice.",
    "L2": "When a unit is read again, a thread's share of it is still in its L2.",
    "L3": "When a unit is read again, it is still in L3, as far as others leave it there.",
    "memory": "A unit is more than the caches hold, so it comes from memory twice.",
}

#: What each strategy does on CUDA; the fields are those of the plan.
_WHY = {
    "single_pass": "Nothing has to be reduced, so each element is read once and written once.",
    "block": "A block reduces a unit alone and then writes it.",
    "cluster": "A unit is shared by a cluster of {team} blocks, which meet at its barrier: one "
    "block could not hold it, or too few blocks would be at work.",
    "grid": "A unit is more than a cluster should hold, so all blocks that fit on the device work "
    "on {units_at_once} of {units} units at a time and meet at the grid's barrier.",
    "two_kernels": "A unit is more than a block should hold and the blocks cannot meet here, so "
    "one kernel reduces and a second one writes.",
}


def shape(text: str) -> tuple[int, ...]:
    """The sizes of "128,64,56,56"; at least (N, C)."""
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes: 128,64,56,56") from None
    if len(sizes) < 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not (N, C, *) with sizes of at least 1")
    return sizes


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def problem(sizes: tuple[int, ...], layout: str) -> tuple[str, int, int, int]:
    """Layout, n, c and s, as problem_of() of csrc/bindings/layout.h has them."""
    n, c, *spatial = sizes
    s = math.prod(spatial)
    if c == 1:
        return "channels_first", 1, 1, n * s
    return ("channels_last" if s == 1 else layout), n, c, s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--shape", type=shape, required=True, help="N,C,*: 128,64,56,56")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--op", choices=OPS, default=OPS[0])
    parser.add_argument("--device", choices=[CPU, *_C.cuda_devices()], default="h100")
    parser.add_argument("--threads", type=positive, help="on the CPU; as many as torch has")
    parser.add_argument("--residual", action="store_true", help="a residual is added")
    parser.add_argument("--masked", action="store_true", help="a mask is kept for backward")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def plan_of(arguments: argparse.Namespace) -> _C.CudaPlan:
    """The plan that these options ask for, on CUDA."""
    return _C.plan_cuda(*_call(arguments), device=arguments.device, **_operands(arguments))


def cpu_plan_of(arguments: argparse.Namespace) -> _C.Plan:
    """The plan that these options ask for, on the CPU."""
    layout, dtype, n, c, s, op = _call(arguments)
    threads = arguments.threads or torch.get_num_threads()
    return _C.plan(layout, dtype, n, c, s, threads, op, **_operands(arguments))


def _call(arguments: argparse.Namespace) -> tuple[Any, ...]:
    layout, *sizes = problem(arguments.shape, arguments.layout)
    return layout, arguments.dtype, *sizes, arguments.op


def _operands(arguments: argparse.Namespace) -> dict[str, Any]:
    backward = arguments.op == "backward"
    return {
        # Backward reads a residual only where no mask tells what the activation did.
        "residual": arguments.residual and not (backward and arguments.masked),
        "masked": arguments.masked and arguments.op != "eval",
        "outputs": 2 if backward and arguments.residual else 1,
    }


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} bytes"


def why(plan: _C.CudaPlan) -> str:
    """The strategy's reason, and what it costs."""
    text = _WHY[plan["strategy"]].format(**plan)
    if plan["predicted_bytes"] == plan["compulsory_bytes"]:
        return f"{text} Nothing crosses device memory twice."
    return f"{text} What does not stay on the chip in between is read again."


def render(plan: _C.CudaPlan, arguments: argparse.Namespace) -> str:
    """The plan as aligned text."""
    rows = [
        ("call", _described(arguments)),
        ("device", arguments.device),
        ("strategy", plan["strategy"]),
        ("mapping", f"{plan['mapping']}, {plan['unit_channels']} channels in a unit"),
        ("access", plan["access"] + (", streaming stores" if plan["stream_stores"] else "")),
        ("units", f"{plan['units']}, {plan['units_at_once']} at once"),
        ("blocks", f"{plan['blocks']}, {plan['team']} for each unit"),
        ("shared", f"{plan['shared_bytes']} bytes a block, {plan['slots']} cells of a thread stay"),
        ("workspace", megabytes(plan["workspace_bytes"])),
        *_traffic(plan["compulsory_bytes"], plan["predicted_bytes"]),
    ]
    return _aligned(rows, why(plan))


def render_cpu(plan: _C.Plan, arguments: argparse.Namespace) -> str:
    """The plan as aligned text."""
    units = math.ceil(arguments.shape[1] / plan["unit_channels"])
    shared = "all of them in each" if plan["cooperative"] else "each with units of its own"
    rows = [
        ("call", _described(arguments)),
        ("device", f"{CPU}, {_C.cpu_capability()}"),
        ("scheme", plan["scheme"]),
        ("units", f"{units} of {plan['unit_channels']} channels"),
        ("threads", str(plan["threads"]) + (f", {shared}" if plan["threads"] > 1 else "")),
        ("walk", _walk(plan)),
        ("stores", "past the caches" if plan["stream"] else "into the caches"),
        *_traffic(plan["compulsory_bytes"], plan["predicted_bytes"]),
    ]
    reason = _WHY_ON_CPU[plan["scheme"]].format(**plan)
    return _aligned(rows, f"{reason} {_READ_AGAIN[plan['second_reading']]}")


def _walk(plan: _C.Plan) -> str:
    if plan["scheme"] == "planes":
        return "the unit's planes of one n, then those of the next"
    rows = "a row at a time" if plan["group_rows"] == 1 else f"{plan['group_rows']} rows at a time"
    return rows + (f", each made of {plan['fold']}" if plan["fold"] > 1 else "")


def _described(arguments: argparse.Namespace) -> str:
    layout, dtype, n, c, s, op = _call(arguments)
    return f"{op}, {dtype}, {layout} n={n} c={c} s={s}"


def _traffic(compulsory: int, predicted: int) -> Iterable[tuple[str, str]]:
    times = f"{predicted / compulsory:.2f} times the compulsory"
    return ("compulsory", megabytes(compulsory)), ("predicted", f"{megabytes(predicted)}, {times}")


def _aligned(rows: Iterable[tuple[str, str]], reason: str) -> str:
    return "\n".join([*(f"{label:<15}{value}" for label, value in rows), "", reason])


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    if arguments.device == CPU:
        on_cpu = cpu_plan_of(arguments)
        _print(arguments, on_cpu, render_cpu(on_cpu, arguments))
    else:
        on_cuda = plan_of(arguments)
        _print(arguments, on_cuda, render(on_cuda, arguments))
    return 0


def _print(arguments: argparse.Namespace, plan: Mapping[str, Any], text: str) -> None:
    print(json.dumps(plan, indent=2) if arguments.json else text)
