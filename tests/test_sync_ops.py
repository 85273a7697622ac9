"""The operators that synchronised batch norm is made of, on one process, against formulas."""

from __future__ import annotations

import pytest
import torch
from strategies import DEVICE, DTYPES, LAYOUTS
from torch import Tensor

ops = torch.ops.batchnorm_ext
C = 5
SHAPES = [(6, C), (4, C, 7), (3, C, 4, 5)]
IN_ALL = pytest.mark.parametrize("shape", SHAPES, ids=str)


def _values(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    return LAYOUTS[layout]((torch.randn(shape) * 2 + 3).to(dtype)).to(DEVICE)


def _rows(x: Tensor) -> Tensor:
    return x.double().movedim(1, -1).reshape(-1, x.size(1))


def _parts(x: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([ops.moments(part) for part in x.split(sizes)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@IN_ALL
def test_moments(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = _values(shape, layout, dtype)
    rows, packed = _rows(x), ops.moments(x)
    mean, m2, count = packed.split([C, C, 1])
    near = 1e-9 if dtype == torch.float64 else 1e-5
    m2_by_definition = (rows - rows.mean(0)).square().sum(0)
    torch.testing.assert_close(mean, rows.mean(0), rtol=near, atol=near)
    torch.testing.assert_close(m2, m2_by_definition, rtol=near, atol=near)
    assert count.item() == len(rows)


@pytest.mark.parametrize("tail", [(), (4,), (0, 3)], ids=str)
def test_moments_of_nothing(tail: tuple[int, ...]) -> None:
    packed = ops.moments(torch.empty(0, C, *tail, device=DEVICE))
    assert packed.tolist() == [0.0] * (2 * C + 1)


@pytest.mark.parametrize("momentum", [0.3, None])
@IN_ALL
def test_parts_are_the_whole(shape: tuple[int, ...], momentum: float | None) -> None:
    """Statistics and buffers of the parts are those of one call, an empty part among them."""
    x = _values(shape, "contiguous", torch.float64)
    sizes = [1, 0, len(x) - 1]
    buffers = [
        [torch.randn(C, device=DEVICE), torch.rand(C, device=DEVICE), torch.tensor(3).to(DEVICE)]
    ] * 2
    whole, parts = ([b.clone() for b in each] for each in buffers)
    _, mean, invstd, _ = ops.forward_train(
        x, None, None, None, *whole, momentum, 1e-3, "identity", 0.0, False
    )
    found = ops.combine_moments(_parts(x, sizes), *parts, momentum, 1e-3, x.shape)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], invstd**-2 - 1e-3)
    torch.testing.assert_close(found[2], invstd)
    assert found[3].item() == x.numel() // C
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_of_ranks_is_the_order_of_additions() -> None:
    x = _values((12, C, 9), "contiguous", torch.float32)
    gathered = _parts(x, [5, 4, 3])
    arguments = (None, None, None, 0.1, 1e-5, x.shape)
    first, again = (ops.combine_moments(gathered, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@IN_ALL
def test_backward_by_totals(
    shape: tuple[int, ...], name: str, layout: str, dtype: torch.dtype
) -> None:
    """Given the sums that it would find itself, the gradient is the same."""
    x, dy = (_values(shape, layout, dtype) for _ in range(2))
    weight, bias = (torch.rand(C, dtype=torch.float64, device=DEVICE) for _ in range(2))
    statistics = ops.forward_train(
        x, None, weight, bias, None, None, None, 0.1, 1e-5, name, 0.0, False
    )[1:3]
    call = (dy, x, None, weight, bias, *statistics, None, True, name, 0.0)
    dx, _, dweight, dbias = ops.backward(*call, (True, False, True, True))
    count = torch.tensor([x.numel() / C], dtype=torch.float64, device=DEVICE)
    totals = torch.cat([dweight, dbias, count])
    found = ops.backward(*call, (True, False, False, False), totals)
    torch.testing.assert_close(found[0], dx)
    half = ops.backward(*call, (True, False, False, False), torch.cat([totals[:-1], 2 * count]))
    assert not torch.equal(half[0], dx)
    assert found[2].numel() == found[3].numel() == 0


def test_what_is_refused() -> None:
    x = _values((4, C, 3), "contiguous", torch.float32)
    gathered = _parts(x, [2, 2])
    mean, var, counter = (torch.zeros(n, device=DEVICE) for n in (C, C, 1))
    rest = (0.1, 1e-5, x.shape)
    for bad, message in (
        (gathered.float(), r"contiguous float64 of shape \(ranks, 2 \* channels \+ 1\)"),
        (gathered[:, :-1], "contiguous float64 of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.combine_moments(bad, None, None, None, *rest)
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 4"):
        ops.combine_moments(gathered, mean[1:], var[1:], None, *rest)
    with pytest.raises(RuntimeError, match="num_batches_tracked should be one int64 value"):
        ops.combine_moments(gathered, mean, var, counter, *rest)
    with pytest.raises(ValueError, match="eps must be positive"):
        ops.combine_moments(gathered, mean, var, None, 0.1, 0.0, x.shape)
    single = ops.moments(x[:1, :, :1])[None]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.combine_moments(single, mean, var, None, 0.1, 1e-5, (1, C, 1))
    assert not mean.any() and not var.any()
    statistics = ops.combine_moments(gathered, None, None, None, *rest)
    call = (x, x, None, None, None, statistics[0], statistics[2], None, True, "identity", 0.0)
    with pytest.raises(RuntimeError, match="totals should be contiguous float64 of 11 elements"):
        ops.backward(*call, (True, False, False, False), mean.double())
    weights = (x, x, None, mean, None, statistics[0], statistics[2], None, True, "identity", 0.0)
    with pytest.raises(RuntimeError, match="with totals, the gradients of weight and bias are"):
        ops.backward(*weights, (True, False, True, False), gathered[0])


def test_fakes_are_like_the_kernels() -> None:
    x = _values((4, C, 3), "contiguous", torch.float32)
    mean, var = torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)
    arguments = (_parts(x, [2, 2]), mean, var, torch.tensor(0).to(DEVICE), 0.1, 1e-5, x.shape)
    torch.library.opcheck(ops.moments.default, (x,))
    torch.library.opcheck(ops.combine_moments.default, arguments)


def test_buffers_are_marked_as_written() -> None:
    x = _values((4, C, 3), "contiguous", torch.float32)
    mean, var = torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)
    versions = mean._version, var._version
    ops.combine_moments(_parts(x, [4]), mean, var, None, 0.1, 1e-5, x.shape)
    assert (mean._version, var._version) > versions
