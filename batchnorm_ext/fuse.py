"""Fuse batch norm, residual add and activation in a whole model, and take it back.

Nothing in the model is replaced: the forward of each module that calls a batch norm and then an
activation is written anew, with `norm_act(norm, x, activation, ...)` of `joined` for these calls.
Whoever reaches the modules by another way, `model.layer1[0].bn1` or another method of the same
class, finds what was there.
"""

from __future__ import annotations

import logging
import operator
import types
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm_ext.convert import _OURS, convert_batchnorm, revert_batchnorm
from batchnorm_ext.joined import (
    ACTIVATIONS,
    Program,
    activation_of,
    check_class,
    fused_class,
    is_bare,
    norm_act,
    original_class,
    resolve,
)
from batchnorm_ext.modules import _DropIn
from batchnorm_ext.trace import Refused, trace_forward

__all__ = ["FusionReport", "fuse_batchnorm", "fusion_report", "unfuse_batchnorm"]

_logger = logging.getLogger("batchnorm_ext")

_Model = TypeVar("_Model", bound=nn.Module)

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


class Fused(NamedTuple):
    """A place where one call of the kernels does several: `activation(norm(x) [+ residual])`.

    `module` is the path of the module whose forward it stands in ("" for the model), `norm` that
    of the batch norm, `activation` the kernels' name ("identity" for an add without activation).
    """

    module: str
    norm: str
    activation: str
    residual: bool


class Left(NamedTuple):
    """A batch norm that is called as before, and why."""

    norm: str
    reason: str


class FusionReport(NamedTuple):
    """What `fuse_batchnorm` does with a model; `str()` of it is a text of one line for each entry.

    `fused` has an entry for each place (a batch norm called twice has two), `unpaired` names the
    batch norms that nothing fusable follows, and `refused` those that are left for another reason.
    """

    fused: tuple[Fused, ...]
    unpaired: tuple[Left, ...]
    refused: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [
            f"fused     {s.norm or 'the model'}: {s.activation}{'(norm + residual)' * s.residual}"
            for s in self.fused
        ]
        for kind in ("unpaired", "refused"):
            lines += [f"{kind:<9} {x.norm or 'the model'}: {x.reason}" for x in getattr(self, kind)]
        return "\n".join(lines) or "no batch norm"


def fuse_batchnorm(model: _Model) -> _Model:
    """Let the fused kernels do BN -> activation and BN -> add -> activation in `model`, in place.

    First `convert_batchnorm(model)`. Then each module whose forward calls a batch norm and hands
    the result to an activation, to an add, or to an add and then an activation, gets a forward
    with these calls joined; so does each `nn.Sequential` with a batch norm before an activation.
    `y = module(x)` is what it was but for rounding: outputs, gradients and buffers, in training
    and in eval.

    Activations: the modules `ReLU`, `ReLU6`, `LeakyReLU`, `ELU`, `SiLU`, `GELU`, `Hardswish` and
    their functions and methods, also in place. Adds: `a + b`, `a += b`, `torch.add`, `add`,
    `add_`. A residual of another shape or dtype than the batch norm's output is added separately,
    as before; so is everything at a batch norm or activation that has hooks when it is called, or
    that has been exchanged for something the kernels don't know.

    What stays: the module objects, all of them; parameters, buffers and the keys of the
    state_dict; hooks; `train()` and `eval()`; `isinstance` of each module's class. A rewritten
    module is an instance of a class derived from its own, `FusedX` of `X`. `copy.deepcopy`,
    `pickle`, `torch.fx` and `torch.compile(fullgraph=True)` work, `torch.jit.script` does not.

    What is frozen: the forward of a rewritten module itself (not of its children) is what it was
    on this call. If it asks its attributes for the way (`if self.downsample is not None`), changing
    them later has no effect until `fuse_batchnorm` is called again, which starts afresh from the
    original. `nn.Identity` children drop out.

    Left alone: forwards that `torch.fx` can't trace, or that depend on the training mode, on the
    type of an argument or on whether it is None, that change state, draw random numbers, or use
    `torch.no_grad` or autocast; batch norms that aren't torch's own or this package's, or have
    hooks; outputs used in several places. Each module is judged by itself, so one that is left
    alone hinders no other. `fusion_report` tells which and why. One INFO line of the logger
    `batchnorm_ext` says how many places were fused, one WARNING line names the refused.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    classes, report = _plan(model)
    convert_batchnorm(model)
    _set_classes(model, classes)
    _logger.info("batch norm calls fused: %d", len(report.fused))
    if report.refused:
        named = ", ".join(f"{norm or 'the model'} ({reason})" for norm, reason in report.refused)
        _logger.warning("batch norm calls not fused: %s", named)
    return model


def unfuse_batchnorm(model: _Model) -> _Model:
    """Take `fuse_batchnorm` back, in place.

    Every rewritten module gets its class and so its forward back, then `revert_batchnorm(model)`
    makes the batch norms torch's again (also those that were this package's before; call
    `convert_batchnorm` to have them). All of them are the original objects, with the parameters and
    buffers that they have now.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    _set_classes(model, {})
    return revert_batchnorm(model)


