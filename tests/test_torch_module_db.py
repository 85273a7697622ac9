"""torch's own samples for batch norm, run through ours and through torch's.

`torch.testing._internal` is what torch tests itself with: the module database has inputs and
error inputs for `nn.BatchNorm1d/2d/3d`, the operator database for `nn.functional.batch_norm`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import batchnorm_ext as bx

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: bx.BatchNorm1d,
    nn.BatchNorm2d: bx.BatchNorm2d,
    nn.BatchNorm3d: bx.BatchNorm3d,
}
LAZY: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: (bx.LazyBatchNorm1d, nn.LazyBatchNorm1d),
    nn.BatchNorm2d: (bx.LazyBatchNorm2d, nn.LazyBatchNorm2d),
    nn.BatchNorm3d: (bx.LazyBatchNorm3d, nn.LazyBatchNorm3d),
}
MODULE_INFOS = [info for info in module_db if info.module_cls in OURS]
OP_INFOS = [
    info
    for info in op_db
    if info.name == "nn.functional.batch_norm" and not info.variant_test_name  # CUDA's variant
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tolerances(dtype: torch.dtype) -> dict[str, Any]:
    """How far the two may be apart on these small, well-conditioned samples.

    In float32 and float64, torch.testing's own. Half-precision results are each rounded once per
    operation from values of order one, and a gradient sums up to 72 of them: 4 units in the last
    place of the largest intermediate (below 4).
    """
    if dtype.itemsize > 2:
        return {}
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * 4 * torch.finfo(dtype).eps}


def names(value: Any) -> str | None:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "module_cls"):
        return value.module_cls.__name__
    if hasattr(value, "aten_name"):
        return value.name
    return None


def tensor_copies(values: Any) -> Any:
    """The same arguments in fresh tensors: running estimates are written, gradients kept."""
    if isinstance(values, Tensor):
        return values.detach().clone().requires_grad_(values.requires_grad)
    if isinstance(values, (tuple, list)):
        return type(values)(tensor_copies(v) for v in values)
    if isinstance(values, dict):
        return {k: tensor_copies(v) for k, v in values.items()}
    return values


def tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)


def assert_same_call(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], args: Any, kwargs: Any
) -> None:
    """Output, gradients of all inputs, and what the call wrote into its inputs."""
    results = []
    for function in (ours, torchs):
        own_args, own_kwargs = tensor_copies(args), tensor_copies(kwargs)
        output = function(*own_args, **own_kwargs)
        if output.requires_grad:
            weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            output.backward(weight.reshape(output.shape))
        inputs = list(tensors_in((own_args, own_kwargs)))
        results.append((output.detach(), [t.detach() for t in inputs], [t.grad for t in inputs]))
    dtype = results[1][0].dtype
    torch.testing.assert_close(results[0], results[1], **tolerances(dtype))


def test_the_databases_have_batch_norm() -> None:
    """Should torch move them, the tests below must not silently become empty."""
    assert {info.module_cls for info in MODULE_INFOS} == set(OURS)
    assert len(OP_INFOS) == 1
    for info in MODULE_INFOS:
        samples = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
        )
        assert len(samples) >= 6  # as many as torch 2.11 has for BatchNorm2d
        assert info.module_error_inputs_func is not None


def pairs(info: Any, dtype: torch.dtype, training: bool) -> Iterator[tuple[Any, ...]]:
    """(ours, torch's, forward arguments) per sample: plain classes, then the lazy ones."""
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        forward = sample.forward_input
        for lazy in (False, True):
            classes = LAZY[info.module_cls] if lazy else (OURS[info.module_cls], info.module_cls)
            both = [cls(*args[1 if lazy else 0 :], **kwargs, dtype=dtype) for cls in classes]
            for module in both:
                module.train(training)
            yield *both, forward.args, forward.kwargs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("info", MODULE_INFOS, ids=names)
def test_module_samples(info: Any, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    count = 0
    for ours, torchs, args, kwargs in pairs(info, dtype, training):
        for _ in range(2):  # the second step starts from what the first one wrote
            assert_same_call(ours, torchs, args, kwargs)
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), **tolerances(dtype))
        gradients = [{k: p.grad for k, p in m.named_parameters()} for m in (ours, torchs)]
        torch.testing.assert_close(*gradients, **tolerances(dtype))
        assert type(ours) is OURS[info.module_cls]
        assert repr(ours) == repr(torchs)
        count += 1
    assert count >= 12


@pytest.mark.parametrize("info", MODULE_INFOS, ids=names)
def test_module_samples_any_strides(info: Any) -> None:
    """The same samples as a transposed and as a strided view."""
    torch.manual_seed(0)
    for ours, torchs, (x, *_), _ in pairs(info, torch.float64, True):
        for view in (x.detach().transpose(0, -1).contiguous().transpose(0, -1), spread(x)):
            assert not view.is_contiguous() or view.numel() == 0
            leaf = view.requires_grad_()
            other = copy.deepcopy(leaf.detach()).requires_grad_()
            y, expected = ours(leaf), torchs(other)
            torch.testing.assert_close(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(leaf.grad, other.grad)


def spread(x: Tensor) -> Tensor:
    """A view with `x`'s values in every second element of the last dimension."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    view = wide[..., ::2]
    view.copy_(x.detach())
    return view


@pytest.mark.parametrize("info", MODULE_INFOS, ids=names)
def test_module_error_inputs(info: Any) -> None:
    """Each of torch's bad modules or inputs gets the error that torch's tests ask for."""
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    )
    assert len(errors) >= 2
    for error in errors:
        bad = error.module_error_input
        args, kwargs = bad.constructor_input.args, bad.constructor_input.kwargs
        for lazy in (False, True):
            cls = LAZY[info.module_cls][0] if lazy else OURS[info.module_cls]
            given = args[1 if lazy else 0 :]
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex):
                    cls(*given, **kwargs)
                continue
            module = cls(*given, **kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*bad.forward_input.args, **bad.forward_input.kwargs)
            assert int(module.get_buffer("num_batches_tracked")) == 0


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("info", OP_INFOS, ids=names)
def test_operator_samples(info: Any, dtype: torch.dtype, requires_grad: bool) -> None:
    torch.manual_seed(0)
    count = 0
    for sample in info.sample_inputs_func(info, "cpu", dtype, requires_grad):
        if sample.input.dim() < 2:
            # The one difference: torch looks at no dimension of an empty input, not even whether
            # there is one for the channels.
            assert sample.input.numel() == 0
            with pytest.raises(ValueError, match="expected at least 2D input"):
                bx.batch_norm(sample.input, *sample.args, **sample.kwargs)
            continue
        assert_same_call(bx.batch_norm, info.op, (sample.input, *sample.args), sample.kwargs)
        count += 1
    assert count >= 10


@pytest.mark.parametrize("info", OP_INFOS, ids=names)
def test_operator_error_inputs(info: Any) -> None:
    """Torch lists no bad inputs of this operator today; whatever it lists must fail alike."""
    for error in info.error_inputs_func(info, "cpu") if info.error_inputs_func else ():
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            bx.batch_norm(sample.input, *sample.args, **sample.kwargs)
