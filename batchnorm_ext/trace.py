"""What one module's own forward computes, as a graph; or why a graph can't stand for it.

A trace runs a forward once, with proxies for tensors, and keeps what it saw. Whatever Python
decides on the way is frozen, so `trace_forward` runs it under several conditions and refuses where
they disagree, where the forward leaves something changed, or draws random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
import pickle
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Refused", "trace_forward"]

_AUTOCAST_DEVICES = ("cpu", "cuda")


class Refused(Exception):
    """Why something is left as it is, in words for the report."""


def trace_forward(module: nn.Module, cls: type[nn.Module]) -> fx.Graph:
    """The graph of `cls.forward` on `module`, each child module a single node.

    `cls` is `module`'s class or one that it derives from. `nn.Identity` children are left out.
    The module is as before afterwards, and so are the random number generators.

    Raises:
        Refused: the forward has no graph, or one that would not always compute the same.
    """
    with _observed(module, cls):
        graph = _trace(module, _Tracer())
        for training, grad in itertools.product((True, False), repeat=2):
            if str(_trace(module, _Tracer(), training, grad)) != str(graph):
                raise Refused("its forward depends on the training or the gradient mode")
        # To fx a proxy is no Tensor and never None. Forwards that ask take another way here.
        if str(_trace(module, _Tracer(posing=True))) != str(graph):
            raise Refused("its forward depends on the type of an argument")
        for node in graph.find_nodes(op="placeholder"):
            if _goes_another_way_without(str(node.target), module, graph):
                raise Refused(f"its forward depends on whether {node.target} is None")
    return graph


def _goes_another_way_without(argument: str, module: nn.Module, graph: fx.Graph) -> bool:
    """Whether the forward is another, or has no graph, where `argument` is None."""
    try:
        return _calls(_trace(module, _Tracer(absent=argument))) != _calls(graph)
    except Refused as refusal:
        # The usual case: None is no possible value, and whatever is done with it fails. Other
        # reasons lie on a way that None may take.
        return not isinstance(refusal.__cause__, (TypeError, AttributeError, AssertionError))


def _calls(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.nodes]


def _in_place(name: str) -> Any:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return record


class _InPlace:
    """`x += y` recorded as such: fx has `x = x + y` for it, which writes to nothing."""

    __iadd__, __isub__, __imul__ = _in_place("iadd"), _in_place("isub"), _in_place("imul")
    __itruediv__, __ifloordiv__ = _in_place("itruediv"), _in_place("ifloordiv")
    __imod__, __ipow__, __iand__ = _in_place("imod"), _in_place("ipow"), _in_place("iand")
    __ior__, __ixor__ = _in_place("ior"), _in_place("ixor")
    __ilshift__, __irshift__ = _in_place("ilshift"), _in_place("irshift")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):  # what a proxy itself has
            raise Refused(f"its forward assigns to the attribute {name} of a tensor")
        super().__setattr__(name, value)


class _Attribute(_InPlace, fx.proxy.Attribute):
    """A proxy for `x.name`."""


class _Proxy(_InPlace, fx.Proxy):
    """A proxy for a tensor."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _TensorProxy(_Proxy):
    """A proxy that is an instance of Tensor to whoever asks."""

    __class__ = property(lambda self: Tensor)


class _Tracer(fx.Tracer):
    """Records every child module as one call, and refuses what a graph would lose."""

    proxy_buffer_attributes = True

    def __init__(self, *, posing: bool = False, absent: str | None = None) -> None:
        super().__init__()
        self.posing, self.absent = posing, absent
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if type(m) is nn.Identity and not (m._forward_hooks or m._forward_pre_hooks or kwargs):
            return args[0]
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self) if self.posing else _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        if _modes() != self.modes:
            raise Refused("its forward changes the gradient or autocast mode")
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        absent = kind == "placeholder" and target == self.absent
        return None if absent else proxy

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # isinstance would ask a.__class__, see _TensorProxy
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Refused("its forward uses a tensor that is neither parameter nor buffer")
        return super().create_arg(a)


def _modes() -> tuple[bool, ...]:
    autocast = map(torch.is_autocast_enabled, _AUTOCAST_DEVICES)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _trace(
    module: nn.Module, tracer: _Tracer, training: bool | None = None, grad: bool = True
) -> fx.Graph:
    """One trace. Without gradients autocast is on, so that a forward that turns it off shows."""
    before, autocast = module.training, [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    try:
        module.training = before if training is None else training
        for device in _AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, not grad)
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            tracer.modes = _modes()
            graph = tracer.trace(module)
    except Refused:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise Refused(f"its forward can't be traced ({type(error).__name__}: {text})") from error
    finally:
        module.training = before
        for device, enabled in zip(_AUTOCAST_DEVICES, autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
    for node in graph.nodes:
        node.type = None  # an annotation may be a name that only its own file knows
    return graph


def _random_states() -> list[Any]:
    """Of torch, Python and numpy, if that is in use; lists and tuples, which can be compared."""
    numpy = sys.modules.get("numpy")
    states = [torch.get_rng_state().tolist(), random.getstate()]
    return [*states, pickle.dumps(numpy.random.get_state())] if numpy else states


def _set_random_states(states: list[Any]) -> None:
    torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
    random.setstate(states[1])
    for state in states[2:]:
        sys.modules["numpy"].random.set_state(pickle.loads(state))


def _members(container: Any) -> list[int]:
    items = container.items() if isinstance(container, dict) else ((x, x) for x in container)
    return [id(member) for pair in items for member in pair]


@contextlib.contextmanager
def _observed(module: nn.Module, cls: type[nn.Module]) -> Iterator[None]:
    """Run a block with `module` as a `cls`, undo what it changes, and refuse if it changed any."""
    own, attributes = type(module), dict(vars(module))
    containers = {
        name: copy.copy(value)
        for name, value in attributes.items()
        if isinstance(value, (list, dict, set))
    }
    states = _random_states()
    module.__class__ = cls
    try:
        yield
    finally:
        module.__class__ = own
        now = dict(vars(module))
        changed = {k for k in now | attributes if k not in now or k not in attributes}
        changed |= {k for k in now.keys() & attributes.keys() if now[k] is not attributes[k]}
        changed |= {k for k, v in containers.items() if _members(v) != _members(attributes[k])}
        if changed:
            vars(module).clear()
            vars(module).update(attributes)
        for name in changed & containers.keys():
            value, saved = attributes[name], containers[name]
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(saved)
        drawn = _random_states() != states
        if drawn:
            _set_random_states(states)
    if changed:
        raise Refused(f"its forward assigns to {', '.join(sorted(changed))}")
    if drawn:
        raise Refused("its forward draws random numbers itself")
