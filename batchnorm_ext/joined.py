"""What a fused model runs: `norm_act`, and the classes whose forward calls it.

`norm_act(norm, x, activation, "add", residual)` means `activation(norm(x) + residual)` and no more.
It is given the modules themselves and looks at them on every call: where the kernels compute the
same in one call they do, otherwise (another shape, hooks, a module exchanged since) it makes the
separate calls.

The batch norm may be the last module of an `nn.Sequential`: `begin(module, x)` runs what comes
before it and leaves the batch norm to `norm_act`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from batchnorm_ext.functional import _activate, _resolve_activation
from batchnorm_ext.modules import _DropIn, _forward, _record_call
from batchnorm_ext.trace import Refused

# The activations' modules: name and the option that `_resolve_activation` takes.
ACTIVATIONS: dict[type[nn.Module], tuple[str, str | None]] = {
    nn.ReLU: ("relu", None),
    nn.ReLU6: ("relu6", None),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.SiLU: ("silu", None),
    nn.GELU: ("gelu", "approximate"),
    nn.Hardswish: ("hardswish", None),
}


def norm_act(
    norm: Callable[[Any], Any],  # a module, or what `begin` returns
    input: Any,  # a Tensor; a Proxy while fx traces
    activation: nn.Module | tuple[str, float],
    add: str = "",
    residual: Any = None,
) -> Any:
    """`activation(norm(input))`; with `add` ("add" or "iadd") of `norm(input) + residual`."""
    for proxy in (input, residual):
        if isinstance(proxy, fx.Proxy) and isinstance(proxy.tracer, fx.Tracer):
            arguments = (norm, input, activation, add, residual)
            return proxy.tracer.create_proxy("call_function", norm_act, arguments, {})
    known = activation if isinstance(activation, tuple) else activation_of(activation)
    if known is not None and _computes_here(norm) and (not add or _fits(residual, input)):
        return _forward(norm, input, residual, *known)  # type: ignore[arg-type]
    output = norm(input)
    if add:
        output = getattr(operator, add)(output, residual)
    return _activate(output, *activation) if isinstance(activation, tuple) else activation(output)


def _fits(residual: Any, input: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
    )


def _computes_here(norm: object) -> bool:
    """Whether calling `norm` is calling this package's forward and nothing besides."""
    return isinstance(norm, _DropIn) and type(norm).forward is _DropIn.forward and is_bare(norm)


def begin(module: nn.Module, input: Any) -> Any:
    """Run `module(input)` up to the batch norm that it ends with: that, and its input.

    A module that ends otherwise, or has hooks that would miss something, is run to its end, and a
    function that returns its argument stands for the batch norm.
    """
    while is_sequential(module) and is_bare(module) and module._modules:
        *first, module = module._modules.values()  # type: ignore[assignment]
        input = _run(first, input)
    return (module, input) if _computes_here(module) else (_unchanged, module(input))


def _unchanged(input: Any) -> Any:
    return input


def is_sequential(module: nn.Module) -> bool:
    """Whether calling `module` is calling its children in turn, but for hooks."""
    return type(module).forward in (nn.Sequential.forward, run_sequential)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of `module` is a call of its class's forward: no hooks, none of its own."""
    return not (
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def activation_of(module: nn.Module) -> tuple[str, float] | None:
    """The kernels' name and parameter of an activation module; None if it is not one of theirs."""
    entry = ACTIVATIONS.get(type(module))
    if entry is None or not is_bare(module):
        return None
    name, option = entry
    return resolve(name, {} if option is None else {option: getattr(module, option)})


def resolve(name: str, options: dict[str, Any]) -> tuple[str, float]:
    """The operators' name and parameter, with torch's defaults for what `options` lacks."""
    defaults: dict[str, Any] = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}
    return _resolve_activation(name, **{**defaults, **options})


def run_sequential(self: nn.Sequential, input: Any) -> Any:
    """`nn.Sequential.forward`, with each batch norm and the activation after it in one call."""
    return _run(self._modules.values(), input)


def _run(modules: Iterable[Any], input: Any) -> Any:
    following = iter([*modules, None])
    module = next(following)
    while module is not None:
        after = next(following)
        if type(after) in ACTIVATIONS and isinstance(module, (_DropIn, nn.Sequential)):
            norm, input = begin(module, input)
            input = norm_act(norm, input, after)
            after = next(following)
        else:
            input = module(input)
        module = after
    return input


def run_tail(self: Any, input: Any) -> Any:
    """The forward of a batch norm whose class does more: see `Tail`."""
    if isinstance(input, fx.Proxy):
        call = _record_call(self, input, None)
        if call is not None:
            return call
    first, *rest = [getattr(self, s) if isinstance(s, str) else s for s in self._program.steps]
    known = first if isinstance(first, tuple) else activation_of(first)
    output = _forward(self, input, None, *(known or ("identity", 0.0)))
    for step in rest if known else (first, *rest):
        output = _activate(output, *step) if isinstance(step, tuple) else step(output)
    return output


