"""accumulate_statistics: one update of the running statistics by several mini-batches."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Checkpointed, Network, assert_same, gradients, images
from norms import OF_EVERY_KIND, buffers, norm_for, values
from strategies import DEVICE
from torch import nn

import batchnorm_ext as bx


@pytest.mark.parametrize("momentum", [0.1, None])
@OF_EVERY_KIND
def test_accumulated_statistics(kind: str, momentum: float | None) -> None:
    """The first layer sees the same values as in one large batch, and moves as it does there."""
    model, whole = (Network(kind, momentum=momentum).double() for _ in range(2))
    batches = [images(seed, n) for seed, n in enumerate((4, 2, 5))]
    for _ in range(3):
        with bx.accumulate_statistics(model):
            for batch in batches:
                before = buffers(model)
                model(batch).square().mean().backward()
                torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)
        whole(torch.cat(batches))
    assert model.get_buffer("second.num_batches_tracked") == 3
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(
            model.get_buffer(f"first.{name}"),
            whole.get_buffer(f"first.{name}"),
            rtol=1e-12,
            atol=1e-12,
        )


def test_accumulation_changes_no_gradient() -> None:
    models = [Network("fused").double() for _ in range(2)]
    for step in range(3):
        models[0](images(step)).square().mean().backward()
    with bx.accumulate_statistics(models[1]):
        for step in range(3):
            models[1](images(step)).square().mean().backward()
    torch.testing.assert_close(gradients(models[0]), gradients(models[1]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_in_few_digits(dtype: torch.dtype) -> None:
    """A large mean: the statistics are kept in float64, rounded once when they move."""
    norm = bx.BatchNorm1d(6, momentum=None).to(dtype).to(DEVICE)
    x = (values((64, 6)) + 1000).to(dtype)
    with bx.accumulate_statistics(norm):
        for part in x.split(16):
            norm(part)
    exact = x.double()
    torch.testing.assert_close(norm.running_mean, exact.mean(0).to(dtype))
    torch.testing.assert_close(norm.running_var, exact.var(0).to(dtype))


def test_an_exception_leaves_the_statistics_as_they_were() -> None:
    norm = bx.BatchNorm1d(6)
    before = buffers(norm)
    with pytest.raises(KeyError), bx.accumulate_statistics(norm):
        norm(torch.randn(4, 6))
        raise KeyError
    torch.testing.assert_close(buffers(norm), before, rtol=0, atol=0)
    norm(torch.randn(4, 6))
    assert norm.num_batches_tracked == 1


def test_what_does_not_take_part_in_an_accumulation() -> None:
    """Eval mode, layers that saw nothing, those without running statistics."""
    norms = [bx.BatchNorm1d(6, track_running_stats=i < 3) for i in range(4)]
    model = nn.ModuleList(norms)
    before = buffers(model)
    with bx.accumulate_statistics(model):
        norms[0].eval()(torch.randn(4, 6))
        norms[1].freeze()(torch.randn(4, 6))
        norms[3](torch.randn(4, 6))
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)


def test_accumulations_do_not_nest() -> None:
    norm = bx.BatchNorm1d(6)
    with bx.accumulate_statistics(norm), pytest.raises(RuntimeError, match="at work for the model"):
        bx.accumulate_statistics(norm).__enter__()
    with pytest.raises(ValueError, match="needs a first input before"):
        bx.accumulate_statistics(bx.LazyBatchNorm1d()).__enter__()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_accumulation_under_checkpointing(use_reentrant: bool) -> None:
    """With the policy, a recomputation is no other mini-batch."""
    model, plain = Checkpointed("fused").double(), Network("fused").double()
    model.use_reentrant = use_reentrant
    bx.set_policies(model, recomputation="skip")
    for m in (model, plain):
        with bx.accumulate_statistics(m):
            for step in range(3):
                m(images(step)).square().mean().backward()
    assert_same(model, plain)


def test_accumulation_leaves_out_what_is_not_finite() -> None:
    """A channel's mini-batch that is not finite, of those of all channels."""
    norm = bx.set_policies(norm_for((4, 6)), nonfinite_statistics="skip")
    expected = norm_for((4, 6))
    x = values((8, 6))
    x[0, 2] = math.inf
    with bx.accumulate_statistics(norm):
        norm(x[:4])
        norm(x[4:])
    expected(x)
    assert norm.num_batches_tracked == 1
    for name, statistic in (("running_mean", torch.mean), ("running_var", torch.var)):
        of_finite = statistic(x[4:, 2], 0)
        before = norm_for((4, 6)).get_buffer(name)[2]
        want = expected.get_buffer(name)
        want[2] = before.lerp(of_finite, 0.1)
        torch.testing.assert_close(norm.get_buffer(name), want)


def test_accumulation_of_single_values() -> None:
    """Their variance is that between them."""
    norm = bx.set_policies(bx.BatchNorm1d(6, momentum=None), single_value="zero_variance")
    x = torch.randn(5, 6)
    with bx.accumulate_statistics(norm):
        for row in x.split(1):
            norm(row)
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    torch.testing.assert_close(norm.running_var, x.var(0))
    with bx.accumulate_statistics(norm):
        norm(x[:1])
    torch.testing.assert_close(norm.running_var, x.var(0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_accumulation(dynamic: bool) -> None:
    """In one graph."""
    model, eager = (Network("fused").double() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for function, m in ((compiled, model), (eager, eager)):
        for _ in range(2):
            with bx.accumulate_statistics(m):
                for seed, n in enumerate((4, 2, 5)):
                    function(images(seed, n)).square().mean().backward()
    assert_same(model, eager)


def test_a_single_value_by_the_running_statistics_takes_no_part() -> None:
    """It is normalised with the module's own, not with what is collected."""
    norm = bx.set_policies(norm_for((1, 6)), single_value="running")
    expected, before = norm_for((1, 6)).eval(), buffers(norm)
    x = values((1, 6))
    with bx.accumulate_statistics(norm):
        torch.testing.assert_close(norm(x), expected(x), rtol=0, atol=0)
    torch.testing.assert_close(buffers(norm), before, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_block_of_recomputations_alone_moves_nothing(use_reentrant: bool) -> None:
    model = bx.set_policies(Checkpointed("fused").double(), recomputation="skip")
    model.use_reentrant = use_reentrant
    loss = model(images(0)).square().mean()
    before = buffers(model)
    with bx.accumulate_statistics(model):
        loss.backward()
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)
