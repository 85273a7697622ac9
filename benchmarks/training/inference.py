"""Training and inference compute different things: how far apart are they?"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.training import data, figures
from benchmarks.training.data import Part
from benchmarks.training.experiment import Experiment, Settings, Size, Table, frame, grid, one_cell
from benchmarks.training.fit import evaluate, fit, seeded
from benchmarks.training.intervals import Estimate
from benchmarks.training.networks import FUSED, MLP, Normalization

BATCHES = (2, 4, 8, 16, 32, 64, 128)
MOMENTA = (0.01, 0.1, 0.5, None)
USUAL = 0.1
# How the test images are normalised; the last is the control: the network cannot be blamed for
# what it gets right with better statistics.
WAYS = {
    "running": figures.named(figures.WITH, "running"),
    "batch": figures.named(figures.WITHOUT, "of test batches"),
    "exact": figures.named(figures.OTHER, "of all training images"),
}
MOMENTUM_STYLES = (figures.OTHER, figures.WITH, figures.WITHOUT, figures.FOURTH)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "running_var")]


@torch.no_grad()
def with_exact_statistics(model: nn.Module, train: Part) -> nn.Module:
    """A copy whose running statistics are those of all training images in one batch."""
    exact = copy.deepcopy(model).train()
    for norm in _norms(exact):
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
    exact(train.inputs)
    return exact


def variance_error(model: nn.Module, exact: nn.Module) -> float:
    """Mean over the channels of how far running_var is off, relative."""

    def variances(of: nn.Module) -> Tensor:
        return torch.cat([norm.running_var for norm in _norms(of)])  # type: ignore[misc]

    right = variances(exact)
    return ((variances(model) - right).abs() / (right + 1e-5)).mean().item()


class Inference(Experiment):
    """Running statistics against batch statistics, over batch sizes and momenta."""

    name = "inference"
    title = "What does inference do differently?"
    method = (
        "An MLP is trained with several batch sizes and momenta of the running statistics, in the "
        "same number of updates, and tested in three ways: with the running statistics (eval "
        "mode), with the statistics of test batches of the size that it was trained with, and, as "
        "the control, with the statistics of all training images under the final weights."
    )
    limits = (
        "Smaller batches have seen fewer images after the same number of updates, so only the ways "
        "of testing are comparable at one size, not the sizes with each other. One small network "
        "and one rate; a batch of 1 is not among them, since training on one value per channel is "
        "an error."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "updates": 3, "batches": (2, 64), "rate": 0.05},
        "quick": {"seeds": 5, "updates": 300, "batches": BATCHES, "rate": 0.05},
        "full": {"seeds": 10, "updates": 1000, "batches": BATCHES, "rate": 0.05},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every momentum at every batch size."""
        fixed = {"updates": [size["updates"]], "rate": [size["rate"]]}
        choices = {"momentum": list(map(str, MOMENTA)), "batch": size["batches"]}
        return grid(**choices, seed=range(size["seeds"]), **fixed)

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train; the test error in the three ways."""
        split = data.digits().to(device)
        momentum = {str(m): m for m in MOMENTA}[settings["momentum"]]
        how = Normalization(FUSED, momentum=momentum)
        model = seeded(settings["seed"], lambda: MLP(how), device)
        history = fit(
            model, split.train, rate=settings["rate"], steps=settings["updates"],
            batch=settings["batch"], seed=settings["seed"],
        )  # fmt: skip
        exact = with_exact_statistics(model, split.train)
        in_batches = evaluate(model, split.test, batch_statistics=settings["batch"])
        return {
            "running": 1 - evaluate(model, split.test)["accuracy"],
            "batch_way": 1 - in_batches["accuracy"],
            "exact": 1 - evaluate(exact, split.test)["accuracy"],
            "variance_error": variance_error(model, exact),
            "diverged": history.diverged,
        }

    @staticmethod
    def _error(result: dict[str, Any], way: str, **want: Any) -> Estimate:
        column = "batch_way" if way == "batch" else way
        return Estimate.of(list(one_cell(frame(result), **want)[column]))

    def table(self, result: dict[str, Any]) -> Table:
        """The three errors at each size, and the running ones at each momentum."""
        heads = ["batch size", *(f"statistics {style.label}" for style in WAYS.values()),
                 *(f"running, momentum {m}" for m in MOMENTA if m != USUAL)]  # fmt: skip
        rows = []
        for batch in sorted(frame(result).batch.unique()):
            usual = [self._error(result, way, batch=batch, momentum=str(USUAL)) for way in WAYS]
            others = [self._error(result, "running", batch=batch, momentum=str(m))
                      for m in MOMENTA if m != USUAL]  # fmt: skip
            rows.append([str(batch), *(f"{e.mean:.1%} [{e.low:.1%}, {e.high:.1%}]"
                                       for e in usual + others)])  # fmt: skip
        return heads, rows

    def finding(self, result: dict[str, Any]) -> str:
        """The three errors at the smallest and the largest batch, and the best momentum."""
        sizes = sorted(frame(result).batch.unique())
        parts = []
        for batch in (sizes[0], sizes[-1]):
            errors = {
                w: self._error(result, w, batch=batch, momentum=str(USUAL)).mean for w in WAYS
            }
            running = {str(m): self._error(result, "running", batch=batch, momentum=str(m)).mean
                       for m in MOMENTA}  # fmt: skip
            best = min(running, key=lambda momentum: running[momentum])
            parts.append(
                f"trained with batches of {batch}, the test error is {errors['running']:.1%} with "
                f"running statistics (momentum {USUAL}), {errors['batch']:.1%} with those of test "
                f"batches and {errors['exact']:.1%} with exact ones, and the least of the running "
                f"ones is {running[best]:.1%}, at momentum {best}"
            )
        text = "; ".join(parts)
        return text[0].upper() + text[1:] + "."

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """Error over the batch size by way and by momentum, and how far the variances are off."""
        records = frame(result)
        sizes = sorted(records.batch.unique())
        left, middle, right = figure.subplots(1, 3)
        for way, style in WAYS.items():
            errors = [self._error(result, way, batch=b, momentum=str(USUAL)) for b in sizes]
            figures.curve(left, sizes, errors, style)
        for momentum, other in zip(MOMENTA, MOMENTUM_STYLES, strict=True):
            want = {"momentum": str(momentum)}
            style = figures.named(other, f"momentum {momentum}")
            errors = [self._error(result, "running", batch=b, **want) for b in sizes]
            figures.curve(middle, sizes, errors, style)
            off = [figures.geometric(list(one_cell(records, batch=b, **want).variance_error))
                   for b in sizes]  # fmt: skip
            figures.curve(right, sizes, off, style)
        left.set_title(f"Test error, momentum {USUAL}", loc="left")
        middle.set_title("Test error, running statistics", loc="left")
        right.set_title("Error of running_var, relative", loc="left")
        for axes in (left, middle, right):
            axes.set_xlabel("batch size (log scale)")
            figures.plain_log(axes, "x", sizes)
        for axes in (left, middle):
            figures.plain_log(axes, "y")
            figures.percent_axis(axes.yaxis)
        figures.plain_log(right, "y")
        # The curves fall: the upper right is free.
        left.legend(loc="upper right", title="statistics", fontsize=8)
        middle.legend(loc="upper right", fontsize=8)
