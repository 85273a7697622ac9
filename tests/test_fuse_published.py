"""Fusing other people's models: torchvision's and timm's, where they are installed."""

from __future__ import annotations

import copy

import pytest
import torch
from fusable import two_steps
from torch import nn

import batchnorm_ext as bx


@pytest.mark.parametrize(
    ("package", "name", "fused", "unpaired", "refused"),
    [
        ("torchvision", "resnet18", 17, 3, 0),
        ("torchvision", "resnet50", 49, 4, 0),
        ("torchvision", "mobilenet_v2", 45, 7, 0),
        ("torchvision", "mobilenet_v3_small", 29, 5, 0),
        ("torchvision", "efficientnet_b0", 33, 16, 0),  # nine before a stochastic depth
        ("torchvision", "densenet121", 121, 0, 0),
        ("torchvision", "shufflenet_v2_x1_0", 37, 19, 0),
        ("torchvision", "googlenet", 57, 0, 0),
        ("torchvision", "vgg11_bn", 8, 0, 0),
        ("timm", "resnet26d", 27, 4, 0),
        ("timm", "mobilenetv3_small_050", 30, 4, 0),
        ("timm", "efficientnet_b0", 42, 7, 0),
        ("timm", "densenet121", 121, 0, 0),
    ],
)
def test_published_models(package: str, name: str, fused: int, unpaired: int, refused: int) -> None:
    library = pytest.importorskip(package)
    models = library.models if package == "torchvision" else library
    make = models.get_model if package == "torchvision" else models.create_model
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = make(name, num_classes=4, **options).double()
    for module in model.modules():  # random numbers would differ in the two runs that are compared
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    report = bx.fusion_report(model)
    assert tuple(map(len, report)) == (fused, unpaired, refused)
    expected = two_steps(copy.deepcopy(model), x)
    bx.fuse_batchnorm(model)
    actual = two_steps(model, x)
    for a, e in zip(actual, expected, strict=True):
        # As assert_same, but up to 120 layers deep: 1e-16 grows to 1e-9 at most in the gradients.
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
