"""``python -m batchnorm_ext plan``: how a CUDA call would be cut into work, and why.

Plans are integers made of integers (csrc/core/plan_cuda.h): no GPU is needed, any may be named.
"""

from __future__ import annotations

import argparse
import json
import math

from . import _C

LAYOUTS = ("channels_first", "channels_last")
DTYPES = ("float32", "float64", "bfloat16", "float16")
OPS = ("forward", "backward", "eval")

#: What each strategy does; the fields are those of the plan.
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
    parser.add_argument("--device", choices=list(_C.cuda_devices()), default="h100")
    parser.add_argument("--residual", action="store_true", help="a residual is added")
    parser.add_argument("--masked", action="store_true", help="a mask is kept for backward")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def plan_of(arguments: argparse.Namespace) -> _C.CudaPlan:
    """The plan that these options ask for."""
    layout, n, c, s = problem(arguments.shape, arguments.layout)
    backward = arguments.op == "backward"
    return _C.plan_cuda(
        layout,
        arguments.dtype,
        n,
        c,
        s,
        arguments.op,
        device=arguments.device,
        # Backward reads a residual only where no mask tells what the activation did.
        residual=arguments.residual and not (backward and arguments.masked),
        masked=arguments.masked and arguments.op != "eval",
        outputs=2 if backward and arguments.residual else 1,
    )


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
    layout, n, c, s = problem(arguments.shape, arguments.layout)
    ratio = plan["predicted_bytes"] / plan["compulsory_bytes"]
    rows = [
        ("call", f"{arguments.op}, {arguments.dtype}, {layout} n={n} c={c} s={s}"),
        ("device", arguments.device),
        ("strategy", plan["strategy"]),
        ("mapping", f"{plan['mapping']}, {plan['unit_channels']} channels in a unit"),
        ("access", plan["access"] + (", streaming stores" if plan["stream_stores"] else "")),
        ("units", f"{plan['units']}, {plan['units_at_once']} at once"),
        ("blocks", f"{plan['blocks']}, {plan['team']} for each unit"),
        ("shared", f"{plan['shared_bytes']} bytes a block, {plan['slots']} cells of a thread stay"),
        ("workspace", megabytes(plan["workspace_bytes"])),
        ("compulsory", megabytes(plan["compulsory_bytes"])),
        ("predicted", f"{megabytes(plan['predicted_bytes'])}, {ratio:.2f} times the compulsory"),
    ]
    return "\n".join([*(f"{label:<15}{value}" for label, value in rows), "", why(plan)])


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    plan = plan_of(arguments)
    print(json.dumps(plan, indent=2) if arguments.json else render(plan, arguments))
    return 0
