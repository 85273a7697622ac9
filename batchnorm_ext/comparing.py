"""`compare`: what this package brings for one model."""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm_ext.comparison import Candidate, Comparison, Difference, Norms
from batchnorm_ext.convert import _OURS, _described, convert_batchnorm
from batchnorm_ext.fuse import Left, fuse_batchnorm, fusion_report, unfuse_batchnorm
from batchnorm_ext.modules import _DropIn, _Layer
from batchnorm_ext.progress import say
from batchnorm_ext.table import one_line
from batchnorm_ext.trial import (
    MEMORY,
    Arguments,
    Trial,
    Values,
    devices_of,
    difference,
    mean_squares,
)
from batchnorm_ext.turns import take_turns

__all__ = ["compare"]

_logger = logging.getLogger("batchnorm_ext")

#: What is done to a copy of the model whose batch norms are torch's; torch's own come first.
WAYS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "converted": convert_batchnorm,
    "fused": fuse_batchnorm,
}
# Each candidate compiles three graphs of the same forwards; dynamo would stop at 8 and not say so.
_RECOMPILES = 64


class _Key(NamedTuple):
    name: str
    compiled: bool


def compare(
    model: nn.Module,
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    compile: bool = False,
    rounds: int | None = None,
    seconds: float = 20.0,
) -> Comparison:
    """Measure what this package brings for `model`: time, memory and differences from torch.

    The candidates are the model with torch's batch norm, converted by `convert_batchnorm`, and
    converted and fused by `fuse_batchnorm`; with `compile` also `torch.compile` of each. Measured
    are, in turns and with quartiles, a training step (forward, loss, backward; freeing gradients is
    outside) and inference (eval mode, no gradients), the memory of a training step, and the largest
    difference of outputs and gradients from torch's in a first step from the same state with the
    same data and random numbers, in train mode and in eval mode.

    Differences are max|ours - torch's| / max|torch's| over all floating-point outputs, and over the
    gradients of all parameters and inputs that require one. Memory is on CUDA the peak of
    `torch.cuda.max_memory_allocated` during a step beyond what was allocated before it (its
    statistics are reset), on other devices what is kept between forward and backward: tensors saved
    for backward, each storage once, and the outputs, without parameters, buffers and inputs.

    `model` stays as it is, and so do torch's and Python's random number generators: all runs are on
    copies, which need that many times its memory. Hooks are copied with it and run there. A
    progress line goes to stderr where that is a terminal.

    Args:
        model: any module with batch norms of torch or ones made of them; modes inside it are those
            that `train()` and `eval()` give. Of any dtype, on the device of the inputs.
        inputs: a tensor, a tuple of positional arguments, or a dictionary of keyword arguments,
            which may also be the last of the tuple. Values may be nested.
        loss: from the model's outputs to a tensor with one element. By default the sum, over all
            floating-point tensors in the outputs, of the mean of their squares.
        compile: whether to run compiled candidates too; compiling takes minutes for large models.
        rounds: how often each is timed, in train mode and in eval mode; None lets `seconds` decide.
        seconds: time for measuring, in all; there are at least 5 and at most 200 rounds.

    Returns:
        The figures; `str()` of them is a table. What raised in one candidate is its `error`.

    Raises:
        ValueError: no batch norm of torch in the model, a model that can't be copied, inputs or
            a loss with which every candidate raised, or less than one round.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds should be at least 1, got {rounds}")
    arguments = Arguments.of(inputs)
    with _aside(devices_of(model, arguments), compile):
        base = _base(model)
        run = _Run(base, arguments, loss or mean_squares)
        for compiled in (False, True) if compile else (False,):
            for name in WAYS:
                run.begin(_Key(name, compiled))
        run.check()
        for mode in ("training", "inference"):
            run.measure(mode, rounds, seconds / 2)
        say("")
        return Comparison(
            run.subject(), _survey(base), MEMORY[run.device], tuple(run.candidates.values())
        )


@contextmanager
def _aside(devices: set[torch.device], compile: bool) -> Iterator[None]:
    """Random numbers, the logger and the compiler's limit are afterwards what they were."""
    state = random.getstate()
    with ExitStack() as stack:
        stack.callback(random.setstate, state)
        stack.enter_context(torch.random.fork_rng(sorted({d.index for d in devices})))
        # What conversion warns of is part of the result.
        stack.callback(setattr, _logger, "disabled", _logger.disabled)
        _logger.disabled = True
        if compile:
            from torch._dynamo import config

            stack.enter_context(config.patch(recompile_limit=_RECOMPILES))
        yield


