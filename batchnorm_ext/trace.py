"""What one module's own forward computes, as graphs; or why no graph can stand for it.

A trace runs a forward once, with proxies for tensors, and keeps what it saw. Whatever Python
decides on the way is frozen. Where a forward asks for an argument's type, or whether it is None,
there is a graph for each answer, with the condition under which it holds; where it decides by
something else, runs under several conditions disagree, or it leaves something changed or draws
random numbers, it is refused.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import dis
import inspect
import itertools
import operator
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

__all__ = ["Refused", "Way", "trace_forward", "trace_norm"]

_AUTOCAST_DEVICES = ("cpu", "cuda")
# Training or not, with gradients or without.
_MODES = ((True, True), (True, False), (False, True), (False, False))

# What an argument may be found to be: exactly these, since a forward may ask for derived classes.
_TYPES: dict[str, type] = {"Tensor": Tensor, "list": list, "tuple": tuple, "None": type(None)}
# More than two arguments that decide have more combinations than are worth a graph each.
_MOST_CONDITIONS = 2


class Refused(Exception):
    """Why something is left as it is, in words for the report."""


class Way(NamedTuple):
    """What a forward computes where each argument of `conditions` is what stands beside it.

    That is a name of `_TYPES`, or "given" for an argument that is anything but None.
    """

    conditions: tuple[tuple[str, str], ...]
    graph: fx.Graph


def trace_forward(module: nn.Module, cls: type[nn.Module]) -> list[Way]:
    """The graphs of `cls.forward` on `module`, each child module a single node.

    `cls` is `module`'s class or one that it derives from. `nn.Identity` children are left out.
    The module is as before afterwards, and so are the random number generators. Of several ways,
    one at most has its conditions met; a call that meets none of them is not in any graph.

    Raises:
        Refused: the forward has no graph, or one that would not always compute the same.
    """
    _check_source(cls.forward)
    arguments = _arguments(cls)
    with _observed(module, cls):
        found = list(_ways(module, arguments, {}))
    ways = [
        Way(tuple(known.items()), graph) for known, graph in found if isinstance(graph, fx.Graph)
    ]
    if not ways:
        raise next(refusal for _, refusal in found if isinstance(refusal, Refused))
    return ways


def _check_source(forward: Any) -> None:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    instructions = dis.get_instructions(code) if code else ()
    if any(i.opname == "LOAD_GLOBAL" and i.argval == "type" for i in instructions):
        raise Refused("its forward uses type(), which finds a proxy where a tensor will be")


def _arguments(cls: type[nn.Module]) -> list[str]:
    """The names of the arguments of `cls.forward` that may be None, or a list, or a tensor."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    kinds = {p.kind for p in parameters}
    if kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}:
        raise Refused("its forward has arguments after *args, which fx puts before")
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _ways(
    module: nn.Module, arguments: list[str], known: dict[str, str]
) -> Iterator[tuple[dict[str, str], fx.Graph | Refused]]:
    """What the forward computes, or why that can't be told, for each answer to what it asks."""
    graph, types_asked = _read(module, known)
    open_ = [argument for argument in arguments if argument not in known]
    asked = next((argument for argument in open_ if argument in types_asked), None)
    answers = list(_TYPES)
    if asked is None:
        answers = ["given", "None"]
        asked = next((a for a in open_ if _differs_without(a, module, known, graph)), None)
    if asked is None or (len(known) == _MOST_CONDITIONS and isinstance(graph, Refused)):
        yield known, graph
    elif len(known) == _MOST_CONDITIONS:
        yield known, Refused(f"its forward depends on what {', '.join(known)} and {asked} are")
    else:
        for answer in answers:
            yield from _ways(module, arguments, {**known, asked: answer})


def _read(module: nn.Module, known: dict[str, str]) -> tuple[fx.Graph | Refused, set[str]]:
    """The graph that the forward has in each mode, and whose type it asks for in any of them."""
    tracers = [_Tracer(known) for _ in _MODES]
    graphs = [_attempt(module, t, modes) for t, modes in zip(tracers, _MODES, strict=True)]
    asked = {argument for tracer in tracers for argument in tracer.asked}
    refusal = next((graph for graph in graphs if isinstance(graph, Refused)), None)
    if refusal is None and any(str(graph) != str(graphs[0]) for graph in graphs):
        refusal = Refused("its forward depends on the training or the gradient mode")
    return refusal or graphs[0], asked


def _attempt(module: nn.Module, tracer: _Tracer, modes: tuple[bool, bool]) -> fx.Graph | Refused:
    try:
        return _trace(module, tracer, *modes)
    except Refused as refusal:
        return refusal


def _differs_without(
    argument: str, module: nn.Module, known: dict[str, str], graph: fx.Graph | Refused
) -> bool:
    """Whether the forward is another than `graph`, or has no graph, where `argument` is None."""
    for modes in _MODES:
        without = _attempt(module, _Tracer({**known, argument: "None"}), modes)
        if isinstance(without, fx.Graph):
            differs = isinstance(graph, Refused) or (
                _steps(graph, argument) != _steps(without, argument)
            )
        else:
            # The usual case: None is no possible value, and whatever is done with it fails. Other
            # reasons lie on a way that None may take.
            fails = isinstance(without.__cause__, (TypeError, AttributeError, AssertionError))
            differs = isinstance(graph, fx.Graph) and not fails
        if differs:
            return True
    return False


