"""SyncBatchNorm in models: conversion, DistributedDataParallel, FSDP2, and a process that ends."""

from __future__ import annotations

import copy
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import KINDS, Network, images
from processes import NEEDS_GLOO, Run, of_one_import, processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import batchnorm_ext as bx

WORLD = 2
run = processes(WORLD)

# ---- conversion ----


@pytest.mark.parametrize("kind", [*KINDS, "torch"])
def test_conversion_keeps_everything(kind: str) -> None:
    model = Network(kind)
    if kind != "torch":
        bx.set_policies(model, nonfinite_statistics="skip")
    classes = {name: type(m) for name, m in model.named_modules()}
    held = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    assert bx.convert_sync_batchnorm(model) is model
    wanted = bx.SyncBatchNormAct if kind == "fused" else bx.SyncBatchNorm
    assert type(model.first) is type(model.second) is wanted
    assert held == {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    if kind == "fused":
        assert model.first.activation == "relu"
    bx.revert_sync_batchnorm(model)
    assert classes == {name: type(m) for name, m in model.named_modules()}
    assert attributes == {name: dict(vars(m)) for name, m in model.named_modules()}


def test_the_rank_of_inputs_is_still_checked() -> None:
    model = bx.convert_sync_batchnorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(2, 3))
    bx.SyncBatchNorm(3)(torch.randn(2, 3))


def test_torchs_own_sync_batch_norm() -> None:
    norm = nn.SyncBatchNorm(3)
    assert isinstance(bx.convert_sync_batchnorm(norm), bx.SyncBatchNorm)
    assert type(bx.revert_sync_batchnorm(norm)) is nn.SyncBatchNorm
    assert norm.process_group is None
    groups = object(), object()
    norm.process_group = groups[0]
    assert bx.convert_sync_batchnorm(norm).process_group is groups[0]
    bx.revert_sync_batchnorm(norm)
    assert bx.convert_sync_batchnorm(norm, groups[1]).process_group is groups[1]


def test_a_second_conversion_moves_modules_to_its_group() -> None:
    groups = object(), object()
    model = nn.Sequential(nn.BatchNorm1d(3), bx.SyncBatchNorm(3, process_group=groups[0]))
    bx.convert_sync_batchnorm(model, groups[0])
    bx.convert_sync_batchnorm(model)
    assert [norm.process_group for norm in model] == [groups[0], groups[0]]
    bx.convert_sync_batchnorm(model, groups[1])
    assert [norm.process_group for norm in model] == [groups[1], groups[1]]
    assert type(bx.revert_sync_batchnorm(model)[0]) is nn.BatchNorm1d


def test_fused_models_stay_fused() -> None:
    model = bx.fuse_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    x = torch.randn(5, 3)
    expected = copy.deepcopy(model)(x)
    bx.convert_sync_batchnorm(model)
    assert isinstance(model[1], bx.SyncBatchNorm) and torch.equal(model(x), expected)
    assert [site.activation for site in bx.fusion_report(model).fused] == ["relu"]


def test_what_cannot_be_converted(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.BatchNorm1d):
        pass

    model = nn.Sequential(Own(3), bx.SyncBatchNorm(3))
    with caplog.at_level(logging.WARNING, "batchnorm_ext"):
        bx.convert_sync_batchnorm(model)
        bx.revert_sync_batchnorm(model)
    assert type(model[0]) is Own and type(model[1]) is bx.SyncBatchNorm
    assert ["not synchronised: 0 (" in caplog.text, "and left: 1" in caplog.text] == [True, True]
    lazy = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="needs a first input before, for 1"):
        bx.convert_sync_batchnorm(lazy)
    assert type(lazy[0]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match=r"for the model$"):
        bx.convert_sync_batchnorm(lazy[1])


def test_constructor_and_state_are_torchs() -> None:
    ours, torchs = bx.SyncBatchNorm(3, 1e-3, None, True, True), nn.SyncBatchNorm(3, 1e-3, None)
    assert repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    torchs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(ours, nn.SyncBatchNorm)
    assert "activation=silu" in repr(bx.SyncBatchNormAct(3, "silu"))


# ---- training ----


def _networks(kind: str) -> tuple[nn.Module, Network]:
    """One to train on all processes, and torch's for the whole batch in one."""
    return bx.convert_sync_batchnorm(Network(kind).double()), Network("torch").double()


def _step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def _with_ddp(rank: int, kind: str, options: dict[str, Any]) -> None:
    model, whole = _networks(kind)
    parallel = DistributedDataParallel(model, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, whole)]
    for step in range(10):
        parts = [images(10 * step + r) for r in range(WORLD)]
        _step(parallel, parts[rank], optimizers[0])
        _step(whole, torch.cat(parts), optimizers[1])
    torch.testing.assert_close(model.state_dict(), whole.state_dict())


@NEEDS_GLOO
@pytest.mark.parametrize(
    "options",
    [{}, {"broadcast_buffers": False}, {"find_unused_parameters": True}],
    ids=lambda options: next(iter(options), "default"),
)
@pytest.mark.parametrize("kind", ["plain", "converted"])
def test_ddp_is_one_process_with_the_whole_batch(
    run: Run, kind: str, options: dict[str, Any]
) -> None:
    run(_with_ddp, kind, options)


def _with_fsdp(rank: int) -> None:
    model, whole = _networks("plain")
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for step in range(5):
        parts = [images(10 * step + r) for r in range(WORLD)]
        _step(model, parts[rank], optimizers[0])
        _step(whole, torch.cat(parts), optimizers[1])
    sharded: dict[str, Any] = dict(model.named_parameters())
    found = {name: p.full_tensor() for name, p in sharded.items()}
    torch.testing.assert_close(found, dict(whole.named_parameters()), check_stride=False)
    torch.testing.assert_close(dict(model.named_buffers()), dict(whole.named_buffers()))


@NEEDS_GLOO
def test_fsdp(run: Run) -> None:
    run(_with_fsdp)


def _copies_follow(rank: int) -> None:
    """A copy made between steps goes on from where the original is."""
    model, _ = _networks("plain")
    model(images(rank))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(images(rank + 5)), model(images(rank + 5)))
    torch.testing.assert_close(copied.state_dict(), model.state_dict())


@NEEDS_GLOO
def test_copies(run: Run) -> None:
    run(_copies_follow)


# ---- a process that ends ----


def _lose_a_process(rank: int, store: Path, results: Any, in_backward: bool) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=20),
    )
    model = bx.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    try:
        y = model(torch.randn(5, 3)) if in_backward or rank != 1 else None
        if rank == 1:
            os._exit(1)
        assert y is not None
        y.sum().backward()
    except RuntimeError as error:
        results.put((rank, str(error)))


@NEEDS_GLOO
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_process_that_ends(tmp_path: Path, in_backward: bool) -> None:
    """The others end with an error that names the layer, and do not wait for ever."""
    context = of_one_import()
    results = context.Queue()
    arguments = (tmp_path / "store", results, in_backward)
    them = [context.Process(target=_lose_a_process, args=(r, *arguments)) for r in range(3)]
    for process in them:
        process.start()
    answers = dict(results.get(timeout=100) for _ in range(2))
    for process in them:
        process.join(30)
        process.kill()
    assert set(answers) == {0, 2}
    for message in answers.values():
        assert "SyncBatchNorm(4) 1: exchanging statistics with the other 2 processes" in message
