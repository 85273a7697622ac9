"""Where in a module's own forward a batch norm's call can be joined with what takes its output.

Nothing is changed here: a forward is read, rewritten as a `Program`, and each call of a batch norm
is told with what came of it.
"""

from __future__ import annotations

import operator
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm_ext.convert import _OURS
from batchnorm_ext.joined import (
    ACTIVATIONS,
    FusedModule,
    Program,
    Source,
    Tail,
    activation_of,
    begin,
    check_class,
    is_bare,
    is_sequential,
    norm_act,
    original_class,
    resolve,
)
from batchnorm_ext.modules import _DropIn
from batchnorm_ext.trace import Refused, trace_forward, trace_norm

__all__ = ["Joined", "Kept", "Norms", "join_forward", "join_norm", "join_sequential", "read_norm"]

# The activations' functions and methods, as ACTIVATIONS has the modules.
_FUNCTIONS: dict[Any, tuple[str, str | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("relu", None)),
    F.relu6: ("relu6", None),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), ("leaky_relu", "negative_slope")),
    **dict.fromkeys((F.elu, F.elu_), ("elu", "alpha")),
    F.silu: ("silu", None),
    F.gelu: ("gelu", "approximate"),
    F.hardswish: ("hardswish", None),
}
# What adds, and the name of the operator that does the same.
_ADDITIONS: dict[Any, str] = {
    **dict.fromkeys((operator.add, torch.add, "add"), "add"),
    **dict.fromkeys((operator.iadd, "add_"), "iadd"),
}


class Joined(NamedTuple):
    """How a call of a batch norm is joined: with which activation, with an add or not."""

    activation: str
    residual: bool


class Kept(NamedTuple):
    """Why a call of a batch norm is not joined; `kind` names the report's list that it is in."""

    kind: str
    reason: str


#: What became of each call of a batch norm.
Found = list[tuple[nn.Module, Joined | Kept]]
#: Each batch norm of a model, with what its class does after normalising; None for torch's own
#: classes and this package's, a refusal for a class that can't be read.
Norms = Mapping[nn.Module, Tail | Refused | None]


# --- batch norms --------------------------------------------------------------------------------


def read_norm(norm: nn.Module) -> Tail | Refused | None:
    """The value that `Norms` has for `norm`."""
    cls: type[nn.Module] = parametrize.type_before_parametrizations(norm)
    if isinstance(norm, FusedModule):
        cls = original_class(norm)
    if cls in _OURS or cls.forward is _DropIn.forward:
        return None
    try:
        base = next((base for base in cls.__mro__ if base in _OURS), None)
        if base is None:
            raise Refused("it is derived from none of them")
        check_class(norm, cls)
        return Tail(tuple(_step(norm, node) for node in trace_norm(norm, cls, base)))
    except Refused as refusal:
        name = f"{cls.__module__}.{cls.__qualname__}"
        return Refused(f"it is a {name}, not torch's own batch norm: {refusal}")


def _step(norm: nn.Module, node: fx.Node) -> str | tuple[str, float]:
    name = str(node.target)
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and "." not in name:
        return name
    activation = _activation_at(norm, node, node.all_input_nodes[0])
    if activation is None or isinstance(activation[0], str):
        raise Refused(f"{node.name} in its forward is no child and no known activation")
    return activation[0]


def join_norm(norm: nn.Module, tail: Tail) -> Joined | Kept:
    """What becomes of the call within `norm`'s own forward, with the first step of its tail."""
    first = tail.steps[0]
    if isinstance(first, tuple):
        return Joined(first[0], False)
    try:
        return _joined_or_unpaired(norm.get_submodule(first))
    except Refused as refusal:
        return Kept("refused", str(refusal))


def _joined_or_unpaired(after: nn.Module | None) -> Joined | Kept:
    known = _known_activation(after)
    what = "nothing" if after is None else f"a {type(after).__name__}"
    return Joined(known[0], False) if known else Kept("unpaired", f"{what} comes after it")


def _known_activation(module: nn.Module | None) -> tuple[str, float] | None:
    """`activation_of`, with a refusal of what would be one but for its hooks."""
    if module is None or type(module) not in ACTIVATIONS:
        return None
    if not is_bare(module):
        raise Refused("the activation after it has hooks or a forward of its own")
    return activation_of(module)


