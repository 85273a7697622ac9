"""What is set for all batch norms of a model at once."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import is_lazy

from batchnorm_ext.accumulator import Accumulator
from batchnorm_ext.modules import _Layer

__all__ = ["accumulate_statistics", "freeze_batchnorm", "set_policies", "unfreeze_batchnorm"]

_logger = logging.getLogger("batchnorm_ext")

_Model = TypeVar("_Model", bound=nn.Module)


def set_policies(
    model: _Model,
    *,
    nonfinite_statistics: Literal["update", "skip"] | None = None,
    single_value: Literal["error", "running", "zero_variance"] | None = None,
    recomputation: Literal["update", "skip"] | None = None,
) -> _Model:
    """Set the policies of every batch norm of this package in `model`, in place.

    What each means, and its default, is told by `Policies`. None leaves a policy as it is. They are
    no part of the state_dict.

    Args:
        model: any `torch.nn.Module`. torch's own batch norms in it cannot follow a policy and are
            named in a warning of the logger `batchnorm_ext`.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: an unknown value, or no batch norm of this package in `model`; nothing is set.
    """
    given: dict[str, Any] = {
        "nonfinite_statistics": nonfinite_statistics,
        "single_value": single_value,
        "recomputation": recomputation,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    layers = _layers(model, "follow no policies")
    chosen = [dataclasses.replace(layer.policies, **changes) for layer in layers.values()]
    for layer, policies in zip(layers.values(), chosen, strict=True):
        layer.policies = policies
    return model


def freeze_batchnorm(model: _Model, affine: bool = True) -> _Model:
    """Freeze every batch norm of this package in `model`: see `BatchNorm1d.freeze`.

    torch's own batch norms in it are named in a warning of the logger `batchnorm_ext`.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: no batch norm of this package in `model`, or one without running statistics;
            nothing is frozen.
    """
    layers = _layers(model, "are not frozen")
    for name, layer in layers.items():
        layer._check_freezable(name)
    for layer in layers.values():
        layer.freeze(affine)
    return model


def unfreeze_batchnorm(model: _Model) -> _Model:
    """Undo `freeze_batchnorm`, in place.

    Returns:
        `model`, the same object.
    """
    for layer in _layers(model, "are not frozen").values():
        layer.unfreeze()
    return model


@contextlib.contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Make the mini-batches of a `with` block one, as far as running statistics are concerned.

    Each forward pass in training mode is normalised by its own mini-batch, as always. The running
    statistics stand still until the block ends; then they move once, by mean and variance of all
    values that passed through a layer in the block, as one large mini-batch would have moved them,
    and `num_batches_tracked` counts one. An exception leaves them as they were.

        with accumulate_statistics(model):
            for inputs, targets in micro_batches:
                (loss(model(inputs), targets) / len(micro_batches)).backward()
        optimizer.step()

    Args:
        model: with batch norms of this package. torch's own in it move at each mini-batch, and are
            named in a warning of the logger `batchnorm_ext`.

    Raises:
        ValueError: no batch norm of this package in `model`, or a lazy one before its first input.
        RuntimeError: within another such block for the same layer.
    """
    pairs = []
    for name, layer in _layers(model, "move at every mini-batch").items():
        if layer.running_mean is None:
            continue
        if is_lazy(layer.running_mean):
            raise ValueError(f"accumulate_statistics needs a first input before, for {name}")
        if layer._accumulator is not None:
            raise RuntimeError(f"accumulate_statistics is at work for {name} already")
        pairs.append((layer, Accumulator(layer.running_mean)))
    for layer, accumulator in pairs:
        layer._accumulator = accumulator
    try:
        yield
        for layer, accumulator in pairs:
            accumulator.move(layer)
    finally:
        for layer, _ in pairs:
            layer._accumulator = None


def _layers(model: nn.Module, others: str) -> dict[str, _Layer]:
    """This package's batch norms, by name; a warning says that torch's `others`."""
    layers = {n or "the model": m for n, m in model.named_modules() if isinstance(m, _Layer)}
    left = [
        f"{name or 'the model'} ({type(module).__qualname__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, _Layer)
    ]
    if not layers:
        raise ValueError(
            "expected a model with batch norms of batchnorm_ext, but got one with none"
            + (f": {', '.join(left)}; convert_batchnorm(model) first" if left else "")
        )
    if left:
        _logger.warning("batch norms that %s: %s", others, ", ".join(left))
    return layers
