"""One candidate of a comparison: its steps, what they give, and the memory that they take."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

_SEED = 0

#: The memory format of a tensor with so many dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Loss = Callable[[Any], Tensor]


class Arguments(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(inputs: Any) -> Arguments:
        """A tensor, a dictionary of keyword arguments, or a tuple that may end with one."""
        if isinstance(inputs, Mapping):
            return Arguments((), inputs)
        if not isinstance(inputs, (tuple, list)):
            return Arguments((inputs,), {})
        if inputs and isinstance(inputs[-1], Mapping):
            return Arguments(tuple(inputs[:-1]), inputs[-1])
        return Arguments(tuple(inputs), {})

    def tensors(self) -> list[Tensor]:
        """All of them, nested ones too."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if _is_tensor(leaf)]

    def copy(self) -> Arguments:
        """The same values, layout and `requires_grad` in other memory."""
        args, kwargs = pytree.tree_map_only(Tensor, _leaf, (self.args, dict(self.kwargs)))
        return Arguments(args, kwargs)

    def __str__(self) -> str:
        return ", ".join(map(_described, self.tensors())) or "no tensor"


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _described(tensor: Tensor) -> str:
    text = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    layout = CHANNELS_LAST.get(tensor.dim())
    if layout is None or tensor.is_contiguous():
        return text
    return text + " channels_last" * tensor.is_contiguous(memory_format=layout)


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a nested structure."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def mean_squares(outputs: Any) -> Tensor:
    """The default loss: the sum of the mean squares of all floating-point tensors, in float32."""
    found = floating(outputs)
    if not found:
        raise ValueError(
            "a floating-point tensor was required in the outputs, got "
            f"{type(outputs).__name__}: give a loss"
        )
    wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in found)
    return torch.stack([t.square().mean() for t in wide]).sum()


def devices_of(model: nn.Module, arguments: Arguments) -> set[torch.device]:
    """The CUDA devices that the model and its inputs are on; none for the CPU."""
    tensors = [*model.parameters(), *model.buffers(), *arguments.tensors()]
    return {tensor.device for tensor in tensors if tensor.is_cuda}


class Values(NamedTuple):
    """What a step gave: floating-point outputs, and gradients of parameters and inputs."""

    outputs: list[Tensor]
    gradients: list[Tensor]


class Trial:
    """A model of its own, and the calls of it that are compared.

    Each call starts with `prepare`: a mode, no gradients, fresh copies of the inputs and the same
    random numbers for every candidate.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: Arguments,
        loss: Loss,
        devices: Iterable[torch.device],
        compiled: bool,
    ) -> None:
        self._model = model
        self._call: Callable[..., Any] = torch.compile(model) if compiled else model
        self._given, self._arguments, self._loss = arguments, arguments, loss
        self._devices = tuple(devices)

    def prepare(self, training: bool) -> None:
        """What is not timed."""
        self._model.train(training)
        for parameter in self._model.parameters():
            parameter.grad = None
        self._arguments = self._given.copy()
        random.seed(_SEED)
        torch.default_generator.manual_seed(_SEED)
        for device in self._devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)

    def step(self) -> Any:
        """Forward, loss and backward, in the mode that was prepared; the outputs."""
        with torch.enable_grad():
            outputs = self._forward()
            self._loss(outputs).backward()
        return outputs

    def infer(self) -> Any:
        """Forward without gradients; the outputs."""
        with torch.no_grad():
            return self._forward()

    def _forward(self) -> Any:
        return self._call(*self._arguments.args, **self._arguments.kwargs)

    def evaluation(self) -> Values:
        """Outputs of both calls in eval mode, and the gradients there. Changes no statistics."""
        self.prepare(training=False)
        outputs = _kept(floating(self.infer()))
        self.prepare(training=False)
        outputs += _kept(floating(self.step()))
        return Values(outputs, self._gradients())

    def training(self) -> Values:
        """Outputs and gradients of a training step."""
        self.prepare(training=True)
        outputs = _kept(floating(self.step()))
        return Values(outputs, self._gradients())

    def _gradients(self) -> list[Tensor]:
        leaves = [*self._model.parameters(), *self._arguments.tensors()]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return _kept(torch.zeros_like(t) if t.grad is None else t.grad for t in wanted)

    def memory(self) -> int:
        """Bytes that a training step takes, as `MEMORY` says for the device."""
        self.prepare(training=True)
        return self._peak() if self._devices else self._saved()

    def _peak(self) -> int:
        before = sum(map(torch.cuda.memory_allocated, self._devices))
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        self.step()
        return sum(map(torch.cuda.max_memory_allocated, self._devices)) - before

    def _saved(self) -> int:
        given = [*self._model.parameters(), *self._model.buffers(), *self._arguments.tensors()]
        known = {_storage(tensor).data_ptr() for tensor in given if _has_storage(tensor)}
        # The storages themselves, so that none is freed and its address counted for another's.
        found: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _has_storage(tensor) and _storage(tensor).data_ptr() not in known:
                found[_storage(tensor).data_ptr()] = _storage(tensor)
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self._forward()
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                keep(tensor)
        return sum(storage.nbytes() for storage in found.values())


#: What `Trial.memory` measures on a CPU and on CUDA devices.
MEMORY = {
    "cpu": "kept for backward (saved tensors, each storage once, and outputs; "
    "without parameters, buffers and inputs)",
    "cuda": "peak of a training step, beyond what was allocated before it",
}


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _kept(tensors: Iterable[Tensor]) -> list[Tensor]:
    """On the CPU, where they take nothing from the next candidate's memory."""
    return [t.detach().to_dense().to("cpu", copy=True) for t in tensors]


def difference(ours: Sequence[Tensor], torchs: Sequence[Tensor]) -> float:
    """The largest |ours - torch's| of all elements, relative to the largest finite |torch's|.

    Over all tensors together, because a gradient that is 0 but for rounding, as that of a bias
    before a batch norm, has no scale of its own. Values that are equal, or both nan, differ by 0;
    where one alone is not finite the result is not.
    """
    if [t.shape for t in ours] != [t.shape for t in torchs]:
        raise ValueError("outputs of other shapes than torch's")
    distances, scales = [0.0], [0.0]
    for mine, theirs in zip(ours, torchs, strict=True):
        a, b = mine.double(), theirs.double()
        same = (a == b) | (a.isnan() & b.isnan())
        distances.append(_largest((a - b).masked_fill(same, 0.0)))
        scales.append(_largest(b[b.isfinite()]))
    worst = _largest(torch.tensor(distances))
    return worst / max(scales) if max(scales) else (worst and math.inf)


def _largest(values: Tensor) -> float:
    """The largest magnitude; nan where there is one, unlike Python's max."""
    return float(values.abs().amax()) if values.numel() else 0.0
