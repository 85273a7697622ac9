"""The demo's table and picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter
from rich.console import Console

from benchmarks import plots
from benchmarks.plots import BLUE, GREEN, GREY, ORANGE, STYLE, plt
from benchmarks.report import ratio_text, simple_table, time_text

NAMES = {
    "torch": "torch: nn.BatchNorm2d",
    "converted": "converted: convert_batchnorm",
    "fused": "fused: BatchNormAct2d",
}
# colour, line width, dashes: later curves are thinner and broken, so that equal ones stay visible
CURVES = {
    "torch": (ORANGE, 3.5, (1, 0)),
    "converted": (BLUE, 1.8, (1, 0)),
    "fused": (GREEN, 1.4, (4, 3)),
}
SMOOTHING = 5
SMALLEST = 1e-6  # the losses are stored with six decimals


def _of(result: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    return [run for run in result["runs"] if run["variant"] == variant]


def percent(share: float) -> str:
    """A difference of shares with its sign, without one for zero."""
    text = f"{share:+.2%}"
    return text if any(digit in text for digit in "123456789") else "0.00%"


def show(result: dict[str, Any], console: Console) -> None:
    """Loss, accuracy and time per step of each model, then the verdict with its noise."""
    table = simple_table("Trained from the same seeds: mean over the seeds")
    table.add_column("model", no_wrap=True)
    for name in ("training loss", "test loss", "test accuracy", "time per step", "times as fast"):
        table.add_column(name, justify="right")
    for variant, name in NAMES.items():
        runs = _of(result, variant)
        last = statistics.fmean(statistics.fmean(run["losses"][-10:]) for run in runs)
        step = result["step_time"][variant]
        table.add_row(
            name,
            f"{last:.4f}",
            f"{statistics.fmean(run['test_loss'] for run in runs):.4f}",
            f"{statistics.fmean(run['accuracy'] for run in runs):.2%}",
            f"{time_text(step['median'])} ({step['q1'] * 1e3:.2f}-{step['q3'] * 1e3:.2f})",
            ratio_text(result["speedup"].get(variant)),
        )
    console.print(table)
    for verdict in result["verdicts"]:
        loss, accuracy = verdict["test_loss"], verdict["accuracy"]
        answer = "equal within noise" if verdict["equal"] else "[red]NOT equal within noise[/red]"
        console.print(
            f"{verdict['variant']} against torch: {answer}. Mean difference at the same seeds: "
            f"test loss {loss['difference']:+.4f}, accuracy {percent(accuracy['difference'])}; "
            f"its noise (rounding, seeds): {loss['noise']:.4f}, {accuracy['noise']:.2%}.",
            highlight=False,
        )


def _smooth(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def _claim(result: dict[str, Any], variant: str) -> str:
    """The speed-up for a label; '(~)' where none is claimed."""
    text = ratio_text(result["speedup"].get(variant))
    return f" ({text})" if text else ""


def _losses(result: dict[str, Any], variant: str) -> np.ndarray:
    """Training losses (seeds, steps)."""
    return np.array([run["losses"] for run in _of(result, variant)])


def _draw_losses(axes: Any, result: dict[str, Any]) -> None:
    for variant, (colour, width, dashes) in CURVES.items():
        losses = _smooth(list(_losses(result, variant)[0]))
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, lw=width, dashes=dashes, label=variant)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Training loss, seed 0", loc="left")
    axes.legend()


def _draw_differences(axes: Any, result: dict[str, Any]) -> None:
    """How fast the runs part from torch's, beside torch against itself."""
    own = _losses(result, "torch")
    curves = {"control": (GREY, 3.5, (1, 0)), **CURVES}
    del curves["torch"]
    for variant, (colour, width, dashes) in curves.items():
        typical = np.median(np.abs(_losses(result, variant) - own), axis=0)
        smooth = np.maximum(_smooth(list(typical)), SMALLEST)
        label = "torch, weights one\nrounding off" if variant == "control" else variant
        steps = range(1, len(smooth) + 1)
        axes.plot(steps, smooth, color=colour, lw=width, dashes=dashes, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title("Its distance from torch's, median of seeds", loc="left")
    axes.legend(loc="lower right", fontsize=8)


def _draw_times(axes: Any, result: dict[str, Any]) -> None:
    labels = []
    for y, (variant, (colour, _, _)) in enumerate(CURVES.items()):
        step = {key: value * 1e3 for key, value in result["step_time"][variant].items()}
        error = [[step["median"] - step["q1"]], [step["q3"] - step["median"]]]
        axes.barh(y, step["median"], 0.6, color=colour, xerr=error, capsize=3)
        labels.append(f"{variant}\n{step['median']:.1f} ms{_claim(result, variant)}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms, median and quartiles")
    axes.set_title("Time per step", loc="left")


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """The losses of one seed, their median distance from torch's over the seeds, and the times."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 3, figsize=(10, 3.3), width_ratios=(3, 3, 2), layout="constrained"
        )
        _draw_losses(axes[0], result)
        _draw_differences(axes[1], result)
        _draw_times(axes[2], result)
        return plots.save(figure, stem)
