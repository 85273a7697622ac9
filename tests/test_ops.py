"""torch.library.opcheck on every operator: schema, fake kernels, autograd, tracing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from strategies import ACTIVATION_PARAMS, DTYPES, LAYOUTS, covering
from torch import Tensor
from torch.library import opcheck

OPS = torch.ops.batchnorm_ext

AXES: dict[str, list[Any]] = {
    "shape": [(4, 3), (2, 3, 5), (2, 5, 3, 4), (2, 3, 2, 1, 3), (6, 1), (3, 1, 4), (1, 2, 3)],
    "dtype": list(DTYPES),
    "layout": list(LAYOUTS),
    "activation": list(ACTIVATION_PARAMS),
    "residual": [None, "contiguous", "sliced"],
    "affine": ["both", "weight", "bias", "none"],
    "parameters": [None, torch.float32, torch.float64],
    "buffers": [True, False],
    "momentum": [0.1, None],
    "mask": [True, False],
    "gradients": [True, False],
}


class Sample:
    """The tensors of a row."""

    def __init__(self, row: dict[str, Any], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        shape, dtype = row["shape"], row["dtype"]
        c = shape[1]
        kind = row["parameters"] or dtype
        self.row = row
        self.x = LAYOUTS[row["layout"]](normal(*shape).to(dtype))
        self.dy = normal(*shape).to(dtype)
        residual = row["residual"]
        self.residual = LAYOUTS[residual](normal(*shape).to(dtype)) if residual else None
        self.weight = normal(c).to(kind) if row["affine"] in ("both", "weight") else None
        self.bias = normal(c).to(kind) if row["affine"] in ("both", "bias") else None
        self.mean, self.var = normal(c).to(kind), (normal(c).abs() + 0.5).to(kind)
        self.activation = (row["activation"], ACTIVATION_PARAMS[row["activation"]])

    def buffers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean, variance and counter."""
        if not self.row["buffers"]:
            return None, None, None
        return self.mean, self.var, torch.tensor(3)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Input, residual, weight, bias, with or without a gradient to compute."""
        tensors = (self.x, self.residual, self.weight, self.bias)
        wanted = self.row["gradients"]
        return tuple(None if t is None else t.detach().requires_grad_(wanted) for t in tensors)


def samples() -> Iterator[Any]:
    for seed, row in enumerate(covering(AXES, 2)):
        words = [str(v).removeprefix("torch.") for v in row.values()]
        yield pytest.param(Sample(row, seed), id="-".join(words))


SAMPLES = list(samples())
#: opcheck's default list has all four; the three inner operators have no autograd of their own.
INNER = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("sample", SAMPLES)
def test_forward_train(sample: Sample) -> None:
    arguments = (sample.x, sample.residual, sample.weight, sample.bias, *sample.buffers())
    rest = (sample.row["momentum"], 1e-5, *sample.activation, sample.row["mask"])
    opcheck(OPS.forward_train.default, (*arguments, *rest), test_utils=INNER[:2])


@pytest.mark.parametrize("sample", SAMPLES)
def test_forward_eval(sample: Sample) -> None:
    arguments = (sample.x, sample.residual, sample.weight, sample.bias, sample.mean, sample.var)
    opcheck(OPS.forward_eval.default, (*arguments, 1e-5, *sample.activation), test_utils=INNER[:2])


@pytest.mark.parametrize("sample", SAMPLES)
def test_backward(sample: Sample) -> None:
    """With the forward's own statistics and mask."""
    tensors = (sample.residual, sample.weight, sample.bias)
    _, mean, invstd, mask = OPS.forward_train(
        sample.x, *tensors, None, None, None, 0.1, 1e-5, *sample.activation, sample.row["mask"]
    )
    wanted = [
        True,
        sample.residual is not None,
        sample.weight is not None,
        sample.bias is not None,
    ]
    arguments = (sample.dy, sample.x, *tensors, mean, invstd, mask, True, *sample.activation)
    opcheck(OPS.backward.default, (*arguments, wanted), test_utils=INNER[:2])


#: Tracing takes longer, so fewer rows; each operator meets each value of each axis.
FEW = SAMPLES[:: max(len(SAMPLES) // 14, 1)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sample", FEW)
def test_batch_norm(sample: Sample, training: bool) -> None:
    """The differentiable one: registered autograd and dynamic shapes too."""
    mean, var, counter = sample.buffers() if training else (sample.mean, sample.var, None)
    arguments = (*sample.differentiable(), mean, var, counter, training)
    opcheck(OPS.batch_norm.default, (*arguments, sample.row["momentum"], 1e-5, *sample.activation))


@pytest.mark.parametrize("sample", FEW[::3])
def test_inner_operators_trace(sample: Sample) -> None:
    tensors = (sample.x, sample.residual, sample.weight, sample.bias)
    opcheck(
        OPS.forward_train.default,
        (*tensors, *sample.buffers(), 0.1, 1e-5, *sample.activation, sample.row["mask"]),
        test_utils=INNER,
    )
    opcheck(
        OPS.forward_eval.default,
        (*tensors, sample.mean, sample.var, 1e-5, *sample.activation),
        test_utils=INNER,
    )


def test_meta_tensors() -> None:
    """Shapes, dtypes and strides without data, on tensors that only describe themselves."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for training in (True, False):
        mean, var = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
        arguments = (x.to("meta"), None, None, None, mean, var, None, training, 0.1, 1e-5)
        y = OPS.batch_norm(*arguments, "relu", 0.0)
        assert y.is_meta and y.shape == x.shape and y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(6, 5), (2, 5), (6, 1), (2, 3, 4), (2, 1, 4), (2, 3, 1), (2, 3, 1, 1), (1, 3, 2, 2)]
)
def test_fake_strides(shape: tuple[int, ...], layout: str) -> None:
    """What tracing believes is what the kernels return, to the last stride that means anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = LAYOUTS[layout](torch.randn(shape))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for name in ("relu", "silu"):
        real = OPS.forward_train(x, None, None, None, None, None, None, 0.1, 1e-5, name, 0.0, True)
        with mode:
            faked = OPS.forward_train(
                fake, None, None, None, None, None, None, 0.1, 1e-5, name, 0.0, True
            )
        for a, b in zip(real, faked, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            strides = zip(a.shape, a.stride(), b.stride(), strict=True)
            assert all(p == q for size, p, q in strides if size > 1)


def test_schemas() -> None:
    """Buffers are declared as written to, everything else as read, and names are torch's."""
    schema = OPS.batch_norm.default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert written == {"running_mean", "running_var", "num_batches_tracked"}
    inner = OPS.forward_train.default._schema
    assert {a.name for a in inner.arguments if a.alias_info} == written
    for op in (OPS.forward_eval, OPS.backward):
        assert not any(a.alias_info for a in op.default._schema.arguments)
