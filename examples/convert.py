"""Convert a model in the middle of its training, train on, and take it back.

    python examples/convert.py

The optimizer was made before and stays valid, because the parameters are the very same tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm_ext as bx


def network() -> nn.Sequential:
    """Two convolutions with batch norm for (N, 3, 16, 16) images, ten classes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> float:
    """One step of training; the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    """Prints the class of a norm and the loss, before, in between and after."""
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weight, keys = model[1].weight, list(model.state_dict())
    for change in (None, bx.convert_batchnorm, bx.revert_batchnorm):
        if change is not None:
            change(model)
        loss = step(model, optimizer, images, labels)
        print(f"{type(model[1]).__module__}.{type(model[1]).__name__}: loss {loss:.4f}")
    print("the same parameters:", model[1].weight is weight)
    print("the same state_dict keys:", list(model.state_dict()) == keys)
    network().load_state_dict(model.state_dict())  # torch's own network takes the checkpoint


if __name__ == "__main__":
    main()
