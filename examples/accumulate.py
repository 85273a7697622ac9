"""Gradient accumulation: running statistics of the large batch that the micro-batches stand for.

python examples/accumulate.py
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import batchnorm_ext as bx


def main() -> None:
    """Prints the running variance that a step leaves, in three ways."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 16), torch.randn(64, 1)
    inputs += torch.arange(64).unsqueeze(1) / 16  # sorted data: the micro-batches' means differ
    whole = nn.Sequential(bx.BatchNormAct1d(16), nn.Linear(16, 1))
    apart, together = copy.deepcopy(whole), copy.deepcopy(whole)
    loss = nn.MSELoss()

    loss(whole(inputs), targets).backward()

    batches = list(zip(inputs.split(8), targets.split(8), strict=True))
    for x, t in batches:
        (loss(apart(x), t) / len(batches)).backward()

    with bx.accumulate_statistics(together):
        for x, t in batches:
            (loss(together(x), t) / len(batches)).backward()

    for name, model in (("one batch", whole), ("default", apart), ("accumulated", together)):
        updates = int(model.get_buffer("0.num_batches_tracked"))
        variance = float(model.get_buffer("0.running_var").mean())
        print(f"{name:<12} updates: {updates}, running_var: {variance:.4f}")


if __name__ == "__main__":
    main()
