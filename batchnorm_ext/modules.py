"""Batch normalisation modules: torch's own classes with another forward, and fused ones.

For each channel c of an input of shape (N, C, *):

    mean[c] = E[x[:, c]]                    (batch statistics)
    var[c]  = E[(x[:, c] - mean[c])^2]
    z[:, c] = (x[:, c] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c]
    y = activation(z + residual)

with the running estimates in place of the batch statistics in eval mode. The method is that of
Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift" (2015, https://arxiv.org/abs/1502.03167); each choice the paper leaves open
(biased variance to normalise, unbiased variance in the running estimate, `momentum=None` for a
cumulative average) is the one in the documentation of `torch.nn.BatchNorm2d`.

Parameters and buffers are torch's: `weight`, `bias`, `running_mean`, `running_var` and
`num_batches_tracked`, owned by torch's own base class. Checkpoints move between `torch.nn` and
this package, fused modules included, in both directions and without a change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from batchnorm_ext.accumulator import Accumulator
from batchnorm_ext.functional import _apply, _resolve_activation
from batchnorm_ext.policies import DEFAULT, Policies

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

_Self = TypeVar("_Self", bound="_Layer")

# Where a module is traced through instead of being one node (see _record_call), the graph gets
# one call of this function rather than whatever it does inside.
fx.wrap("_apply")


def _record_call(module: _NormBase, input: fx.Proxy, residual: object) -> Any:
    """Record `module(input)` as one `call_module` node, as fx does for torch's own modules.

    fx treats a module as a leaf only if its class lives in `torch.nn`. Traced through, batch
    norm would be frozen in the mode it was traced in; as a leaf it keeps following `train()`
    and `eval()`, and the graph looks as it does with `torch.nn.BatchNorm2d` in its place.

    None, for "trace through", where a leaf would be wrong: for the root of the trace (the node
    would call the whole graph again) and under forward hooks (fx has already run them on the
    proxies; the node would run them a second time).
    """
    tracer = input.tracer
    if not isinstance(tracer, fx.Tracer) or tracer.root is module:
        return None
    if module._forward_pre_hooks or module._forward_hooks:
        return None
    args = (input,) if residual is None else (input, residual)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


def _forward(
    module: _Layer,
    input: Any,  # a Tensor; a Proxy while fx traces
    residual: Tensor | None,
    activation: str,
    activation_param: float,
) -> Tensor:
    """Choose the tensors that take part in this mode and call the op: every module's forward.

    This runs once per layer and step, and small networks are bound by such time, so tensors are
    read from the module's dictionaries: `module.weight` goes through `Module.__getattr__`,
    which costs several times as much.
    """
    if isinstance(input, fx.Proxy):
        call = _record_call(module, input, residual)
        if call is not None:
            return call
    else:
        module._check_input_dim(input)

    parameters, buffers = module._parameters, module._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    except KeyError:  # parametrised, pruned, sharded or replicated: something else stands in
        weight, bias = module.weight, module.bias
        running_mean, running_var = module.running_mean, module.running_var

    momentum = module.momentum
    num_batches_tracked = accumulator = None
    flags: tuple[bool, ...] = ()
    if not module.training or module._frozen is not None:
        use_batch_stats = running_mean is None and running_var is None
    else:
        use_batch_stats = True
        if not module.track_running_stats:
            running_mean = running_var = None
        else:
            num_batches_tracked = buffers["num_batches_tracked"]
            if num_batches_tracked is None and momentum is None:
                momentum = 0.0  # no count to average over: torch leaves the estimates alone
            accumulator = module._accumulator
        policies = module.policies
        if policies is not DEFAULT:
            flags = policies.flags()
            single = policies.single_value == "running" and input.numel() == input.size(1)
            if single and not module._synchronizes:
                use_batch_stats, accumulator = running_mean is None, None
    if accumulator is not None:
        stand_ins = running_mean, running_var, num_batches_tracked = accumulator.buffers()
        momentum = 1.0
        flags = (False, *flags[1:])  # it has to see what is not finite
    arguments = (
        *(input, residual, weight, bias, running_mean, running_var, num_batches_tracked),
        *(use_batch_stats, momentum, module.eps, activation, activation_param, *flags),
    )
    count: int | Tensor | None = None
    if use_batch_stats and module.training and module._synchronizes:
        output, count = module._apply_synchronized(arguments)
    else:
        output = _apply(*arguments)
    if accumulator is not None:
        skip_nonfinite = policies.nonfinite_statistics == "skip"
        count = input.numel() // input.size(1) if count is None else count
        accumulator.add(count, stand_ins, skip_nonfinite)
    return output


class _Layer(_NormBase):
    """What every module of this package can do besides what torch's can."""

    #: What to do where torch leaves no choice; `set_policies` sets it for a whole model.
    policies: Policies = DEFAULT
    #: The names of the parameters that `freeze` stopped from being trained.
    _frozen: tuple[str, ...] | None = None
    #: At work in a block of `accumulate_statistics`.
    _accumulator: Accumulator | None = None
    #: Whether the statistics are those of several processes: `SyncBatchNorm`.
    _synchronizes = False

    def _apply_synchronized(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """Whether `freeze` was called, and not `unfreeze` since."""
        return self._frozen is not None

    def freeze(self: _Self, affine: bool = True) -> _Self:
        """Normalise with the running statistics whatever `train()` says, and leave them alone.

        Nothing then depends on the mini-batch, and backward needs no statistics. With `affine`,
        `weight` and `bias` are not trained either (`requires_grad` is False until `unfreeze`), and
        with that the input is not kept for backward: nothing is, or one bit for each element where
        there is a piecewise-linear activation. Smooth activations need it still.

        `training` follows `train()` and `eval()` as ever. It is no part of the state_dict.

        Returns:
            The module.

        Raises:
            ValueError: without running statistics (`track_running_stats=False`).
        """
        self._check_freezable()
        self.unfreeze()
        trained = [(n, p) for n, p in self.named_parameters() if affine and p.requires_grad]
        for _, parameter in trained:
            parameter.requires_grad_(False)
        self._frozen = tuple(name for name, _ in trained)
        return self

    def unfreeze(self: _Self) -> _Self:
        """Undo `freeze`: the parameters that were trained before are trained again.

        Returns:
            The module.
        """
        for name in self._frozen or ():
            self.get_parameter(name).requires_grad_(True)
        self._frozen = None
        return self

    def _check_freezable(self, name: str = "") -> None:
        if self.running_mean is None:
            raise ValueError(
                f"freeze() needs running statistics, but {name or 'the module'} has none "
                f"(track_running_stats=False)"
            )

    def extra_repr(self) -> str:
        """torch's, followed by what was set besides."""
        changed = [
            f", {name}={value}"
            for name, value in vars(self.policies).items()
            if value != getattr(DEFAULT, name)
        ]
        return "".join([super().extra_repr(), ", frozen" if self.frozen else "", *changed])


class _DropIn(_Layer, _BatchNorm):
    """What the classes below put before torch's."""

    if TYPE_CHECKING:  # torch's own constructor runs; editors and the documentation read this one

        def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float | None = 0.1,
            affine: bool = True,
            track_running_stats: bool = True,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            bias: bool = True,
        ) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input, None, "identity", 0.0)


