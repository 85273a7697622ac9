"""Do gradients reach the first layers of a deep plain network?"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from benchmarks.training import data, figures
from benchmarks.training.data import Part
from benchmarks.training.experiment import Experiment, Settings, Size, Table, frame, grid, one_cell
from benchmarks.training.fit import evaluate, seeded
from benchmarks.training.intervals import Estimate
from benchmarks.training.networks import FUSED, MLP, NONE, Normalization
from benchmarks.training.tasks import fit_run

DEPTH, WIDTH = 24, 64
# (normalization, He's initialisation): the second without is the control.
VARIANTS = {
    "without": (NONE, False),
    "without, He": (NONE, True),
    "batch norm": (FUSED, False),
    "batch norm, He": (FUSED, True),
}
STYLES = {
    "without": figures.named(figures.WITHOUT, "without, torch's initialisation"),
    "without, He": figures.named(figures.OTHER, "without, He initialisation"),
    "batch norm": figures.named(figures.WITH, "batch norm, torch's initialisation"),
    "batch norm, He": figures.named(figures.FOURTH, "batch norm, He initialisation"),
}
FLOOR = 1e-20  # for the logarithm of a gradient that underflowed


class GradientFlow(Experiment):
    """Gradient norms per layer in a deep plain network, with and without."""

    name = "gradient-flow"
    title = "Do gradients reach the first layers?"
    method = (
        f"A plain network of {DEPTH} linear layers of {WIDTH} with ReLU: the norm of each layer's "
        "weight gradient at the first step and at the last. The control: no batch norm, but the "
        "initialisation of He et al. (2015), which is made to keep the scale of the signal. "
        "Runs that diverged have no last step, and end the curve of the loss."
    )
    limits = (
        "Even gradients at the start are no proof of faster learning, and residual connections "
        "give them too; one width, depth and rate were tried. That batch norm makes gradients grow "
        "towards the first layers at initialisation is known (Yang et al. 2019) and seen here."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "steps": 3, "rate": 0.02},
        "quick": {"seeds": 5, "steps": 400, "rate": 0.003},
        "full": {"seeds": 10, "steps": 1500, "rate": 0.003},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every variant."""
        fixed = {"steps": [size["steps"]], "rate": [size["rate"]]}
        return grid(variant=list(VARIANTS), seed=range(size["seeds"]), **fixed)

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train; each layer's gradient norm at the first and the last step."""
        split = data.digits().to(device)
        way, he = VARIANTS[settings["variant"]]
        make = lambda: MLP(Normalization(way), width=WIDTH, depth=DEPTH, he=he)  # noqa: E731
        model = cast(MLP, seeded(settings["seed"], make, device))
        norms: dict[int, list[float]] = {}

        def watch(number: int, _: Part) -> None:
            if number in (0, settings["steps"] - 1):
                weights = [cast(nn.Linear, linear).weight for linear in model.linears]
                norms[number] = [w.grad.norm().item() for w in weights if w.grad is not None]

        history = fit_run(model, split.train, settings, watch=watch)
        return {
            "first": norms[0],
            "last": norms.get(settings["steps"] - 1),
            "losses": [round(loss, 5) for loss in history.losses],
            "diverged": history.diverged,
            "test_accuracy": evaluate(model, split.test)["accuracy"],
        }

    @staticmethod
    def _ends(result: dict[str, Any], variant: str, when: str) -> list[Estimate] | None:
        """The gradient's norm in the first and the last layer; None where runs diverged."""
        runs = one_cell(frame(result), variant=variant)
        if runs[when].isna().any():
            return None
        return [figures.geometric([norms[layer] for norms in runs[when]]) for layer in (0, -1)]

    def table(self, result: dict[str, Any]) -> Table:
        """Both ends of the network at both ends of training, and what was learned."""
        heads = ["", *(f"gradient of the {layer} layer at the {when} step"
                       for when in ("first", "last") for layer in ("first", "last")),
                 "training loss at the end", "test accuracy"]  # fmt: skip
        rows = []
        for variant, style in STYLES.items():
            runs = one_cell(frame(result), variant=variant)
            norms = [end.text(".1e") for when in ("first", "last")
                     for end in self._ends(result, variant, when) or ()]  # fmt: skip
            last = Estimate.of([float(np.mean(losses[-10:])) for losses in runs.losses])
            diverged = f"{runs.diverged.sum()} of {len(runs)} diverged"
            rows.append([
                style.label, *(norms + [diverged] * 4)[:4],
                diverged if runs.diverged.any() else last.text(".3f"),
                Estimate.of(list(runs.test_accuracy * 100)).text(".1f", "%"),
            ])  # fmt: skip
        return heads, rows

    def finding(self, result: dict[str, Any]) -> str:
        """The gradients at both ends of the network, and what was learned."""
        parts = []
        for variant, style in STYLES.items():
            ends = self._ends(result, variant, "first")
            norms = " and ".join(f"{end.mean:.0e}" for end in ends) if ends else "not finite"
            runs = one_cell(frame(result), variant=variant)
            lost = f" ({runs.diverged.sum()} of {len(runs)} diverged)" * bool(runs.diverged.any())
            parts.append(f"{style.label}: {norms}, {runs.test_accuracy.mean():.0%}{lost}")
        return (
            "The norm of the weight gradient at the first step in the first and in the last layer, "
            "and the test accuracy at the end: " + "; ".join(parts) + "."
        )

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """Gradient norms over the layers at both ends of training, and the loss."""
        grid = figure.subplots(1, 3)
        for axes, when, title in zip(grid, ("first", "last"), ("first step", "last step"),
                                     strict=False):  # fmt: skip
            for variant, style in STYLES.items():
                runs = one_cell(frame(result), variant=variant)[when].dropna()
                if len(runs) < 2:
                    continue
                layers = np.log10(np.maximum(np.array(runs.tolist()), FLOOR)).T
                estimates = [Estimate(*(10.0**v for v in Estimate.of(list(row)))) for row in layers]
                figures.curve(axes, range(1, DEPTH + 1), estimates, style, points=False)
            axes.set_yscale("log")
            axes.set_title(f"Gradient at the {title}", loc="left")
            axes.set_xlabel("layer, from the input on")
        grid[0].set_ylabel("norm of the weight gradient (log scale)")
        losses = {style: list(one_cell(frame(result), variant=variant).losses)
                  for variant, style in STYLES.items()}  # fmt: skip
        figures.loss_curves(grid[2], losses)
        figures.legend_below(figure, grid[0], columns=2)
