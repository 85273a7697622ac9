"""Fine-tuning with frozen batch norm, which survives train() and keeps no input for backward.

python examples/freeze.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import batchnorm_ext as bx


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def main() -> None:
    """Prints memory and statistics of three norms in training mode, frozen and not."""
    torch.manual_seed(0)
    x = torch.randn(8, 32, 56, 56, requires_grad=True)
    megabytes = x.numel() * x.element_size() / 1e6
    torchs = nn.Sequential(nn.BatchNorm2d(32).eval(), nn.ReLU())
    fused = bx.BatchNormAct2d(32)
    print(f"input: {megabytes:.2f} MB; kept for backward:")
    print(f"torch's in eval mode, ReLU  {kept_bytes(torchs, x) / 1e6:.2f} MB")
    print(f"fused, in training          {kept_bytes(fused, x) / 1e6:.2f} MB")
    counted = int(fused.get_buffer("num_batches_tracked"))
    bx.freeze_batchnorm(fused).train()  # train() does not wake it
    print(f"fused, frozen               {kept_bytes(fused, x) / 1e6:.2f} MB")

    fused(x).sum().backward()
    trained = [name for name, parameter in fused.named_parameters() if parameter.requires_grad]
    counted = int(fused.get_buffer("num_batches_tracked")) - counted
    print(f"frozen: {counted} batches counted, trains {trained}")
    bx.unfreeze_batchnorm(fused)
    trained = [name for name, parameter in fused.named_parameters() if parameter.requires_grad]
    print(f"unfrozen: trains {trained}")


if __name__ == "__main__":
    main()
