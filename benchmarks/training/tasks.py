"""What is learned by which network: the pairs that several experiments share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from benchmarks.training import data, networks
from benchmarks.training.data import Part, Split
from benchmarks.training.fit import History, batches, fit, seeded
from benchmarks.training.networks import Normalization

BATCH = 64


@dataclass(frozen=True)
class Task:
    """A network for some data.

    target: the validation accuracy that counts as learned, if it is kept on average.
    patience: how many times as many epochs it gets, where epochs are short.
    """

    label: str
    make: Callable[[Normalization], nn.Module]
    split: Callable[[], Split]
    target: float
    patience: int = 1

    def seeded(self, seed: int, how: Normalization | str, device: str) -> nn.Module:
        """The network of a seed, ready to be trained; `how` may be a way alone."""
        if isinstance(how, str):
            how = Normalization(how)
        return seeded(seed, partial(self.make, how), device)

    @property
    def epoch(self) -> int:
        """Steps in a pass over the training part."""
        return len(self.split().train) // BATCH

    @property
    def half_epoch(self) -> int:
        """Steps between two evaluations."""
        return max(self.epoch // 2, 1)


def _cancer_mlp(how: Normalization) -> nn.Module:
    return networks.MLP(how, features=30, width=32, classes=2)


TASKS = {
    "cnn": Task("residual CNN, digits", networks.ResidualCNN, data.digits, 0.95),
    "mlp": Task("MLP, digits", networks.MLP, data.digits, 0.95),
    "transformer": Task("transformer, digits", networks.Transformer, data.digits, 0.90),
    "cancer": Task("MLP, raw cell features", _cancer_mlp, data.cancer, 0.90, 4),
    "standardised": Task(
        "MLP, standardised", _cancer_mlp, lambda: data.cancer(standardised=True), 0.90, 4
    ),
}


def in_epochs(runs: list[dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
    """The settings with the number of steps that the epochs of each run's task have."""

    def steps(task: Task) -> int:
        return epochs * task.patience * task.epoch

    return [{**run, "steps": steps(TASKS[run["task"]])} for run in runs]


def fit_run(model: nn.Module, train: Part, settings: dict[str, Any], **options: Any) -> History:
    """`fit` with the rate, the steps and the seed of a run, in the usual batches."""
    rate, steps, seed = settings["rate"], settings["steps"], settings["seed"]
    return fit(model, train, rate=rate, steps=steps, batch=BATCH, seed=seed, **options)


def first_batch(name: str, device: str) -> Part:
    """A batch of a task's training part."""
    return next(batches(TASKS[name].split().to(device).train, BATCH, 0))
