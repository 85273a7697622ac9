"""Policies, each beside what torch does: set, followed, and the default untouched by them."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from networks import Checkpointed, Network, assert_same, gradients, images
from norms import LAYOUTS, OF_EVERY_KIND, SHAPES, buffers, norm_for, values
from strategies import DEVICE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad

import batchnorm_ext as bx

BAD = [math.inf, -math.inf, math.nan]


# ---- setting them ----


def test_policies_are_checked_before_any_is_set() -> None:
    model = Network("plain")
    with pytest.raises(ValueError, match="single_value should be one of 'error', 'running', 'ze"):
        bx.set_policies(model, recomputation="skip", single_value="mean")  # type: ignore[arg-type]
    assert model.get_submodule("first").policies == bx.Policies()
    with pytest.raises(
        ValueError, match="recomputation should be one of 'update', 'skip', but got"
    ):
        bx.Policies(recomputation="once")  # type: ignore[arg-type]


@OF_EVERY_KIND
def test_set_policies(kind: str) -> None:
    """Of all layers, one by one; they survive copies and pickling and are not in the state."""
    model = Network(kind)
    keys = list(model.state_dict())
    assert bx.set_policies(model, recomputation="skip") is model
    bx.set_policies(model, single_value="running")
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("first", "second"):
            expected = bx.Policies(recomputation="skip", single_value="running")
            assert other.get_submodule(name).policies == expected
    assert "single_value=running, recomputation=skip" in repr(model.get_submodule("first"))
    assert list(model.state_dict()) == keys


def test_a_model_without_these_batch_norms(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing to set is an error; torch's own beside ours are named."""
    for call in (
        lambda m: bx.set_policies(m, recomputation="skip"),
        bx.freeze_batchnorm,
        bx.unfreeze_batchnorm,
        lambda m: bx.accumulate_statistics(m).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"got one with none: 0 \(BatchNorm2d\); convert_batc"):
            call(nn.Sequential(nn.BatchNorm2d(3)))
    with caplog.at_level(logging.WARNING, "batchnorm_ext"):
        bx.set_policies(nn.Sequential(nn.BatchNorm2d(3), bx.BatchNorm2d(3)), recomputation="skip")
    assert "batch norms that follow no policies: 0 (BatchNorm2d)" in caplog.text


def test_reverting_keeps_what_torch_lacks(caplog: pytest.LogCaptureFixture) -> None:
    norms = [bx.BatchNorm2d(3) for _ in range(3)]
    model = nn.Sequential(*norms)
    norms[0].freeze()
    norms[1].policies = bx.Policies(single_value="running")
    with caplog.at_level(logging.WARNING, "batchnorm_ext"):
        bx.revert_batchnorm(model)
    assert [type(m) for m in model] == [bx.BatchNorm2d, bx.BatchNorm2d, nn.BatchNorm2d]
    assert "BatchNorm2d, frozen)" in caplog.text and "BatchNorm2d with policies)" in caplog.text
    norms[0].unfreeze()
    norms[1].policies = bx.Policies()
    bx.revert_batchnorm(model)
    assert {type(m) for m in model} == {nn.BatchNorm2d}


# ---- channels that are not finite ----


@LAYOUTS
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nonfinite_channels_leave_their_statistics_alone(
    shape: tuple[int, ...], momentum: float | None, bad: float, channels_last: bool
) -> None:
    """The others move as ever, to the bit; the output is the same; the batch is counted."""
    x = values(shape, channels_last)
    x[1, 2] = bad
    x.movedim(1, -1)[(0,) * (len(shape) - 1)][4] = bad
    norms = [norm_for(shape, momentum=momentum) for _ in range(2)]
    before = buffers(norms[0])
    bx.set_policies(norms[1], nonfinite_statistics="skip")
    outputs = [norm(x) for norm in norms]
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
    updated, skipped = (buffers(norm) for norm in norms)
    for name in ("running_mean", "running_var"):
        finite = updated[name].isfinite()
        assert finite.tolist() == [c not in (2, 4) for c in range(6)]
        assert torch.equal(skipped[name][finite], updated[name][finite])
        assert torch.equal(skipped[name][~finite], before[name][~finite])
    assert skipped["num_batches_tracked"] == updated["num_batches_tracked"] == 1


