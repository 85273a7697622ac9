"""Policies, each beside what torch does: set, followed, and the default untouched by them."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from networks import CHANNELS, KINDS, Checkpointed, Network, assert_same, gradients, images
from strategies import DEVICE
from torch import Tensor, nn
from torch.func import functional_call, grad

import batchnorm_ext as bx

OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(4, 6), (5, 6, 3), (4, 6, 5, 3), (40, 6, 2, 2)]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
BAD = [math.inf, -math.inf, math.nan]


def norm_for(shape: tuple[int, ...], act: bool = False, **options: Any) -> Any:
    """A layer for inputs of this shape, with running statistics that are not the initial ones."""
    name = f"BatchNorm{'Act' if act else ''}{max(len(shape) - 2, 1)}d"
    norm = getattr(bx, name)(shape[1], **options).to(DEVICE)
    norm.running_mean.copy_(torch.linspace(-1, 1, shape[1]))
    norm.running_var.copy_(torch.linspace(0.5, 2, shape[1]))
    return norm


def values(shape: tuple[int, ...], channels_last: bool = False, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, **options).to(DEVICE)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def buffers(norm: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


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


def test_a_mean_that_overflows_is_not_finite() -> None:
    """The variance alone is infinite: values of float16's range squared, in float32's."""
    x = values((4, 6, 5, 3))
    x[:, 1] *= 1e30 if x.device.type == "cuda" else 1e200
    norm = norm_for(x.shape).double()
    before = buffers(norm)
    bx.set_policies(norm, nonfinite_statistics="skip")(x.double() * 1e100)
    for name in ("running_mean", "running_var"):
        assert norm.get_buffer(name).isfinite().all()
        assert torch.equal(norm.get_buffer(name)[1], before[name][1])


def test_nonfinite_statistics_under_a_transform() -> None:
    """torch's own operators stand in there, and follow the policy too."""
    norm = bx.set_policies(norm_for((4, 6)), nonfinite_statistics="skip")
    x = values((4, 6))
    x[0, 3] = math.inf
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


# ---- frozen ----


def saved_bytes(norm: nn.Module, *arguments: Tensor) -> int:
    """Bytes that a call keeps for backward, beyond the values per channel."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > CHANNELS:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(*arguments)
    return sum(kept.values())


@LAYOUTS
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen(
    shape: tuple[int, ...], with_residual: bool, activation: str, channels_last: bool
) -> None:
    """Results of eval mode in training mode; gradients without the input, to the bit."""
    frozen, evaluated = (norm_for(shape, True, activation=activation) for _ in range(2))
    frozen.freeze()
    evaluated.eval()
    x, r, dy = values((3, *shape), channels_last=False).unbind()
    results = []
    for norm in (frozen, evaluated):
        leaves = [
            t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.clone()
            for t in ((x, r) if with_residual else (x,))
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        y = norm(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy), *norm.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("with_residual", [False, True])
def test_frozen_keeps_no_input(with_residual: bool) -> None:
    """Nothing without an activation, a bit per element with a piecewise-linear one."""
    x = torch.randn(4, CHANNELS, 8, 8, requires_grad=True, device=DEVICE)
    arguments = (x, x.detach().clone().requires_grad_()) if with_residual else (x,)
    size = x.numel() * 4
    for activation, expected in (("identity", 0), ("relu", size // 32), ("leaky_relu", size // 32)):
        norm = bx.BatchNormAct2d(CHANNELS, activation).to(DEVICE)
        assert saved_bytes(norm, *arguments) >= size
        assert saved_bytes(norm.freeze(), *arguments) == expected
        assert saved_bytes(norm.freeze(affine=False), *arguments) >= size
    smooth = bx.BatchNormAct2d(CHANNELS, "silu").to(DEVICE).freeze()
    assert saved_bytes(smooth, *arguments) == size * len(arguments)


def test_the_gradient_of_bias_alone_needs_no_input() -> None:
    x = torch.randn(4, CHANNELS, 8, 8, device=DEVICE)
    norm = bx.BatchNormAct2d(CHANNELS).to(DEVICE).eval()
    expected = torch.autograd.grad(norm(x).sum(), norm.bias)
    norm.weight.requires_grad_(False)
    assert saved_bytes(norm, x) == x.numel() // 8
    torch.testing.assert_close(torch.autograd.grad(norm(x).sum(), norm.bias), expected)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_second_derivatives_of_a_frozen_one(activation: str) -> None:
    norm = norm_for((4, 6, 2), True, activation=activation).double().freeze()
    x = values((4, 6, 2), dtype=torch.float64).requires_grad_()
    r = values((4, 6, 2), dtype=torch.float64).flip(0).requires_grad_()
    torch.autograd.gradcheck(norm, (x, r))
    torch.autograd.gradgradcheck(norm, (x, r))


@OF_EVERY_KIND
def test_freezing_a_model(kind: str) -> None:
    """It survives train(), trains nothing of its own, and is undone without a trace."""
    model = Network(kind).double()
    reference = Network("torch").double().eval()
    model.get_parameter("first.bias").requires_grad_(False)
    before = buffers(model)
    assert bx.freeze_batchnorm(model) is model
    model.train()
    x = images(0)
    y = model(x)
    torch.testing.assert_close(y, reference(x))
    y.square().sum().backward()
    reference(x).square().sum().backward()
    mine, theirs = gradients(model), gradients(reference)
    assert set(theirs) - set(mine) == {
        f"{norm}.{name}" for norm in ("first", "second") for name in ("weight", "bias")
    }
    torch.testing.assert_close(mine, {name: theirs[name] for name in mine})
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)
    first = model.get_submodule("first")
    assert first.training and first.frozen and ", frozen" in repr(first)

    assert bx.unfreeze_batchnorm(model) is model
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, does in trained.items() if not does] == ["first.bias"]
    model(x)
    assert not torch.equal(first.get_buffer("running_mean"), before["first.running_mean"])


@OF_EVERY_KIND
def test_frozen_statistics_with_trained_weights(kind: str) -> None:
    """affine=False leaves weight and bias as they are; copies stay frozen."""
    model = copy.deepcopy(bx.freeze_batchnorm(Network(kind).double(), affine=False)).train()
    reference = Network("torch").double().eval()
    for m in (model, reference):
        m(images(1)).square().sum().backward()
    assert_same(model, reference)


def test_freezing_needs_running_statistics() -> None:
    """Found before any layer is frozen."""
    model = nn.Sequential(bx.BatchNorm1d(3), bx.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"needs running statistics, but 1 has none \(track_run"):
        bx.freeze_batchnorm(model)
    assert not model[0].frozen and model[0].weight.requires_grad


def test_freezing_a_parametrised_layer() -> None:
    norm = bx.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    norm.freeze()
    assert not any(p.requires_grad for p in norm.parameters())
    norm.freeze()  # twice is as good as once
    norm.unfreeze()
    assert all(p.requires_grad for p in norm.parameters())


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


def test_a_recomputation_without_gradients_of_its_own() -> None:
    """Nested: the inner region is computed three times, its statistics move once."""
    norm = bx.set_policies(bx.BatchNorm2d(3), recomputation="skip")
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    inner = torch.utils.checkpoint.checkpoint

    def nested(t: Tensor) -> Tensor:
        return inner(norm, t, use_reentrant=False) * 2

    inner(nested, x, use_reentrant=True).square().sum().backward()
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


# ---- accumulation ----


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
