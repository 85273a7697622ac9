"""Exchange torch's batch norm modules for this package's in a whole model, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm_ext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    _BatchNormAct,
    _DropIn,
    _Layer,
)
from batchnorm_ext.policies import DEFAULT

__all__ = ["convert_batchnorm", "revert_batchnorm"]

_logger = logging.getLogger("batchnorm_ext")

_Model = TypeVar("_Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert_batchnorm(model: _Model) -> _Model:
    """Make every torch batch norm of `model` compute with this package, in place.

    Modules whose class is exactly `torch.nn.BatchNorm1d/2d/3d` or `LazyBatchNorm1d/2d/3d`
    become the class of the same name here, at any depth and `model` itself included.

    How: the module object stays and only its `__class__` changes, as torch itself does when a
    lazy module materialises. The classes here add a forward to torch's and no state, so nothing
    has to be carried over and nothing can be forgotten: parameters and buffers are the very same
    tensors (an optimizer made before stays valid), hooks of every kind, `requires_grad`, mode,
    dtype, device and parametrisations stay, a module shared by several parents stays shared, and
    so does any reference to it held elsewhere. A new object would have to reproduce each of these.

    Left alone, and named in one warning of the logger `batchnorm_ext`: subclasses of torch's
    batch norm (`SyncBatchNorm`, a library's own), whose behaviour this package doesn't know, and
    modules with a `forward` of their own, which would hide the new one. Modules of this package
    and its subclasses are already what they should be.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    return _exchange(model, _OURS, leave=_BatchNorm, done=_DropIn, verb="converted")


def revert_batchnorm(model: _Model) -> _Model:
    """Give every module converted by `convert_batchnorm` its torch class back, in place.

    Does so for modules whose class is exactly `BatchNorm1d/2d/3d` or `LazyBatchNorm1d/2d/3d`
    of this package, made by conversion or directly, under the same guarantees; for example
    before scripting a model, or pickling it whole for a process without this package.

    Left alone, and named in one warning of the logger `batchnorm_ext`: `BatchNormAct1d/2d/3d`,
    since torch has no module with their activation and residual, subclasses of the classes here,
    and modules that are frozen or have policies, which torch's would not follow.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    return _exchange(model, _TORCHS, leave=(_DropIn, _BatchNormAct), done=(), verb="reverted")


def _exchange(
    model: _Model,
    table: Mapping[type[nn.Module], type[nn.Module]],
    *,
    leave: type | tuple[type, ...],
    done: type | tuple[type, ...],
    verb: str,
) -> _Model:
    """Change the class of each module in `table`; log the `leave` that are not `done`."""
    changed, left = 0, []
    for name, module in model.named_modules():
        new = table.get(parametrize.type_before_parametrizations(module))
        why = "" if new is None else _hindrance(module)
        if new is not None and not why:
            _change_class(module, new)
            changed += 1
        elif isinstance(module, leave) and not isinstance(module, done):
            cls = type(module)
            left.append(f"{name or 'the model'} ({cls.__module__}.{cls.__qualname__}{why})")
    _logger.info("batch norm modules %s: %d", verb, changed)
    if left:
        _logger.warning("batch norm modules not %s: %s", verb, ", ".join(left))
    return model


def _hindrance(module: nn.Module) -> str:
    """What another class would not keep."""
    if "forward" in vars(module):
        return " with its own forward"
    if isinstance(module, _Layer) and module.frozen:
        return ", frozen"
    if isinstance(module, _Layer) and module.policies != DEFAULT:
        return " with policies"
    return ""


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Set `module`'s class, under its parametrisations if it has any.

    `torch.nn.utils.parametrize` gives a module a class of its own, derived from its real one,
    that holds a property per parametrised tensor. Copies of the module share that class, so it
    can't be altered: the same namespace is put over `new`.
    """
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        new = type(f"Parametrized{new.__name__}", (new,), own)
    module.__class__ = new
