"""Fuse batch norm, residual add and activation in a whole model, and take it back.

Nothing in the model is replaced: the forward of each module that calls a batch norm and then an
activation is written anew, with `norm_act(norm, x, activation, ...)` of `joined` for these calls.
Whoever reaches the modules by another way, `model.layer1[0].bn1` or another method of the same
class, finds what was there.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_ext.convert import _hindrance, convert_batchnorm, revert_batchnorm
from batchnorm_ext.joined import (
    FusedModule,
    Program,
    check_class,
    fused_class,
    is_sequential,
    original_class,
)
from batchnorm_ext.progress import counted
from batchnorm_ext.sites import (
    Joined,
    Kept,
    Norms,
    join_forward,
    join_norm,
    join_sequential,
    read_norm,
)
from batchnorm_ext.trace import Refused

__all__ = ["FusionReport", "fuse_batchnorm", "fusion_report", "unfuse_batchnorm"]

_logger = logging.getLogger("batchnorm_ext")

_Model = TypeVar("_Model", bound=nn.Module)


class Fused(NamedTuple):
    """A place where one call of the kernels does several: `activation(norm(x) [+ residual])`.

    `module` is the path of the module whose forward it stands in ("" for the model), `norm` that
    of the batch norm, `activation` the kernels' name ("identity" for an add without activation).
    Both are the same where it is the batch norm's own forward.
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

    `fused` has an entry for each place (a batch norm called twice has two; one whose forward goes
    another way for another type of argument has two if that changes what is joined), `unpaired`
    names the batch norms that nothing fusable follows, and `refused` those that are left for
    another reason.

    Examples:
        ```python
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(16), torch.nn.ReLU())
        report = batchnorm_ext.fusion_report(model)
        assert [place.norm for place in report.fused] == ["0"]
        print(report)
        ```
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
    with these calls joined; so does each `nn.Sequential` with a batch norm before an activation. A
    batch norm that ends an `nn.Sequential` is joined with what the caller does to the Sequential's
    output. A class derived from torch's batch norm whose own forward goes on with other children,
    as timm's `BatchNormAct2d` with its activation, runs on the kernels with its first activation.
    `y = module(x)` is what it was but for rounding: outputs, gradients and buffers, in training
    and in eval.

    Activations: the modules `ReLU`, `ReLU6`, `LeakyReLU`, `ELU`, `SiLU`, `GELU`, `Hardswish` and
    their functions and methods, also in place. Adds: `a + b`, `a += b`, `torch.add`, `add`,
    `add_`. A residual of another shape or dtype than the batch norm's output is added separately,
    as before; so is everything at a batch norm, an activation or a Sequential around them that has
    hooks when it is called, or that has been exchanged for something the kernels don't know.

    A forward that asks whether an argument is a tensor, a list or a tuple, by `isinstance`, or
    whether it is None, is rewritten for each answer and asks again on every call. What is none of
    these (a class derived from one of them, for instance) gets the original forward.

    What stays: the module objects, all of them; parameters, buffers and the keys of the
    state_dict; hooks; `train()` and `eval()`; `isinstance` of each module's class. A rewritten
    module is an instance of a class derived from its own, `FusedX` of `X`. `copy.deepcopy`,
    `pickle`, `torch.fx` and `torch.compile(fullgraph=True)` work, `torch.jit.script` does not.

    What is frozen: the forward of a rewritten module itself (not of its children) is what it was
    on this call. If it asks its attributes for the way (`if self.downsample is not None`), changing
    them later has no effect until `fuse_batchnorm` is called again, which starts afresh from the
    original. `nn.Identity` children drop out.

    Left alone: forwards that `torch.fx` can't trace, or that depend on the training mode, use
    `type()`, ask for the type of what they computed or ask about more than two arguments, that
    change state, draw random numbers, or use `torch.no_grad` or autocast; batch norms of other
    classes whose forward is not torch's and something after it; batch norms with hooks; outputs
    used in several places. Each module is judged by itself, so one that is left alone hinders no
    other. `fusion_report` tells which and why. One INFO line of the logger `batchnorm_ext` says
    how many places were fused, one WARNING line names the refused. A model with hundreds of modules
    takes seconds; a line on stderr counts them where that is a terminal.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    classes, report = _plan(model)
    _set_classes(model, classes)
    convert_batchnorm(model)
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
    buffers that they have now. Batch norms that are frozen or have policies stay, of derived
    classes too, as `revert_batchnorm` has it.

    Args:
        model: any `torch.nn.Module`.

    Returns:
        `model`, the same object.
    """
    norms = [m for m in model.modules() if isinstance(m, FusedModule) and isinstance(m, _BatchNorm)]
    stay = [norm for norm in norms if _hindrance(norm, original_class(norm))]
    _set_classes(model, {norm: type(norm) for norm in stay})
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


# What became of the calls of each batch norm, with the path of the module whose forward calls it.
_Outcomes = dict[nn.Module, list[tuple[str, Joined | Kept]]]


def _plan(model: nn.Module) -> tuple[dict[nn.Module, type[nn.Module]], FusionReport]:
    """The new class of each module that gets one, and the report. Changes nothing."""
    names = {module: name for name, module in model.named_modules()}
    norms: Norms = {m: read_norm(m) for m in names if isinstance(m, _BatchNorm)}
    outcomes: _Outcomes = {norm: [] for norm in norms}
    classes: dict[nn.Module, type[nn.Module]] = {}
    for norm, tail in norms.items():
        if isinstance(tail, Refused):
            outcomes[norm].append((names[norm], Kept("refused", str(tail))))
        elif tail is not None:
            classes[norm] = fused_class(original_class(norm), tail)
            if tail.steps:
                outcomes[norm].append((names[norm], join_norm(norm, tail)))
    obstacles: dict[str, Refused] = {}
    callers = [m for m in names if m not in norms and any(n in norms for n in m.modules())]
    called_elsewhere: set[nn.Module] = set()
    # Sequentials last: what another module's forward calls of one, it does not call itself.
    for module in counted(sorted(callers, key=is_sequential), "reading forwards"):
        original = original_class(module)
        if original.forward is nn.Module.forward:  # a list or dictionary of modules
            continue
        try:
            check_class(module, original)
            program: Program | None = None
            if is_sequential(module):
                found = [p for p in join_sequential(module, norms) if p[0] not in called_elsewhere]
                called_elsewhere.update({n for n, _ in found} - set(module._modules.values()))
            else:
                found, program = join_forward(module, original, norms)
                called_elsewhere.update(norm for norm, _ in found)
        except Refused as refusal:
            obstacles[names[module]] = refusal
            continue
        for norm, outcome in found:
            outcomes[norm].append((names[module], outcome))
        if any(isinstance(outcome, Joined) for _, outcome in found):
            classes[module] = fused_class(original, program)
    return classes, _report(names, outcomes, obstacles)


def _report(
    names: dict[nn.Module, str], outcomes: _Outcomes, obstacles: dict[str, Refused]
) -> FusionReport:
    fused: list[Fused] = []
    left: dict[str, list[Left]] = {"unpaired": [], "refused": []}
    for norm, found in outcomes.items():
        name = names[norm]
        for module, outcome in found:
            if isinstance(outcome, Joined):
                fused.append(Fused(module, name, *outcome))
            else:
                left[outcome.kind].append(Left(name, outcome.reason))
        if not found:
            above = [path for path in obstacles if not path or name.startswith(f"{path}.")]
            nearest = max(above, key=len, default=None)
            reason = "no forward that could be read calls it"
            if nearest is not None:
                reason = f"{nearest or 'the model'}: {obstacles[nearest]}"
            left["refused"].append(Left(name, reason))
    return FusionReport(tuple(fused), tuple(left["unpaired"]), tuple(left["refused"]))
