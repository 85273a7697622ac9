"""Strides: of the input, the residual, the gradient, the parameters, the buffers, the results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, EXPANDED, LAYOUTS, Case, channels_last, contiguous
from torch import Tensor

from batchnorm_ext import functional

SHAPES = [(6, 5), (3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)]
#: What each input layout's results have: its own where that is dense, else the nearest.
RESULT = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "cropped_channels_last": channels_last,
    "unaligned": contiguous,
    "sliced": contiguous,
    "reversed_order": contiguous,
    "swapped": contiguous,
}


def _strides(tensor: Tensor) -> list[int]:
    """Strides that mean something."""
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _gradients(case: Case, data: strategies.Data, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in data.differentiable()]
    names = [n for n in ("input", "residual", "weight", "bias") if getattr(data, n) is not None]
    for name, leaf in zip(names, leaves, strict=True):
        setattr(data, name, leaf)
    output = case.call(data)
    return (output.detach(), *torch.autograd.grad(output, leaves, dy))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_have_the_nearest_layout(shape: tuple[int, ...], layout: str, mode: str) -> None:
    case = Case(shape, layout=layout, activation="relu", residual="sliced", mode=mode)
    data = case.data()
    output, dx, dresidual, *_ = _gradients(case, data, data.grad_output)
    expected = RESULT[layout](torch.empty(shape))
    if layout == "reversed_order" and len(shape) == 2:  # a transposed matrix: C isn't innermost
        expected = contiguous(torch.empty(shape))
    for result in (output, dx, dresidual):
        assert _strides(result) == _strides(expected)


def test_formats_that_torch_knows() -> None:
    """A channels_last network stays so, as with torch.nn.functional.batch_norm."""
    for shape, form in (
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 2, 3, 4), torch.channels_last_3d),
    ):
        x = torch.randn(shape).to(memory_format=form)
        ours = functional.batch_norm(x, None, None, training=True)
        torchs = torch.nn.functional.batch_norm(x, None, None, training=True)
        assert ours.is_contiguous(memory_format=form)
        assert ours.stride() == torchs.stride()


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_tensors_strides_change_nothing(
    shape: tuple[int, ...], layout: str, activation: str
) -> None:
    """Bit for bit the same, however the residual and dy lie in memory."""
    case = Case(shape, layout=layout, activation=activation, residual="contiguous")
    first = case.data()
    expected = _gradients(case, first, first.grad_output)
    for residual_layout, grad_layout in itertools.product(LAYOUTS, LAYOUTS):
        data = case.data()
        assert data.residual is not None
        data.residual = LAYOUTS[residual_layout](data.residual)
        got = _gradients(case, data, LAYOUTS[grad_layout](data.grad_output))
        for ours, wanted in zip(got, expected, strict=True):
            assert torch.equal(ours, wanted), (residual_layout, grad_layout)


@pytest.mark.parametrize("with_input", [True, False], ids=["input", "no input"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_reads_the_mask_in_its_own_layout(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], with_input: bool
) -> None:
    """In whatever layout backward gets its tensors, it returns gradients in that one."""
    operators = torch.ops.batchnorm_ext
    data = Case(shape, activation="relu", residual="contiguous").data()
    x, dy = data.input.detach(), data.grad_output
    c = shape[1]
    mean, var = torch.zeros(c), torch.ones(c)
    rest = (None, None, mean, var, 1e-5, "relu", 0.0, True)
    y, mask = operators.forward_eval(layout(x), data.residual, *rest)
    statistics = operators.eval_statistics(mean, var, 1e-5)
    for arranged in (contiguous, channels_last):
        dx, dresidual, _, _ = operators.backward(
            arranged(dy), arranged(x) if with_input else None, None, None, None, *statistics, mask,
            False, "relu", 0.0, [True, True, False, False],
        )  # fmt: skip
        torch.testing.assert_close(dresidual, dy * (y > 0), rtol=0, atol=0)
        torch.testing.assert_close(dx, dy * (y > 0) / (1 + 1e-5) ** 0.5)
        assert dx.stride() == dresidual.stride() == arranged(dy).stride()


def test_a_mask_of_another_call_is_refused() -> None:
    operators = torch.ops.batchnorm_ext
    x = torch.randn(2, 9, 5, 3)
    mean, invstd = torch.zeros(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)

    def backward(mask: Tensor) -> None:
        wanted = [True, True, False, False]
        operators.backward(x, x, None, None, None, mean, invstd, mask, False, "relu", 0.0, wanted)

    rest = (None, None, None, mean.float(), invstd.float(), 1e-5, "relu", 0.0, True)
    _, right = operators.forward_eval(x, *rest)
    backward(right)
    wrongs = [right[:-1], right.float(), right[::2]]
    if right.dim() == 1:  # its last byte names the layout
        wrongs.append(torch.cat([right[:-1], torch.full((1,), 2, dtype=torch.uint8)]))
    for wrong in wrongs:
        with pytest.raises(RuntimeError, match="mask should be what the forward pass returned"):
            backward(wrong)


@pytest.mark.parametrize("what", ["input", "residual", "grad_output"])
@pytest.mark.parametrize("expansion", EXPANDED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expanded(shape: tuple[int, ...], dtype: torch.dtype, expansion: str, what: str) -> None:
    """The same as its dense copy."""
    results = []
    for dense in (False, True):
        case = Case(shape, dtype, activation="relu", residual="contiguous")
        data = case.data()
        tensor = EXPANDED[expansion](getattr(data, what))
        setattr(data, what, tensor.contiguous() if dense else tensor)
        results.append(_gradients(case, data, data.grad_output))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    """Input, residual and dy anywhere in memory: what their dense copies give in some layout."""
    shape = data.draw(strategies.shapes())
    case = Case(
        shape,
        data.draw(st.sampled_from(DTYPES)),
        activation=data.draw(st.sampled_from(["identity", "relu", "gelu"])),
        residual="contiguous",
        mode=data.draw(st.sampled_from(strategies.MODES)),
    )
    expected = []
    for layout in (contiguous, channels_last):
        made = case.data()
        made.input = layout(made.input)
        expected.append(_gradients(case, made, made.grad_output))
    made = case.data()
    assert made.residual is not None
    made.input = data.draw(strategies.strided(made.input))
    made.residual = data.draw(strategies.strided(made.residual))
    got = _gradients(case, made, data.draw(strategies.strided(made.grad_output)))
    assert any(all(map(torch.equal, got, wanted)) for wanted in expected)


@given(data=st.data())
def test_any_repetition(data: st.DataObject) -> None:
    shape = data.draw(strategies.shapes())
    case = Case(shape, activation="relu", residual="contiguous", mode="eval")
    made, dense = case.data(), case.data()
    assert made.residual is not None
    made.input = data.draw(strategies.repeated(made.input))
    made.residual = data.draw(strategies.repeated(made.residual))
    dy = data.draw(strategies.repeated(made.grad_output))
    dense.input, dense.residual = made.input.contiguous(), made.residual.contiguous()
    got, wanted = _gradients(case, made, dy), _gradients(case, dense, dy.contiguous())
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # layouts may differ


@given(data=st.data())
def test_strides_of_dimensions_of_size_one(data: st.DataObject) -> None:
    """They say nothing and may be anything."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    if math.prod(sizes) // sizes[1] < 2:
        sizes[0] = 2
    x = torch.randn(sizes)
    if data.draw(st.booleans()):
        x = channels_last(x)
    strides = [
        data.draw(st.integers(0, 40)) if size == 1 else stride
        for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    odd = x.as_strided(x.shape, strides)
    ours = functional.batch_norm(odd, None, None, training=True, activation="relu")
    wanted = functional.batch_norm(x, None, None, training=True, activation="relu")
    # Up to rounding: which of the two layouts it is may depend on those strides.
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strided_buffers_are_updated_in_place(layout: str, dtype: torch.dtype) -> None:
    case = Case((4, 7, 3), layout=layout)
    plain, spread = case.data(), case.data()
    rooms = []
    for name in ("running_mean", "running_var"):
        buffer = getattr(plain, name).to(dtype)
        setattr(plain, name, buffer.clone())
        room = torch.full((7, 3), 123.0, dtype=dtype)
        room[:, 1] = buffer
        setattr(spread, name, room[:, 1])
        rooms.append(room)
    assert torch.equal(case.call(plain), case.call(spread))
    for name, room in zip(("running_mean", "running_var"), rooms, strict=True):
        assert torch.equal(room[:, 1], getattr(plain, name))
        assert (room[:, ::2] == 123.0).all(), "written beside the buffer"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_strided_and_shaped_parameters(mode: str) -> None:
    """Every second element; one value expanded; (1, C), which torch takes too."""
    case = Case((4, 6, 3), activation="relu", mode=mode)
    base = case.data()
    assert base.weight is not None and base.bias is not None
    room = torch.stack([base.weight, base.bias], 1)
    views = [(room[:, 0], room[:, 1]), (base.weight.view(1, 6), base.bias.view(6, 1))]
    expected = _gradients(case, base, base.grad_output)
    for weight, bias in views:
        data = case.data()
        data.weight, data.bias = weight.detach(), bias.detach()
        got = _gradients(case, data, data.grad_output)
        for ours, wanted in zip(got, expected, strict=True):
            assert torch.equal(ours.reshape(-1), wanted.reshape(-1))
    data, dense = case.data(), case.data()
    data.weight, data.bias = torch.tensor([1.5]).expand(6), torch.tensor([0.5]).expand(6)
    dense.weight, dense.bias = torch.full((6,), 1.5), torch.full((6,), 0.5)
    for ours, wanted in zip(
        _gradients(case, data, data.grad_output),
        _gradients(case, dense, dense.grad_output),
        strict=True,
    ):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unaligned_everything(layout: str) -> None:
    """Streaming stores need aligned addresses; inputs needn't be aligned."""
    case = Case((3, 5, 7, 3), layout=layout, activation="relu", residual=layout)
    base = case.data()
    expected = _gradients(case, base, base.grad_output)
    data = case.data()
    assert data.residual is not None
    for name in ("input", "residual", "grad_output"):
        dense = getattr(data, name)
        room = torch.empty(dense.numel() + 1)[1:]
        setattr(data, name, room.as_strided(dense.shape, dense.stride(), 1).copy_(dense))
    streaming = replace(case, plan=(("stream", True),))
    for ours, wanted in zip(_gradients(streaming, data, data.grad_output), expected, strict=True):
        assert torch.equal(ours, wanted)
