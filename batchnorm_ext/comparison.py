"""What `compare` found, and how it is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchnorm_ext.fuse import Left
from batchnorm_ext.table import Column, number, render, shorten, unit
from batchnorm_ext.turns import Quartiles

__all__ = ["Candidate", "Comparison", "Difference", "Norms"]

_WIDTH = 80
# Reasons with a line each; the rest is counted.
_REASONS = 5
_TORCH = "torch"


@dataclass(frozen=True)
class Difference:
    """Largest difference of a first step from torch's, relative to torch's largest magnitude."""

    outputs: float
    gradients: float


@dataclass(frozen=True)
class Candidate:
    """The figures of one way to run the model; None is what could not be measured.

    `name` is "torch", "converted" or "fused"; `training` and `inference` are seconds of a step,
    `memory` is bytes (`Comparison.memory` says which). The differences, in train mode and in eval
    mode, are from torch's batch norm run the same way, compiled or not, and None for that itself.
    `error` is one line, empty where nothing was wrong.
    """

    name: str
    compiled: bool = False
    training: Quartiles | None = None
    inference: Quartiles | None = None
    memory: int | None = None
    training_difference: Difference | None = None
    eval_difference: Difference | None = None
    error: str = ""

    @property
    def label(self) -> str:
        """The name in the table."""
        return f"{self.name}, compiled" if self.compiled else self.name


@dataclass(frozen=True)
class Norms:
    """The names of a model's batch norms.

    `found` are those of torch, `converted` those that `convert_batchnorm` takes, `joined` those
    that `fuse_batchnorm` joins with the add or activation after them. `left` and `unjoined` are the
    others, with the reason: left by the one, or not joined by the other. Batch norms of this
    package that torch has none for are the same for every candidate, and among those `left`.
    """

    found: tuple[str, ...]
    converted: tuple[str, ...]
    joined: tuple[str, ...]
    left: tuple[Left, ...]
    unjoined: tuple[Left, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. `str()` of it is the table, 80 characters wide.

    `subject` names the model, its inputs and where it ran, `memory` what the bytes are.

    Examples:
        ```python
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        result = batchnorm_ext.compare(model, torch.randn(4, 3, 8, 8), rounds=3)
        print(result)
        print(result.candidates[-1].training.median)  # seconds
        ```
    """

    subject: str
    norms: Norms
    memory: str
    candidates: tuple[Candidate, ...]

    @property
    def compared(self) -> bool:
        """Whether anything was: torch's batch norm, and another in the same way."""
        ways = [(c.name == _TORCH, c.compiled) for c in self.candidates if not c.error]
        return any((True, compiled) in ways for torchs, compiled in ways if not torchs)

    def torchs(self, candidate: Candidate) -> Candidate:
        """Torch's batch norm, run the same way."""
        of = (c for c in self.candidates if c.name == _TORCH and c.compiled == candidate.compiled)
        return next(of)

    def table(self, width: int = _WIDTH) -> str:
        """As text of lines of at most `width` characters, with fewer columns where it is narrow."""
        training = _columns(self, "training step", training=True)
        inference = _columns(self, "inference", training=False)
        parts = [[self.subject], [render(training, width)], [render(inference, width)]]
        parts.append([f"{c.label}: {c.error}" for c in self.candidates if c.error])
        parts.append([*_norm_lines(self.norms)])
        tables = parts[1:3]
        return "\n\n".join(
            "\n".join(part if part in tables else (shorten(line, width) for line in part))
            for part in [*parts, textwrap.wrap(_legend(self.memory), width)]
            if part
        )

    def __str__(self) -> str:
        return self.table()


def _columns(of: Comparison, heading: str, training: bool) -> list[Column]:
    """One row for each candidate; a higher worth stays longer on a narrow screen."""
    candidates = of.candidates
    times = [c.training if training else c.inference for c in candidates]
    apart = [c.training_difference if training else c.eval_difference for c in candidates]
    name, scale = unit([t.median for t in times if t])
    ranges = [f"{number(t.q1 / scale)}-{number(t.q3 / scale)}" if t else "" for t in times]
    gains = [_gain(of.torchs(c), c, training) for c in candidates]
    memory = [
        number(c.memory / 1e6) if training and c.memory is not None else "" for c in candidates
    ]
    return [
        Column(heading, [c.label for c in candidates], 9),
        Column(name, [number(t.median / scale) if t else "-" for t in times], 8),
        Column("quartiles", ranges, 1),
        Column("gain", gains, 6),
        Column("MB", memory, 4),
        Column("outputs", [_size(d.outputs) if d else "" for d in apart], 3),
        Column("gradients", [_size(d.gradients) if d else "" for d in apart], 2),
    ]


def _size(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def _gain(torchs: Candidate, ours: Candidate, training: bool) -> str:
    a, b = (c.training if training else c.inference for c in (torchs, ours))
    if a is None or b is None or torchs is ours:
        return ""
    return "~" if a.overlaps(b) else f"{a.median / b.median:.2f}x"


def _norm_lines(norms: Norms) -> Iterator[str]:
    found, converted, joined = (len(x) for x in (norms.found, norms.converted, norms.joined))
    yield f"batch norms: {found}; converted: {converted}; joined with what follows: {joined}"
    reasons: dict[str, list[str]] = {}
    for what, entries in (("not converted", norms.left), ("not joined", norms.unjoined)):
        for entry in entries:
            reasons.setdefault(f"{what}, {entry.reason}", []).append(entry.norm or "the model")
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for reason, names in ordered[:_REASONS]:
        yield f"{len(names)} {reason}: {', '.join(names)}"
    if len(ordered) > _REASONS:
        rest: Sequence[str] = [name for _, names in ordered[_REASONS:] for name in names]
        yield f"{len(rest)} more for other reasons: see .norms of the result, or fusion_report"


def _legend(memory: str) -> str:
    return (
        "Gain: torch's time / this one's, run the same way; ~ where the quartiles overlap. "
        f"MB: {memory}. Outputs, gradients: largest difference from torch's in a first step, in "
        "train and in eval mode, relative to torch's largest magnitude."
    )
