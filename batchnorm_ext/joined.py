"""What a fused model runs: `norm_act`, and the classes whose forward calls it.

`norm_act(norm, x, activation, "add", residual)` means `activation(norm(x) + residual)` and no more.
It is given the modules themselves and looks at them on every call: where the kernels compute the
same in one call they do, otherwise (another shape, hooks, a module exchanged since) it makes the
separate calls.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from batchnorm_ext.functional import _activate, _resolve_activation
from batchnorm_ext.modules import _DropIn, _forward
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
    norm: nn.Module,
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


def _computes_here(norm: nn.Module) -> bool:
    """Whether calling `norm` is calling this package's forward and nothing besides."""
    return type(norm).forward is _DropIn.forward and is_bare(norm)


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
    following = iter([*self._modules.values(), None])
    module = next(following)
    while module is not None:
        after = next(following)
        if after is not None and isinstance(module, _DropIn) and type(after) in ACTIVATIONS:
            input = norm_act(module, input, after)
            after = next(following)
        else:
            input = module(input)
        module = after
    return input


# fx writes a forward's annotations into the code that it makes, and here they are strings.
run_sequential.__annotations__.clear()


class Program(NamedTuple):
    """The source of a forward and the global names that it uses, in a form that pickles."""

    source: str
    objects: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]


class FusedModule(nn.Module):
    """What comes before the original class in a rewritten module's class."""

    _original: type[nn.Module]
    _program: Program | None

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


def _new(original: type[nn.Module], program: Program | None, *args: Any) -> nn.Module:
    cls = fused_class(original, program)
    return cls.__new__(cls, *args)


def _make_class(original: type[nn.Module], program: Program | None) -> type[nn.Module]:
    """The class of a rewritten `original`; without a program that of an `nn.Sequential`."""
    members = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_original": original,
        "_program": program,
        "forward": run_sequential if program is None else _compile(program, original.__name__),
    }
    bases = (FusedModule, original)
    return types.new_class(f"Fused{original.__name__}", bases, {}, lambda ns: ns.update(members))


# Modules of one structure share a class; 256 of them is more than a model has.
fused_class: Callable[[type[nn.Module], Program | None], type[nn.Module]]
fused_class = functools.lru_cache(maxsize=256)(_make_class)  # type: ignore[assignment]


def _compile(program: Program, name: str) -> Callable[..., Any]:
    names = dict(program.objects)
    names |= {name: importlib.import_module(path) for name, path in program.modules}
    place = f"<fused forward {hash(program):x} of {name}>"
    linecache.cache[place] = (
        len(program.source),
        None,
        program.source.splitlines(keepends=True),
        place,
    )
    exec(compile(program.source, place, "exec"), names)
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
