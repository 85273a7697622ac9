"""Does batch norm need fewer steps, and less time, to learn the same?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.training import figures
from benchmarks.training.experiment import (
    Experiment,
    Settings,
    Size,
    Steps,
    Table,
    frame,
    grid,
    one_cell,
)
from benchmarks.training.fit import evaluate, training_steps
from benchmarks.training.intervals import Estimate, verdict
from benchmarks.training.networks import FUSED, NONE
from benchmarks.training.tasks import TASKS, first_batch, fit_run, in_epochs

RATES = (0.01, 0.03, 0.1, 0.3)
STYLES = {NONE: figures.WITHOUT, FUSED: figures.WITH}
# The same network where the simple remedy has been taken: features on one scale.
REMEDY = {"cancer": "standardised"}
PANELS = ("cnn", "mlp", "transformer", "cancer")
# A run that does not get there counts as one of so many budgets when a rate is chosen.
UNREACHED = 2
UNDECIDED = "no difference shown"


def _best(records: pd.DataFrame, seed: int) -> float:
    """The rate that was best over the other seeds: no run takes part in choosing its own."""
    others = records[records.seed != seed]
    costs = others.reached.fillna(UNREACHED * others.steps).groupby(others.rate).mean()
    return float(costs.idxmin())


def chosen(result: dict[str, Any], task: str, way: str) -> pd.DataFrame:
    """The run of each seed at the rate that was best over the other seeds."""
    records = one_cell(frame(result), task=task, way=way)
    picked = [records[(records.seed == s) & (records.rate == _best(records, s))]
              for s in sorted(records.seed.unique())]  # fmt: skip
    return pd.concat(picked)


def steps_needed(runs: pd.DataFrame) -> list[float]:
    """Steps to the target; the whole budget where it was not reached, so a lower bound there."""
    return [float(value) for value in runs.reached.fillna(runs.steps)]


def _compared(with_: dict[str, Any], without: dict[str, Any]) -> str:
    """fewer or more epochs with than without; what needed fewer must have reached the target."""
    saved = Estimate.of(list(without["needed"] - with_["needed"]))
    word = verdict(saved, "fewer", "more", UNDECIDED)
    quicker = {"fewer": with_, "more": without}.get(word)
    return UNDECIDED if quicker and quicker["reached"] < quicker["runs"] else word


class FasterTraining(Experiment):
    """Epochs and seconds to a given accuracy, with and without."""

    name = "faster-training"
    title = "Does it train faster?"
    method = (
        "Each network is trained at several learning rates; each seed is counted at the rate that "
        "was best over the other seeds, with and without batch norm apart. The target is reached "
        "where the accuracy is that high and on average stays so. Seconds are steps times "
        "the median time of a step, which is measured alone and in turns."
    )
    limits = (
        "The networks and images are small, one optimizer is used and the rates are a coarse grid: "
        "it does not show that the gain is as large elsewhere. Where standardised features do as "
        "well, the gain on raw features is the scaling's, which costs nothing in training."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "epochs": 1, "rates": (0.03, 0.1), "turns": 2},
        "quick": {"seeds": 5, "epochs": 10, "rates": RATES, "turns": 40},
        "full": {"seeds": 10, "epochs": 15, "rates": (0.003, *RATES, 1.0), "turns": 200},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every task with and without, at every rate."""
        choices = {"task": list(TASKS), "way": (NONE, FUSED), "rate": size["rates"]}
        runs = in_epochs(grid(**choices, seed=range(size["seeds"])), size["epochs"])
        return [run for run in runs if (run["task"], run["way"]) != ("standardised", FUSED)]

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train and note when the target was reached."""
        task = TASKS[settings["task"]]
        split = task.split().to(device)
        model = task.seeded(settings["seed"], settings["way"], device)
        history = fit_run(
            model, split.train, settings, validation=split.validation, every=task.half_epoch
        )
        return {
            "reached": history.first_step(task.target),
            "accuracies": [[number, round(value, 5)] for number, value in history.accuracies],
            "diverged": history.diverged,
            "test_accuracy": evaluate(model, split.test)["accuracy"],
        }

    def timed(self, device: str, size: Size) -> Steps:
        """A training step of each task, with and without."""
        groups = {}
        for name, task in TASKS.items():
            models = {way: task.seeded(0, way, device) for way in (NONE, FUSED)}
            groups[name] = training_steps(models, first_batch(name, device), size["rates"][0])
        return groups

    def _rows(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        rows = []
        for task, way in dict.fromkeys((r["task"], r["way"]) for r in result["records"]):
            runs = chosen(result, task, way)
            needed = np.array(steps_needed(runs))
            seconds = needed * result["timings"][task][way]["median"]
            rows.append({
                "task": task, "way": way, "needed": needed / TASKS[task].epoch,
                "epochs": Estimate.of(list(needed / TASKS[task].epoch)),
                "seconds": Estimate.of(list(seconds)),
                "reached": int(runs.reached.notna().sum()), "runs": len(runs),
                "rates": sorted(set(runs.rate)),
                "accuracy": Estimate.of(list(runs.test_accuracy)),
            })  # fmt: skip
        return rows

    def table(self, result: dict[str, Any]) -> Table:
        """A line for each task and variant."""
        heads = ["network, data", "", "rate", "target", "reached", "epochs to it", "seconds to it",
                 "test accuracy at the end"]  # fmt: skip
        rows = []
        for row in self._rows(result):
            task, bound = TASKS[row["task"]], "" if row["reached"] == row["runs"] else "≥ "
            rows.append([
                task.label, STYLES[row["way"]].label, ", ".join(f"{r:g}" for r in row["rates"]),
                f"{task.target:.0%}", f"{row['reached']} of {row['runs']}",
                bound + row["epochs"].text(".1f"), bound + row["seconds"].text(".3f"),
                f"{row['accuracy'].mean:.1%}",
            ])  # fmt: skip
        return heads, rows

    def finding(self, result: dict[str, Any]) -> str:
        """Per task: fewer, more or as many epochs, by how many."""
        rows = {(row["task"], row["way"]): row for row in self._rows(result)}
        parts = []
        for task in PANELS:
            without, with_ = rows[task, NONE], rows[task, FUSED]
            word = _compared(with_, without)
            times = [
                ("" if row["reached"] == row["runs"] else "at least ")
                + f"{row['epochs'].mean:.1f} ({row['seconds'].mean:.3f} s)"
                for row in (with_, without)
            ]
            parts.append(f"{TASKS[task].label} {times[0]} against {times[1]}, {word}")
        remedy = rows[REMEDY["cancer"], NONE]
        parts.append(f"and {remedy['epochs'].mean:.1f} without it on standardised features")
        return "Epochs to the target, with batch norm against without: " + "; ".join(parts) + "."

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """Validation accuracy over the epochs, a panel for each task."""
        grid = figure.subplots(1, len(PANELS), sharey=True)
        for axes, name in zip(grid, PANELS, strict=True):
            task = TASKS[name]
            for way, style in STYLES.items():
                self._curve(axes, result, name, way, style)
            if name in REMEDY:
                style = figures.named(figures.OTHER, "without, features standardised")
                self._curve(axes, result, REMEDY[name], NONE, style)
            axes.axhline(task.target, color=figures.GREY, lw=1, ls=":")
            axes.set_title(task.label, loc="left")
            axes.set_xlabel("epochs")
        grid[0].set_ylabel("validation accuracy")
        figures.share_axis(grid[0])
        figures.legend_below(figure, grid[-1])

    @staticmethod
    def _curve(
        axes: Any, result: dict[str, Any], task: str, way: str, style: figures.Style
    ) -> None:
        runs = chosen(result, task, way)
        curve = figures.accuracy_curve(list(runs.accuracies), TASKS[task].epoch)
        figures.curve(axes, *curve, style, points=False)