class BatchNorm1d(_DropIn, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by this package.

    Constructor, state_dict, repr, semantics and errors are torch's. Because it is a subclass, the
    tools that ask for torch's batch norm by `isinstance`, or are given one (DDP, FSDP,
    `convert_sync_batchnorm`, `swa_utils.update_bn`, `fuse_conv_bn_eval`), treat it as one. Those
    that compare the exact class do not: `torch.fx.experimental.optimization.fuse` leaves it where
    it is, `torch.ao.quantization.fuse_modules` refuses it. `revert_batchnorm` before these.

    Formula: see the head of this module; `activation` is the identity and there is no residual.

    Args:
        num_features: C, the channels of the input.
        eps: added to the variance; positive in training mode.
        momentum: the share of the mini-batch in the new running statistics; None for the average of
            all mini-batches so far.
        affine: whether there are `weight` and `bias` to be trained.
        track_running_stats: whether there are running statistics. Without, eval mode too normalises
            with those of the mini-batch.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: False for a `weight` without a `bias`; not in torch 2.11, whose modules have no such
            argument.

    Shapes: (N, C) or (N, C, L), and the output has the input's shape; C is `num_features`.

    Dtypes: float32, float64, bfloat16 or float16 input; the parameters and buffers may have
    another dtype than the input, and the output has the input's.

    Errors: `ValueError` for an input of any other rank, for one value per channel in training
    mode, and for an `eps` that is not positive.

    Source: Ioffe and Szegedy (2015); the documentation of `torch.nn.BatchNorm1d`.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNorm1d(16)
        y = norm(torch.randn(32, 16))
        y = norm(torch.randn(32, 16, 100))
        ```
    """


class BatchNorm2d(_DropIn, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by this package, for input of shape (N, C, H, W).

    Everything else is as in `BatchNorm1d`. Contiguous and `channels_last` inputs are
    both computed where they lie.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNorm2d(16)
        x = torch.randn(8, 16, 28, 28)
        y = norm(x)
        y = norm(x.to(memory_format=torch.channels_last))
        ```
    """


class BatchNorm3d(_DropIn, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by this package, for input of shape (N, C, D, H, W).

    Everything else is as in `BatchNorm1d`. Contiguous and `channels_last_3d` inputs are
    both computed where they lie.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNorm3d(16)
        y = norm(torch.randn(4, 16, 8, 14, 14))
        ```
    """


