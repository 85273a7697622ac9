"""What the CUDA plans promise: bytes, and the time that they take at a given bandwidth.

Nothing here is measured and no GPU is needed: plans are made of integers. A time is that of all
predicted bytes at a copy's rate. Left out are launches, barriers and uneven ends, which make it
longer, and what the second-level cache spares of a second reading, which makes it shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchnorm_ext import _C
from benchmarks import shapes

#: Bytes per second that a copy reads and writes on an H200; its data sheet says 4.8e12.
COPY_BANDWIDTH = 4.3e12

#: How many of ResNet-50's 53 batch norms have each of RESNET50_PLANES.
RESNET50_LAYERS = (1, 6, 4, 1, 7, 5, 1, 11, 7, 1, 5, 4)
TRAINING = ("forward", "backward")


@dataclass(frozen=True)
class Prediction:
    """One plan, and the time of its bytes in microseconds."""

    plan: _C.CudaPlan
    microseconds: float

    @property
    def waves(self) -> int:
        """How often all blocks meet."""
        return math.ceil(self.plan["units"] / self.plan["units_at_once"])

    @property
    def cells(self) -> str:
        """Columns of a table: the plan, megabytes, of them read again in a wave, microseconds."""
        plan = self.plan
        strategy = plan["strategy"] + (f" of {plan['team']}" if plan["team"] > 1 else "")
        again = (plan["predicted_bytes"] - plan["compulsory_bytes"]) / self.waves / 1e6
        return " | ".join(
            [
                strategy + (f", {self.waves} waves" if self.waves > 1 else ""),
                f"{plan['predicted_bytes'] / 1e6:.1f}",
                f"{again:.1f}" if again > 0 else "",
                f"{self.microseconds:.1f}",
            ]
        )


def predict(
    sizes: tuple[int, ...], layout: str, dtype: str, direction: str, device: str
) -> Prediction:
    """Batch norm with or without ReLU, x of `sizes` (N, C, *)."""
    n, c, *spatial = sizes
    plan = _C.plan_cuda(layout, dtype, n, c, math.prod(spatial), direction, device=device)
    return Prediction(plan, plan["predicted_bytes"] / COPY_BANDWIDTH * 1e6)


def table(layout: str, dtype: str, batch: int, device: str) -> list[str]:
    """ResNet-50's training steps as a Markdown table; the last row is all 53 layers."""
    lines = [
        "| C x H x W | layers | " + " | ".join(f"{d}: plan | MB | again | us" for d in TRAINING),
        "|---|---:" + "|---|---:|---:|---:" * len(TRAINING),
    ]
    totals = dict.fromkeys(TRAINING, (0.0, 0.0))
    for (c, side), layers in zip(shapes.RESNET50_PLANES, RESNET50_LAYERS, strict=True):
        row = [f"{c} x {side} x {side}", str(layers)]
        for direction in TRAINING:
            one = predict((batch, c, side, side), layout, dtype, direction, device)
            row.append(one.cells)
            megabytes, time = totals[direction]
            totals[direction] = (
                megabytes + layers * one.plan["predicted_bytes"] / 1e6,
                time + layers * one.microseconds,
            )
        lines.append(" | ".join(row))
    sums = [f" | {megabytes:.0f} | | {time:.0f}" for megabytes, time in totals.values()]
    lines.append(" | ".join(["all", str(sum(RESNET50_LAYERS)), *sums]))
    return [lines[0] + " |", lines[1] + "|", *(f"| {line} |" for line in lines[2:])]


def report(dtype: str, batch: int, device: str) -> str:
    """Both layouts' tables."""
    rate = f"{COPY_BANDWIDTH / 1e12:.1f} TB/s"
    parts = []
    for layout in shapes.LAYOUTS:
        head = f"ResNet-50, N = {batch}, {dtype}, {layout}, {device}, at {rate}; predicted:"
        parts.append("\n".join([head, "", *table(layout, dtype, batch, device)]))
    return "\n\n".join(parts)