class _End(NamedTuple):
    """A batch norm that is all of a module, or the last of a Sequential."""

    norm: nn.Module
    before: nn.Module | None  # what computes its input, in a Sequential
    bare: bool  # whether none of the Sequentials has hooks


def _end_of(module: nn.Module | None, norms: Norms) -> _End | None:
    """What `begin` leaves to be done, if it is a batch norm that does no more than normalise."""
    before, bare = None, True
    while module is not None and is_sequential(module) and module._modules:
        bare = bare and is_bare(module)
        *first, module = module._modules.values()
        before = first[-1] if first else before
    plain = isinstance(module, _BatchNorm) and norms[module] in (None, Tail(()))
    return _End(module, before, bare) if module is not None and plain else None


def _check(end: _End) -> None:
    """Refuse a batch norm whose call the kernels don't stand for."""
    # A lazy module's own hook removes itself on the first call.
    if not isinstance(end.norm, LazyModuleMixin) and not is_bare(end.norm):
        raise Refused("it has hooks or a forward of its own")
    if not end.bare:
        raise Refused("the Sequential that it ends has hooks or a forward of its own")


# --- Sequentials --------------------------------------------------------------------------------


def join_sequential(module: nn.Module, norms: Norms) -> Found:
    """The batch norms of an `nn.Sequential`, as `run_sequential` calls them.

    Of a Sequential within only the batch norm at its end, if an activation follows here.
    """
    found: Found = []
    children = list(module._modules.values())
    for child, after in zip(children, [*children[1:], None], strict=True):
        end = _end_of(child, norms)
        if end is None or (end.norm is not child and type(after) not in ACTIVATIONS):
            continue
        try:
            _check(end)
            found.append((end.norm, _joined_or_unpaired(after)))
        except Refused as refusal:
            found.append((end.norm, Kept("refused", str(refusal))))
    return found


# --- other forwards -----------------------------------------------------------------------------


def join_forward(
    module: nn.Module, original: type[nn.Module], norms: Norms
) -> tuple[Found, Program | None]:
    """The calls in `original.forward`, and the forward that joins them, if there are any.

    A call that is made in several ways counts once where the same comes of it.

    Raises:
        Refused: by `trace_forward`.
    """
    found: Counter[tuple[nn.Module, Joined | Kept]] = Counter()
    ways = []
    for conditions, graph in trace_forward(module, original):
        calls = _join_calls(module, graph, norms)
        found |= Counter(calls)
        if any(isinstance(outcome, Joined) for _, outcome in calls):
            ways.append((conditions, _source_of(graph)))
    return list(found.elements()), Program(tuple(ways)) if ways else None


def _source_of(graph: fx.Graph) -> Source:
    code = graph.python_code("self")
    compiled = compile(code.src, "", "exec")
    function = next(c for c in compiled.co_consts if isinstance(c, types.CodeType))
    used = {*compiled.co_names, *function.co_names} & code.globals.keys()
    found = {name: code.globals[name] for name in sorted(used)}
    modules = {k: v.__name__ for k, v in found.items() if isinstance(v, types.ModuleType)}
    objects = tuple((k, v) for k, v in found.items() if k not in modules)
    return Source(code.src, objects, tuple(modules.items()))


def _join_calls(root: nn.Module, graph: fx.Graph, norms: Norms) -> Found:
    """Join what can be joined in `graph`, and say for each call of a batch norm what came of it."""
    found: Found = []
    called = [set(m.modules()) for m in (_module_of(root, n) for n in graph.nodes) if m is not None]
    # From the end on: of two batch norms that are added, the later one takes the add along.
    for node in reversed(graph.nodes):
        end = _end_of(_module_of(root, node), norms)
        if end is None:
            continue
        try:
            _check(end)
            often = sum(end.norm in modules for modules in called) > 1
            found.append((end.norm, _join(root, graph, node, end, often)))
        except Refused as refusal:
            found.append((end.norm, Kept("refused", str(refusal))))
    return found[::-1]


