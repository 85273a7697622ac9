"""What the tests run on: memory layouts, cases, covering samples of them, hypothesis strategies."""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tolerances
import torch
from hypothesis import strategies as st
from torch import Tensor

from batchnorm_ext import _C, functional, reference

#: Where cases have their tensors. BATCHNORM_EXT_TEST_DEVICE=cuda runs the tests that are made of
#: cases on a GPU.
DEVICE = torch.device(os.environ.get("BATCHNORM_EXT_TEST_DEVICE", "cpu"))
#: The emulated CUDA device, where tests/conftest.py put it behind the operators for CPU tensors.
EMULATED: Any = sys.modules.get("torch_emulated")
EMULATED_DEVICES = ("hopper", "ampere", "turing") if EMULATED else ("as it is",)
HAS_CUDA_KERNELS = EMULATED is not None or DEVICE.type == "cuda"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: name -> the parameter that a test gives it; leaky_relu and elu get one that isn't the default.
ACTIVATION_PARAMS: dict[str, float] = {
    **dict.fromkeys(reference.ACTIVATIONS, 0.0),
    "leaky_relu": 0.125,
    "elu": 0.75,
}


def activation_arguments(name: str, param: float) -> dict[str, Any]:
    """The keyword arguments of batch_norm for an operator's activation name and parameter."""
    if name == "gelu_tanh":
        return {"activation": "gelu", "approximate": "tanh"}
    if name == "leaky_relu":
        return {"activation": name, "negative_slope": param}
    if name == "elu":
        return {"activation": name, "alpha": param}
    return {"activation": None if name == "identity" else name}


# ---- memory layouts: the same values, other strides ----


def _with_order(values: Tensor, order: Sequence[int]) -> Tensor:
    """Dimensions lie in memory in this order, outermost first."""
    inverse = [order.index(d) for d in range(values.dim())]
    return values.permute(*order).contiguous().permute(*inverse)


def contiguous(values: Tensor) -> Tensor:
    """(N, C, *) row by row."""
    return values.contiguous()


def channels_last(values: Tensor) -> Tensor:
    """C innermost, for any rank: (N, L, C) and channels_last_3d too."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def reversed_order(values: Tensor) -> Tensor:
    """The first dimension innermost."""
    return _with_order(values, range(values.dim())[::-1])


def swapped(values: Tensor) -> Tensor:
    """N inside of C: neither of the two layouts that kernels know."""
    return _with_order(values, (1, 0, *range(2, values.dim())))


def sliced(values: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor; what lies between is nan."""
    room = values.new_full([2 * size + 1 for size in values.shape], math.nan)
    view = room[tuple(slice(1, 2 * size + 1, 2) for size in values.shape)]
    view.copy_(values)
    return view


def cropped_channels_last(values: Tensor) -> Tensor:
    """A corner of a larger tensor with C innermost."""
    room = channels_last(values.new_full([size + 1 for size in values.shape], math.nan))
    view = room[tuple(slice(0, size) for size in values.shape)]
    view.copy_(values)
    return view


