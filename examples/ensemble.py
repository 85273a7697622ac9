"""Train five networks at once by vmap over their stacked parameters and buffers.

    python examples/ensemble.py

The running statistics are stacked too, and each network's are written in its own row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

import batchnorm_ext as bx

MODELS = 5


def network() -> nn.Sequential:
    """(N, 20) samples, three classes."""
    return nn.Sequential(nn.Linear(20, 32), bx.BatchNormAct1d(32, "relu"), nn.Linear(32, 3))


def main() -> None:
    """Prints the loss of each network, and that of one of them trained alone."""
    torch.manual_seed(0)
    x, labels = torch.randn(64, 20), torch.randint(3, (64,))
    models = [network() for _ in range(MODELS)]
    parameters, buffers = stack_module_state(models)
    base = network().to("meta")  # gives the forward; its own tensors are not used

    def loss_of(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(base, (parameters, buffers), (x,)), labels)

    for _ in range(30):
        gradients, losses = vmap(grad_and_value(loss_of))(parameters, buffers)
        parameters = {k: p.detach() - 0.5 * gradients[k] for k, p in parameters.items()}
    print("losses:", *(f"{loss:.4f}" for loss in losses.tolist()))
    print("batches seen:", *buffers["1.num_batches_tracked"].tolist())

    alone, optimizer = models[0], torch.optim.SGD(models[0].parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(alone(x), labels)
        loss.backward()
        optimizer.step()
    print(f"the first alone: {loss.item():.4f}")
    means = alone.get_buffer("1.running_mean"), buffers["1.running_mean"][0]
    print("the same statistics:", torch.allclose(*means, atol=1e-4))


if __name__ == "__main__":
    main()