class _LazyDropIn(_DropIn):
    """The same for the lazy ones, which are made without `num_features`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            eps: float = 1e-5,
            momentum: float | None = 0.1,
            affine: bool = True,
            track_running_stats: bool = True,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            bias: bool = True,
        ) -> None: ...


class LazyBatchNorm1d(_LazyDropIn, nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d`: becomes a `BatchNorm1d` of this package.

    `num_features` is taken from `input.shape[1]` of the first input. Constructor, state_dict
    and errors are torch's.

    Examples:
        ```python
        norm = batchnorm_ext.LazyBatchNorm1d()
        y = norm(torch.randn(32, 16))
        assert norm.num_features == 16
        ```
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyDropIn, nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d`: becomes a `BatchNorm2d` of this package.

    See `LazyBatchNorm1d`.

    Examples:
        ```python
        norm = batchnorm_ext.LazyBatchNorm2d()
        y = norm(torch.randn(8, 16, 28, 28))
        ```
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyDropIn, nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d`: becomes a `BatchNorm3d` of this package.

    See `LazyBatchNorm1d`.

    Examples:
        ```python
        norm = batchnorm_ext.LazyBatchNorm3d()
        y = norm(torch.randn(4, 16, 8, 14, 14))
        ```
    """

    cls_to_become = BatchNorm3d


class _BatchNormAct(_Layer):
    """Constructor, repr and forward of the fused modules.

    The base is the one that owns the parameters and buffers of torch's batch norm and reads its
    checkpoints, but not `_BatchNorm`: what replaces `_BatchNorm` modules knows nothing of the
    activation and would drop it.
    """

    activation: str
    activation_param: float

    def __init__(
        self,
        num_features: int,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        approximate: str = "none",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        resolved = _resolve_activation(activation, negative_slope, alpha, approximate)
        # Only what differs from the default is passed on: torch 2.11 does not know the argument.
        # Its `reset_parameters` needs a bias, so there torch's own refusal is the right answer.
        without_bias = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **without_bias
        )
        # The op's name and parameter of the activation, the only record of it: both may be
        # assigned later, and the repr follows.
        self.activation, self.activation_param = resolved

    def extra_repr(self) -> str:
        """torch's, followed by the activation as the constructor takes it."""
        if self.activation == "gelu_tanh":
            shown = "gelu, approximate=tanh"
        elif self.activation == "leaky_relu":
            shown = f"leaky_relu, negative_slope={self.activation_param}"
        elif self.activation == "elu":
            shown = f"elu, alpha={self.activation_param}"
        else:
            shown = self.activation
        return f"{super().extra_repr()}, activation={shown}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _forward(self, input, residual, self.activation, self.activation_param)


class BatchNormAct1d(_BatchNormAct):
    """Batch normalisation, an optional residual and an activation in one pass.

    `module(x, residual)` is `activation(BN(x) + residual)` and `module(x)` is
    `activation(BN(x))`, where BN is what `BatchNorm1d` computes; the formula is at the
    head of this module.

    Args:
        activation: "identity" (or None), "relu", "relu6", "leaky_relu", "elu", "silu", "gelu" or
            "hardswish".
        negative_slope: of "leaky_relu".
        alpha: of "elu".
        approximate: of "gelu": "none" or "tanh".

    The other arguments are those of `BatchNorm1d`.

    Shapes: (N, C) or (N, C, L); `residual` and the output have the input's shape, and
    `residual` may have any strides.

    Dtypes: as in `BatchNorm1d`; `residual` has the input's dtype. Torch's `+` would promote where
    they differ, as they may under autocast: `module(x, shortcut.to(x.dtype))`.

    Errors: those of `BatchNorm1d`, `ValueError` for an unknown activation, an error for a
    residual of another shape or dtype, and `TypeError` for `bias=False` in torch 2.11.

    State: parameters, buffers and the state_dict are those of `torch.nn.BatchNorm1d`; either
    loads the other's checkpoint. The activation is not part of it.

    It is a `torch.nn.Module` but not one of torch's `_BatchNorm`: torch's `convert_sync_batchnorm`
    leaves it as it is (this package's makes it a `SyncBatchNormAct`), and so do
    `swa_utils.update_bn` and `functorch`'s batch norm replacement. `fuse_conv_bn_eval` asks no
    questions: it folds the normalisation into the convolution, and the activation has to be applied
    to what that returns.

    Source: Ioffe and Szegedy (2015); the documentation of `torch.nn.BatchNorm1d` and of the
    activations in `torch.nn`.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNormAct1d(16, activation="gelu", approximate="tanh")
        y = norm(torch.randn(32, 16))
        ```
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchNormAct2d(_BatchNormAct):
    """Fused batch norm, residual and activation for input of shape (N, C, H, W).

    Everything else is as in `BatchNormAct1d`.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNormAct2d(16, activation="relu")
        x, shortcut = torch.randn(2, 8, 16, 28, 28)
        y = norm(x)
        y = norm(x, residual=shortcut)
        ```
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchNormAct3d(_BatchNormAct):
    """Fused batch norm, residual and activation for input of shape (N, C, D, H, W).

    Everything else is as in `BatchNormAct1d`.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNormAct3d(16, activation="leaky_relu", negative_slope=0.2)
        y = norm(torch.randn(4, 16, 8, 14, 14))
        ```
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim
