"""Modules whose mini-batch is spread over several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from batchnorm_ext.functional import _apply
from batchnorm_ext.modules import _BatchNormAct, _DropIn, _Layer
from batchnorm_ext.synchronized import Group, apply_synchronized

__all__ = ["SyncBatchNorm", "SyncBatchNormAct"]


class Ranks(NamedTuple):
    """A process group as it is stored: its members. It is looked up again when it is used."""

    ranks: tuple[int, ...]


class _Synchronized(_Layer):
    """The group, and the call that goes through it."""

    process_group: Any  # a ProcessGroup, Ranks, or None for all processes
    #: Where a converted module stands in its model, for messages.
    _path: str = ""
    #: The class before conversion; None if it was made as it is.
    _local_class: type[_NormBase] | None = None
    _synchronizes = True

    def _check_input_dim(self, input: Tensor) -> None:
        if self._local_class is not None:
            return self._local_class._check_input_dim(self, input)
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        return None

    def _apply_synchronized(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        """The output, and the count of values on all processes if there are several."""
        if self.policies.single_value == "running":
            raise ValueError(
                "single_value='running' needs the count of values on all processes before they "
                "are normalised, which SyncBatchNorm does not wait for"
            )
        group = self._group()
        if group is None:
            return _apply(*arguments), None
        # Without use_batch_stats, which is true.
        return apply_synchronized(group, *arguments[:7], *arguments[8:])

    def _group(self) -> Group | None:
        """Whom to share statistics with; None where there is nobody else."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        if isinstance(self.process_group, Ranks):
            self.process_group = _group_of(self.process_group.ranks)
        group = dist.group.WORLD if self.process_group is None else self.process_group
        size = dist.get_world_size(group)
        if group is None or size <= 1:
            return None
        layer = f"{type(self).__name__}({self.num_features})"
        return Group(group.group_name, size, f"{layer} {self._path}".rstrip())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the group's members: the group itself is this process's."""
        state = self.__dict__.copy()
        if self.process_group is not None and not isinstance(self.process_group, Ranks):
            ranks = dist.get_process_group_ranks(self.process_group)
            state["process_group"] = Ranks(tuple(ranks))
        return state


def _group_of(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    world = tuple(range(dist.get_world_size()))
    if tuple(ranks) == world:
        return None
    for group in dist.distributed_c10d._world.pg_map:
        if group is not dist.group.WORLD and tuple(dist.get_process_group_ranks(group)) == ranks:
            return group
    raise RuntimeError(
        f"a batch norm shares its statistics with the processes {list(ranks)}, and this process "
        "has no group of them; torch.distributed.new_group(ranks), on every process, makes it"
    )


class SyncBatchNorm(_Synchronized, _DropIn):
    """`torch.nn.SyncBatchNorm`, computed by this package, on the CPU too.

    In training mode, mean and variance are those of the mini-batches of all processes of
    `process_group` together, as of one process that had them all, the running statistics likewise.
    Gradients are those of the sum of all processes' losses with respect to this process's input;
    those of `weight` and `bias` are this process's part, which `DistributedDataParallel` averages.

    Processes may have mini-batches of any size, also none, with other spatial sizes. Each sends
    2 C + 1 numbers of float64 in forward and 2 C in backward, in one collective each. Combined in
    the order of ranks, so every process has the same bits, and the device is not waited for. In
    eval mode, without an initialised process group and with a single process it is `BatchNorm1d`
    and sends nothing.

    It is not a subclass of `torch.nn.SyncBatchNorm`, which `DistributedDataParallel` refuses on the
    CPU. `copy.deepcopy` and `pickle` keep which processes belong to the group; it is looked up
    again on first use.

    Args:
        process_group: a `torch.distributed.ProcessGroup`; None for all processes.

    The other arguments are those of `BatchNorm1d`.

    Shapes: (N, C) or (N, C, *). Dtypes: those of `BatchNorm1d`.

    Errors: those of `BatchNorm1d`; one value per channel on all processes together is an error on
    each of them. `RuntimeError` that names the layer where another process does not answer within
    the group's timeout.

    Source: Ioffe and Szegedy (2015); the documentation of `torch.nn.SyncBatchNorm`.

    Examples:
        ```python
        norm = batchnorm_ext.SyncBatchNorm(16)  # in each process
        y = norm(torch.randn(8, 16, 28, 28))
        ```
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        # Only what differs from the default: torch 2.11 does not know the argument.
        without_bias = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **without_bias
        )
        self.process_group = process_group


class SyncBatchNormAct(_Synchronized, _BatchNormAct):
    """`SyncBatchNorm`, an optional residual and an activation in one pass.

    `module(x, residual)` is `activation(SyncBN(x) + residual)`. The arguments are those of
    `BatchNormAct1d`, and `process_group`. Everything else is as in `SyncBatchNorm`.

    Examples:
        ```python
        norm = batchnorm_ext.SyncBatchNormAct(16, activation="silu")  # in each process
        x, shortcut = torch.randn(2, 8, 16, 28, 28)
        y = norm(x, residual=shortcut)
        ```
    """

    def __init__(
        self,
        num_features: int,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_group: Any = None,
        bias: bool = True,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        approximate: str = "none",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            activation,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            negative_slope=negative_slope,
            alpha=alpha,
            approximate=approximate,
            device=device,
            dtype=dtype,
        )
        self.process_group = process_group
