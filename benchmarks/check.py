"""Correctness before speed: every candidate against float64 arithmetic.

The bounds are per element. `eps_s` is the spacing of the storage type at 1, `eps_c` that of the
arithmetic (float32, or float64 for float64 tensors). Each has the form

    rounding the result to storage:  eps_s * magnitude of what was rounded
    computing it:                    slack * eps_c * condition * scale of the terms

with condition = 1 + max |mean| / std: x - mean loses that factor, whoever subtracts. Ours has the
small slack. A peer has a larger one: it is checked to compute the same thing, not for its accuracy
(torch's channels-last statistics of float32 are plain sums, and off by more than the small one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.candidates import EPS, OURS, Calls, Data

SLACK = 16.0
PEER_SLACK = 1024.0
# Elements of the reference at a time. On the CPU the dozen float64 tensors of a block stay in
# cache; on a GPU they take 2 GB, and the two hundred operations on them are no longer small.
CPU_CHUNK = 1 << 18
GPU_CHUNK = 1 << 24
LARGE_MEAN = 1e3


@dataclass(frozen=True)
class Outcome:
    """The largest error in units of its bound, and where it was found."""

    worst: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound; a nan is not."""
        return self.worst <= 1.0


@dataclass(frozen=True)
class Expected:
    """A float64 value; its error may be `storage` + slack * `computing`."""

    name: str
    value: Tensor
    storage: Tensor
    computing: Tensor

    def worst(self, got: Tensor, slack: float) -> Outcome:
        """The largest error of `got`, in units of the bound."""
        error = (got.detach().double() - self.value).abs_()
        ratio = (error / (self.storage + (slack * self.computing + 1e-300))).max().item()
        return Outcome(ratio if ratio == ratio else float("inf"), self.name)


def _chunks(data: Data) -> Iterator[slice]:
    channels = data.x.shape[1]
    chunk = CPU_CHUNK if data.x.device.type == "cpu" else GPU_CHUNK
    step = max(1, chunk * channels // data.x.numel())
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, memory_format=torch.contiguous_format)


class _Reference:
    """Float64 values and bounds for one block of channels."""

    def __init__(self, data: Data, part: slice, relu: bool) -> None:
        """Copies the block `part` of `data`'s channels to float64."""
        self.x = _double(data.x[:, part])
        self.weight, self.bias = self._vector(data.weight[part]), self._vector(data.bias[part])
        self.residual = None if data.residual is None else _double(data.residual[:, part])
        self.buffers = self._vector(data.running_mean[part]), self._vector(data.running_var[part])
        self.relu = relu
        self.eps_s = torch.finfo(data.x.dtype).eps
        self.eps_c = torch.finfo(data.weight.dtype).eps
        self.reduced = [dim for dim in range(self.x.dim()) if dim != 1]
        var, self.mean = torch.var_mean(self.x, self.reduced, correction=0, keepdim=True)
        self.invstd = (var + EPS).rsqrt_()
        self.xhat = (self.x - self.mean).mul_(self.invstd)
        self.before = self._affine(self.xhat)

    def _vector(self, values: Tensor) -> Tensor:
        return _double(values).view(1, -1, *[1] * (self.x.dim() - 2))

    def _affine(self, xhat: Tensor) -> Tensor:
        """Weight, bias and residual put to a normalised x: the value before the activation."""
        z = (xhat * self.weight).add_(self.bias)
        return z if self.residual is None else z.add_(self.residual)

    def output(self) -> Expected:
        """Of the training forward."""
        return self._output("output", self.before, self.mean, self.invstd)

    def eval_output(self) -> Expected:
        """With the running statistics."""
        mean, var = self.buffers
        invstd = (var + EPS).rsqrt()
        before = self._affine((self.x - mean).mul_(invstd))
        return self._output("eval output", before, mean, invstd)

    def _output(self, name: str, before: Tensor, mean: Tensor, invstd: Tensor) -> Expected:
        magnitude = before.abs()
        if self.residual is not None:
            # Added by a separate op, it is rounded twice: |BN(x)| <= |BN(x) + r| + |r|.
            magnitude.add_(self.residual.abs(), alpha=2)
        condition = 1 + (mean.abs() * invstd).max()
        computing = self.eps_c * condition * (self.weight.abs().max() + 1)
        value = before.clamp_min(0) if self.relu else before
        return Expected(name, value, magnitude.mul_(self.eps_s), computing)

    def gradients(self, grad: Tensor) -> Iterator[Expected]:
        """In the order of the candidates' results."""
        dz = grad * (self.before > 0) if self.relu else grad
        grad_bias = dz.sum(self.reduced, keepdim=True)
        grad_weight = (dz * self.xhat).sum(self.reduced, keepdim=True)
        count = self.x.numel() // self.x.shape[1]
        grad_x = dz - (self.xhat * (grad_weight / count)).add_(grad_bias / count)
        grad_x.mul_(self.weight * self.invstd)
        unit = self.eps_c * (1 + (self.mean.abs() * self.invstd).max())
        scale = (self.weight.abs() * self.invstd).max() * grad.abs().max()
        nothing = torch.zeros((), dtype=torch.float64)
        yield Expected("grad_input", grad_x, grad_x.abs().mul_(self.eps_s), unit * scale)
        if self.residual is not None:
            yield Expected("grad_residual", dz, dz.abs() * self.eps_s, nothing)
        terms = (dz.abs() * (1 + self.xhat.abs())).sum(self.reduced)
        yield Expected("grad_weight", grad_weight.flatten(), nothing, unit * terms)
        yield Expected("grad_bias", grad_bias.flatten(), nothing, unit * terms)


