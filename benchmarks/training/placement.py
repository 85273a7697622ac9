"""Before or after the activation; fused with it or apart."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.report import time_text
from benchmarks.training import figures
from benchmarks.training.data import Part
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
from benchmarks.training.fit import batches, evaluate, training_steps
from benchmarks.training.intervals import Estimate, verdict
from benchmarks.training.networks import AFTER, FUSED, NONE, OURS, TORCH, Normalization
from benchmarks.training.tasks import BATCH, TASKS, first_batch, fit_run, in_epochs

VARIANTS = {
    "without": Normalization(NONE),
    "before": Normalization(OURS),
    "after": Normalization(OURS, place=AFTER),
}
STYLES = {
    "without": figures.WITHOUT,
    "before": figures.named(figures.WITH, "before the activation"),
    "after": figures.named(figures.OTHER, "after the activation"),
}
TIMED = {"torch's, separate": TORCH, "ours, separate": OURS, "ours, fused": FUSED}
TIMED_STYLES = (figures.FIFTH, figures.WITH, figures.FOURTH)
TASK_NAMES = ("cnn", "mlp")
# Both add in float32 and differ in the order: of outputs and gradients of order 1, with room.
TOLERANCE = 1e-4


def _first_step(model: nn.Module, part: Part) -> list[Tensor]:
    """Logits and gradients of the first step."""
    logits = model(part.inputs)
    loss = F.cross_entropy(logits, part.targets)
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, each over the largest value of its pair."""
    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()
        for a, b in zip(first, second, strict=True)
    )


class Placement(Experiment):
    """Before against after the activation, fused against separate."""

    name = "placement"
    title = "Where does it stand?"
    method = (
        "The same network with batch norm before the activation (as in the paper), after it, and "
        "without. Then fused against separate: outputs and gradients of the first step, compared; "
        "and the time of a training step, in turns."
    )
    limits = (
        "One rate and one number of epochs for all; deeper networks may prefer another place. The "
        "time of a step contains the convolutions and the optimizer, so the gain of the fused "
        "layer alone is larger than what is seen."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "epochs": 1, "rate": 0.05, "turns": 2},
        "quick": {"seeds": 5, "epochs": 8, "rate": 0.05, "turns": 60},
        "full": {"seeds": 10, "epochs": 20, "rate": 0.05, "turns": 300},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every place, in two networks."""
        choices = {"task": TASK_NAMES, "variant": list(VARIANTS), "rate": [size["rate"]]}
        return in_epochs(grid(**choices, seed=range(size["seeds"])), size["epochs"])

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train; and how far the fused network is from this one at the first step."""
        task = TASKS[settings["task"]]
        split = task.split().to(device)
        how = VARIANTS[settings["variant"]]
        model = task.seeded(settings["seed"], how, device)
        difference = None
        if settings["variant"] == "before":
            part = next(batches(split.train, BATCH, settings["seed"]))
            pair = (task.seeded(settings["seed"], way, device) for way in (OURS, FUSED))
            difference = largest_difference(*(_first_step(one, part) for one in pair))
        history = fit_run(
            model, split.train, settings, validation=split.validation, every=task.half_epoch
        )
        return {
            "accuracies": [[number, round(value, 5)] for number, value in history.accuracies],
            "diverged": history.diverged,
            "test_accuracy": evaluate(model, split.test)["accuracy"],
            "fused_difference": difference,
        }

    def timed(self, device: str, size: Size) -> Steps:
        """A training step of each network: torch's, ours and fused."""
        groups = {}
        for name in TASK_NAMES:
            models = {label: TASKS[name].seeded(0, way, device) for label, way in TIMED.items()}
            groups[name] = training_steps(models, first_batch(name, device), size["rate"])
        return groups

    @staticmethod
    def _difference(result: dict[str, Any]) -> float:
        return float(frame(result).fused_difference.max())

    def passed(self, result: dict[str, Any]) -> bool:
        """Fused and separate give the same numbers."""
        return self._difference(result) <= TOLERANCE

    def table(self, result: dict[str, Any]) -> Table:
        """Accuracies by place, then times by implementation."""
        rows = []
        for task in TASK_NAMES:
            for variant, style in STYLES.items():
                runs = one_cell(frame(result), task=task, variant=variant)
                text = Estimate.of(list(runs.test_accuracy * 100)).text(".1f", "%")
                rows.append([TASKS[task].label, style.label, text, ""])
        for task in TASK_NAMES:
            timings = result["timings"][task]
            for label in TIMED:
                ratio = speedup(timings, next(iter(TIMED)), label)
                text = f"{time_text(timings[label]['median'])} ({ratio})"
                rows.append([TASKS[task].label, label, "", text])
        return ["network, data", "", "test accuracy", "time of a step (times as fast)"], rows

    def finding(self, result: dict[str, Any]) -> str:
        """Before against after, fused against separate."""
        parts = []
        for task in TASK_NAMES:
            runs = [one_cell(frame(result), task=task, variant=v) for v in ("before", "after")]
            change = Estimate.of(
                list((runs[0].test_accuracy.values - runs[1].test_accuracy.values) * 100)
            )
            word = verdict(change, "better", "worse", "neither better nor worse")
            parts.append(f"{TASKS[task].label} {word} ({change.text('+.1f')} points)")
        gains = [
            f"{TASKS[task].label} "
            + as_fast(speedup(result["timings"][task], "ours, separate", "ours, fused"))
            for task in TASK_NAMES
        ]
        difference = self._difference(result)
        return (
            "Before the activation against after it, test accuracy: " + ", ".join(parts) + ". "
            "At the first step fused and separate layers "
            + (f"differ by {difference:.0e} of the largest value"
               if difference else "agree in every bit")
            + "; a training step with fused layers against separate ones: " + ", ".join(gains) + "."
        )  # fmt: skip

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """Accuracy by place for both networks, and the times."""
        grid = figure.subplots(1, 3)
        for axes, name in zip(grid, TASK_NAMES, strict=False):
            for variant, style in STYLES.items():
                runs = one_cell(frame(result), task=name, variant=variant).accuracies
                curves = figures.accuracy_curve(list(runs), TASKS[name].epoch)
                figures.curve(axes, *curves, style, points=False)
            axes.set_title(TASKS[name].label, loc="left")
            axes.set_xlabel("epochs")
            axes.set_ylabel("validation accuracy")
            figures.share_axis(axes)
        bars = [{f"{TASKS[task].label.split(',')[0]}, {label}": result["timings"][task][label]
                 for label in TIMED} for task in TASK_NAMES]  # fmt: skip
        figures.time_bars(grid[2], bars, TIMED_STYLES)
        figures.legend_below(figure, grid[0])