def unaligned(values: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address."""
    room = values.new_empty(values.numel() + 1)[1:]
    return room.copy_(values.reshape(-1)).view(values.shape)


def expanded_batch(values: Tensor) -> Tensor:
    """The first sample, N times: stride 0."""
    return values[:1].expand_as(values)


def expanded_channels(values: Tensor) -> Tensor:
    """The first channel, C times."""
    return values[:, :1].expand_as(values)


def expanded_value(values: Tensor) -> Tensor:
    """One value everywhere: what y.sum().backward() sends."""
    return values.reshape(-1)[0].expand_as(values)


Layout = Callable[[Tensor], Tensor]

#: Those that keep the values.
LAYOUTS: dict[str, Layout] = {
    f.__name__: f
    for f in (
        contiguous,
        channels_last,
        reversed_order,
        swapped,
        sliced,
        cropped_channels_last,
        unaligned,
    )
}
#: Those that repeat some.
EXPANDED: dict[str, Layout] = {
    f.__name__: f for f in (expanded_batch, expanded_channels, expanded_value)
}


#: The fields that are forced now.
_FORCED: dict[str, Any] = {}


@contextmanager
def forced_plan(**fields: Any) -> Iterator[None]:
    """The CPU plan's fields for the calls inside, besides those that are forced around it."""
    outer = dict(_FORCED)
    _FORCED.update(fields)
    _C.force_plan(**_FORCED)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(outer)
        _C.force_plan(**outer)


@contextmanager
def forced_cuda_plan(**fields: Any) -> Iterator[None]:
    """The CUDA plan's fields for the calls inside."""
    _C.force_cuda_plan(**fields)
    try:
        yield
    finally:
        _C.force_cuda_plan()


@contextmanager
def emulated_device(name: str, **how: int) -> Iterator[None]:
    """One of EMULATED_DEVICES for the calls inside; a real device stays what it is.

    `how` is that of torch_emulated's set_device.
    """
    if EMULATED is None:
        yield
        return
    EMULATED.set_device(name, **how)
    try:
        yield
    finally:
        EMULATED.set_device("hopper")


@contextmanager
def cpu_capability(name: str) -> Iterator[None]:
    """The instruction set for the calls inside."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(name)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


def available_capabilities() -> list[str]:
    """The instruction sets that this processor can run, the plainest first."""
    found = []
    built = _C.build_info()["cpu_capabilities_built"]
    assert isinstance(built, list)
    for name in built:
        try:
            with cpu_capability(name):
                found.append(name)
        except RuntimeError:
            continue
    return found


# ---- cases ----

#: (weight, bias): a dtype, "same" as the input, or None for no such parameter.
ParameterTypes = tuple[torch.dtype | str | None, torch.dtype | str | None]
PARAMETERS: dict[str, ParameterTypes] = {
    "same": ("same", "same"),
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float64),
    "half": (torch.float16, torch.float32),
    "weight": ("same", None),
    "bias": (None, torch.float32),
    "none": (None, None),
}
#: (running_mean, running_var).
BUFFERS: dict[str, tuple[torch.dtype | str, torch.dtype | str]] = {
    "same": ("same", "same"),
    "float32": (torch.float32, torch.float32),
    "mixed": (torch.float64, torch.bfloat16),
    "half": (torch.float16, torch.float64),
}
#: train updates buffers, batch has none and takes the batch's statistics, eval takes the buffers'.
MODES = ("train", "batch", "eval")


@dataclass
class Data:
    """The tensors of a case."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    grad_output: Tensor

    def differentiable(self) -> list[Tensor]:
        """Those that a gradient may be asked for, in the operators' order."""
        return [t for t in (self.input, self.residual, self.weight, self.bias) if t is not None]


@dataclass(frozen=True)
class Case:
    """One call, by names and numbers; :meth:`data` makes its tensors from the seed."""

    shape: tuple[int, ...] = (4, 3, 5)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    activation: str = "identity"
    residual: str | None = None
    parameters: str = "same"
    buffers: str = "same"
    mode: str = "train"
    grad_layout: str = "contiguous"
    momentum: float = 0.1
    eps: float = 1e-5
    offset: float = 1.5
    scale: float = 2.0
    seed: int = 0
    order: float = tolerances.RANDOM_ORDER
    plan: tuple[tuple[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        parts = [sizes, str(self.dtype).split(".")[1], self.layout, self.activation]
        parts += [f"residual={self.residual}", self.parameters, self.buffers, self.mode]
        parts += [self.grad_layout, *(f"{k}={v}" for k, v in self.plan)]
        return "-".join(parts)

    @property
    def training(self) -> bool:
        return self.mode != "eval"

    @property
    def activation_param(self) -> float:
        return ACTIVATION_PARAMS[self.activation]

    @property
    def count(self) -> int:
        """Values per channel."""
        return math.prod(self.shape) // self.shape[1]

    def data(self) -> Data:
        """Fresh tensors, with every stride as the layouts say."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        def typed(values: Tensor, kind: torch.dtype | str | None) -> Tensor | None:
            if kind is None:
                return None
            return values.to(DEVICE, self.dtype if isinstance(kind, str) else kind)

        layouts = LAYOUTS | EXPANDED
        c = self.shape[1]
        x = normal(*self.shape) * self.scale
        # Channels differ in mean and spread, so that a mix-up of channels is seen.
        spread = torch.linspace(0.5, 1.5, c, dtype=torch.float64)
        centre = self.offset * torch.linspace(1.0, -0.5, c, dtype=torch.float64)
        per_channel = (1, c, *([1] * (len(self.shape) - 2)))
        x = x * spread.view(per_channel) + centre.view(per_channel)
        residual = normal(*self.shape)
        dy = normal(*self.shape)
        weight, bias = PARAMETERS[self.parameters]
        mean, var = BUFFERS[self.buffers]
        has_buffers = self.mode != "batch"
        return Data(
            layouts[self.layout](x.to(DEVICE, self.dtype)),
            layouts[self.residual](residual.to(DEVICE, self.dtype)) if self.residual else None,
            typed(normal(c) * 0.5 + 1.0, weight),
            typed(normal(c), bias),
            typed(centre + 0.3 * normal(c), mean if has_buffers else None),
            typed((self.scale * spread).square() * (0.5 + normal(c).abs()), var)
            if has_buffers
            else None,
            layouts[self.grad_layout](dy.to(DEVICE, self.dtype)),
        )

    def call(self, data: Data) -> Tensor:
        """Our function on these tensors."""
        with forced_plan(**dict(self.plan)):
            return functional.batch_norm(
                data.input,
                data.running_mean,
                data.running_var,
                data.weight,
                data.bias,
                self.training,
                self.momentum,
                self.eps,
                residual=data.residual,
                **activation_arguments(self.activation, self.activation_param),
            )

    def oracle(self, data: Data) -> reference.Forward:
        """What it should give; to be asked before the call, which changes the buffers."""
        return reference.forward(
            data.input,
            data.weight,
            data.bias,
            residual=data.residual,
            running_mean=data.running_mean,
            running_var=data.running_var,
            training=self.training,
            eps=self.eps,
            activation=self.activation,
            activation_param=self.activation_param,
        )

    def bounds(self, data: Data, oracle: reference.Forward) -> tolerances.Bounds:
        """How far off it may be."""
        return tolerances.forward(
            self.dtype,
            data.input,
            oracle,
            weight=data.weight,
            bias=data.bias,
            residual=data.residual,
            training=self.training,
            eps=self.eps,
            activation=self.activation,
            activation_param=self.activation_param,
            order=self.order,
        )


def check_forward(case: Case) -> None:
    """Output, its dtype, and the buffers against the oracle; the other arguments unchanged."""
    data = case.data()
    oracle = case.oracle(data)
    bounds = case.bounds(data, oracle)
    buffers = [b.clone() for b in (data.running_mean, data.running_var) if b is not None]
    readable = [*data.differentiable(), data.grad_output]
    before = [t.clone() for t in readable]
    output = case.call(data)
    assert output.dtype == case.dtype
    tolerances.assert_within(output, oracle.output, bounds.output, "output")
    for tensor, copy in zip(readable, before, strict=True):
        assert torch.equal(tensor, copy), "an argument was written to"
    if case.mode == "batch":
        return
    assert data.running_mean is not None and data.running_var is not None
    if case.mode == "eval":
        assert torch.equal(data.running_mean, buffers[0])
        assert torch.equal(data.running_var, buffers[1])
        return
    expected = reference.update_running_statistics(
        buffers[0], buffers[1], oracle.mean, oracle.var, case.count, case.momentum
    )
    allowed = tolerances.running_statistics(
        *expected,
        bounds.statistics,
        oracle.mean,
        oracle.var,
        case.count,
        case.momentum,
        (buffers[0].dtype, buffers[1].dtype),
    )
    tolerances.assert_within(data.running_mean, expected[0], allowed[0], "running_mean")
    tolerances.assert_within(data.running_var, expected[1], allowed[1], "running_var")


def check_backward(case: Case) -> None:
    """All gradients against the oracle's explicit formulas.

    dy is 0 where the activation's derivative jumps within the rounding error of z.
    """
    data = case.data()
    oracle = case.oracle(data)
    bounds = case.bounds(data, oracle)
    certain = tolerances.away_from_kinks(
        oracle.pre_activation, bounds, case.dtype, case.activation, case.activation_param
    )
    dy = data.grad_output
    if not bool(certain.all()):
        dy = LAYOUTS.get(case.grad_layout, contiguous)(torch.where(certain, dy, 0.0))
    leaves = [t.requires_grad_() for t in data.differentiable()]
    output = case.call(data)
    with forced_plan(**dict(case.plan)):  # of backward too
        gradients = torch.autograd.grad(output, leaves, dy)
    got = dict(zip(_given(data), gradients, strict=True))
    expected = reference.backward(
        dy,
        data.input,
        data.weight,
        oracle.mean,
        oracle.invstd,
        oracle.pre_activation,
        training=case.training,
        activation=case.activation,
        activation_param=case.activation_param,
    )
    types = tuple(case.dtype if p is None else p.dtype for p in (data.weight, data.bias))
    allowed = tolerances.backward(
        case.dtype,
        dy,
        data.input,
        oracle,
        expected,
        bounds,
        weight=data.weight,
        training=case.training,
        activation=case.activation,
        activation_param=case.activation_param,
        parameter_dtypes=(types[0], types[1]),
    )
    for name, gradient in got.items():
        leaf = getattr(data, name)
        assert gradient.dtype == leaf.dtype, f"gradient of {name}: {gradient.dtype}"
        assert gradient.shape == leaf.shape
        tolerances.assert_within(
            gradient, getattr(expected, name), getattr(allowed, name), f"gradient of {name}"
        )


def _given(data: Data) -> list[str]:
    names = ("input", "residual", "weight", "bias")
    return [name for name in names if getattr(data, name) is not None]


# ---- covering samples ----


def covering(
    axes: Mapping[str, Sequence[Any]], strength: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows in which any `strength` axes take all combinations of their values.

    Greedy: each row starts from a combination that is still missing and is filled up at random,
    the best of a few tries.
    """
    generator = random.Random(seed)
    names = list(axes)
    groups = list(itertools.combinations(range(len(names)), strength))
    missing = {
        (group, values)
        for group in groups
        for values in itertools.product(*(range(len(axes[names[i]])) for i in group))
    }
    order = sorted(missing)
    generator.shuffle(order)
    rows = []
    for group, values in order:
        if (group, values) not in missing:
            continue
        best: tuple[int, list[int]] | None = None
        for _ in range(6):
            row = [generator.randrange(len(axes[name])) for name in names]
            for i, value in zip(group, values, strict=True):
                row[i] = value
            gain = sum((g, tuple(row[i] for i in g)) in missing for g in groups)
            if best is None or gain > best[0]:
                best = gain, row
        assert best is not None
        row = best[1]
        missing.difference_update((g, tuple(row[i] for i in g)) for g in groups)
        rows.append({name: axes[name][i] for name, i in zip(names, row, strict=True)})
    return rows


def covering_cases(
    axes: Mapping[str, Sequence[Any]],
    strength: int = 2,
    others: Mapping[str, Sequence[Any]] | None = None,
) -> list[Case]:
    """A Case from each row, each with its own seed.

    With ``others`` there are rows, too, in which any two of all the axes take all combinations;
    otherwise the others' values are random.
    """
    generator = random.Random(0)
    rows = covering(axes, strength)
    for row in rows:
        row.update({name: generator.choice(values) for name, values in (others or {}).items()})
    if others:
        rows += covering({**axes, **others}, 2)
    return [Case(**row, seed=i) for i, row in enumerate(rows)]


# ---- hypothesis ----


@st.composite
def strided(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The values in any order of dimensions in memory, with steps, gaps and an offset."""
    order = draw(st.permutations(range(values.dim())))
    steps = [draw(st.integers(1, 3)) for _ in order]
    gaps = [draw(st.integers(0, 2)) for _ in order]
    sizes = [s * step + gap for s, step, gap in zip(values.shape, steps, gaps, strict=True)]
    room = _with_order(values.new_full(sizes, math.nan), order)
    view = room[
        tuple(
            slice(gap, gap + size * step, step) if size else slice(0, 0)
            for size, step, gap in zip(values.shape, steps, gaps, strict=True)
        )
    ]
    view.copy_(values)
    return view


@st.composite
def repeated(draw: st.DrawFn, values: Tensor) -> Tensor:
    """One slice of a random set of dimensions, expanded over them."""
    for dim in draw(st.sets(st.integers(0, values.dim() - 1))):
        values = values.narrow(dim, 0, 1).expand_as(values)
    return values


@st.composite
def shapes(draw: st.DrawFn, *, minimum: int = 1, values_per_channel: int = 2) -> tuple[int, ...]:
    """(N, C, *), two to five dimensions, small, with odd sizes as likely as even ones."""
    rank = draw(st.integers(0, 3))
    n = draw(st.integers(minimum, 9))
    c = draw(st.one_of(st.integers(1, 9), st.sampled_from((16, 17, 31, 33, 65))))
    spatial = [draw(st.integers(minimum, 7)) for _ in range(rank)]
    while n * math.prod(spatial) < values_per_channel:
        n += 1
    return (n, c, *spatial)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; values in the worst order are possible, so the bounds allow for it."""
    return Case(
        shape=draw(shapes()),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(list(LAYOUTS))),
        activation=draw(st.sampled_from(list(ACTIVATION_PARAMS))),
        residual=draw(st.sampled_from([None, *LAYOUTS])),
        parameters=draw(st.sampled_from(list(PARAMETERS))),
        buffers=draw(st.sampled_from(list(BUFFERS))),
        mode=draw(st.sampled_from(MODES)),
        grad_layout=draw(st.sampled_from([*LAYOUTS, *EXPANDED])),
        momentum=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        eps=draw(st.sampled_from((1e-5, 1e-3, 1e-12))),
        offset=draw(st.sampled_from((0.0, 1.0, -30.0))),
        seed=draw(st.integers(0, 2**20)),
        order=tolerances.WORST_ORDER,
        plan=draw(plans()),
    )


@st.composite
def plans(draw: st.DrawFn) -> tuple[tuple[str, Any], ...]:
    """Fields of a CPU plan to force; those that a call can't have are not taken."""
    choices: dict[str, tuple[Any, ...]] = {
        "scheme": ("planes", "expanded"),
        "cooperative": (False, True),
        "stream": (False, True),
        "threads": (1, 2, 3),
        "unit_channels": (1, 2, 8, 64),
        "fold": (1, 2, 5),
        "group_rows": (1, 8, 64),
    }
    names = draw(st.sets(st.sampled_from(sorted(choices)), max_size=3))
    return tuple((name, draw(st.sampled_from(choices[name]))) for name in sorted(names))
