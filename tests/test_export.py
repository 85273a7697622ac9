"""Programs that leave the process: torch.export, plain ATen, ONNX and AOTInductor."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import fusable
import onnxruntime
import pytest
import torch
from networks import CHANNELS, KINDS, Network, images
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import batchnorm_ext as bx
from batchnorm_ext.functional import ACTIVATIONS

ROOT = Path(__file__).resolve().parent.parent
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)
CXX = os.environ.get("CXX", "g++")  # as inductor looks for it


class Norms(nn.Module):
    """A plain norm, and each activation without and with a residual: outputs of about 1."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.plain = getattr(bx, f"BatchNorm{rank}d")(3)
        fused = getattr(bx, f"BatchNormAct{rank}d")
        self.fused = nn.ModuleList()
        for name in ACTIVATIONS:
            activation = "gelu" if name == "gelu_tanh" else name
            approximate = "tanh" if name == "gelu_tanh" else "none"
            options = {"negative_slope": 0.3, "alpha": 0.7, "approximate": approximate}
            self.fused.append(fused(3, activation, **options))
        generator = torch.Generator().manual_seed(0)
        for value in self.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.plain(x)
        return [y, *(norm(x) for norm in self.fused), *(norm(x, y) for norm in self.fused)]


def export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (x,), dynamic_shapes=BATCH)


def operators(program: torch.export.ExportedProgram) -> list[torch._ops.OpOverload]:
    targets = (node.target for node in program.graph.nodes)
    return [target for target in targets if isinstance(target, torch._ops.OpOverload)]


def flat(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


# ---- torch.export ----


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export(mode: str, strict: bool) -> None:
    """With a batch of any size, runs and matches."""
    module = nn.Sequential(bx.BatchNorm2d(3), bx.BatchNormAct2d(3, "relu")).train(mode == "train")
    x = torch.randn(4, 3, 5, 5)
    program = torch.export.export(
        copy.deepcopy(module), (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict
    )
    other = torch.randn(7, 3, 5, 5)
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_exported_program_saved_and_loaded(
    kind: str, momentum: float | None, training: bool
) -> None:
    """With a batch of any size; it keeps its running statistics as the module does."""
    model = Network(kind, momentum=momentum).double().train(training)
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(copy.deepcopy(model), (images(0),), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (5, 9):
        torch.testing.assert_close(loaded(images(n, n)), model(images(n, n)))
    torch.testing.assert_close(dict(loaded.named_buffers()), dict(model.named_buffers()))


def test_one_operator_unless_asked() -> None:
    """Neither torch.export nor torch's own decompositions take it apart."""
    program = export(bx.BatchNormAct2d(3, "silu"), torch.randn(4, 3, 5, 5))
    assert [str(op) for op in operators(program)] == ["batchnorm_ext.batch_norm.default"]
    program = program.run_decompositions()
    assert [str(op) for op in operators(program)] == ["batchnorm_ext.forward_eval.default"]


def test_layouts_of_symbolic_sizes() -> None:
    """The kernels', which keep the layout of (N, L, C), not those of the decomposition."""
    x = torch.randn(4, 5, 3).transpose(1, 2)
    module = bx.BatchNorm1d(3)
    program = export(module, x).run_decompositions()
    (output,) = program.graph.output_node().args[0]
    assert output.meta["val"].stride() == module(x).stride() == x.stride()


# ---- plain ATen ----


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_decompositions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = Norms(max(len(shape) - 2, 1)).to(dtype)
    program = export(model, torch.randn(shape, dtype=dtype))
    program = program.run_decompositions(bx.decompositions())
    assert all(torch.Tag.core in op.tags for op in operators(program)), operators(program)
    x = torch.randn(7, *shape[1:], dtype=dtype)
    # In bfloat16 torch rounds after the norm, the residual and parts of an activation: each by
    # 2^-9 of values of up to 16.
    rounding: dict[str, Any] = {} if dtype == torch.float64 else {"rtol": 2**-5, "atol": 2**-5}
    torch.testing.assert_close(flat(program.module()(x)), flat(model(x)), **rounding)


def test_a_table_of_ones_own() -> None:
    """What is taken out of one is left as it is by that one alone."""
    table = bx.decompositions()
    table.pop(torch.ops.aten.silu.default)
    program = export(bx.BatchNormAct1d(3, "silu"), torch.randn(4, 3))
    assert torch.ops.aten.silu.default in operators(program.run_decompositions(table))
    plain = program.run_decompositions(bx.decompositions())
    assert torch.ops.aten.silu.default not in operators(plain)


def test_statistics_of_the_batch_stay_the_operators() -> None:
    """Nothing that has to be written is lost, in a program exported in training mode."""
    model = bx.BatchNorm1d(3)
    x = torch.randn(4, 3)
    program = torch.export.export(copy.deepcopy(model), (x,))
    other = program.run_decompositions(bx.decompositions()).module()
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))


def test_masks_for_backward_stay_the_operators() -> None:
    """A graph with a backward pass, given the table, is right."""

    module = bx.BatchNormAct1d(3, "relu").eval()
    x, residual = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph), decompositions=bx.decompositions()
    )
    leaves = [x, residual, *module.parameters()]
    results = [
        torch.autograd.grad(call(x, residual).square().sum(), leaves)
        for call in (module, torch.compile(module, backend=backend, fullgraph=True))
    ]
    torch.testing.assert_close(*results)


