"""What a call costs besides its arithmetic: host time on a tiny input, bytes kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.candidates import OURS, make_calls, make_data
from benchmarks.shapes import OPS, Group, Shape
from benchmarks.timing import Ratio, Stats

TINY = (2, 4, 2, 2)
CALLS_PER_BLOCK = 500
SAVED_SHAPE = Shape("resnet50", (4, 64, 56, 56))


def _host_calls(module: nn.Module, device: str) -> dict[str, Callable[[], object]]:
    x = torch.randn(TINY, device=device, requires_grad=True)
    grad = torch.randn(TINY, device=device)
    wanted = [x, *module.parameters()]
    return {
        "forward": lambda: module(x),
        "forward+backward": lambda: torch.autograd.grad(module(x), wanted, grad),
    }


def host_time(rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Seconds per call of the module on a (2,4,2,2) input, ours beside nn.BatchNorm2d.

    One thread: the arithmetic is a few dozen nanoseconds, the rest is what the call itself costs.
    """
    import batchnorm_ext

    modules = {OURS: batchnorm_ext.BatchNorm2d(TINY[1]), "eager": nn.BatchNorm2d(TINY[1])}
    calls = {name: _host_calls(module.to(device), device) for name, module in modules.items()}
    rows = []
    for direction in ("forward", "forward+backward"):
        timers = {
            name: Timer("call()", globals={"call": calls[name][direction]}, num_threads=1)
            for name in modules
        }
        samples: dict[str, list[float]] = {name: [] for name in modules}
        for turn in range(rounds + 1):
            for name in sorted(timers, reverse=bool(turn % 2)):
                measurement = timers[name].timeit(CALLS_PER_BLOCK)
                if turn:  # the first round warms up
                    samples[name].append(measurement.median)
        stats = {name: Stats.of(values, CALLS_PER_BLOCK) for name, values in samples.items()}
        ratio = Ratio.of(stats["eager"], stats[OURS])
        rows.append(
            {
                "direction": direction,
                "shape": "x".join(map(str, TINY)),
                "timings": {name: value.as_dict() for name, value in stats.items()},
                "ours_over_eager": round(1 / ratio.value, 4),
                "decided": ratio.decided,
            }
        )
    return rows


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def saved_bytes() -> list[dict[str, Any]]:
    """Bytes that autograd keeps between forward and backward, by candidate and op.

    total   all storages that are saved
    kept    those that are not the input's, a parameter's or a buffer's. A residual that is saved
            counts: torch's ops do not keep it
    hidden  those of `kept` that are not the output's either: the output often lives on anyway,
            because the next layer saves it as its input
    """
    rows = []
    for op in OPS:
        group = Group(SAVED_SHAPE, "channels_first", "float32", op, torch.get_num_threads())
        for name in (OURS, "eager"):
            data = make_data(group)
            calls = make_calls(name, group, data)
            saved: list[Tensor] = []

            def pack(tensor: Tensor, into: list[Tensor] = saved) -> Tensor:
                into.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = calls.forward()
            module = calls.train_module
            known = _storages([data.x, *module.parameters(), *module.buffers()])
            every, output = _storages(saved), _storages([y])
            kept = {key: size for key, size in every.items() if key not in known}
            rows.append(
                {
                    "op": op,
                    "candidate": name,
                    "shape": SAVED_SHAPE.name,
                    "tensor_bytes": data.x.nbytes,
                    "total": sum(every.values()),
                    "kept": sum(kept.values()),
                    "hidden": sum(size for key, size in kept.items() if key not in output),
                }
            )
    return rows