def fusion_report(model: nn.Module) -> FusionReport:
    """What `fuse_batchnorm(model)` fuses and what it leaves, and why; `model` stays as it is.

    May be asked before and after: it looks at the original forwards.
    """
    return _plan(model)[1]


# --- what is fused in a model ------------------------------------------------------------------


def _set_classes(model: nn.Module, classes: dict[nn.Module, type[nn.Module]]) -> None:
    for module in model.modules():
        cls = classes.get(module, original_class(module))
        if cls is not type(module):
            module.__class__ = cls


class _Joined(NamedTuple):
    """How a call of a batch norm was joined: with which activation, with an add or not."""

    activation: str
    residual: bool


# Joined; or a text that says what stands in the place of an activation or add; or a refusal.
_Outcome = _Joined | str | Refused


def _plan(model: nn.Module) -> tuple[dict[nn.Module, type[nn.Module]], FusionReport]:
    """The new class of each module that gets one, and the report. Changes nothing."""
    names = {module: name for name, module in model.named_modules()}
    outcomes: dict[nn.Module, list[tuple[str, _Outcome]]] = {
        module: [] for module in names if isinstance(module, _BatchNorm)
    }
    classes: dict[nn.Module, type[nn.Module]] = {}
    obstacles: dict[str, Refused] = {}
    callers = [m for m in names if m not in outcomes and any(n in outcomes for n in m.modules())]
    called_elsewhere: set[nn.Module] = set()
    # Sequentials last: what another module's forward calls of one, it does not call itself.
    for module in sorted(callers, key=_is_sequential):
        original = original_class(module)
        if original.forward is nn.Module.forward:  # a list or dictionary of modules
            continue
        try:
            check_class(module, original)
            program: Program | None = None
            if _is_sequential(module):
                found = [p for p in _pairs(module) if p[0] not in called_elsewhere]
            else:
                graph = trace_forward(module, original)
                found = _join_calls(module, graph)
                program = _program_of(graph)
                called_elsewhere.update(norm for norm, _ in found)
        except Refused as refusal:
            obstacles[names[module]] = refusal
            continue
        for norm, outcome in found:
            outcomes[norm].append((names[module], outcome))
        if any(isinstance(outcome, _Joined) for _, outcome in found):
            classes[module] = fused_class(original, program)
    return classes, _report(names, outcomes, obstacles)


def _report(
    names: dict[nn.Module, str],
    outcomes: dict[nn.Module, list[tuple[str, _Outcome]]],
    obstacles: dict[str, Refused],
) -> FusionReport:
    fused: list[Fused] = []
    unpaired: list[Left] = []
    refused: list[Left] = []
    for norm, found in outcomes.items():
        name = names[norm]
        for module, outcome in found:
            if isinstance(outcome, _Joined):
                fused.append(Fused(module, name, *outcome))
            elif isinstance(outcome, str):
                unpaired.append(Left(name, outcome))
            else:
                refused.append(Left(name, str(outcome)))
        if not found:
            above = [path for path in obstacles if not path or name.startswith(f"{path}.")]
            nearest = max(above, key=len, default=None)
            reason = "no forward that could be read calls it"
            if nearest is not None:
                reason = f"{nearest or 'the model'}: {obstacles[nearest]}"
            refused.append(Left(name, reason))
    return FusionReport(tuple(fused), tuple(unpaired), tuple(refused))


def _is_sequential(module: nn.Module) -> bool:
    return original_class(module).forward is nn.Sequential.forward


def _check_norm(norm: nn.Module) -> None:
    """Refuse a batch norm whose call the kernels don't stand for."""
    cls = parametrize.type_before_parametrizations(norm)
    if cls not in _OURS and type(norm).forward is not _DropIn.forward:
        raise Refused(f"it is a {cls.__module__}.{cls.__qualname__}, not torch's own batch norm")
    # A lazy module's own hook removes itself on the first call.
    if not isinstance(norm, LazyModuleMixin) and not is_bare(norm):
        raise Refused("it has hooks or a forward of its own")


