"""Tensors whose offsets don't fit 32 bits, and what else only shows at size."""

from __future__ import annotations

import os

import pytest
import torch

from batchnorm_ext import batch_norm

GIB = 2**30


def _available_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _needs(gibibytes: float) -> None:
    if _available_memory() < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes} GiB of free memory")


#: Just above 2^31, in rows of a pattern whose statistics are known exactly.
PATTERN = torch.arange(-8, 8, dtype=torch.float32) / 4.0
MEAN, VAR = float(PATTERN.mean()), float(PATTERN.var(correction=0))


def _patterned(*shape: int) -> torch.Tensor:
    """bfloat16, each run of 16 along the memory holding the pattern."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    x.view(-1, 16).copy_(PATTERN.to(torch.bfloat16).expand(x.numel() // 16, 16))
    return x


def _check(y: torch.Tensor, x: torch.Tensor, relu: bool) -> None:
    """Every element: the pattern's 16 values have 16 results."""
    expected = (PATTERN - MEAN) / (VAR + 1e-5) ** 0.5
    if relu:
        expected = expected.relu()
    rows = y.view(-1, 16)
    first = rows[0].clone()
    torch.testing.assert_close(first.float(), expected, rtol=2**-8, atol=0)
    step = 2**22
    for start in range(0, rows.shape[0], step):
        assert (rows[start : start + step] == first).all(), f"wrong from row {start} on"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 2**30 + 16), (3, 16, 2**26 - 16, 1), (2**27 + 3, 16)])
def test_more_than_two_to_the_31_elements(shape: tuple[int, ...]) -> None:
    """Forward and statistics, channels-first with one and many channels, and (N, C).

    In the (N, C) case each channel holds one value of the pattern: variance 0, output 0.
    """
    _needs(10)
    x = _patterned(*shape)
    assert x.numel() > 2**31
    c = shape[1]
    mean, var = torch.zeros(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
    y = batch_norm(x, mean, var, training=True, momentum=1.0, activation="relu")
    if len(shape) == 2:
        assert torch.equal(mean, PATTERN.double())
        assert (var == 0).all()
        assert not y.any()
        return
    n = x.numel() // c
    torch.testing.assert_close(mean, torch.full_like(mean, MEAN), rtol=1e-9, atol=0)
    unbiased = torch.full_like(var, VAR * n / (n - 1))
    torch.testing.assert_close(var, unbiased, rtol=1e-6, atol=0)
    _check(y, x, relu=True)


@pytest.mark.slow
def test_backward_of_more_than_two_to_the_31_elements() -> None:
    """dx of dy = y, in evaluation: scale * y, so that every element is known."""
    _needs(14)
    x = _patterned(2, 2, 2**29 + 16).requires_grad_()
    mean, var = torch.full((2,), MEAN), torch.full((2,), VAR)
    y = batch_norm(x, mean, var)
    dy = y.detach()
    _check(dy, x, relu=False)
    del y
    y = batch_norm(x, mean, var)
    (dx,) = torch.autograd.grad(y, x, dy)
    del y
    first = dx.view(-1, 16)[0].clone()
    expected = dy.view(-1, 16)[0].float() / (VAR + 1e-5) ** 0.5
    torch.testing.assert_close(first.float(), expected, rtol=2**-8, atol=0)
    step = 2**22
    rows = dx.view(-1, 16)
    for start in range(0, rows.shape[0], step):
        assert (rows[start : start + step] == first).all(), f"wrong from row {start} on"


@pytest.mark.slow
def test_strides_beyond_two_to_the_31() -> None:
    """A small view whose elements are far apart."""
    _needs(6)
    room = torch.empty(2**31 + 64, dtype=torch.uint8).view(torch.bfloat16)
    view = room.as_strided((2, 3, 4), (2**30, 4, 1))
    x = torch.randn(2, 3, 4).to(torch.bfloat16)
    view.copy_(x)
    ours = batch_norm(view, None, None, training=True)
    assert torch.equal(ours, batch_norm(x, None, None, training=True))
