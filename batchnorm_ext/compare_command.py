"""``python -m batchnorm_ext compare``: what this package brings for a model, by its name."""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm_ext.comparing import compare
from batchnorm_ext.table import one_line
from batchnorm_ext.trial import CHANNELS_LAST

LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_WIDTH = 80


class _BadInput(Exception):
    """One line: what was required, what was got."""


def sizes(text: str) -> tuple[int, ...]:
    """The sizes of "8,3,224,224"."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes: 8,3,224,224") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should have sizes of at least 1")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", metavar="MODULE:NAME", help="torchvision.models:resnet50")
    parser.add_argument(
        "--input",
        type=sizes,
        action="append",
        required=True,
        help="sizes of a tensor of random numbers: 8,3,224,224; once for each input",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of model and inputs")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="run it through torch.compile too")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--rounds", type=int, help="how often each candidate is timed")
    effort.add_argument("--seconds", type=float, default=20.0, help="time for measuring (20)")


def load(name: str) -> nn.Module:
    """The module MODULE:NAME, or what it gives when called without arguments."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise _BadInput(f"MODULE:NAME was required, got {name!r}")
    found: Any = _tried(f"{module_name} can't be imported", importlib.import_module, module_name)
    for word in path.split("."):
        if not hasattr(found, word):
            raise _BadInput(f"{name}: {found.__name__} has no {word}")
        found = getattr(found, word)
    if not isinstance(found, nn.Module) and callable(found):
        found = _tried(f"{name} can't be called without arguments", found)
    if not isinstance(found, nn.Module):
        raise _BadInput(f"{name}: a torch.nn.Module was required, got {type(found).__name__}")
    return found


def _tried(problem: str, call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        raise _BadInput(f"{problem}: {one_line(error)}") from error


def _inputs(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, ...]:
    found = [torch.randn(size, dtype=dtype, device=arguments.device) for size in arguments.input]
    if arguments.layout == "contiguous":
        return tuple(found)
    if not any(tensor.dim() in CHANNELS_LAST for tensor in found):
        raise _BadInput(f"channels_last needs an input of 4 or 5 sizes, got {arguments.input}")
    return tuple(_channels_last(tensor) for tensor in found)


def _channels_last(tensor: Tensor) -> Tensor:
    layout = CHANNELS_LAST.get(tensor.dim())
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def _prepared(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Model and inputs as the options ask for."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise _BadInput("a CUDA device was required, torch finds none")
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = load(arguments.model).to(arguments.device, dtype)
    inputs = _inputs(arguments, dtype)
    if arguments.layout == "channels_last":
        for parameter in model.parameters():
            parameter.data = _channels_last(parameter.data)
    return model, inputs


def run(arguments: argparse.Namespace) -> int:
    """Prints the table. 1 where nothing could be compared, with one line on stderr."""
    try:
        model, inputs = _prepared(arguments)
        result = compare(
            model,
            inputs,
            compile=arguments.compile,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
    except (_BadInput, ValueError, torch.OutOfMemoryError) as error:
        print(f"batchnorm_ext compare: {error}", file=sys.stderr)
        return 1
    print(result.table(min(_WIDTH, shutil.get_terminal_size().columns)))
    return 0 if result.compared else 1
