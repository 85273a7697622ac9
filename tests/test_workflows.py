"""What people do with modules in torch, on one process; torch's own batch norm is the judge.

Not here, because elsewhere: copies, pickling, fuse_conv_bn_eval, update_bn and parametrised plain
modules (test_modules.py), every transform of torch.func and second derivatives of the function
(test_autograd.py), autocast of the function and two forwards before a backward
(test_semantics.py), several processes (test_distributed.py), compiling (test_compile.py).
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from networks import CHANNELS, KINDS, Checkpointed, Network, assert_same, gradients, images, pair
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold_by_class
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn

import batchnorm_ext as bx

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


# ---- mixed precision ----


def rounding(dtype: torch.dtype) -> dict[str, Any]:
    """Of networks that round to `dtype` after each layer, torch's more often than the fused one.

    A chain of about 8 roundings (2 convolutions, 2 norms, 2 activations, the sum, the linear
    layer) of values of size 1, each half of `eps`: 4 `eps` if all have the same sign. Parameters'
    gradients are sums of such values over the batch, where they average out.
    """
    eps = torch.finfo(dtype).eps
    return {"rtol": 4 * eps, "atol": 4 * eps}


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@OF_EVERY_KIND
def test_autocast(kind: str, dtype: torch.dtype, training: bool) -> None:
    """A convolution's 16-bit output beside float32 parameters: the same dtypes as torch's."""
    results = []
    models = Network(kind).train(training), Network("torch").train(training)
    for model in models:
        seen: list[torch.dtype] = []
        model.second.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.dtype))
        x = images(0, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = model(x)
        assert seen == [dtype]
        y.float().square().mean().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results, **rounding(dtype))
    assert_same(*models, **rounding(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_hide_a_residual_of_another_dtype(dtype: torch.dtype) -> None:
    """torch's `+` would promote to float32; the fused module asks for one dtype."""
    norm, conv = bx.BatchNormAct2d(3), nn.Conv2d(3, 3, 1)
    x = images(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        with pytest.raises(RuntimeError, match=r"residual should have the dtype of .* got Float"):
            norm(conv(x), x)
        assert norm.get_buffer("num_batches_tracked").item() == 0
        assert norm(conv(x), x.to(dtype)).dtype == dtype


@OF_EVERY_KIND
def test_grad_scaler(kind: str) -> None:
    """The first step overflows float16 and is left out, the others count."""
    models = Network(kind), Network("torch")
    scales = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", 2.0**40, backoff_factor=2.0**-30, growth_interval=2)
        history = []
        for step in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                y = model(images(step, dtype=torch.float32))
                loss = nn.functional.cross_entropy(y, torch.arange(4))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(scaler.get_scale())
        scales.append(history)
    assert scales[0] == scales[1] == [2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**12]
    torch.testing.assert_close(
        models[0].state_dict(), models[1].state_dict(), **rounding(torch.float16)
    )


# ---- checkpointing and accumulation ----


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@OF_EVERY_KIND
def test_checkpoint(kind: str, momentum: float | None, use_reentrant: bool) -> None:
    """The gradients of a network without it; the running statistics move twice, as torch's do."""
    models = [
        cls(k, momentum=momentum).double()
        for cls, k in ((Checkpointed, kind), (Checkpointed, "torch"), (Network, kind))
    ]
    for model in models:
        if isinstance(model, Checkpointed):
            model.use_reentrant = use_reentrant
        for step in range(2):
            model(images(step)).square().sum().backward()
    ours, torchs, without = models
    assert_same(ours, torchs)
    torch.testing.assert_close(gradients(ours), gradients(without), rtol=0, atol=0)
    assert ours.get_buffer("first.num_batches_tracked").item() == 2
    assert ours.get_buffer("second.num_batches_tracked").item() == 4


@OF_EVERY_KIND
def test_gradient_accumulation(kind: str) -> None:
    """Each micro-batch has its own statistics; gradients add up."""
    models = pair(kind)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for micro in range(4):
                (model(images(micro)).square().mean() / 4).backward()
            optimizer.step()
    assert_same(*models)
    assert models[0].get_buffer("first.num_batches_tracked").item() == 8


# ---- torch.func ----


def ensemble(kind: str, training: bool, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients of three networks at once, and their buffers after it, stacked."""
    models = [Network(kind, seed, **options).double().train(training) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (x,)).square().mean()

    x = torch.stack([images(seed) for seed in range(3)])
    return torch.func.vmap(torch.func.grad(loss))(parameters, buffers, x), buffers


@MODES
@OF_EVERY_KIND
def test_ensemble(kind: str, training: bool) -> None:
    """stack_module_state and vmap: torch's numbers, and those of each network alone."""
    got = ensemble(kind, training)
    torch.testing.assert_close(got, ensemble("torch", training))
    for seed in range(3):
        alone = Network(kind, seed).double().train(training)
        alone(images(seed)).square().mean().backward()
        torch.testing.assert_close({k: v[seed] for k, v in got[0].items()}, gradients(alone))
        torch.testing.assert_close(
            {k: v[seed] for k, v in got[1].items()}, dict(alone.named_buffers())
        )


@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_ensemble_has_no_cumulative_average(kind: str) -> None:
    """vmap can't read the counter as a number, for torch's modules nor for ours."""
    with pytest.raises(RuntimeError, match="vmap"):
        ensemble(kind, True, momentum=None)
    ensemble(kind, False, momentum=None)


@MODES
@OF_EVERY_KIND
def test_derivatives_in_the_parameters(kind: str, training: bool) -> None:
    """grad with buffers passed in (and written there only), jvp and jacrev without any."""
    models = pair(kind)
    for model in models:
        model.train(training)
    x, before = images(0), copy.deepcopy(models[0].state_dict())
    results = []
    for model in models:
        parameters = {k: p.detach() for k, p in model.named_parameters()}
        buffers = {k: b.clone() for k, b in model.named_buffers()}

        def loss(p: dict[str, Tensor], b: dict[str, Tensor], m: nn.Module = model) -> Tensor:
            return torch.func.functional_call(m, (p, b), (x,)).square().mean()

        results.append((torch.func.grad(loss)(parameters, buffers), buffers))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(models[0].state_dict(), before, rtol=0, atol=0)

    results = []
    for model in pair(kind, track_running_stats=False):
        model.train(training)
        parameters = {k: p.detach() for k, p in model.named_parameters()}

        def call(p: dict[str, Tensor], m: nn.Module = model) -> Tensor:
            return torch.func.functional_call(m, p, (x,))

        tangent = torch.func.jvp(call, (parameters,), (parameters,))[1]
        results.append((tangent, torch.func.jacrev(call)(parameters)))
    torch.testing.assert_close(*results)


@OF_EVERY_KIND
def test_gradient_penalty(kind: str) -> None:
    """Three steps of a critic as WGAN-GP trains it: a derivative of the input's gradient."""
    models = pair(kind)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            real, fake = images(step), images(step + 10)
            optimizer.zero_grad()
            between = (0.3 * real + 0.7 * fake).requires_grad_()
            score = model(between).square().sum()
            (slope,) = torch.autograd.grad(score, between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            (model(fake).mean() - model(real).mean() + 10 * penalty).backward()
            if step < 2:
                optimizer.step()
    assert_same(*models)


# ---- torch's tools ----


@OF_EVERY_KIND
def test_averaged_models(kind: str) -> None:
    """SWA and EMA, then update_bn, which knows torch's batch norms and so not the fused ones."""
    averaged = []
    for model in pair(kind):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        swa = AveragedModel(model)
        ema = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
        for step in range(3):
            model(images(step)).square().mean().backward()
            optimizer.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
        averaged.append(nn.ModuleList([swa, ema]))
    assert_same(averaged[0], averaged[1])
    before = {k: b.clone() for k, b in averaged[0].named_buffers()}
    for both in averaged:
        update_bn([images(7), images(8)], both[0])
    if kind == "fused":
        torch.testing.assert_close(dict(averaged[0].named_buffers()), before, rtol=0, atol=0)
    else:
        assert_same(averaged[0], averaged[1])


@OF_EVERY_KIND
def test_weights_only(kind: str) -> None:
    """A state_dict loads as it is; a whole module with the classes that the refusal names."""
    norm = Network(kind).first
    files = io.BytesIO(), io.BytesIO()
    torch.save(norm.state_dict(), files[0])
    torch.save(norm, files[1])
    for file in files:
        file.seek(0)
    torch.testing.assert_close(torch.load(files[0], weights_only=True), norm.state_dict())
    name = f"batchnorm_ext.modules.{type(norm).__name__}"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(files[1]) == [name]
    files[1].seek(0)
    with torch.serialization.safe_globals([type(norm)]):
        loaded = torch.load(files[1], weights_only=True)
    assert type(loaded) is type(norm) and repr(loaded) == repr(norm)
    torch.testing.assert_close(loaded.state_dict(), norm.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [True, False])
@OF_EVERY_KIND
def test_meta_device(kind: str, assign: bool) -> None:
    """Built without memory, then filled from a checkpoint: the tensors themselves, or copies."""
    full = Network(kind)
    with torch.device("meta"):
        empty = Network(kind)
        assert empty(images(0).to("meta", torch.float32)).device.type == "meta"
    if not assign:
        empty.to_empty(device="cpu")
    state = full.state_dict()
    empty.load_state_dict(state, assign=assign)
    kept = empty.get_parameter("first.weight").data_ptr() == state["first.weight"].data_ptr()
    assert kept == assign
    results = [model(images(0, dtype=torch.float32)) for model in (empty, copy.deepcopy(full))]
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


@pytest.mark.parametrize("tool", ["parametrize", "prune", "replicate"])
@MODES
@pytest.mark.parametrize("kind", ["converted", "fused"])
def test_weights_that_something_else_stands_in_for(kind: str, training: bool, tool: str) -> None:
    """The weight is no parameter of the module any more, but an attribute made from one."""

    def changed(model: Network) -> nn.Module:
        if tool == "parametrize":
            parametrize.register_parametrization(model.second, "weight", Softplus())
            return model.second
        if tool == "prune":
            prune.l1_unstructured(model.second, "weight", amount=2)
            return model.second
        # As DataParallel does: a shallow copy with the original's buffers and derived parameters.
        replica = model.second._replicate_for_data_parallel()
        for name, parameter in model.second.named_parameters():
            setattr(replica, name, parameter * 1.0)
        return replica

    x, models = torch.randn(4, CHANNELS, 5, 3, dtype=torch.float64), pair(kind)
    results = []
    for model in models:
        norm = changed(model.train(training))
        if kind == "fused" and model is models[0]:
            y = norm(x, x)
        else:
            y = norm(x) + x
            y = y.relu() if kind == "fused" else y
        y.square().sum().backward()
        results.append(y)
    torch.testing.assert_close(*results)
    assert_same(*models)
    assert models[0].get_buffer("second.num_batches_tracked").item() == training


@MODES
@OF_EVERY_KIND
def test_channels_last_models(kind: str, training: bool) -> None:
    """The format goes through the network, and the gradients come back in it."""
    ours, torchs = pair(kind)
    results = []
    for model in (ours, torchs):
        model.train(training)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = images(0).to(memory_format=torch.channels_last).requires_grad_()
        inner = model.start(x)
        assert inner.is_contiguous(memory_format=torch.channels_last)
        assert model.block(inner).is_contiguous(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
        results.append(x.grad)
    torch.testing.assert_close(*results)
    assert_same(ours, torchs)


def test_folding_into_convolutions() -> None:
    """A tool that goes by the exact class folds torch's own; one that is given a norm, ours."""
    conv, norm = nn.Conv2d(3, CHANNELS, 3), bx.BatchNorm2d(CHANNELS)
    model = nn.Sequential(conv, norm).double().eval()
    norm.get_buffer("running_mean").fill_(0.3)
    expected = model(images(0))
    untouched = fold_by_class(model)
    assert type(untouched.get_submodule("1")) is bx.BatchNorm2d
    folded = fold_by_class(bx.revert_batchnorm(copy.deepcopy(model)))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for other in (untouched, folded, fuse_conv_bn_eval(conv, norm)):
        torch.testing.assert_close(other(images(0)), expected)


def test_folding_a_fused_module_leaves_the_activation_to_the_caller() -> None:
    conv = nn.Conv2d(3, CHANNELS, 3).double().eval()
    norm: Any = Network("fused").double().eval().first
    folded = fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(folded(images(0)).relu(), norm(conv(images(0))))