def _pairs(module: nn.Module) -> list[tuple[nn.Module, _Outcome]]:
    """The batch norms of an `nn.Sequential`, as `run_sequential` calls them."""
    found: list[tuple[nn.Module, _Outcome]] = []
    children = list(module._modules.values())
    for norm, after in zip(children, [*children[1:], None], strict=True):
        if not isinstance(norm, _BatchNorm):
            continue
        try:
            _check_norm(norm)
            known = _known_activation(after)
            what = "nothing" if after is None else f"a {type(after).__name__}"
            found.append((norm, _Joined(known[0], False) if known else f"{what} comes after it"))
        except Refused as refusal:
            found.append((norm, refusal))
    return found


def _known_activation(module: nn.Module | None) -> tuple[str, float] | None:
    """`activation_of`, with a refusal of what would be one but for its hooks."""
    if module is None or type(module) not in ACTIVATIONS:
        return None
    if not is_bare(module):
        raise Refused("the activation after it has hooks or a forward of its own")
    return activation_of(module)


def _program_of(graph: fx.Graph) -> Program:
    code = graph.python_code("self")
    compiled = compile(code.src, "", "exec")
    function = next(c for c in compiled.co_consts if isinstance(c, types.CodeType))
    used = {*compiled.co_names, *function.co_names} & code.globals.keys()
    found = {name: code.globals[name] for name in sorted(used)}
    modules = {k: v.__name__ for k, v in found.items() if isinstance(v, types.ModuleType)}
    objects = tuple((k, v) for k, v in found.items() if k not in modules)
    return Program(code.src, objects, tuple(modules.items()))


def _join_calls(root: nn.Module, graph: fx.Graph) -> list[tuple[nn.Module, _Outcome]]:
    """Join what can be joined in `graph`, and say for each call of a batch norm what came of it."""
    found: list[tuple[nn.Module, _Outcome]] = []
    # From the end on: of two batch norms that are added, the later one takes the add along.
    for node in reversed(graph.nodes):
        norm = _module_of(root, node)
        if isinstance(norm, _BatchNorm):
            try:
                _check_norm(norm)
                found.append((norm, _join(root, graph, node)))
            except Refused as refusal:
                found.append((norm, refusal))
    return found[::-1]


def _module_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _join(root: nn.Module, graph: fx.Graph, call: fx.Node) -> _Outcome:
    """Join `call`, of a batch norm, with the calls that take its output; see `_Outcome`."""
    if len(call.args) != 1 or call.kwargs or not call.all_input_nodes:
        raise Refused("it is called with something else than one input")
    if len(call.users) != 1:
        raise Refused(f"its output is used in {len(call.users)} places")
    joined = [call, next(iter(call.users))]
    add, residual = "", None
    if (activation := _activation_at(root, joined[1], call)) is None:
        add, residual = _addition_at(joined[1], call)
        if residual is None:
            return f"{joined[1].name} takes its output"
        for after in joined[1].users if len(joined[1].users) == 1 else ():
            activation = _activation_at(root, after, joined[1])
            joined += [after] if activation else []
    _check_order(root, joined)
    argument, name = activation or (("identity", 0.0), "identity")
    with graph.inserting_before(joined[-1]):
        if isinstance(argument, str):
            argument = graph.create_node("get_attr", argument)
        norm = graph.create_node("get_attr", str(call.target))
        rest = (add, residual) if add else ()
        together = graph.call_function(norm_act, (norm, call.args[0], argument, *rest))
    joined[-1].replace_all_uses_with(together)
    for node in reversed(joined):
        graph.erase_node(node)
    return _Joined(name, bool(add))


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


def _check_order(root: nn.Module, joined: list[fx.Node]) -> None:
    """Refuse if the batch norm, called as late as the last of `joined`, might read other values.

    What lies in between may write to the batch norm's input or to the residual.
    """
    nodes, (source,) = list(joined[0].graph.nodes), joined[0].all_input_nodes
    passed = nodes[nodes.index(joined[0]) : nodes.index(joined[-1])]
    between = [node for node in passed if node.op != "get_attr" and node not in joined]
    fresh = isinstance(_module_of(root, source), (_ConvNd, nn.Linear)) and len(source.users) == 1
    if between and (not fresh or any(node.prev not in joined for node in joined[2:])):
        raise Refused(f"{between[0].name} comes between it and what takes its output")
