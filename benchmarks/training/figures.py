"""What the figures share: one style for each variant, bands for intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from benchmarks.report import time_text
from benchmarks.training.intervals import Estimate

WIDTH = 9  # inches
LARGEST_LOSS = 10  # of a curve: what diverges leaves the picture
SMALLEST_LOSS = 1e-5  # losses are stored with five decimals at least
SMOOTHING = 10  # steps that a loss curve averages over


@dataclass(frozen=True)
class Style:
    """Colour, and marker and dashes that repeat what the colour says."""

    label: str
    colour: str
    marker: str = "o"
    dashes: tuple[float, ...] = ()


# The same variant looks the same in every figure.
WITHOUT = Style("without", ORANGE, "s", (4, 2))
WITH = Style("batch norm", BLUE, "o")
OTHER = Style("", GREEN, "^", (1, 1.5))
FOURTH = Style("", RED, "v", (6, 2, 1, 2))
FIFTH = Style("", PURPLE, "P", (3, 2))
CONTROL = Style("", GREY, "D", (2, 1))


def named(style: Style, label: str) -> Style:
    """The style under another name."""
    return Style(label, style.colour, style.marker, style.dashes)


def curve(
    axes: Any,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    style: Style,
    *,
    points: bool = True,
) -> None:
    """Means joined by a line, their intervals as a band."""
    line = {"color": style.colour, "lw": 1.6, "label": style.label}
    if style.dashes:
        line["dashes"] = style.dashes
    if points:
        line |= {"marker": style.marker, "ms": 4}
    axes.plot(x, [e.mean for e in estimates], **line)
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(x, low, high, color=style.colour, alpha=0.18, lw=0)


def share_axis(axes: Any) -> None:
    """Accuracies from 0 to 100 %, whatever an interval says."""
    axes.set_ylim(0, 1.03)
    percent_axis(axes.yaxis)


def percent_axis(axis: Any) -> None:
    """Shares as percentages."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))


def plain_log(axes: Any, which: str, ticks: Sequence[float] | None = None) -> None:
    """A logarithmic axis with numbers as people write them, at `ticks` where they are given."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    if ticks is not None:
        axis.set_ticks(list(ticks))
    else:
        low, high = axis.get_view_interval()
        # Decades alone would label a short axis once or never.
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(labelsize=8)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend_below(figure: Any, axes: Any, columns: int | None = None) -> None:
    """One legend for all panels, taken from `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns or len(handles))


def geometric(values: Sequence[float], floor: float = 1e-20) -> Estimate:
    """A geometric mean with its interval, for a logarithmic axis."""
    logs = Estimate.of([math.log(max(value, floor)) for value in values])
    return Estimate(*(math.exp(value) for value in logs))


def loss_curves(axes: Any, curves: Mapping[Style, Sequence[Sequence[float]]]) -> None:
    """Training losses of the seeds, smoothed; a run that diverged ends its curve."""
    for style, losses in curves.items():
        count = min(len(run) for run in losses)
        smoothed = [smooth(list(run[:count])) for run in losses]
        estimates = [geometric(row, SMALLEST_LOSS) for row in zip(*smoothed, strict=True)]
        curve(axes, range(1, count + 1), estimates, style, points=False)
    axes.set_yscale("log")
    axes.set_ylim(top=min(axes.get_ylim()[1], LARGEST_LOSS))
    plain_log(axes, "y")
    axes.set_xlabel("step")
    axes.set_title("Training loss", loc="left")


def smooth(values: list[float]) -> list[float]:
    """Means of the last steps."""
    return [fmean(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def accuracy_curve(
    runs: Sequence[Sequence[tuple[int, float]]], epoch: int
) -> tuple[list[float], list[Estimate]]:
    """Epochs and accuracies over the seeds; a run that diverged stays where it was."""
    steps = [number for number, _ in max(runs, key=len)]
    padded = [
        [value for _, value in run] + [run[-1][1] if run else 0.0] * (len(steps) - len(run))
        for run in runs
    ]
    estimates = [Estimate.of(list(values)) for values in zip(*padded, strict=True)]
    return [number / epoch for number in steps], estimates


def time_bars(
    axes: Any, groups: Sequence[Mapping[str, dict[str, Any]]], styles: Sequence[Style]
) -> None:
    """Times of a step with their quartiles, over the first of their group."""
    labels: list[str] = []
    for group in groups:
        first = next(iter(group.values()))["median"]
        for (label, step), style in zip(group.items(), styles, strict=True):
            median, q1, q3 = (step[key] / first for key in ("median", "q1", "q3"))
            error = [[median - q1], [q3 - median]]
            axes.barh(len(labels), median, 0.6, color=style.colour, xerr=error, capsize=3)
            labels.append(f"{label}, {time_text(step['median'])}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("over torch's; median, quartiles")
    axes.set_title("Time of a step", loc="left")
