"""Write a fused network to an ONNX file and run it in ONNX Runtime.

pip install onnx onnxscript onnxruntime
python examples/export_onnx.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import batchnorm_ext as bx


def main() -> None:
    """Prints the operators of the file, and how far its outputs are from the model's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    bx.fuse_batchnorm(model).eval()
    images = torch.randn(8, 3, 16, 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        sizes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=sizes)
        assert program is not None
        program.save(path)
        session = onnxruntime.InferenceSession(path)
    print("operators:", *(node.op_type for node in program.model_proto.graph.node))
    for n in (1, 20):
        images = torch.randn(n, 3, 16, 16)
        (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        difference = (torch.from_numpy(outputs) - model(images)).abs().max().item()
        print(f"batch of {n}: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
