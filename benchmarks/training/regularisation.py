"""Do the noisy statistics of small batches regularise?"""

from __future__ import annotations

from typing import Any, ClassVar

from matplotlib.figure import Figure

from benchmarks.training import data, figures
from benchmarks.training.experiment import (
    Experiment,
    Settings,
    Size,
    Table,
    cells,
    frame,
    grid,
    one_cell,
)
from benchmarks.training.fit import evaluate, fit, seeded
from benchmarks.training.intervals import Estimate, verdict
from benchmarks.training.networks import FUSED, MLP, NONE, Normalization

IMAGES = 300  # few enough to be learned by heart
DROPOUT = 0.3
BATCHES = (4, 8, 16, 32, 64, 128, 256)
VARIANTS = {
    "without": Normalization(NONE),
    "dropout": Normalization(NONE, dropout=DROPOUT),
    "batch norm": Normalization(FUSED),
}
STYLES = {
    "without": figures.WITHOUT,
    "dropout": figures.named(figures.OTHER, f"without, dropout {DROPOUT:g}"),
    "batch norm": figures.WITH,
}


class Regularisation(Experiment):
    """The generalisation gap over batch sizes, beside dropout."""

    name = "regularisation"
    title = "Does it regularise?"
    method = (
        f"An MLP learns {IMAGES} images by heart in a fixed number of updates, at several batch "
        "sizes: the generalisation gap is the test loss minus the training loss, both in eval "
        "mode. The controls: no batch norm at the same batch sizes, which have an effect of their "
        "own, and dropout."
    )
    limits = (
        "The number of updates is the same, so larger batches see each image more often; and at a "
        "batch of 4 the running statistics are poor as well (see the next section), which is in "
        "the test loss. It does not show that the noise is the reason for a difference."
    )
    sizes: ClassVar = {
        "tiny": {"seeds": 2, "updates": 3, "batches": (4, 64), "rate": 0.03},
        "quick": {"seeds": 5, "updates": 500, "batches": BATCHES, "rate": 0.01},
        "full": {"seeds": 10, "updates": 1500, "batches": BATCHES, "rate": 0.01},
    }

    def runs(self, size: Size) -> list[Settings]:
        """Every variant at every batch size."""
        fixed = {"updates": [size["updates"]], "rate": [size["rate"]]}
        choices = {"variant": list(VARIANTS), "batch": size["batches"]}
        return grid(**choices, seed=range(size["seeds"]), **fixed)

    def measure(self, settings: Settings, device: str) -> Settings:
        """Train; loss and accuracy on what was learned and on the test images."""
        split = data.digits().to(device)
        train = split.train.first(IMAGES)
        how = VARIANTS[settings["variant"]]
        model = seeded(settings["seed"], lambda: MLP(how), device)
        history = fit(
            model, train, rate=settings["rate"], steps=settings["updates"],
            batch=settings["batch"], seed=settings["seed"],
        )  # fmt: skip
        return {
            "train": evaluate(model, train),
            "test": evaluate(model, split.test),
            "diverged": history.diverged,
        }

    @staticmethod
    def _gaps(result: dict[str, Any], **want: Any) -> list[float]:
        runs = one_cell(frame(result), **want)
        return [t["loss"] - r["loss"] for t, r in zip(runs.test, runs.train, strict=True)]

    def table(self, result: dict[str, Any]) -> Table:
        """Gap and accuracies of every variant and size."""
        heads = ["", "batch size", "generalisation gap", "test loss", "test accuracy"]
        rows = []
        for (variant, batch), runs in cells(frame(result), ["variant", "batch"]):
            rows.append([
                STYLES[variant].label, str(batch),
                Estimate.of(self._gaps(result, variant=variant, batch=batch)).text(".3f"),
                Estimate.of([test["loss"] for test in runs.test]).text(".3f"),
                Estimate.of([test["accuracy"] * 100 for test in runs.test]).text(".1f", "%"),
            ])  # fmt: skip
        return heads, rows

    def finding(self, result: dict[str, Any]) -> str:
        """The gap against no batch norm, at the smallest and the largest batch."""
        sizes = sorted(frame(result).batch.unique())
        parts = []
        for batch in (sizes[0], sizes[-1]):
            own = self._gaps(result, variant="without", batch=batch)
            texts = []
            for variant in ("batch norm", "dropout"):
                other = self._gaps(result, variant=variant, batch=batch)
                change = Estimate.of([a - b for a, b in zip(other, own, strict=True)])
                word = verdict(change, "a larger", "a smaller", "no different")
                texts.append(f"{word} gap with {variant} ({change.text('+.3f')})")
            parts.append(f"at a batch of {batch} {' and '.join(texts)}")
        return "Against no batch norm at the same seeds: " + "; ".join(parts) + "."

    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """Gap and accuracy over the batch size."""
        records = frame(result)
        sizes = sorted(records.batch.unique())
        left, right = figure.subplots(1, 2)
        for variant, style in STYLES.items():
            gaps = [Estimate.of(self._gaps(result, variant=variant, batch=b)) for b in sizes]
            figures.curve(left, sizes, gaps, style)
            tests = (one_cell(records, variant=variant, batch=b).test for b in sizes)
            accuracies = [Estimate.of([t["accuracy"] for t in test]) for test in tests]
            figures.curve(right, sizes, accuracies, style)
        for axes in (left, right):
            axes.set_xlabel("batch size (log scale)")
            figures.plain_log(axes, "x", sizes)
        left.set_title("Generalisation gap", loc="left")
        left.set_ylabel("test loss − training loss")
        right.set_title("Test accuracy", loc="left")
        figures.percent_axis(right.yaxis)
        left.set_ylim(bottom=0)
        figures.legend_below(figure, left)