def _module_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _join(root: nn.Module, graph: fx.Graph, call: fx.Node, end: _End, often: bool) -> Joined | Kept:
    """Join `call`, which ends with the batch norm of `end`, with the calls that take its output."""
    if len(call.args) != 1 or call.kwargs or not call.all_input_nodes:
        raise Refused("it is called with something else than one input")
    if len(call.users) != 1:
        raise Refused(f"its output is used in {len(call.users)} places")
    joined = [call, next(iter(call.users))]
    add, residual = "", None
    if (activation := _activation_at(root, joined[1], call)) is None:
        add, residual = _addition_at(joined[1], call)
        if residual is None:
            return Kept("unpaired", f"{joined[1].name} takes its output")
        for after in joined[1].users if len(joined[1].users) == 1 else ():
            activation = _activation_at(root, after, joined[1])
            joined += [after] if activation else []
    _check_order(root, joined, end, often)
    argument, name = activation or (("identity", 0.0), "identity")
    norm, input = _begun(graph, call, end.norm is _module_of(root, call))
    with graph.inserting_before(joined[-1]):
        if isinstance(argument, str):
            argument = graph.create_node("get_attr", argument)
        rest = (add, residual) if add else ()
        together = graph.call_function(norm_act, (norm, input, argument, *rest))
    joined[-1].replace_all_uses_with(together)
    for node in reversed(joined):
        graph.erase_node(node)
    return Joined(name, bool(add))


def _begun(graph: fx.Graph, call: fx.Node, alone: bool) -> tuple[Any, Any]:
    """The batch norm of `call` and its input, which `begin` computes where it is not `alone`."""
    with graph.inserting_before(call):
        module, input = graph.create_node("get_attr", str(call.target)), call.args[0]
        if alone:
            return module, input
        begun = graph.call_function(begin, (module, input))
        norm, rest = (graph.call_function(operator.getitem, (begun, i)) for i in range(2))
        return norm, rest


def _activation_at(root: nn.Module, node: fx.Node, value: fx.Node) -> tuple[Any, str] | None:
    """What `norm_act` is given for `node`, and its name, if it is an activation of `value`.

    That is a module's path, or what the kernels call a function.
    """
    if node.all_input_nodes != [value] or node.args[:1] != (value,):
        return None
    if node.op == "call_module":
        known = _known_activation(_module_of(root, node))
        return (str(node.target), known[0]) if known and len(node.args) == 1 else None
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return None
    name, option = _FUNCTIONS[node.target]
    given = dict(zip([option], node.args[1:], strict=False)) | node.kwargs
    known = resolve(name, {option: given[option]} if option in given and option else {})
    return known, known[0]


def _addition_at(node: fx.Node, value: fx.Node) -> tuple[str, fx.Node | None]:
    """The operator and the other operand, if `node` adds to `value`; otherwise "" and None."""
    if node.op in ("call_function", "call_method") and len(node.args) == 2 and not node.kwargs:
        add = _ADDITIONS.get(node.target, "")
        left, right = node.args
        residual = right if left is value else left
        # In place it is the batch norm's output, which nobody else has, that may be written to.
        if add and isinstance(residual, fx.Node) and not (add == "iadd" and left is not value):
            return (add, residual) if residual is not value else ("", None)
    return "", None


def _check_order(root: nn.Module, joined: list[fx.Node], end: _End, often: bool) -> None:
    """Refuse if the batch norm, called as late as the last of `joined`, might read other values.

    What lies in between may write to the batch norm's input or to the residual, or call the batch
    norm, if that happens more `often` than once.
    """
    nodes, (source,) = list(joined[0].graph.nodes), joined[0].all_input_nodes
    passed = nodes[nodes.index(joined[0]) : nodes.index(joined[-1])]
    between = [node for node in passed if node.op != "get_attr" and node not in joined]
    before = end.before or (_module_of(root, source) if len(source.users) == 1 else None)
    kept = isinstance(before, (_ConvNd, nn.Linear)) and not often
    if between and (not kept or any(node.prev not in joined for node in joined[2:])):
        raise Refused(f"{between[0].name} comes between it and what takes its output")
