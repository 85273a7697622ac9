"""Compile a network, export it, save and load the program, and package it without Python.

    python examples/compile_and_export.py

The last step, AOTInductor, needs a C++ compiler.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import batchnorm_ext as bx


def network() -> nn.Sequential:
    """For images (N, 3, H, W), ten classes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), bx.BatchNormAct2d(16, "relu")),
        *(nn.Conv2d(16, 16, 3), bx.BatchNormAct2d(16, "silu")),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def main() -> None:
    """Prints, for each way to run the network, how far it is from eager mode."""
    torch.manual_seed(0)
    model, images = network(), torch.randn(8, 3, 16, 16)

    compiled = torch.compile(model, fullgraph=True)
    compiled(images).square().sum().backward()  # a step of training, whose statistics it keeps
    print("batches counted:", model[1].get_buffer("num_batches_tracked").item())

    model.eval().requires_grad_(False)
    more = torch.randn(20, 3, 16, 16)
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images,), dynamic_shapes=sizes)
    plain = program.run_decompositions(bx.decompositions()).module()  # torch's operators alone
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "program.pt2")
        loaded = torch.export.load(Path(folder) / "program.pt2").module()
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "package.pt2")
        )
        packaged = torch._inductor.aoti_load_package(package)
    for name, call in {"plain": plain, "loaded": loaded, "packaged": packaged}.items():
        print(f"{name}: largest difference {(call(more) - model(more)).abs().max():.1e}")


if __name__ == "__main__":
    main()
