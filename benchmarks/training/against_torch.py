"""Does it train the same as `nn.BatchNorm*`, and in less time?

Only rounding differs, but training magnifies that: after some dozen steps two runs are as far apart
as if more had changed. So each seed has a control: torch's own network with every initial weight
moved to the next float. What the control changes is noise, and what a seed changes is too.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import batchnorm_ext
from benchmarks.report import time_text
from benchmarks.training import figures
from benchmarks.training.experiment import (
    Experiment,
    Settings,
    Size,
    Steps,
    Table,
    as_fast,
    frame,
    grid,
    one_cell,
    speedup,
)
from benchmarks.training.fit import evaluate, training_steps
from benchmarks.training.networks import FUSED, TORCH
from benchmarks.training.tasks import TASKS, first_batch, fit_run, in_epochs

CONVERTED, CONTROL = "converted", "control"
COMPARED = (CONVERTED, FUSED)
TASK_NAMES = ("cnn", "mlp", "transformer")
NAMES = {
    TORCH: "torch: nn.BatchNorm",
    CONVERTED: "convert_batchnorm",
    FUSED: "fused: BatchNormAct",
    CONTROL: "control: one rounding off",
}
STYLES = {
    TORCH: figures.named(figures.WITHOUT, NAMES[TORCH]),
    CONVERTED: figures.named(figures.WITH, NAMES[CONVERTED]),
    FUSED: figures.named(figures.FIFTH, NAMES[FUSED]),
    CONTROL: figures.named(figures.CONTROL, NAMES[CONTROL]),
}
# A mean difference over the seeds passes up to this many of its own standard errors.
STANDARD_ERRORS = 3.0
SMALLEST = 1e-6  # the losses are stored with six decimals


def make_model(task: str, variant: str, seed: int, device: str = "cpu") -> nn.Module:
    """The network of a seed in a variant; all start from the same weights, but for the control."""
    way = FUSED if variant == FUSED else TORCH
    model = TASKS[task].seeded(seed, way, device)
    if variant == CONVERTED:
        return batchnorm_ext.convert_batchnorm(model)
    if variant == CONTROL:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, math.inf)))
    return model


def _differences(records: pd.DataFrame, task: str, variant: str, key: str) -> list[float]:
    """`key` of `variant` minus torch's at the same seed."""
    other, own = (one_cell(records, task=task, variant=v)[key].values for v in (variant, TORCH))
    return list(other - own)


def _noise(records: pd.DataFrame, task: str, key: str) -> float:
    """How much `key` differs between runs that are equal for all that matters.

    The largest of: what a rounding changes (control against torch, root mean square), what a seed
    changes (standard deviation of torch's runs), and for the accuracy the sampling error of that
    many test images, since a few runs can agree by chance.
    """
    own = one_cell(records, task=task, variant=TORCH)
    changes = _differences(records, task, CONTROL, key)
    rounding = math.sqrt(statistics.fmean(d * d for d in changes))
    noise = max(rounding, statistics.stdev(own[key]))
    if key == "accuracy":
        mean = float(own[key].mean())
        noise = max(noise, math.sqrt(mean * (1 - mean) / int(own.test_images.iloc[0])))
    return noise


def judge(records: pd.DataFrame, task: str, variant: str) -> dict[str, Any]:
    """Whether `variant` trains like torch: mean difference over the seeds against its noise."""
    answer: dict[str, Any] = {"equal": True}
    for key in ("test_loss", "accuracy"):
        differences = _differences(records, task, variant, key)
        difference = statistics.fmean(differences)
        noise = _noise(records, task, key) / math.sqrt(len(differences))
        answer[key] = {"difference": difference, "noise": noise}
        # Not "> limit": a nan from diverged training must not pass.
        within = abs(difference) <= STANDARD_ERRORS * noise
        answer["equal"] = bool(answer["equal"] and within)
    return answer


