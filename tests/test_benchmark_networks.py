"""`python -m benchmarks networks`: the networks, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_cases import invoke
from torch import nn

import batchnorm_ext
from benchmarks import networks
from benchmarks.models import NETWORKS, Whole
from benchmarks.shapes import LAYOUTS

# As their papers' authors and torchvision count them; of the last only what is before its head.
PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "densenet121": 7_978_856}
MOBILENET_FEATURES = 927_008


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_parameters_of_their_papers(name: str) -> None:
    assert count(NETWORKS[name].make()) == PARAMETERS[name]


def test_mobilenet_has_the_parameters_of_its_paper() -> None:
    model = NETWORKS["mobilenet_v3_small"].make()
    assert isinstance(model, nn.Sequential)
    assert count(model[:-1]) == MOBILENET_FEATURES


@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_computes_the_same(name: str) -> None:
    """And nothing that could be joined is left alone but where the network says so."""
    sizes = NETWORKS[name].sizes
    small = (2, *sizes[1:]) if name == "transformer" else (2, 3, 64, 64)
    model, x = networks.prepared(Whole(NETWORKS[name].make, small), "channels_first")
    model, x = model.double(), x.double()
    wanted = model(x)
    for name, way in networks.WAYS.items():
        torch.testing.assert_close(way(model)(x), wanted, msg=name)


def test_batch_norms_are_joined() -> None:
    report = batchnorm_ext.fusion_report(batchnorm_ext.fuse_batchnorm(NETWORKS["resnet50"].make()))
    joined = [site for site in report.fused if site.residual]
    assert len(joined) == 16, report


def test_kinds_of_operators() -> None:
    for name, kind in {
        "aten::mkldnn_convolution": "products",
        "aten::convolution_backward": "products",
        "aten::addmm": "products",
        "aten::native_batch_norm": "norm",
        "aten::native_batch_norm_backward": "norm",
        "batchnorm_ext::forward_train": "norm",
        "batchnorm_ext::backward": "norm",
        "aten::add_": "pointwise",
        "aten::threshold_backward": "pointwise",
        "aten::max_pool2d_with_indices": "others",
    }.items():
        assert networks.kind_of(name) == kind, name


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_result_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str) -> None:
    monkeypatch.setitem(NETWORKS, "resnet18", Whole(Tiny, (2, 3, 8, 8)))
    monkeypatch.setattr(networks, "peak_bytes", lambda *_: 12_000_000)
    monkeypatch.setattr(networks, "PROFILED", 1)
    words = ("--network", "resnet18", "--rounds", "2", "--dtype", dtype)
    found = invoke("networks", *words, "--output", str(tmp_path))
    assert found.exit_code == 0, found.output
    (path,) = tmp_path.glob("*-networks.json")
    rows = json.loads(path.read_text())["networks"]
    assert [row["layout"] for row in rows] == list(LAYOUTS)
    for row in rows:
        assert set(row["timings"]) == set(row["operators"]) == {"torch", "converted", "fused"}
        assert all(some["norm"] > 0 and some["products"] > 0 for some in row["operators"].values())
        assert row["operators"]["fused"]["pointwise"] < row["operators"]["torch"]["pointwise"]
        assert set(row["peak_bytes"]) == {"torch", *networks.POOLS}
    for text in ("resnet18", "converted", "fused", "12 MB"):
        assert text in found.output


def test_peaks_are_those_of_a_process() -> None:
    """Of its own: what this one has is not in it."""
    mine = torch.ones(750_000_000)  # 3 GB
    peak = networks.peak_bytes("unet", "channels_first", "float32", "fused", "0")
    assert 50e6 < peak < mine.nbytes


def test_unknown_names_are_refused() -> None:
    found = invoke("networks", "--network", "resnet19")
    assert found.exit_code == 2 and "resnet19" in found.output