def test_a_plain_program_needs_no_package(tmp_path: Path) -> None:
    model, x = Network("fused").eval(), images(0, dtype=torch.float32)
    program = export(model, x).run_decompositions(bx.decompositions())
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    script = """if True:
        import sys, torch
        program = torch.export.load("model.pt2")
        torch.save(program.module()(torch.load("x.pt")).detach(), "y.pt")
        assert "batchnorm_ext" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x).detach())


# ---- ONNX ----


def assert_onnx(program: Any, model: nn.Module, *batches: Tensor) -> None:
    """The file has standard operators alone, and ONNX Runtime computes the model's outputs."""
    proto = program.model_proto
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for x in batches:
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = [y.detach() for y in flat(model(x))]
        outputs = [torch.from_numpy(y) for y in got]
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


def to_onnx(model: nn.Module, x: Tensor) -> Any:
    return torch.onnx.export(model.eval(), (x,), dynamo=True, dynamic_shapes=BATCH, verbose=False)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 5, 6)], ids=str)
def test_onnx_modules(shape: tuple[int, ...]) -> None:
    """Every rank, every activation, with and without a residual."""
    model = Norms(max(len(shape) - 2, 1))
    x = torch.randn(shape)
    assert_onnx(to_onnx(model, x), model, x, torch.randn(1, *shape[1:]), torch.randn(9, *shape[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_networks(kind: str) -> None:
    model = Network(kind)
    batches = [images(n, n, torch.float32) for n in (4, 1, 9)]
    assert_onnx(to_onnx(model, batches[0]), model, *batches)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3", "volume", "mlp"])
def test_onnx_fused_models(name: str) -> None:
    model, x = fusable.build(name)
    model, x = bx.fuse_batchnorm(model).float(), x.float()
    assert_onnx(to_onnx(model, x), model, x, torch.cat([x, x + 1]))


def test_onnx_of_an_exported_program() -> None:
    model, x = Network("fused"), images(0, dtype=torch.float32)
    program = torch.onnx.export(export(model, x), dynamo=True, verbose=False)
    assert_onnx(program, model, x, images(1, 9, torch.float32))


# ---- AOTInductor ----


@pytest.mark.skipif(
    shutil.which(CXX) is None, reason=f"NO C++ COMPILER {CXX}: AOTInductor is NOT TESTED"
)
@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain"])
def test_aotinductor(plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One package for two sizes of batch, with this package's kernels or without them.

    With CI set, where inductor refuses to call what has a decomposition unless it is told to.
    """
    monkeypatch.setenv("CI", "true")
    model = nn.Sequential(bx.BatchNorm2d(CHANNELS), bx.BatchNormAct2d(CHANNELS, "silu"))
    x = torch.randn(4, CHANNELS, 5, 7)
    model(x)  # running statistics that are not 0 and 1
    program = export(model, x)
    if plain:
        program = program.run_decompositions(bx.decompositions())
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    with zipfile.ZipFile(path) as package:
        calls = any(b"batchnorm_ext::forward_eval" in package.read(n) for n in package.namelist())
    assert calls is not plain
    compiled = torch._inductor.aoti_load_package(path)
    for n in (2, 7):
        x = torch.randn(n, CHANNELS, 5, 7)
        torch.testing.assert_close(compiled(x), model(x).detach())