def silence_kinks(data: Data) -> None:
    """Set dy to 0 where rounding decides on which side of ReLU's kink a value falls.

    There, either mask is a right answer; without dy the two give the same gradients.
    """
    for part in _chunks(data):
        reference = _Reference(data, part, relu=True)
        expected = reference.output()
        bound = expected.storage.add_(PEER_SLACK * expected.computing)
        data.grad[:, part].masked_fill_(reference.before.abs_() <= bound, 0)


@dataclass(frozen=True)
class _Results:
    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    @staticmethod
    def of(calls: Calls, directions: tuple[str, ...]) -> _Results:
        outputs = [calls.forward()] if "forward" in directions else []
        gradients = calls.backward() if "backward" in directions else ()
        with torch.no_grad():
            outputs += [calls.eval()] if "eval" in directions else []
        return _Results(tuple(outputs), gradients)

    def outcomes(self, part: slice, expected: list[Expected], slack: float) -> Iterator[Outcome]:
        for got, want in zip(self.outputs + self.gradients, expected, strict=True):
            yield want.worst(got[part] if got.dim() == 1 else got[:, part], slack)


def check(
    candidates: Mapping[str, Calls], data: Data, op: str, directions: tuple[str, ...]
) -> dict[str, Outcome]:
    """The worst outcome of each candidate over all results that `directions` produce.

    For an op with ReLU, `data` must have gone through `silence_kinks`. A candidate that raises
    has an infinite error, and the exception's text stands for the place.
    """
    worst: dict[str, Outcome] = {}
    results: dict[str, _Results] = {}
    for name, calls in candidates.items():
        try:
            results[name] = _Results.of(calls, directions)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            worst[name] = Outcome(float("inf"), text)
            continue
        worst[name] = Outcome(0.0, "")
        for y in results[name].outputs:
            if (y.shape, y.dtype) != (data.x.shape, data.x.dtype):
                worst[name] = Outcome(float("inf"), f"output: {y.dtype} of {tuple(y.shape)}")
    for part in _chunks(data):
        reference = _Reference(data, part, op != "bn")
        expected = [reference.output()] if "forward" in directions else []
        expected += [reference.eval_output()] if "eval" in directions else []
        if "backward" in directions:
            expected += reference.gradients(_double(data.grad[:, part]))
        for name, found in results.items():
            slack = SLACK if name == OURS else PEER_SLACK
            if worst[name].worst < float("inf"):
                found_here = found.outcomes(part, expected, slack)
                worst[name] = max([worst[name], *found_here], key=lambda outcome: outcome.worst)
    return worst