def _base(model: nn.Module) -> nn.Module:
    """A copy with torch's batch norms wherever there can be."""
    try:
        base = unfuse_batchnorm(copy.deepcopy(model))
    except Exception as error:
        raise ValueError(
            f"a model that copy.deepcopy takes was required: {one_line(error)}"
        ) from error
    if not _torchs(base):
        raise ValueError(
            f"a model with batch norm modules of torch was required, {type(model).__name__} has "
            + ("only this package's own" if _owns(base) else "none")
        )
    return base


def _torchs(model: nn.Module) -> list[str]:
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, _BatchNorm) and not isinstance(m, _Layer)]


def _owns(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _Layer)]


def _survey(base: nn.Module) -> Norms:
    """What becomes of each batch norm."""
    found = _torchs(base)
    report = fusion_report(base)
    joined = {entry.norm for entry in report.fused}
    converted = dict(convert_batchnorm(copy.deepcopy(base)).named_modules())
    left = {
        name: _described(module, _OURS.get(parametrize.type_before_parametrizations(module)))
        for name, module in converted.items()
        if name in found and not isinstance(module, _DropIn) and name not in joined
    }
    others = {*found} - {*left} - joined
    return Norms(
        tuple(found),
        tuple(name for name in found if isinstance(converted[name], _DropIn)),
        tuple(name for name in found if name in joined),
        (
            *(Left(name, f"it is a {kind}") for name, kind in left.items()),
            *(Left(name, "this package's own in every row") for name in _owns(base)),
        ),
        tuple(x for x in (*report.unpaired, *report.refused) if x.norm in others),
    )


class _Run:
    """The candidates on their way: copies of `base`, their first steps, then their times."""

    def __init__(
        self, base: nn.Module, arguments: Arguments, loss: Callable[[Any], Tensor]
    ) -> None:
        self.candidates: dict[_Key, Candidate] = {}
        self._base, self._arguments, self._loss = base, arguments, loss
        self._devices = devices_of(base, arguments)
        self._trials: dict[_Key, Trial] = {}
        # Of torch's batch norm, not compiled and compiled: in eval and in train mode.
        self._expected: dict[bool, tuple[Values, Values]] = {}
        self.device = "cuda" if self._devices else "cpu"

    def subject(self) -> str:
        """Who was compared on what, and where."""
        where = f"cpu, threads: {torch.get_num_threads()}"
        if self._devices:
            where = torch.cuda.get_device_name(next(iter(self._devices)))
        return f"{type(self._base).__name__}, {self._arguments}, {where}, torch {torch.__version__}"

    def begin(self, key: _Key) -> None:
        """The candidate's first steps and its memory."""
        self.candidates[key] = Candidate(*key)
        say(f"{self.candidates[key].label}: first steps")
        try:
            model = WAYS[key.name](copy.deepcopy(self._base))
            trial = Trial(model, self._arguments, self._loss, self._devices, key.compiled)
            # Eval mode first: it leaves the statistics as they are.
            values = trial.evaluation(), trial.training()
            if key.name == "torch":
                self._expected[key.compiled] = values
            else:
                self._differ(key, *values)
            self._note(key, memory=trial.memory())
            self._trials[key] = trial
        except Exception as error:
            self._fail(key, error)

    def _differ(self, key: _Key, *values: Values) -> None:
        if key.compiled not in self._expected:
            return
        found = [
            Difference(*(difference(*pair) for pair in zip(ours, torchs, strict=True)))
            for ours, torchs in zip(values, self._expected[key.compiled], strict=True)
        ]
        self._note(key, eval_difference=found[0], training_difference=found[1])

    def _note(self, key: _Key, **figures: Any) -> None:
        self.candidates[key] = replace(self.candidates[key], **figures)

    def _fail(self, key: _Key, error: Exception) -> None:
        self._trials.pop(key, None)
        self._note(key, error=one_line(error))
        # The frames of the traceback hold the candidate's tensors.
        error.__traceback__ = None
        if self._devices:
            torch.cuda.empty_cache()

    def check(self) -> None:
        """Where every candidate raised, it was not the candidates."""
        self._expected.clear()
        if not self._trials:
            name, error = type(self._base).__name__, self.candidates[_Key("torch", False)].error
            raise ValueError(
                f"inputs and a loss that {name} can be trained with were required, "
                f"got {self._arguments}: {error}"
            )

    def measure(self, mode: str, rounds: int | None, seconds: float) -> None:
        """Times of "training" or "inference", in turns."""
        training = mode == "training"
        found = take_turns(
            list(self._trials),
            lambda key: self._trials[key].prepare(training),
            lambda key: self._trials[key].step() if training else self._trials[key].infer(),
            rounds=rounds,
            seconds=seconds,
            clock=self._clock,
            fail=self._fail,
            say=lambda text: say(f"{mode}: {text}"),
        )
        for key, times in found.items():
            self._note(key, **{mode: times})

    def _clock(self) -> float:
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()
