"""Two explanations, side by side: less internal covariate shift, or a smoother loss."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.training import data, figures
from benchmarks.training.data import Part
from benchmarks.training.experiment import Experiment, Settings, Size, Table, frame, grid, one_cell
from benchmarks.training.fit import kept_buffers, seeded
from benchmarks.training.intervals import Estimate
from benchmarks.training.networks import MLP, NONE, OURS, Normalization
from benchmarks.training.tasks import fit_run

DEPTH, WIDTH = 8, 64
PROBE = 256  # training images on which distributions are measured
ALONG = (0.5, 1.0, 2.0, 4.0)  # steps along the gradient, in learning rates
VARIANTS = {
    "without": Normalization(NONE),
    "batch norm": Normalization(OURS),
    "disturbed": Normalization(OURS, disturbed=True),
}
STYLES = {
    "without": figures.WITHOUT,
    "batch norm": figures.WITH,
    "disturbed": figures.named(figures.OTHER, "batch norm, then random shift and scale"),
}
# What is recorded at each probe: title and label of its panel.
MEASURES = {
    "mean_drift": ("Drift of the means", "in standard deviations"),
    "std_drift": ("Drift of the deviations", "in standard deviations"),
    "loss_range": ("Loss along the gradient", "highest minus lowest (log scale)"),
    "gradient_change": ("Gradient along the gradient", "change over its norm (log scale)"),
}
SMALLEST = 1e-6  # measures are stored with six decimals
LOGARITHMIC = ("loss_range", "gradient_change")


@torch.no_grad()
def layer_inputs(model: MLP, probe: Part) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation per feature of what enters each linear layer but the first."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((inputs[0].mean(0), inputs[0].std(0)))

    layers = [*list(model.linears)[1:], model.head]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with kept_buffers(model):
        model(probe.inputs)
    for hook in hooks:
        hook.remove()
    return found


def drift(
    before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """How far means and deviations moved, over the layer's root mean square deviation; mean."""
    means, stds = [], []
    for (mean_0, std_0), (mean_1, std_1) in zip(before, after, strict=True):
        scale = std_0.square().mean().sqrt().clamp_min(1e-12)
        means.append(((mean_1 - mean_0).abs().mean() / scale).item())
        stds.append(((std_1 - std_0).abs().mean() / scale).item())
    return float(np.mean(means)), float(np.mean(stds))


def along_gradient(model: nn.Module, part: Part, rate: float) -> tuple[float, float]:
    """Along w - t * g: highest minus lowest loss, and the largest |g(t) - g| / |g|."""
    parameters = list(model.parameters())

    def loss_and_gradient() -> tuple[float, list[Tensor]]:
        loss = F.cross_entropy(model(part.inputs), part.targets)
        return loss.item(), list(torch.autograd.grad(loss, parameters))

    start = [p.detach().clone() for p in parameters]
    with kept_buffers(model):
        loss, gradient = loss_and_gradient()
        norm = torch.cat([g.flatten() for g in gradient]).norm().item()
        losses, changes = [loss], []
        for step in ALONG:
            with torch.no_grad():
                for p, w, g in zip(parameters, start, gradient, strict=True):
                    p.copy_(w - step * rate * g)
            loss, there = loss_and_gradient()
            losses.append(loss)
            difference = [a - b for a, b in zip(there, gradient, strict=True)]
            changes.append(torch.cat([d.flatten() for d in difference]).norm().item())
        with torch.no_grad():
            for p, w in zip(parameters, start, strict=True):
                p.copy_(w)
    return max(losses) - min(losses), max(changes) / max(norm, 1e-12)


