"""Does batch norm bear higher learning rates?"""

from __future__ import annotations

from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.training import figures
from benchmarks.training.experiment import Experiment, Settings, Size, Table, frame, grid, one_cell
from benchmarks.training.fit import evaluate
from benchmarks.training.intervals import Estimate
from benchmarks.training.networks import FUSED, NONE
from benchmarks.training.tasks import TASKS, fit_run, in_epochs

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
CLIPPED, CLIP = "clipped", 1.0
STYLES = {
    NONE: figures.WITHOUT,
    CLIPPED: figures.named(figures.OTHER, "without, gradient clipped"),
    FUSED: figures.WITH,
}
USEFUL = 0.9  # a mean test accuracy of at least this


def _useful(records: pd.DataFrame) -> list[float]:
    """The rates whose mean accuracy is useful."""
    means = records.groupby("rate").test_accuracy.mean()
    return [float(rate) for rate, mean in means.items() if mean >= USEFUL]


def _range(rates: list[float]) -> str:
    if not rates:
        return "at none of the rates"
    if len(rates) == 1:
        return f"at {rates[0]:g} only"
    return f"from {rates[0]:g} to {rates[-1]:g}"


class LearningRates(Experiment):
    """Final accuracy over a sweep of rates, with and without."""

    name = "learning-rates"
    title = "Does it bear higher learning rates?"
    method = (
        "Training for a fixed number of epochs at every rate, with and without batch norm. The "
        "control: without, but with the gradient's norm clipped at "
        f"{CLIP:g}, a cheaper way to survive a "
        "high rate."
    )
    limits = (
        "The number of epochs is fixed, so a low rate fails by being slow and a high one by "
        "diverging; it does not show that the best accuracy of either is out of the other's reach "
        "with more training, a warm-up or another initialisation."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "epochs": 1, "rates": (0.03, 10.0)},
        "quick": {"seeds": 5, "epochs": 6, "rates": RATES},
        "full": {"seeds": 10, "epochs": 12, "rates": (0.001, *RATES, 30.0)},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every rate for every variant of two networks."""
        choices = {"task": ("cnn", "mlp"), "variant": list(STYLES), "rate": size["rates"]}
        return in_epochs(grid(**choices, seed=range(size["seeds"])), size["epochs"])

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train; the accuracy at the end, of whatever is left of the weights."""
        task = TASKS[settings["task"]]
        split = task.split().to(device)
        way = FUSED if settings["variant"] == FUSED else NONE
        model = task.seeded(settings["seed"], way, device)
        history = fit_run(
            model, split.train, settings, clip=CLIP if settings["variant"] == CLIPPED else None
        )
        accuracy = evaluate(model, split.test)["accuracy"]
        return {"diverged": history.diverged, "test_accuracy": accuracy}

    def table(self, result: dict[str, Any]) -> Table:
        """Mean accuracy at each rate."""
        records = frame(result)
        rates = sorted(records.rate.unique())
        rows = []
        for task in records.task.unique():
            for variant, style in STYLES.items():
                runs = one_cell(records, task=task, variant=variant)
                means = runs.groupby("rate").test_accuracy.mean()
                cells = [f"{means[rate] * 100:.1f}" for rate in rates]
                rows.append([TASKS[task].label, style.label, *cells])
        return ["network, data", "test accuracy in % by rate", *(f"{r:g}" for r in rates)], rows

    def finding(self, result: dict[str, Any]) -> str:
        """The range of useful rates of every variant."""
        records = frame(result)
        parts = []
        for task in records.task.unique():
            of = {v: _useful(one_cell(records, task=task, variant=v)) for v in STYLES}
            parts.append(
                f"{TASKS[task].label}: {_range(of[FUSED])} with batch norm, {_range(of[NONE])} "
                f"without, {_range(of[CLIPPED])} with the gradient clipped instead"
            )
        return (
            f"The mean test accuracy is {USEFUL:.0%} or more for the "
            + "; for the ".join(parts)
            + "."
        )

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """Accuracy over the rate, a panel for each network."""
        records = frame(result)
        tasks = list(records.task.unique())
        grid = figure.subplots(1, len(tasks), sharey=True)
        for axes, task in zip(grid, tasks, strict=True):
            for variant, style in STYLES.items():
                by_rate = list(one_cell(records, task=task, variant=variant).groupby("rate"))
                estimates = [Estimate.of(list(group.test_accuracy)) for _, group in by_rate]
                figures.curve(axes, [rate for rate, _ in by_rate], estimates, style)
            axes.set_title(TASKS[task].label, loc="left")
            axes.set_xlabel("learning rate (log scale)")
            figures.plain_log(axes, "x", sorted(records.rate.unique()))
        grid[0].set_ylabel("test accuracy")
        figures.share_axis(grid[0])
        figures.legend_below(figure, grid[0])
