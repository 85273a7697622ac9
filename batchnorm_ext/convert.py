"""Exchange torch's batch norm modules for this package's in a whole model, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from batchnorm_ext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    _BatchNormAct,
    _DropIn,
    _Layer,
)
from batchnorm_ext.policies import DEFAULT
from batchnorm_ext.sync_modules import SyncBatchNorm, SyncBatchNormAct, _Synchronized

__all__ = [
    "convert_batchnorm",
    "convert_sync_batchnorm",
    "revert_batchnorm",
    "revert_sync_batchnorm",
]

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
_SYNCHRONIZED: dict[type[nn.Module], type[_Synchronized]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SyncBatchNorm),
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d, nn.SyncBatchNorm), SyncBatchNorm),
    **dict.fromkeys((BatchNormAct1d, BatchNormAct2d, BatchNormAct3d), SyncBatchNormAct),
}


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


def convert_sync_batchnorm(model: _Model, process_group: Any = None) -> _Model:
    """Make every batch norm of `model` share its statistics with other processes, in place.

    Modules whose class is exactly one of torch's or this package's batch norms, the fused ones
    included, become `SyncBatchNorm` or `SyncBatchNormAct`, at any depth, `model` itself included;
    a model that `fuse_batchnorm` has rewritten stays fused. As in `convert_batchnorm` the module
    object stays, with all that it holds: parameters, buffers, hooks, activation, policies.

    Left alone, and named in one warning of the logger `batchnorm_ext`: subclasses of torch's batch
    norm that this package doesn't know, and modules with a `forward` of their own.

    Args:
        model: any `torch.nn.Module`.
        process_group: a `torch.distributed.ProcessGroup`, also for modules that have another one
            already; None for all processes, and for its own group where a module has one.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: a lazy batch norm, which has to see a first input before; nothing is changed.
    """
    lazy = [
        name or "the model"
        for name, module in model.named_modules()
        if isinstance(module, _LazyNormBase) and module.has_uninitialized_params()
    ]
    if lazy:
        raise ValueError(
            f"convert_sync_batchnorm needs a first input before, for {', '.join(lazy)}"
        )
    local = {module: parametrize.type_before_parametrizations(module) for module in model.modules()}
    _exchange(model, _SYNCHRONIZED, leave=_BatchNorm, done=_Synchronized, verb="synchronised")
    for name, module in model.named_modules():
        if not isinstance(module, _Synchronized):
            continue
        own = getattr(module, "process_group", None)
        module.process_group = own if process_group is None else process_group
        if not issubclass(local[module], _Synchronized):
            module._local_class, module._path = local[module], name
    return model


def revert_sync_batchnorm(model: _Model) -> _Model:
    """Give every module converted by `convert_sync_batchnorm` its own class back, in place.

    Left alone, and named in one warning of the logger `batchnorm_ext`: those made as
    `SyncBatchNorm`, which take inputs of any rank and so have no other class.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, _Synchronized):
            continue
        if module._local_class is None:
            left.append(name or "the model")
            continue
        local = module._local_class
        del module._local_class, module._path
        if local is not nn.SyncBatchNorm:
            del module.process_group
        _change_class(module, local)
    if left:
        _logger.warning("batch norm modules made as SyncBatchNorm and left: %s", ", ".join(left))
    return model


def _exchange(
    model: _Model,
    table: Mapping[type[nn.Module], type[nn.Module]],
    *,
    leave: type[nn.Module] | tuple[type[nn.Module], ...],
    done: type | tuple[type, ...],
    verb: str,
) -> _Model:
    """Change the class of each module in `table`; log the `leave` that are not `done`."""
    changed, left = 0, []
    for name, module in model.named_modules():
        new = table.get(parametrize.type_before_parametrizations(module))
        why = "" if new is None else _hindrance(module, new)
        if new is not None and not why:
            _change_class(module, new)
            changed += 1
        elif isinstance(module, leave) and not isinstance(module, done):
            left.append(f"{name or 'the model'} ({_described(module, new)})")
    _logger.info("batch norm modules %s: %d", verb, changed)
    if left:
        _logger.warning("batch norm modules not %s: %s", verb, ", ".join(left))
    return model


def _described(module: nn.Module, new: type[nn.Module] | None) -> str:
    """Its class, and what hinders it from becoming `new`, where there is one for it."""
    cls = type(module)
    why = "" if new is None else _hindrance(module, new)
    return f"{cls.__module__}.{cls.__qualname__}{why}"


def _hindrance(module: nn.Module, new: type[nn.Module]) -> str:
    """What another class would not keep."""
    if "forward" in vars(module):
        return " with its own forward"
    if issubclass(new, _Layer) or not isinstance(module, _Layer):
        return ""
    if module.frozen:
        return ", frozen"
    return " with policies" if module.policies != DEFAULT else ""


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