class CovariateShift(Experiment):
    """Drift of the layers' inputs beside the smoothness of the loss."""

    name = "covariate-shift"
    title = "Less covariate shift, or a smoother loss?"
    height = 5.4
    method = (
        "Ioffe and Szegedy (2015) explained batch norm by steadier distributions of the layers' "
        "inputs; Santurkar et al. (2018) dispute it and point to a smoother loss. Both are "
        f"measured in a network of {DEPTH} linear layers: how far mean and deviation of the "
        "inputs move between two probes, and how loss and gradient change along the gradient. The "
        "control, theirs: batch norm whose outputs are shifted and scaled at random at every step."
    )
    limits = (
        "Which of the two is the cause is not shown, and neither is claimed: both are only seen "
        "beside the training loss. Steps along the gradient are of the same length in weights, "
        "though batch norm makes the scale of the weights meaningless, and other measures of "
        "either idea exist."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "steps": 4, "every": 2, "rate": 0.05},
        "quick": {"seeds": 5, "steps": 200, "every": 10, "rate": 0.05},
        "full": {"seeds": 10, "steps": 600, "every": 20, "rate": 0.05},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every variant."""
        fixed = {key: [size[key]] for key in ("steps", "every", "rate")}
        return grid(variant=list(VARIANTS), seed=range(size["seeds"]), **fixed)

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train, and probe after every few steps."""
        train = data.digits().train.to(device)
        how = VARIANTS[settings["variant"]]
        make = lambda: MLP(how, width=WIDTH, depth=DEPTH, he=True)  # noqa: E731
        model = cast(MLP, seeded(settings["seed"], make, device))
        probe = train.first(PROBE)
        known = layer_inputs(model, probe)
        probes: dict[str, list[float]] = {key: [] for key in ("step", *MEASURES)}

        def watch(number: int, part: Part) -> None:
            nonlocal known
            if (number + 1) % settings["every"]:
                return
            now = layer_inputs(model, probe)
            values = (
                number + 1,
                *drift(known, now),
                *along_gradient(model, part, settings["rate"]),
            )
            known = now
            for key, value in zip(probes, values, strict=True):
                probes[key].append(round(value, 6))

        history = fit_run(model, train, settings, watch=watch)
        return {**probes, "losses": [round(loss, 5) for loss in history.losses],
                "diverged": history.diverged}  # fmt: skip

    @staticmethod
    def _means(result: dict[str, Any], variant: str, key: str) -> Estimate:
        """The mean over training, over the seeds."""
        runs = one_cell(frame(result), variant=variant)
        return Estimate.of([float(np.mean(values)) for values in runs[key]])

    @staticmethod
    def _mean_loss(result: dict[str, Any], variant: str) -> Estimate:
        """The mean training loss: how fast it fell."""
        runs = one_cell(frame(result), variant=variant)
        return Estimate.of([float(np.mean(losses)) for losses in runs.losses])

    def table(self, result: dict[str, Any]) -> Table:
        """Means over training."""
        heads = ["mean over training", *(title.lower() for title, _ in MEASURES.values()),
                 "training loss"]  # fmt: skip
        rows = [
            [style.label, *(self._means(result, variant, key).text(".3g") for key in MEASURES),
             self._mean_loss(result, variant).text(".3f")]
            for variant, style in STYLES.items()
        ]  # fmt: skip
        return heads, rows

    def finding(self, result: dict[str, Any]) -> str:
        """Both measures and the loss, for the three variants."""
        parts = [
            f"{style.label}: {self._means(result, variant, 'mean_drift').mean:.2f}, "
            f"{self._means(result, variant, 'gradient_change').mean:.2f}, "
            f"{self._mean_loss(result, variant).mean:.2f}"
            for variant, style in STYLES.items()
        ]
        return (
            "Mean over training of the drift of the layers' input means (in standard deviations), "
            "of the change of the gradient along itself (over its norm), and of the training loss: "
            + "; ".join(parts)
            + "."
        )

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """The four measures and the loss over the steps."""
        grid = figure.subplots(2, 3)
        grid[1][2].set_axis_off()
        panels = [grid[0][0], grid[0][1], grid[1][0], grid[1][1]]
        for axes, (key, (title, label)) in zip(panels, MEASURES.items(), strict=True):
            for variant, style in STYLES.items():
                runs = one_cell(frame(result), variant=variant)
                count = min(len(values) for values in runs[key])
                rows = zip(*(values[:count] for values in runs[key]), strict=True)
                log = key in LOGARITHMIC
                make = partial(figures.geometric, floor=SMALLEST) if log else Estimate.of
                figures.curve(axes, runs.step.iloc[0][:count], [make(list(row)) for row in rows],
                              style, points=False)  # fmt: skip
            axes.set_title(title, loc="left")
            axes.set_ylabel(label)
            axes.set_xlabel("step")
            if key in LOGARITHMIC:
                figures.plain_log(axes, "y")
            else:
                axes.set_ylim(bottom=0)
        losses = {style: list(one_cell(frame(result), variant=variant).losses)
                  for variant, style in STYLES.items()}  # fmt: skip
        figures.loss_curves(grid[0][2], losses)
        figures.legend_below(figure, grid[0][0])