class AgainstTorch(Experiment):
    """Ours against `nn.BatchNorm*`: the same curves within noise, and the time of a step."""

    name = "against-torch"
    title = "Does it train like nn.BatchNorm?"
    height = 7.2
    method = (
        "Three networks from the same seeds with `nn.BatchNorm*`, after `convert_batchnorm`, and "
        "with fused modules. The control: torch's network with every initial weight moved to the "
        "next float. Equal means: the mean difference of test loss and of accuracy is within "
        f"{STANDARD_ERRORS:g} standard errors of the noise that the control and the seeds show."
    )
    limits = (
        "Equal within noise is no proof of equal: a difference smaller than the noise would not be "
        "seen in so few seeds (the tests compare single calls with float64 for that). The networks "
        "are small, so the time of a step says little about large ones."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "epochs": 1, "rate": 0.05, "turns": 2},
        "quick": {"seeds": 5, "epochs": 6, "rate": 0.05, "turns": 60},
        "full": {"seeds": 10, "epochs": 15, "rate": 0.05, "turns": 300},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every network in every variant."""
        choices = {"task": TASK_NAMES, "variant": list(NAMES), "rate": [size["rate"]]}
        return in_epochs(grid(**choices, seed=range(size["seeds"])), size["epochs"])

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train; the loss of every step, and loss and accuracy on the test images."""
        task = TASKS[settings["task"]]
        split = task.split().to(device)
        model = make_model(settings["task"], settings["variant"], settings["seed"], device)
        history = fit_run(model, split.train, settings)
        found = evaluate(model, split.test)
        return {
            "losses": [round(loss, 6) for loss in history.losses],
            "test_loss": found["loss"],
            "accuracy": found["accuracy"],
            "test_images": len(split.test),
        }

    def timed(self, device: str, size: Size) -> Steps:
        """A training step of each network in each implementation."""
        groups = {}
        for name in TASK_NAMES:
            models = {v: make_model(name, v, 0, device) for v in (TORCH, *COMPARED)}
            groups[name] = training_steps(models, first_batch(name, device), size["rate"])
        return groups

    def passed(self, result: dict[str, Any]) -> bool:
        """All are equal to torch within noise."""
        records = frame(result)
        return all(judge(records, task, v)["equal"] for task in TASK_NAMES for v in COMPARED)

    def table(self, result: dict[str, Any]) -> Table:
        """Losses, accuracy, the verdict with its noise, and the time of a step."""
        heads = ["network", "", "training loss", "test loss", "test accuracy",
                 "test loss − torch's (noise)", "accuracy − torch's (noise)", "equal",
                 "time of a step"]  # fmt: skip
        rows = []
        records = frame(result)
        for task in TASK_NAMES:
            timings = result["timings"][task]
            for variant, name in NAMES.items():
                runs = one_cell(records, task=task, variant=variant)
                last = statistics.fmean(statistics.fmean(losses[-10:]) for losses in runs.losses)
                row = [TASKS[task].label.split(",")[0], name, f"{last:.4f}",
                       f"{runs.test_loss.mean():.4f}", f"{runs.accuracy.mean():.2%}"]  # fmt: skip
                if variant in COMPARED:
                    found = judge(records, task, variant)
                    loss, accuracy = found["test_loss"], found["accuracy"]
                    row += [f"{loss['difference']:+.4f} ({loss['noise']:.4f})",
                            f"{accuracy['difference']:+.2%} ({accuracy['noise']:.2%})",
                            "yes" if found["equal"] else "NO"]  # fmt: skip
                else:
                    row += ["", "", ""]
                time = time_text(timings[variant]["median"]) if variant in timings else ""
                gain = f" ({speedup(timings, TORCH, variant)})" if variant in COMPARED else ""
                rows.append([*row, time + gain])
        return heads, rows

    def finding(self, result: dict[str, Any]) -> str:
        """Equal or not, and how much faster."""
        records = frame(result)
        pairs = [(task, variant) for task in TASK_NAMES for variant in COMPARED]
        unequal = [f"{TASKS[task].label}, {NAMES[variant]}" for task, variant in pairs
                   if not judge(records, task, variant)["equal"]]  # fmt: skip
        first = (
            f"All {len(pairs)} pairs of network and implementation train equally to torch's within "
            "noise"
            if not unequal
            else "NOT equal to torch's within noise: " + "; ".join(unequal)
        )
        times = [
            f"{TASKS[task].label} {as_fast(speedup(result['timings'][task], TORCH, CONVERTED))} "
            f"converted, {as_fast(speedup(result['timings'][task], TORCH, FUSED))} fused"
            for task in TASK_NAMES
        ]
        return f"{first}; a training step against torch's: " + "; ".join(times) + "."

    def summary(self, result: dict[str, Any]) -> str:
        """The finding in short, with the largest difference and its noise."""
        records = frame(result)
        pairs = [(task, variant) for task in TASK_NAMES for variant in COMPARED]
        found = [judge(records, *pair) for pair in pairs]
        word = "equal" if all(each["equal"] for each in found) else "NOT equal"
        accuracies = [each["accuracy"] for each in found]
        largest = max(accuracies, key=lambda accuracy: abs(accuracy["difference"]))
        steps = [
            TASKS[task].label.partition(",")[0]
            + " "
            + " and ".join(str(speedup(result["timings"][task], TORCH, v)) for v in COMPARED)
            for task in TASK_NAMES
        ]
        return (
            f"Training is {word} to torch's within noise: over {records.seed.nunique()} seeds the "
            f"test accuracy differs by {abs(largest['difference']):.2%} at most, up to "
            f"{STANDARD_ERRORS * largest['noise']:.2%} would be noise. A training step's speed, "
            f"converted and fused, over torch's: {', '.join(steps)} (~: no difference shown)."
        )

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """For each network: the losses of one seed, their distance from torch's, the times."""
        records = frame(result)
        grid = figure.subplots(len(TASK_NAMES), 3, width_ratios=(3, 3, 2))
        for row, task in zip(grid, TASK_NAMES, strict=True):
            self._draw_losses(row[0], records, task)
            self._draw_distances(row[1], records, task)
            timings = result["timings"][task]
            shown = (TORCH, *COMPARED)
            figures.time_bars(row[2], [{v: timings[v] for v in shown}], [STYLES[v] for v in shown])
            row[0].set_ylabel(TASKS[task].label)
        figures.legend_below(figure, grid[0][0])

    @staticmethod
    def _draw_losses(axes: Any, records: pd.DataFrame, task: str) -> None:
        # Later curves are thinner and broken, so that equal ones stay visible.
        for width, (variant, style) in zip((4.5, 3.0, 1.8, 1.0), STYLES.items(), strict=True):
            losses = figures.smooth(one_cell(records, task=task, variant=variant).losses.iloc[0])
            steps = range(1, len(losses) + 1)
            dashes = {"dashes": style.dashes} if variant != TORCH and style.dashes else {}
            axes.plot(steps, losses, color=style.colour, lw=width, label=style.label, **dashes)
        figures.plain_log(axes, "y")
        axes.set_xlabel("step")
        axes.set_title("Training loss, seed 0", loc="left")

    @staticmethod
    def _draw_distances(axes: Any, records: pd.DataFrame, task: str) -> None:
        def losses(variant: str) -> np.ndarray:
            runs = list(one_cell(records, task=task, variant=variant).losses)
            count = min(len(run) for run in runs)
            return np.array([run[:count] for run in runs])

        for variant in (CONTROL, *COMPARED):
            count = min(losses(variant).shape[1], losses(TORCH).shape[1])
            typical = np.median(
                np.abs(losses(variant)[:, :count] - losses(TORCH)[:, :count]), axis=0
            )
            style = STYLES[variant]
            dashes = {"dashes": style.dashes} if style.dashes else {}
            values = np.maximum(figures.smooth(list(typical)), SMALLEST)
            width = 3.0 if variant == CONVERTED else 1.6  # what lies on top of it stays visible
            axes.plot(range(1, count + 1), values, color=style.colour, lw=width, **dashes)
        axes.set_yscale("log")
        axes.set_ylim(SMALLEST / 2, 1)
        axes.set_xlabel("step")
        axes.set_title("Distance from torch's, median of seeds", loc="left")
