"""The implementations that are compared, each as three calls without arguments.

Every one gets the same tensors and parameters. The peers are written in the most favourable form
that is usual: the residual is added and ReLU applied in place, which autograd allows here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Group

MOMENTUM = 0.1
EPS = 1e-5
OURS = "ours"

Step = Callable[[Tensor, Tensor | None], Tensor]
MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Data:
    """The tensors of one group. x, residual and the parameters require gradients."""

    x: Tensor
    residual: Tensor | None
    grad: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are asked for, besides the parameters."""
        return [self.x] if self.residual is None else [self.x, self.residual]


@dataclass
class Calls:
    """One candidate, ready to be timed or checked; `eval` is to be called under no_grad."""

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor, ...]]
    eval: Callable[[], Tensor]
    train_module: nn.Module


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` in memory as `layout` says; (N, C) is the same in both."""
    if layout == "channels_first" or tensor.dim() == 2:
        return tensor.contiguous()
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous(memory_format=MEMORY_FORMATS[tensor.dim()])


def make_data(group: Group, mean: float = 0.0, seed: int = 0) -> Data:
    """Random tensors for `group`: x has the given mean and standard deviation 1."""
    random = torch.Generator(group.device).manual_seed(seed)
    dtype = getattr(torch, group.dtype)
    sizes, channels = group.shape.sizes, group.shape.sizes[1]
    # Parameters of a half-precision network stay float32, as under autocast.
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=group.device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=random, device=group.device)

    def activation(offset: float = 0.0) -> Tensor:
        return in_layout(normal(*sizes).add_(offset).to(dtype), group.layout)

    def vector(values: Tensor) -> Tensor:
        return values.to(parameter_dtype)

    # Made where they are needed: drawing a GPU's tensors on the CPU would take longer than all the
    # timing. So the numbers of a seed are those of the device's own generator.
    data = Data(
        x=activation(mean),
        residual=activation() if group.op == "bn_add_relu" else None,
        grad=activation(),
        weight=vector(1 + 0.1 * normal(channels)),
        bias=vector(0.1 * normal(channels)),
        running_mean=vector(mean + 0.1 * normal(channels)),
        running_var=vector(0.5 + uniform(channels)),
    )
    for tensor in (*data.inputs, data.weight, data.bias):
        tensor.requires_grad_()
    return data


def _load(module: nn.Module, data: Data) -> nn.Module:
    state = {
        "weight": data.weight,
        "bias": data.bias,
        "running_mean": data.running_mean,
        "running_var": data.running_var,
        "num_batches_tracked": torch.tensor(0),
    }
    module.load_state_dict({name: value.detach() for name, value in state.items()})
    return module.to(data.weight.device, data.weight.dtype)


def _rank(data: Data) -> str:
    return {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[data.x.dim()]


def _ours(group: Group, data: Data) -> tuple[nn.Module, Step]:
    import batchnorm_ext

    channels = group.shape.sizes[1]
    if group.op == "bn":
        plain = getattr(batchnorm_ext, f"BatchNorm{_rank(data)}")(channels, EPS, MOMENTUM)
        return plain, lambda x, _: plain(x)
    fused_class = getattr(batchnorm_ext, f"BatchNormAct{_rank(data)}")
    fused = fused_class(channels, activation="relu", eps=EPS, momentum=MOMENTUM)
    return fused, fused


def _eager(group: Group, data: Data) -> tuple[nn.Module, Step]:
    norm = getattr(nn, f"BatchNorm{_rank(data)}")(group.shape.sizes[1], EPS, MOMENTUM)

    def add_relu(x: Tensor, residual: Tensor | None) -> Tensor:
        return F.relu(norm(x).add_(residual), inplace=True)

    steps: dict[str, Step] = {
        "bn": lambda x, _: norm(x),
        "bn_relu": lambda x, _: F.relu(norm(x), inplace=True),
        "bn_add_relu": add_relu,
    }
    return norm, steps[group.op]


def _cudnn_off(group: Group, data: Data) -> tuple[nn.Module, Step]:
    """torch's own kernels, also where it would call cuDNN: backward follows forward in that."""
    norm, step = _eager(group, data)

    def without(x: Tensor, residual: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return step(x, residual)

    return norm, without


def _compile(group: Group, data: Data) -> tuple[nn.Module, Step]:
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    # The timed backward runs many times over one graph, so it must not take over its buffers; and
    # the generated code holds the thread count, which has to be part of the key of its cache.
    torch._functorch.config.donated_buffer = False
    torch._inductor.config.cpp.threads = group.threads
    norm, step = _eager(group, data)
    return norm, torch.compile(step, dynamic=False, fullgraph=True)


MAKERS: dict[str, Callable[[Group, Data], tuple[nn.Module, Step]]] = {
    OURS: _ours,
    "eager": _eager,
    "cudnn_off": _cudnn_off,
    "compile": _compile,
}


def make_calls(name: str, group: Group, data: Data) -> Calls:
    """The candidate `name` on `data`. Backward's graph is built once, on its first call."""
    make = MAKERS[name]
    train_module, train_step = make(group, data)
    eval_module, eval_step = make(group, data)
    _load(train_module, data).train()
    _load(eval_module, data).eval()
    parameters = list(train_module.parameters())
    x, residual = data.x.detach(), None if data.residual is None else data.residual.detach()
    graph: list[Tensor] = []

    def forward() -> Tensor:
        return train_step(data.x, data.residual)

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(forward())
        wanted = data.inputs + parameters
        return torch.autograd.grad(graph[0], wanted, data.grad, retain_graph=True)

    def evaluate() -> Tensor:
        return eval_step(x, residual)

    return Calls(forward, backward, evaluate, train_module)
