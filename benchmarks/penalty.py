"""The step of a gradient penalty (WGAN-GP): backward with a graph, then backward through it.

A step is y = act(bn(x)), g = dy/dx for a random gradient of y with create_graph=True, and the
gradients of |g|^2 with respect to x and the parameters; for the critic a whole network, with its
convolutions. In training mode, where the derivative goes through the statistics of the batch.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm_ext import fuse_batchnorm
from benchmarks import report, results
from benchmarks.candidates import OURS, in_layout
from benchmarks.console import make_console, show
from benchmarks.shapes import FEWEST_ROUNDS, LAYOUTS, Shape
from benchmarks.timing import Ratio, geometric_mean, interleave

ROUNDS = (FEWEST_ROUNDS, 31)
SHAPES = tuple(
    Shape("critic", sizes) for sizes in ((16, 64, 64, 64), (16, 128, 32, 32), (64, 512, 4, 4))
)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
}
DTYPES = ("float32", "bfloat16")
IMAGES = Shape("images", (16, 3, 64, 64))
Step = Callable[[], tuple[Tensor, ...]]


def critic() -> nn.Sequential:
    """The critic of a DCGAN for 64x64 images, with batch norm."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, 64, 128, 256)):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(256, 1, 8), nn.Flatten())


def step(model: nn.Module, x: Tensor) -> Step:
    """The gradients of the penalty, of x first."""
    x = x.detach().requires_grad_()
    arguments = [x, *model.parameters()]
    # Random: where all of y has the same gradient, that of x is 0.
    dy = torch.randn_like(model(x))

    def call() -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(model(x), x, dy, create_graph=True)
        return torch.autograd.grad(g.square().sum(), arguments, materialize_grads=True)

    return call


def models(torchs: nn.Module) -> dict[str, nn.Module]:
    """torch's module and the same one fused, of equal parameters."""
    return {"eager": torchs, OURS: fuse_batchnorm(copy.deepcopy(torchs))}


def difference(steps: dict[str, Step]) -> float:
    """The largest of ours from torch's, as a part of each gradient's largest value."""
    pairs = zip(*(steps[name]() for name in ("eager", OURS)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs)


def compare(what: dict[str, Any], torchs: nn.Module, x: Tensor, budget_s: float) -> dict[str, Any]:
    """One row: checked in float64, then timed in the dtype of x."""
    exact: dict[str, Step] = {}
    for name, model in models(copy.deepcopy(torchs).double()).items():
        torch.manual_seed(0)
        exact[name] = step(model, x.double())
    error = difference(exact)
    if not error < 1e-8:
        raise RuntimeError(f"{what}: the gradients differ from torch's by {error:.1e} in float64")
    steps = {name: step(model, x) for name, model in models(torchs).items()}
    timings = interleave(steps, budget_s=budget_s, rounds=ROUNDS)
    ratio = Ratio.of(timings["eager"], timings[OURS])
    return {
        **what,
        "shape": "x".join(map(str, x.shape)),
        "dtype": str(x.dtype).removeprefix("torch."),
        "difference_float64": error,
        "timings": {name: stats.as_dict() for name, stats in timings.items()},
        "speedup": {"ratio": round(ratio.value, 4), "decided": ratio.decided},
    }


def measure(budget_s: float) -> dict[str, Any]:
    """Every layer, then the critic."""
    torch.manual_seed(0)
    settings = {
        "preset": "penalty",
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "budget_s": budget_s,
        "rounds": list(ROUNDS),
        "load_average_before": os.getloadavg()[0],
    }
    rows = []
    for shape, dtype, layout, name in itertools.product(SHAPES, DTYPES, LAYOUTS, ACTIVATIONS):
        x = in_layout(torch.randn(shape.sizes).to(getattr(torch, dtype)), layout)
        model = nn.Sequential(nn.BatchNorm2d(shape.sizes[1]), ACTIVATIONS[name]())
        rows.append(compare({"what": name, "layout": layout}, model, x, budget_s))
    for layout in LAYOUTS:
        x = in_layout(torch.randn(IMAGES.sizes), layout)
        model = critic()
        for weight in model.parameters():
            weight.data = in_layout(weight.data, layout) if weight.dim() == 4 else weight.data
        rows.append(compare({"what": "critic", "layout": layout}, model, x, budget_s))
    mean = geometric_mean(row["speedup"]["ratio"] for row in rows)
    return {**results.header(settings), "penalty": rows, "geometric_mean": round(mean, 3)}


def run(output: Path | None, budget_s: float) -> None:
    """Measure, show, write."""
    result = measure(budget_s)
    show(make_console(), report.penalty_table(result))
    print("written:", results.write_result(result, output))
