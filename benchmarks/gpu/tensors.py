"""What is timed and profiled: the operators' calls on tensors that lie in a pool of random values.

The pool is drawn once, on the device; every tensor is a view of it, so that no time goes into data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm_ext import _C, reference
from benchmarks.candidates import EPS, MOMENTUM, Data
from benchmarks.gpu import emulated

#: Elements of the pool. The largest tensor is 128x256x56x56 or 128x64x112x112.
POOL = 1 << 16 if emulated.WANTED else 1 << 28
#: Tensors begin at multiples of so many elements: whole lines of memory.
STEP = 1 << 10
#: Channels that are compared with the formulas in float64.
COMPARED = 3


class Samples:
    """Tensors of any case, from one pool for each dtype."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.random = torch.Generator(self.device).manual_seed(0)
        self.pools: dict[torch.dtype, Tensor] = {}

    def _pool(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.pools:
            normal = torch.randn(POOL, device=self.device, generator=self.random)
            self.pools[dtype] = normal.to(dtype)
        return self.pools[dtype]

    def _cut(self, count: int, dtype: torch.dtype, number: int) -> Tensor:
        """The `number`-th stretch of the pool, with a beginning of its own."""
        pool = self._pool(dtype)
        room = (pool.numel() - count) // STEP
        if room < 0:
            raise ValueError(f"{count} elements, but the pool has {pool.numel()}")
        # Apart by the golden ratio of the room: neighbours overlap as little as can be.
        start = STEP * int(room * math.modf(number * 0.6180339887)[0])
        return pool[start : start + count]

    def words(self, count: int, number: int) -> Tensor:
        """So many bytes to copy."""
        return self._cut(max(count // 4, 1), torch.float32, number)

    def of(self, sizes: tuple[int, ...], layout: str, dtype: str, op: str, seed: int) -> Sample:
        """The tensors of a call; another seed, other memory."""
        count, channels = math.prod(sizes), sizes[1]

        def image(number: int) -> Tensor:
            flat = self._cut(count, getattr(torch, dtype), 3 * seed + number)
            if layout == "channels_first" or len(sizes) == 2:
                return flat.view(sizes)
            return flat.view(sizes[0], *sizes[2:], channels).movedim(-1, 1)

        parameters = torch.float64 if dtype == "float64" else torch.float32

        def vector(number: int) -> Tensor:
            return 0.1 * self._cut(channels, parameters, number)

        return Sample(
            op=op,
            layout=layout,
            x=image(0),
            residual=image(1) if op == "bn_add_relu" else None,
            grad=image(2),
            weight=1 + vector(3),
            bias=vector(4),
            running_mean=vector(5),
            running_var=1 + vector(6).abs(),
        )


@dataclass
class Sample:
    """The tensors of one call."""

    op: str
    layout: str
    x: Tensor
    residual: Tensor | None
    grad: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @property
    def activation(self) -> str:
        """By its operator's name."""
        return "identity" if self.op == "bn" else "relu"

    def data(self) -> Data:
        """For a module: leaves of their own, on the same memory."""
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_()
            for tensor in (self.x, self.residual, self.weight, self.bias)
        ]
        x, residual, weight, bias = leaves
        assert x is not None and weight is not None and bias is not None
        return Data(x, residual, self.grad, weight, bias, self.running_mean, self.running_var)

    # ---- calls -------------------------------------------------------------------------------

    def call(self, direction: str) -> Callable[[], Any]:
        """The operator that a pass is."""
        if direction == "backward":
            return self._backward()
        return self.forward if direction == "forward" else self.evaluate

    def forward(self) -> tuple[Tensor, ...]:
        """y, mean, invstd, mask."""
        return torch.ops.batchnorm_ext.forward_train.default(
            self.x, self.residual, self.weight, self.bias, self.running_mean, self.running_var,
            None, MOMENTUM, EPS, self.activation, 0.0, self.residual is not None,
        )  # fmt: skip

    def evaluate(self) -> tuple[Tensor, ...]:
        """y, and no mask."""
        return torch.ops.batchnorm_ext.forward_eval.default(
            self.x, self.residual, self.weight, self.bias, self.running_mean, self.running_var,
            EPS, self.activation, 0.0, False,
        )  # fmt: skip

    def _backward(self) -> Callable[[], tuple[Tensor, ...]]:
        _, mean, invstd, mask = self.forward()
        wanted = [True, self.residual is not None, True, True]
        return functools.partial(
            torch.ops.batchnorm_ext.backward.default,
            self.grad, self.x, None, self.weight, self.bias, mean, invstd,
            mask if self.residual is not None else None, True, self.activation, 0.0, wanted,
        )  # fmt: skip

    def plan(
        self, direction: str, device: _C.CudaDevice, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the call is cut into; `fields` are prescribed."""
        n, c, *spatial = self.x.shape
        kept, backward = self.residual is not None, direction == "backward"
        layout = "channels_last" if math.prod(spatial) == 1 else self.layout
        plan = _C.plan_cuda(
            layout,
            str(self.x.dtype).removeprefix("torch."),
            n,
            c,
            math.prod(spatial),
            direction,
            device=device,
            residual=kept and not backward,
            masked=kept and direction != "eval",
            outputs=2 if kept and backward else 1,
            **fields,
        )
        return dict(plan)

    # ---- is it right? ------------------------------------------------------------------------

    def error(self, direction: str) -> float:
        """The largest error of a call's output, in units of its bound; of a few channels."""
        emulated.use_tests()
        import tolerances

        channels = self.x.shape[1]
        some = sorted({0, channels // 2, channels - 1})[:COMPARED]

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, some]

        x, residual, grad = of(self.x), of(self.residual), of(self.grad)
        assert x is not None and grad is not None
        weight, bias = self.weight[some], self.bias[some]
        training = direction != "eval"
        oracle = reference.forward(
            x,
            weight,
            bias,
            residual=residual,
            running_mean=self.running_mean[some],
            running_var=self.running_var[some],
            training=training,
            eps=EPS,
            activation=self.activation,
        )
        settings: dict[str, Any] = {
            "weight": weight, "training": training, "activation": self.activation,
        }  # fmt: skip
        bounds = tolerances.forward(
            x.dtype, x, oracle, bias=bias, residual=residual, eps=EPS, **settings
        )
        if direction != "backward":
            got = self.call(direction)()[0][:, some]
            return _worst(got, oracle.output, bounds.output)
        # Where rounding decides about the activation's derivative, either is right.
        certain = tolerances.away_from_kinks(
            oracle.pre_activation, bounds, x.dtype, self.activation, 0.0
        )
        expected = reference.backward(
            grad, x, weight, oracle.mean, oracle.invstd, oracle.pre_activation,
            training=True, activation=self.activation,
        )  # fmt: skip
        allowed = tolerances.backward(x.dtype, grad, x, oracle, expected, bounds, **settings)
        got = self.call(direction)()[0][:, some]
        # An uncertain element moves the sums of its channel by one term of so many.
        moved = 64.0 * (~certain).sum() / (x.numel() / len(some)) * oracle.invstd.max()
        return _worst(got[certain], expected.input[certain], allowed.input[certain] + moved)


def _worst(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    error = (got.double() - expected).abs() / bound
    worst = float(error.max()) if error.numel() else 0.0
    return round(worst, 4) if worst == worst else math.inf
