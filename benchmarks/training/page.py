"""docs/why-batch-norm.md, made from result files: no number in it is typed by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.environment import device_name
from benchmarks.training.experiment import Experiment
from benchmarks.training.intervals import CONFIDENCE
from benchmarks.training.registry import EXPERIMENTS

HEAD = """# Why batch norm

What is said of batch normalization, as experiments with this package: a figure each, what it shows
and what it does not, and the command that makes it. The page is written by
`{command}`
from the result files; none of its numbers is typed by hand.

- Means over {seeds} seeds; bands and brackets are {confidence:.0%} confidence intervals (Student's
  t over the seeds). A difference is only called one where the interval of the differences at the
  same seeds leaves out 0.
- Data: scikit-learn's digits (1,797 images of 8x8) and breast cancer samples (569, raw features),
  cut into 60 % training, 20 % validation and 20 % test, always in the same way. The interval is
  over seeds, not over test images: one of 360 is 0.3 %.
- Batch norm stands after each linear or convolution layer and before the activation. Without it, a
  learned shift stands in its place; both start from the same weights. Stochastic gradient descent
  with momentum {momentum}, a constant rate, no weight decay.
- {device}, torch {torch}, {threads} thread for each run.
"""
SECTION = """## {title}

{method}

![{title}]({figure})

**It shows:** {finding}

**It does not show:** {limits}

{table}

`{command}`, {seconds:.0f} s, [result file]({file}).
"""


def command(size: str, name: str = "all", page: bool = False) -> str:
    """What makes a result, as the user types it."""
    text = f"python -m benchmarks train --experiment {name} --{size}"
    return f"{text} --page docs/why-batch-norm.md" if page else text


def _table(experiment: Experiment, result: dict[str, Any]) -> str:
    heads, rows = experiment.table(result)
    return pd.DataFrame(rows, columns=heads).to_markdown(index=False, disable_numparse=True)


def read(path: Path) -> dict[str, Any]:
    """A result file of `train`; ValueError where it is another."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or "records" not in result:
        raise ValueError(f"{path}: not a result file of `python -m benchmarks train`")
    return result


def make(files: Sequence[Path], page: Path) -> str:
    """The page for these result files, whose figures lie beside them."""
    from benchmarks.training.fit import MOMENTUM

    found = {path: read(path) for path in files}
    first = next(iter(found.values()))
    settings = first["settings"]
    seeds = sorted({result["settings"]["seeds"] for result in found.values()})
    parts = [
        HEAD.format(
            command=command(settings["size"], page=True),
            seeds=" to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))),
            confidence=CONFIDENCE,
            momentum=MOMENTUM,
            device=device_name(first["environment"]),
            torch=first["environment"]["torch"],
            threads=settings["threads"],
        )
    ]
    for path, result in found.items():
        experiment = EXPERIMENTS[result["settings"]["experiment"]]
        link = Path(os.path.relpath(path, page.resolve().parent)).as_posix()
        parts.append(
            SECTION.format(
                title=experiment.title,
                method=experiment.method,
                figure=link.removesuffix(".json") + ".png",
                finding=experiment.finding(result),
                limits=experiment.limits,
                table=_table(experiment, result),
                command=command(result["settings"]["size"], experiment.name),
                seconds=result["seconds"],
                file=link,
            )
        )
    return "\n".join(parts)