def test_a_variance_that_overflows_is_not_finite() -> None:
    """The mean is finite, the sum of squares is not."""
    x = values((4, 6, 5, 3), dtype=torch.float64)
    x[:, 1] *= 1e200
    norm = norm_for(x.shape).double()
    before = buffers(norm)
    bx.set_policies(norm, nonfinite_statistics="skip")(x)
    for name in ("running_mean", "running_var"):
        moved = norm.get_buffer(name) != before[name]
        assert moved.tolist() == [c != 1 for c in range(6)]


@pytest.mark.parametrize("value", [math.inf, 1e30])
def test_nonfinite_statistics_under_a_transform(value: float) -> None:
    """torch's own operators stand in there; with 1e30 the variance alone is not finite."""
    norm = bx.set_policies(norm_for((4, 6)), nonfinite_statistics="skip")
    x = values((4, 6))
    x[0, 3] = value
    before, after = buffers(norm), buffers(norm)
    grad(lambda t, b: functional_call(norm, b, (t,)).nan_to_num().sum())(x, after)
    moved = after["running_mean"] != before["running_mean"]
    assert moved.tolist() == [True, True, True, False, True, True]
    assert after["running_var"].isfinite().all()


# ---- one value per channel ----


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1), (1, 6, 1, 1)], ids=str)
def test_single_value_is_an_error_by_default(shape: tuple[int, ...], act: bool) -> None:
    norm = norm_for(shape, act)
    before = buffers(norm)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
        norm(values(shape))
    torch.testing.assert_close(buffers(norm), before, rtol=0, atol=0)


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1), (1, 6, 1, 1)], ids=str)
def test_single_value_by_the_running_statistics(shape: tuple[int, ...], act: bool) -> None:
    """As in eval mode, gradients too; other batches as ever."""
    norms = [norm_for(shape, act) for _ in range(2)]
    bx.set_policies(norms[0], single_value="running")
    norms[1].eval()
    results = []
    for norm in norms:
        x = values(shape).requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        results.append([y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)

    twice = values((2, *shape[1:]))
    norms[1].train()
    torch.testing.assert_close(norms[0](twice), norms[1](twice), rtol=0, atol=0)
    torch.testing.assert_close(buffers(norms[0]), buffers(norms[1]), rtol=0, atol=0)


def test_single_value_without_running_statistics_stays_an_error() -> None:
    norm = bx.BatchNorm1d(6, track_running_stats=False).to(DEVICE)
    bx.set_policies(norm, single_value="running")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(values((1, 6)))


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1), (1, 6, 1, 1)], ids=str)
def test_single_value_of_zero_variance(
    shape: tuple[int, ...], act: bool, transformed: bool
) -> None:
    norm = norm_for(shape, act)
    bx.set_policies(norm, single_value="zero_variance")
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    before, after = buffers(norm), buffers(norm)
    x = values(shape)
    bias = norm.bias.detach().reshape(1, -1, *[1] * (len(shape) - 2))
    expected = bias.relu() if act else bias
    if transformed:

        def loss(t: Tensor, b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            y = functional_call(norm, b, (t,))
            return y.sum(), y

        dx, y = grad(loss, has_aux=True)(x, after)
    else:
        x.requires_grad_()
        y = norm(x)
        dx, dweight = torch.autograd.grad(y.sum(), [x, norm.weight])
        after = buffers(norm)
        assert torch.equal(dweight, torch.zeros_like(dweight))
    assert torch.equal(y.detach(), expected)
    assert torch.equal(dx, torch.zeros_like(dx))
    torch.testing.assert_close(
        after["running_mean"], before["running_mean"].lerp(x.detach().flatten(), 0.1)
    )
    assert torch.equal(after["running_var"], before["running_var"])
    assert after["num_batches_tracked"] == 1


# ---- eps = 0 ----


@pytest.mark.parametrize("act", [False, True])
def test_eps_of_zero(act: bool) -> None:
    """Right in eval mode, an error in training before anything is written."""
    norm = norm_for((4, 6), act, eps=0.0)
    x = values((4, 6))
    with pytest.raises(ValueError, match="eps must be positive during training, but got 0"):
        norm(x)
    assert norm.num_batches_tracked == 0
    expected = (x - norm.running_mean) / norm.running_var.sqrt()
    torch.testing.assert_close(norm.eval()(x), expected.relu() if act else expected)
    torch.testing.assert_close(norm.train().freeze()(x), expected.relu() if act else expected)


# ---- recomputation ----


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@OF_EVERY_KIND
def test_statistics_move_once_under_checkpointing(
    kind: str, momentum: float | None, use_reentrant: bool
) -> None:
    """The buffers of a network that is not checkpointed (pytorch#96136)."""
    model = Checkpointed(kind, momentum=momentum).double()
    plain = Network(kind, momentum=momentum).double()
    model.use_reentrant = use_reentrant
    bx.set_policies(model, recomputation="skip")
    for m in (model, plain):
        for step in range(3):
            m(images(step)).square().sum().backward()
    assert_same(model, plain, rtol=0, atol=0)
    assert model.get_buffer("second.num_batches_tracked") == 3


def test_nested_checkpoints() -> None:
    """The inner region is computed three times, its statistics move once."""
    norm = bx.set_policies(bx.BatchNorm2d(3), recomputation="skip")
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    inner = torch.utils.checkpoint.checkpoint

    def nested(t: Tensor) -> Tensor:
        return inner(norm, t, use_reentrant=False) * 2

    inner(nested, x, use_reentrant=True).square().sum().backward()
    assert norm.num_batches_tracked == 1


def test_a_recomputation_under_forward_mode() -> None:
    """torch's own operators stand in there too."""
    norm = bx.set_policies(bx.BatchNorm2d(3), recomputation="skip")
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    with forward_ad.dual_level():
        y = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=True)
        y.square().sum().backward()
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_compiled_layer_that_is_recomputed(use_reentrant: bool) -> None:
    """The operator finds out when it runs, not when it is traced."""
    norm = bx.set_policies(bx.BatchNormAct2d(3), recomputation="skip")
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert norm.num_batches_tracked == 1


# ---- together ----


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_policies(frozen: bool) -> None:
    """Every policy at once, in one graph, as in eager; frozen without the input's copy."""
    models = [Network("fused") for _ in range(2)]
    for model in models:
        bx.set_policies(
            model, nonfinite_statistics="skip", single_value="running", recomputation="skip"
        )
        if frozen:
            bx.freeze_batchnorm(model)
    bad = images(1, dtype=torch.float32)
    bad[0, :, 0, 0] = math.inf
    compiled = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    for function in (compiled, models[1]):
        function(images(0, dtype=torch.float32)).square().sum().backward()
        function(bad)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
    torch.testing.assert_close(gradients(models[0]), gradients(models[1]))
    assert all(b.isfinite().all() for b in models[0].buffers())


def test_policies_in_functional_call() -> None:
    """Buffers that are handed in are those that follow."""
    norm = bx.set_policies(bx.BatchNorm1d(6), nonfinite_statistics="skip")
    given = {name: buffer + 1 for name, buffer in norm.named_buffers()}
    x = torch.randn(4, 6)
    x[0, 0] = math.nan
    functional_call(norm, given, (x,))
    assert given["running_mean"][0] == 1 and given["running_mean"][1] != 1
    assert norm.num_batches_tracked == 0