def _steps(graph: fx.Graph, absent: str = "") -> list[tuple[Any, ...]]:
    """The nodes of `graph` in a form that can be compared, with None for the argument `absent`."""

    def name(node: fx.Node) -> str | None:
        return None if node.op == "placeholder" and node.target == absent else node.name

    return [_text(node, name) for node in graph.nodes]


def _text(node: fx.Node, name: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """What `node` does, in a form that can be compared, with the `name` of each node it takes."""
    return node.op, node.target, fx.map_arg(node.args, name), fx.map_arg(node.kwargs, name)


def trace_norm(module: nn.Module, cls: type[nn.Module], base: type[nn.Module]) -> list[fx.Node]:
    """The calls that `cls.forward` makes, one after the other, from `base.forward`'s output on.

    `base` is torch's batch norm that `cls` derives from. What either asserts of its input's shape
    is left out: the kernels' forward asks for it as well.

    Raises:
        Refused: the forward does not begin with `base`'s, or goes on otherwise than in a chain.
    """
    chains = [
        _chain_after(_norm_graph(module, base, modes), _norm_graph(module, cls, modes))
        for modes in _MODES
    ]
    texts = [[_text(node, lambda _: "what came before") for node in chain] for chain in chains]
    if any(text != texts[0] for text in texts):
        raise Refused("its forward depends on the training or the gradient mode")
    return chains[0]


def _norm_graph(module: nn.Module, cls: type[nn.Module], modes: tuple[bool, bool]) -> fx.Graph:
    unchecked = type(cls.__name__, (cls,), {"_check_input_dim": lambda self, input: None})
    tracer = _Tracer({})
    with _observed(module, unchecked):
        graph = _trace(module, tracer, *modes)
    if tracer.asked or len(graph.find_nodes(op="placeholder")) != 1:
        raise Refused("its forward asks for the type of its input, or has several")
    return graph


def _chain_after(start: fx.Graph, whole: fx.Graph) -> list[fx.Node]:
    """What `whole` does with the value that `start` returns, if it begins like that."""
    expected, calls = _calls(start), _calls(whole)
    if list(calls.values())[: len(expected)] != list(expected.values()):
        raise Refused("its forward is not torch's batch norm with something after it")
    first, *chain = list(calls)[len(expected) - 1 :]
    output = whole.output_node()
    for node, after in itertools.pairwise([first, *chain, output]):
        if after.all_input_nodes != [node] or len(node.users) != 1:
            raise Refused(
                f"{after.name} in its forward takes something else than {node.name} alone"
            )
    if output.args != (list(calls)[-1],):
        raise Refused("its forward returns something else than a tensor")
    return chain


def _calls(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """The calls in the graph of a batch norm, but for assertions, each with its `_text`."""
    names = {node: f"self.{node.target}" for node in graph.find_nodes(op="get_attr")}
    names |= dict.fromkeys(graph.find_nodes(op="placeholder"), "input")
    calls = [n for n in graph.nodes if n not in names and n.op != "output" and not _checks(n)]
    names |= {node: f"call {i}" for i, node in enumerate(calls)}
    return {node: _text(node, names.__getitem__) for node in calls}


def _checks(node: fx.Node) -> bool:
    """Whether `node` is an assertion, or what one asks or says about the input."""
    if node.target is torch._assert:
        return True
    return bool(node.users or node.target is getattr) and all(map(_checks, node.users))


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


class _Tracer(fx.Tracer):
    """Records every child module as one call, and refuses what a graph would lose."""

    proxy_buffer_attributes = True

    def __init__(self, known: dict[str, str]) -> None:
        super().__init__()
        self.known = known
        self.asked: set[str] = set()
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if type(m) is nn.Identity and not (m._forward_hooks or m._forward_pre_hooks or kwargs):
            return args[0]
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        if _modes() != self.modes:
            raise Refused("its forward changes the gradient or autocast mode")
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        absent = kind == "placeholder" and self.known.get(target) == "None"
        return None if absent else proxy

    def is_instance(self, node: fx.Node, classes: Any) -> bool:
        """What `isinstance` has to say of the proxy for `node`."""
        if node.op != "placeholder":
            raise Refused("its forward asks for the type of something that it computed")
        known = self.known.get(str(node.target))
        if known in _TYPES:
            return issubclass(_TYPES[known], classes)
        self.asked.add(str(node.target))
        return False

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Refused("its forward uses a tensor that is neither parameter nor buffer")
        return super().create_arg(a)


@contextlib.contextmanager
def _answering_isinstance() -> Iterator[None]:
    """Run a block in which `isinstance(proxy, ...)` is answered by the proxy's tracer.

    Not by a `__class__` of the proxy's: torch's C++ asks for that too, and then takes it for the
    memory of a tensor. torch's own Python is told the truth, among it fx, that deals with proxies.
    """
    real = builtins.isinstance

    def answer(value: Any, classes: Any, /) -> bool:
        if type(value) in (_Proxy, _Attribute):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] not in ("torch", __package__):
                return value.tracer.is_instance(value.node, classes)
        return real(value, classes)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = real


def _modes() -> tuple[bool, ...]:
    autocast = map(torch.is_autocast_enabled, _AUTOCAST_DEVICES)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _trace(module: nn.Module, tracer: _Tracer, training: bool, grad: bool) -> fx.Graph:
    """One trace. Without gradients autocast is on, so that a forward that turns it off shows."""
    before, autocast = module.training, [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    try:
        module.training = training
        for device in _AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, not grad)
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            tracer.modes = _modes()
            with _answering_isinstance():
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
