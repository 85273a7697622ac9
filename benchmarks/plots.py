"""Pictures of a result file, drawn after the fact.

Ratios have a logarithmic axis, on which twice as fast and half as fast are as far from 1;
fractions and times start at 0. The colours are those of Okabe and Ito, told apart by colour-blind
readers; shape or fill repeats what a colour says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.candidates import OURS
from benchmarks.environment import device_name
from benchmarks.limits import FASTEST
from benchmarks.shapes import BASELINES, DIRECTIONS, LAYOUTS, OPS
from benchmarks.timing import geometric_mean

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY = "#CC79A7", "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "batchnorm_ext",
}
DTYPE_STYLE: dict[str, tuple[str, str]] = {
    "float32": (BLUE, "o"),
    "bfloat16": (ORANGE, "s"),
    "float16": (GREEN, "^"),
    "float64": (RED, "v"),
}
OP_NAMES = {"bn": "batch norm", "bn_relu": "batch norm+ReLU", "bn_add_relu": "batch norm+add+ReLU"}
DIRECTION_NAMES = {
    "forward": "Forward (training)",
    "backward": "Backward",
    "eval": "Inference (eval)",
}
CANDIDATE_STYLE: dict[str, tuple[str, str, str]] = {
    OURS: (BLUE, "o", "batchnorm_ext"),
    "eager": (ORANGE, "s", "torch"),
    "cudnn_off": (RED, "v", "torch without cuDNN"),
    "compile": (GREEN, "^", "torch.compile"),
}
SPREAD = 0.2
DODGE = 1.06


def save(figure: Any, stem: Path) -> list[Path]:
    """Write PNG and SVG; `stem` has no ending."""
    paths = [Path(f"{stem}{ending}") for ending in (".png", ".svg")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return paths


def _select(result: dict[str, Any], **want: str) -> list[dict[str, Any]]:
    return [
        case
        for case in result["cases"]
        if OURS in case["timings"] and all(case[key] == value for key, value in want.items())
    ]


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    every = [(op, layout) for op in OPS for layout in LAYOUTS]
    return [(op, layout) for op, layout in every if _select(result, op=op, layout=layout)]


def _speedups(axes: Any, result: dict[str, Any], direction: str, baseline: str) -> None:
    """One dot per case, a bar at the geometric mean, one line per op and layout."""
    for y, (op, layout) in enumerate(_rows(result)):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color="#F4F4F4", lw=0)
        cases = _select(result, op=op, layout=layout, direction=direction)
        cases = [case for case in cases if baseline in case["speedup"]]
        if not cases:
            continue
        ratios = [case["speedup"][baseline]["ratio"] for case in cases]
        offsets = 0.08 + np.linspace(-SPREAD, SPREAD, len(cases))
        for case, ratio, offset in zip(cases, ratios, offsets, strict=True):
            colour, marker = DTYPE_STYLE[case["dtype"]]
            fill = colour if case["speedup"][baseline]["decided"] else "white"
            axes.plot(ratio, y + offset, marker, ms=4, mec=colour, mfc=fill, mew=0.9, zorder=3)
        mean = geometric_mean(ratios)
        axes.plot([mean, mean], [y - 0.24, y + 0.4], color="black", lw=2, zorder=4)
        axes.annotate(
            f"{mean:.1f}x",
            xy=(mean, y - 0.24),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.axvline(1, color=GREY, lw=1.2)
    axes.set_xscale("log")
    axes.set_title(DIRECTION_NAMES[direction], loc="left")
    axes.grid(axis="y", visible=False)


def _ratio_axis(axes: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, ... that read as factors."""
    axes.set_xlim(low, high)
    decades = (0.01, 0.1, 1, 10, 100)
    ticks = [factor * decade for decade in decades for factor in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_speedups(result: dict[str, Any], baseline: str, stem: Path) -> list[Path]:
    """How many times as fast, for each op, layout and direction."""
    shown = [d for d in DIRECTIONS if _select(result, direction=d)]
    rows = _rows(result)
    with plt.rc_context(STYLE):
        size = (9, 1.4 + 0.64 * len(rows))
        figure, grid = plt.subplots(
            1, len(shown), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axes, direction in zip(grid[0], shown, strict=True):
            _speedups(axes, result, direction, baseline)
        ratios = [c["speedup"][baseline]["ratio"] for c in _select(result) if c["speedup"]]
        for axes in grid[0]:
            _ratio_axis(axes, min(0.7, min(ratios) / 1.2), max(ratios) * 1.35)
        names = [f"{OP_NAMES[op]}\n{layout.replace('_', '-')}" for op, layout in rows]
        grid[0][0].set_yticks(range(len(rows)), names)
        grid[0][0].set_ylim(len(rows) - 0.5, -0.5)
        peer = CANDIDATE_STYLE[baseline][2]
        figure.supxlabel(
            f"times as fast: {peer}'s time over batchnorm_ext's, log scale "
            "(2x = twice as fast, left of 1x = slower)",
            fontsize=9,
        )
        dtypes = [d for d in DTYPE_STYLE if _select(result, dtype=d)]
        handles = [_dot(*DTYPE_STYLE[dtype], f"a shape, {dtype}") for dtype in dtypes]
        handles.append(_dot(GREY, "o", "too close to tell (quartiles overlap)", filled=False))
        handles.append(plt.Line2D([], [], color="black", lw=2, label="typical (geometric mean)"))
        # As the legend's title, since a figure's own would lie under the legend.
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=len(handles),
            title=f"How many times as fast as {peer}: batchnorm_ext on {_machine(result)}",
            title_fontproperties={"size": 11, "weight": "bold"},
        )
        return save(figure, stem)


def _machine(result: dict[str, Any]) -> str:
    threads = sorted({case["threads"] for case in _select(result)})
    name = device_name(result["environment"])
    if result["environment"]["device"] != "cpu":
        return name
    return f"{name}, {'/'.join(map(str, threads))} thread{'' if threads == [1] else 's'}"


def _dot(colour: str, marker: str, label: str = "", *, filled: bool = True) -> Any:
    fill = colour if filled else "white"
    line = plt.Line2D([], [], marker=marker, ls="", label=label)
    line.set(markersize=5, markeredgecolor=colour, markerfacecolor=fill)
    return line


def _size_text(value: float, _: object) -> str:
    return f"{value / 2**20:g} MB" if value >= 2**20 else f"{value / 2**10:g} KB"


def draw_limit(result: dict[str, Any], stem: Path) -> list[Path]:
    """The fraction of the fastest copy that each candidate reaches, over the tensor's size."""
    shown = [d for d in DIRECTIONS if _select(result, direction=d)]
    cases = _select(result)
    present = [n for n in (OURS, *BASELINES) if any(n in case["fraction"] for case in cases)]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(shown), figsize=(9, 3.4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, direction in zip(grid[0], shown, strict=True):
            for name in reversed(present):
                colour, marker, _ = CANDIDATE_STYLE[name]
                points = [
                    (case["tensor_bytes"], case["fraction"][name][FASTEST])
                    for case in _select(result, direction=direction)
                    if name in case["fraction"]
                ]
                if not points:
                    continue
                # Side by side: the candidates have the same sizes and would hide each other.
                shift = DODGE ** (present.index(name) - (len(present) - 1) / 2)
                x, y = [point[0] * shift for point in points], [point[1] for point in points]
                style = {"ms": 4, "mec": "white", "mew": 0.4, "alpha": 0.85}
                axes.plot(x, y, marker, color=colour, **style)
            axes.axhline(1, color=GREY, lw=1.2)
            axes.axvline(result["environment"]["llc_bytes"], color=GREY, lw=1, ls=":")
            axes.set_xscale("log", base=4)
            axes.xaxis.set_major_formatter(FuncFormatter(_size_text))
            axes.tick_params(axis="x", labelsize=8)
            axes.set_title(DIRECTION_NAMES[direction], loc="left")
        grid[0][0].set_ylim(0, max(1.1, grid[0][0].get_ylim()[1]))
        grid[0][0].set_ylabel("fraction of the fastest copy's bandwidth")
        figure.supxlabel("size of the input (log scale)", fontsize=9)
        handles = [_dot(*CANDIDATE_STYLE[name]) for name in present]
        handles.append(plt.Line2D([], [], color=GREY, label="the copy itself"))
        handles.append(plt.Line2D([], [], color=GREY, ls=":", label="last-level cache"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return save(figure, stem)


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """All pictures of a result; nothing for a result without timings."""
    if not _select(result):
        return []
    paths = []
    for baseline in BASELINES:
        if any(baseline in case["speedup"] for case in result["cases"]):
            ending = "" if baseline == "eager" else f"-{baseline}"
            paths += draw_speedups(result, baseline, Path(f"{stem}-speedup{ending}"))
    return paths + draw_limit(result, Path(f"{stem}-limit"))
