"""Stochastic weight averaging of a fused model, then fresh running statistics.

    python examples/averaged_weights.py

The average of several weights has seen no batch: its running statistics are those of the last
model. `update_bn` makes them anew. It finds the batch norms of a fused model, which are torch's by
`isinstance`; it does not know `BatchNormAct2d`, whose statistics it would leave as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import batchnorm_ext as bx


def main() -> None:
    """Prints the loss in evaluation, with the last model's statistics and with fresh ones."""
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    bx.fuse_batchnorm(model)
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(20):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        averaged.update_parameters(model)
    before = F.cross_entropy(averaged.eval()(images), labels)
    update_bn([x for x, _ in batches], averaged)
    after = F.cross_entropy(averaged.eval()(images), labels)
    print(f"the last model's statistics: loss {before:.4f}")
    print(f"fresh statistics: loss {after:.4f}")
    print("batches in them:", averaged.get_buffer("module.1.num_batches_tracked").item())


if __name__ == "__main__":
    main()