# fx writes a forward's annotations into the code that it makes, and here they are strings.
run_sequential.__annotations__.clear()


class Source(NamedTuple):
    """The source of a function and the global names that it uses, in a form that pickles."""

    text: str
    objects: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]


class Program(NamedTuple):
    """A forward: its conditions, as in `trace.Way`, and what is run where they are met."""

    ways: tuple[tuple[tuple[tuple[str, str], ...], Source], ...]


class Tail(NamedTuple):
    """What the forward of a class derived from torch's batch norm does after normalising.

    Each step is a child's name, or what the kernels call an activation.
    """

    steps: tuple[str | tuple[str, float], ...]


class FusedModule(nn.Module):
    """What comes before the original class in a rewritten module's class."""

    _original: type[nn.Module]
    _program: Program | Tail | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`type(module)(...)`, as in a slice of a Sequential, makes a module of the original."""
        self.__class__ = type(self)._original  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class and the program, since a class made here has no address."""
        cls = type(self)
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, (_, *args), *rest = reduced
        return (_new, (cls._original, cls._program, *args), *rest)


def _new(original: type[nn.Module], program: Program | Tail | None, *args: Any) -> nn.Module:
    cls = fused_class(original, program)
    return cls.__new__(cls, *args)


def _make_class(original: type[nn.Module], program: Program | Tail | None) -> type[nn.Module]:
    """The class of a rewritten `original`; without a program that of an `nn.Sequential`."""
    bases: tuple[type, ...] = (FusedModule, original)
    if program is None:
        forward: Callable[..., Any] = run_sequential
    elif isinstance(program, Tail):
        bases = (FusedModule, _DropIn, original)
        # One that does nothing more is a batch norm like any other, and known by its forward.
        forward = run_tail if program.steps else _DropIn.forward
    else:
        forward = _compile(program, original)
    members = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_original": original,
        "_program": program,
        "forward": forward,
    }
    return types.new_class(f"Fused{original.__name__}", bases, {}, lambda ns: ns.update(members))


# Modules of one structure share a class; 256 of them is more than a model has.
fused_class: Callable[[type[nn.Module], Program | Tail | None], type[nn.Module]]
fused_class = functools.lru_cache(maxsize=256)(_make_class)  # type: ignore[assignment]

# The conditions of `trace.Way`, in names that no argument has.
_CONDITIONS = {
    "Tensor": "_type({}) is _Tensor",
    "list": "_type({}) is _list",
    "tuple": "_type({}) is _tuple",
    "None": "{} is None",
    "given": "{} is not None",
}
_CONDITION_NAMES = {"_type": type, "_Tensor": Tensor, "_list": list, "_tuple": tuple}


def _compile(program: Program, original: type[nn.Module]) -> Callable[..., Any]:
    ways = {}
    for i, (_, source) in enumerate(program.ways):
        names = dict(source.objects)
        names |= {name: importlib.import_module(path) for name, path in source.modules}
        ways[f"_way_{i}"] = _execute(source.text, names, original)
    if not program.ways[0][0]:
        return ways["_way_0"]
    names = {**ways, **_CONDITION_NAMES, "_original": original.forward}
    return _execute(_choice(program, original), names, original)


def _choice(program: Program, original: type[nn.Module]) -> str:
    """The source of a forward that calls the way whose conditions are met, or the original."""
    _, *parameters = inspect.signature(original.forward).parameters.values()
    marks: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*{}",
        inspect.Parameter.VAR_KEYWORD: "**{}",
        inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    }
    arguments = ", ".join(["self", *(marks.get(p.kind, "{}").format(p.name) for p in parameters)])
    first = program.ways[0][1].text.splitlines()
    lines = [next(line for line in first if line.startswith("def forward("))]
    for i, (conditions, _) in enumerate(program.ways):
        met = " and ".join(_CONDITIONS[what].format(name) for name, what in conditions)
        lines += [f"    if {met}:", f"        return _way_{i}({arguments})"]
    return "\n".join([*lines, f"    return _original({arguments})\n"])


def _execute(text: str, names: dict[str, Any], original: type[nn.Module]) -> Callable[..., Any]:
    place = f"<fused forward {hash(text):x} of {original.__name__}>"
    linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
    exec(compile(text, place, "exec"), names)
    return names["forward"]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was given one by `fused_class`."""
    return type(module)._original if isinstance(module, FusedModule) else type(module)


def check_class(module: nn.Module, original: type[nn.Module]) -> None:
    """Refuse a module that can't be given a class of its own."""
    if "forward" in vars(module):
        raise Refused("it has a forward of its own, beside its class's")
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused("it is scripted")
    if parametrize.is_parametrized(module):
        raise Refused("it has parametrized tensors")
    if any("__init_subclass__" in vars(base) for base in original.__mro__[:-1]):
        raise Refused("its class has an __init_subclass__, which a derived class would run")
    if (original.__reduce__, original.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        raise Refused("its class says itself how it is pickled")
