"""One training run: plain stochastic gradient descent with momentum at a constant rate.

No schedule and no weight decay: either would be one more explanation of what is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.data import Part

MOMENTUM = 0.9


def seeded(seed: int, make: Callable[[], nn.Module], device: str = "cpu") -> nn.Module:
    """The network of a seed in training mode; its weights are drawn on the CPU."""
    torch.manual_seed(seed)
    return make().to(device).train()


def batches(part: Part, size: int, seed: int) -> Iterator[Part]:
    """Without end: each pass in another order, without the images that fill no batch."""
    if size > len(part):
        raise ValueError(f"expected a batch size of at most {len(part)}, but got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(part), generator=generator).to(part.targets.device)
        for indices in order.split(size)[: len(part) // size]:
            yield Part(part.inputs[indices], part.targets[indices])


def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The one optimizer of all experiments."""
    return torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)


def step(
    model: nn.Module, descent: torch.optim.Optimizer, batch: Part, clip: float | None = None
) -> Tensor:
    """One update; the loss before it. `clip` bounds the norm of the whole gradient."""
    descent.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(batch.inputs), batch.targets)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    descent.step()
    return loss.detach()


def training_steps(
    models: Mapping[str, nn.Module], part: Part, rate: float
) -> dict[str, Callable[[], Any]]:
    """A training step of each model on the same batch, to be timed."""
    return {
        name: partial(step, model, optimizer(model, rate), part) for name, model in models.items()
    }


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were before."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(before[name])


@torch.no_grad()
def evaluate(
    model: nn.Module, part: Part, *, batch_statistics: int | None = None
) -> dict[str, float]:
    """Mean loss and accuracy in eval mode.

    `batch_statistics`: in training mode instead, over batches of so many, and nothing is updated.
    """
    model.train(batch_statistics is not None)
    size = batch_statistics or len(part)
    count = len(part) // size * size
    with kept_buffers(model):
        logits = torch.cat([model(x) for x in part.inputs[:count].split(size)])
    targets = part.targets[:count]
    model.train()
    return {
        "loss": F.cross_entropy(logits, targets).item(),
        "accuracy": (logits.argmax(1) == targets).double().mean().item(),
    }


@dataclass
class History:
    """What a run leaves: the loss of every step, and (step, accuracy) on the validation part."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    diverged: bool = False

    def first_step(self, accuracy: float) -> int | None:
        """The first step with that accuracy, and on average that from then on.

        A rate that passes through it on its way to divergence has not learned anything.
        """
        if self.diverged:
            return None
        values = [value for _, value in self.accuracies]
        return next(
            (
                step
                for index, (step, value) in enumerate(self.accuracies)
                if value >= accuracy and fmean(values[index:]) >= accuracy
            ),
            None,
        )


def fit(
    model: nn.Module, train: Part, *, rate: float, steps: int, batch: int, seed: int,
    clip: float | None = None, validation: Part | None = None, every: int = 1,
    watch: Callable[[int, Part], Any] | None = None,
) -> History:  # fmt: skip
    """Train for `steps` updates, or until the loss is not finite.

    Args:
        validation: evaluated after `every` steps, and after the last.
        watch: called after each step with its number and its batch; the gradients are still there.
    """
    history = History()
    descent = optimizer(model, rate)
    for number, part in zip(range(steps), batches(train, batch, seed), strict=False):
        loss = step(model, descent, part, clip).item()
        history.losses.append(loss)
        if watch is not None:
            watch(number, part)
        if not math.isfinite(loss):
            history.diverged = True
            break
        done = number + 1
        if validation is not None and (done % every == 0 or done == steps):
            history.accuracies.append((done, evaluate(model, validation)["accuracy"]))
    return history
