"""Bad arguments: an error that says what was wrong, and nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm_ext import batch_norm, functional

Arguments = dict[str, Any]
#: What a caller may catch. SystemError and segmentation faults aren't among them.
ERRORS = (ValueError, RuntimeError, TypeError, IndexError)  # NotImplementedError is a RuntimeError


def good(**changes: Any) -> Arguments:
    """Arguments that work, with some replaced."""
    arguments: Arguments = {
        "input": torch.randn(4, 3, 5),
        "residual": torch.randn(4, 3, 5),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "running_mean": torch.full((3,), 0.25),
        "running_var": torch.full((3,), 1.5),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "activation": "relu",
    }
    return arguments | changes


def call(arguments: Arguments) -> Tensor:
    """Our function."""
    return batch_norm(**arguments)


def test_good_arguments_work() -> None:
    for training in (True, False):
        call(good(training=training))


#: name -> (changed arguments, what the message must contain, in training / in evaluation)
BOTH_MODES: dict[str, tuple[Arguments, str]] = {
    "input of 0 dimensions": ({"input": torch.tensor(1.0), "residual": None}, "2D"),
    "input of 1 dimension": ({"input": torch.randn(3), "residual": None}, "2D"),
    "too many channels": ({"input": torch.randn(4, 5, 5), "residual": None}, "should contain 5"),
    "too few channels": ({"input": torch.randn(4, 2, 5), "residual": None}, "should contain 2"),
    "channels last by mistake": (
        {"input": torch.randn(4, 5, 3), "residual": None},
        "running_mean should contain 5 elements not 3",
    ),
    "weight too long": ({"weight": torch.ones(4)}, "weight should contain 3 elements not 4"),
    "weight too short": ({"weight": torch.ones(2)}, "weight should contain 3 elements not 2"),
    "weight empty": ({"weight": torch.ones(0)}, "weight should contain 3 elements not 0"),
    "scalar weight": ({"weight": torch.tensor(1.0)}, "weight should contain 3 elements not 1"),
    "bias too long": ({"bias": torch.ones(4)}, "bias should contain 3 elements not 4"),
    "running_mean too long": (
        {"running_mean": torch.ones(6)},
        "running_mean should contain 3 elements not 6",
    ),
    "running_var too short": (
        {"running_var": torch.ones(1)},
        "running_var should contain 3 elements not 1",
    ),
    "only running_mean": ({"running_var": None}, "running_"),
    "only running_var": ({"running_mean": None}, "running_"),
    "int32 input": ({"input": torch.ones(4, 3, 5, dtype=torch.int32), "residual": None}, "Int"),
    "int64 input": ({"input": torch.ones(4, 3, 5, dtype=torch.int64), "residual": None}, "Long"),
    "bool input": ({"input": torch.ones(4, 3, 5, dtype=torch.bool), "residual": None}, "Bool"),
    "complex input": (
        {"input": torch.ones(4, 3, 5, dtype=torch.complex64), "residual": None},
        "Complex",
    ),
    "float8 input": (
        {"input": torch.ones(4, 3, 5).to(torch.float8_e5m2), "residual": None},
        "Float8",
    ),
    "integer weight": ({"weight": torch.ones(3, dtype=torch.int64)}, "weight"),
    "complex bias": ({"bias": torch.ones(3, dtype=torch.complex64)}, "bias"),
    "integer running_mean": ({"running_mean": torch.ones(3, dtype=torch.int64)}, "running_mean"),
    "bool running_var": ({"running_var": torch.ones(3, dtype=torch.bool)}, "running_var"),
    "residual of another shape": ({"residual": torch.randn(4, 3, 6)}, "residual"),
    "residual to broadcast": ({"residual": torch.randn(1, 3, 1)}, "residual"),
    "residual of another rank": ({"residual": torch.randn(4, 3, 5, 1)}, "residual"),
    "residual of another dtype": (
        {"residual": torch.randn(4, 3, 5, dtype=torch.float64)},
        "residual",
    ),
    "residual of bfloat16": (
        {"residual": torch.randn(4, 3, 5, dtype=torch.bfloat16)},
        "residual",
    ),
    "meta weight": ({"weight": torch.ones(3, device="meta")}, "meta"),
    "meta bias": ({"bias": torch.ones(3, device="meta")}, "meta"),
    "meta running_mean": ({"running_mean": torch.ones(3, device="meta")}, "meta"),
    "meta running_var": ({"running_var": torch.ones(3, device="meta")}, "meta"),
    "meta residual": ({"residual": torch.randn(4, 3, 5, device="meta")}, "meta"),
    "unknown activation": ({"activation": "swish"}, "swish"),
    "capitalised activation": ({"activation": "ReLU"}, "ReLU"),
    "empty activation": ({"activation": ""}, "activation"),
    "unknown approximation": ({"activation": "gelu", "approximate": "erf"}, "erf"),
    "negative eps": ({"eps": -1e-5}, "eps"),
    "nan eps": ({"eps": math.nan}, "eps"),
    "eps of minus infinity": ({"eps": -math.inf}, "eps"),
    "input isn't a tensor": ({"input": [1.0, 2.0], "residual": None}, ""),
    "weight isn't a tensor": ({"weight": 1.0}, ""),
    "residual isn't a tensor": ({"residual": 1.0}, ""),
    "eps isn't a number": ({"eps": "small"}, ""),
    "momentum isn't a number": ({"momentum": "fast"}, ""),
    "sparse input": ({"input": torch.randn(4, 3, 5).to_sparse(), "residual": None}, ""),
}
TRAINING: dict[str, tuple[Arguments, str]] = {
    "eps of zero": ({"eps": 0.0}, "eps must be positive during training"),
    "one value per channel": (
        {"input": torch.randn(1, 3, 1), "residual": None},
        "Expected more than 1 value per channel when training, got input size",
    ),
    "expanded running_mean": ({"running_mean": torch.ones(1).expand(3)}, "running_mean"),
}
EVALUATION: dict[str, tuple[Arguments, str]] = {
    "no statistics": (
        {"running_mean": None, "running_var": None},
        "running_mean must be defined in evaluation mode",
    ),
}
CASES = [
    *((name, training, *case) for name, case in BOTH_MODES.items() for training in (True, False)),
    *((name, True, *case) for name, case in TRAINING.items()),
    *((name, False, *case) for name, case in EVALUATION.items()),
]


def _tensors(arguments: Arguments) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse
    }


def _refused(arguments: Arguments, function: Callable[[Arguments], Any]) -> BaseException:
    """The error; every tensor is as it was, and no write was announced."""
    before = {n: (t.clone(), t._version) for n, t in _tensors(arguments).items()}
    with pytest.raises(ERRORS) as caught:
        function(arguments)
    for name, (copy, version) in before.items():
        tensor = arguments[name]
        assert torch.equal(tensor, copy), f"{name} was written to"
        assert tensor._version == version, f"{name} counts as written to"
    return caught.value


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("training", "changes", "words"),
    [case[1:] for case in CASES],
    ids=[f"{name}, {'training' if training else 'evaluation'}" for name, training, *_ in CASES],
)
def test_refused(training: bool, changes: Arguments, words: str, gradients: bool) -> None:
    """With and without a gradient to compute: two ways through the bindings."""
    arguments = good(training=training, **changes)
    if gradients:
        for name in ("input", "weight"):
            value = arguments[name]
            if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf:
                arguments[name] = value.detach().requires_grad_()
    error = _refused(arguments, call)
    assert words in str(error), f"{type(error).__name__}: {error}"


def _torch_takes_eps_of_zero() -> bool:
    try:
        F.batch_norm(torch.ones(2, 1), torch.zeros(1), torch.ones(1), eps=0.0)
    except ValueError:
        return False
    return True


#: torch 2.11 refuses 0 in evaluation as in training, so its words name no mode.
_eps_by_mode = pytest.mark.skipif(
    not _torch_takes_eps_of_zero(), reason="this torch refuses an eps of 0 in either mode"
)

#: Where torch's own function refuses the same, its words are ours.
SHARED = [
    ({"input": torch.randn(4, 5, 3)}, True),
    ({"input": torch.randn(4, 5, 3)}, False),
    ({"weight": torch.ones(4)}, True),
    ({"bias": torch.ones(2)}, False),
    ({"running_var": torch.ones(4)}, True),
    ({"running_mean": None, "running_var": None}, False),
    ({"running_mean": None}, True),
    ({"running_var": None}, True),
    pytest.param({"eps": 0.0}, True, marks=_eps_by_mode),
    pytest.param({"eps": -1.0}, True, marks=_eps_by_mode),
    pytest.param({"eps": -1.0}, False, marks=_eps_by_mode),
    ({"input": torch.randn(1, 3)}, True),
    ({"input": torch.randn(1, 3, 1, 1)}, True),
]


@pytest.mark.parametrize(("changes", "training"), SHARED)
def test_torchs_words(changes: Arguments, training: bool) -> None:
    arguments = good(training=training, **changes)
    for name in ("residual", "activation"):
        del arguments[name]
    errors = []
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(ERRORS) as caught:
            function(**arguments)
        errors.append(caught.value)
    ours, torchs = errors
    assert isinstance(ours, type(torchs)) or isinstance(torchs, type(ours))
    # Python writes 0.0 and -1.0 where C++ writes 0 and -1.
    assert str(ours).split("\n")[0] == str(torchs).split("\n")[0].removesuffix(".0")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_dtypes_are_refused_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.ones(4, 3, 5, dtype=dtype)
    with pytest.raises(NotImplementedError, match='"batch_norm" not implemented for'):
        batch_norm(x, None, None, training=True)


# ---- what only modules pass ----


@pytest.mark.parametrize(
    "counter",
    [
        torch.zeros(2, dtype=torch.int64),
        torch.tensor(0, dtype=torch.int32),
        torch.tensor(0.0),
        torch.tensor(0, device="meta"),
    ],
    ids=["two values", "int32", "float", "meta"],
)
def test_bad_counters(counter: Tensor) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ERRORS, match="num_batches_tracked"):
        functional._apply(
            torch.randn(4, 3), None, None, None, mean, var, counter, True, 0.1, 1e-5, "relu", 0.0
        )
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


def test_refused_calls_are_not_counted() -> None:
    mean, var, counter = torch.zeros(3), torch.ones(3), torch.tensor(7)
    for x, weight, name in (
        (torch.randn(1, 3), None, "relu"),
        (torch.randn(4, 3), torch.ones(4), "relu"),
        (torch.randn(4, 3), None, "softplus"),
    ):
        with pytest.raises(ERRORS):
            functional._apply(x, None, weight, None, mean, var, counter, True, 0.1, 1e-5, name, 0.0)
    assert counter.item() == 7
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


# ---- the operators, called directly ----


def _backward(**changes: Any) -> Any:
    arguments: Arguments = {
        "grad_output": torch.randn(4, 3, 5),
        "input": torch.randn(4, 3, 5),
        "residual": None,
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "mean": torch.zeros(3, dtype=torch.float64),
        "invstd": torch.ones(3, dtype=torch.float64),
        "mask": None,
        "training": True,
        "activation": "relu",
        "activation_param": 0.0,
        "output_mask": [True, False, True, True],
    }
    return torch.ops.batchnorm_ext.backward(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grad_output": torch.ones(4, 3, 6)}, "grad_output"),
        ({"grad_output": torch.ones(4, 3, 5).double()}, "grad_output"),
        ({"input": torch.ones(3)}, "2D"),
        ({"mean": torch.zeros(4, dtype=torch.float64)}, "mean"),
        ({"mean": torch.zeros(3)}, "mean"),
        ({"invstd": torch.zeros(6, dtype=torch.float64)[::2]}, "invstd"),
        ({"weight": torch.ones(4)}, "weight"),
        ({"weight": None}, "weight"),
        ({"bias": None}, "bias"),
        ({"residual": torch.ones(4, 3)}, "residual"),
        ({"mask": torch.zeros(3, dtype=torch.uint8)}, "mask"),
        ({"mask": torch.zeros(12, 1)}, "mask"),
        ({"activation": "tanh"}, "tanh"),
    ],
    ids=str,
)
def test_backward_checks(changes: Arguments, words: str) -> None:
    _backward()
    with pytest.raises(ERRORS) as caught:
        _backward(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps": 0.0}, "eps"),
        ({"activation": "tanh"}, "tanh"),
        ({"running_var": None}, "running_"),
        ({"weight": torch.ones(2)}, "weight"),
        ({"residual": torch.ones(4)}, "residual"),
    ],
    ids=str,
)
def test_forward_checks(changes: Arguments, words: str) -> None:
    arguments: Arguments = {
        "input": torch.randn(4, 3, 5),
        "residual": None,
        "weight": None,
        "bias": None,
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "num_batches_tracked": torch.tensor(0),
        "momentum": 0.1,
        "eps": 1e-5,
        "activation": "relu",
        "activation_param": 0.0,
        "save_mask": True,
    }
    arguments |= changes
    error = _refused(arguments, lambda a: torch.ops.batchnorm_ext.forward_train(*a.values()))
    assert words in str(error)


def test_buffers_may_not_want_gradients() -> None:
    """torch refuses running statistics that require a gradient; ignoring that would be silent."""
    mean = torch.zeros(3, requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError):
        batch_norm(x, mean, torch.ones(3), training=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"residual": torch.empty(0, 4, 2)},
        {"weight": torch.ones(4)},
        {"bias": torch.ones(2)},
        {"activation": "swish"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_an_empty_batch_is_checked_too(wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        batch_norm(torch.empty(0, 3, 2), None, None, training=True, **wrong)  # type: ignore[arg-type]
