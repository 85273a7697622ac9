"""Plans as Python sees them: `_C.plan_cuda`, `_C.force_cuda_plan`, and the command `plan`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from batchnorm_ext import _C, __main__

CALL = ("channels_first", "float32", 128, 64, 56 * 56, "forward")
BYTES = 128 * 64 * 56 * 56 * 4


FIELDS = {
    "mapping", "access", "strategy", "team", "slots", "stream_stores", "refused", "unit_channels",
    "units", "units_at_once", "shared_bytes", "workspace_bytes", "compulsory_bytes",
    "predicted_bytes", "blocks",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_forced() -> Iterator[None]:
    yield
    _C.force_cuda_plan()


def test_a_plan_has_every_field() -> None:
    plan = _C.plan_cuda(*CALL)
    assert set(plan) == FIELDS
    assert plan["compulsory_bytes"] == 2 * BYTES
    assert plan["predicted_bytes"] >= plan["compulsory_bytes"]
    assert plan["blocks"] == plan["units_at_once"] * plan["team"]


@pytest.mark.parametrize("name", _C.cuda_devices())
def test_a_device_by_name_or_by_its_limits(name: str) -> None:
    limits = _C.cuda_devices()[name]
    by_name, by_limits = _C.plan_cuda(*CALL, device=name), _C.plan_cuda(*CALL, device=limits)
    assert by_name == by_limits
    assert by_name["shared_bytes"] <= limits["shared_per_block"]


def test_the_devices_limits_belong_to_their_capability() -> None:
    for name, device in _C.cuda_devices().items():
        clusters = device["compute_capability"] >= 90
        assert (device["max_cluster"] > 1) is clusters, name
        assert device["reserved_shared"] == (1024 if device["compute_capability"] >= 80 else 0)
        left = device["shared_per_multiprocessor"] - device["shared_per_block"]
        assert left == device["reserved_shared"], name


def test_what_is_read_and_written_is_counted() -> None:
    backward = ("channels_first", "float32", 128, 64, 56 * 56, "backward")
    for outputs, residual, tensors in [(1, False, 3), (2, False, 4), (2, True, 5), (0, False, 2)]:
        plan = _C.plan_cuda(*backward, outputs=outputs, residual=residual)
        assert plan["compulsory_bytes"] == tensors * BYTES, (outputs, residual)
    assert _C.plan_cuda(*backward, reduces=False)["strategy"] == "single_pass"
    masked = _C.plan_cuda(*CALL, masked=True, residual=True)
    assert masked["compulsory_bytes"] == 3 * BYTES + BYTES // 4 // 8


def test_eval_reduces_nothing() -> None:
    assert _C.plan_cuda(*CALL[:5], "eval")["strategy"] == "single_pass"


def test_forced_fields() -> None:
    forced: dict[str, Any] = {"strategy": "two_kernels", "access": "scalar", "team": 3}
    plan = _C.plan_cuda(*CALL, **forced)
    assert forced.items() <= plan.items()
    _C.force_cuda_plan(**forced)
    assert _C.plan_cuda(*CALL) == plan
    assert _C.plan_cuda(*CALL, team=5)["team"] == 5
    _C.force_cuda_plan()
    assert _C.plan_cuda(*CALL)["access"] == "vector"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "abacus"}, "device should be one of t4, "),
        ({"device": {}}, "a device needs the field 'compute_capability'"),
        ({"device": {"legs": 4}}, "a device has no field 'legs'"),
        ({"strategy": "luck"}, "strategy should be one of block, cluster, "),
        ({"access": "vectorial"}, "access should be one of vector, scalar"),
        ({"layout": "strided"}, "layout should be one of"),
        ({"n": 0}, "should be at least 1"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    names = ("layout", "dtype", "n", "c", "s", "op")
    good: dict[str, Any] = dict(zip(names, CALL, strict=True))
    with pytest.raises(ValueError, match=message):
        _C.plan_cuda(**(good | wrong))


def command(*words: str) -> int:
    return __main__.main(["plan", *words])


@pytest.mark.parametrize("device", _C.cuda_devices())
@pytest.mark.parametrize("op", ["forward", "backward", "eval"])
def test_the_command_explains_every_plan(
    op: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape in ("2,3", "128,64,56,56", "8,2048,7,7", "4,1,100"):
        for layout in ("channels_first", "channels_last"):
            words = ["--shape", shape, "--layout", layout, "--op", op, "--device", device]
            assert command(*words, "--residual", "--masked") == 0
            text = capsys.readouterr().out
            rows, _, why = text.strip().rpartition("\n\n")
            assert {line[:15].strip() for line in rows.splitlines()} == {
                "call", "device", "strategy", "mapping", "access", "units", "blocks", "shared",
                "workspace", "compulsory", "predicted",
            }  # fmt: skip
            assert why.endswith(".") and "{" not in why


@pytest.mark.parametrize("op", ["forward", "backward", "eval"])
def test_the_command_explains_every_plan_for_the_cpu(
    op: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape in ("2,3", "128,64,56,56", "8,2048,3,3", "4,1,100"):
        for layout in ("channels_first", "channels_last"):
            words = ["--shape", shape, "--layout", layout, "--op", op, "--device", "cpu"]
            assert command(*words, "--residual", "--masked", "--threads", "3") == 0
            text = capsys.readouterr().out
            rows, _, why = text.strip().rpartition("\n\n")
            assert [line[:15].strip() for line in rows.splitlines()] == [
                "call", "device", "scheme", "units", "threads", "walk", "stores", "compulsory",
                "predicted",
            ]  # fmt: skip
            assert why.endswith(".") and "{" not in why
            assert ("read twice" in why) is (op == "eval")


def test_the_command_for_the_cpu_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--shape", "2,64,5,5", "--device", "cpu", "--op", "backward")
    assert command(*words, "--threads", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == _C.plan("channels_first", "float32", 2, 64, 25, 2, "backward")


def _plan(sizes: tuple[Any, ...], op: str, **operands: Any) -> _C.Plan:
    layout, dtype, n, c, s = sizes
    return _C.plan(layout, dtype, n, c, s, 2, op, **operands)


def test_bytes_on_the_cpu() -> None:
    """What is read and written is counted, what is read again where no cache holds it."""
    small: tuple[Any, ...] = ("channels_last", "float32", 16, 64, 49)
    large: tuple[Any, ...] = ("channels_last", "float32", 2**23, 64, 9)
    for sizes in (small, large):
        tensor = math.prod(sizes[2:]) * 4
        cases: list[tuple[str, dict[str, Any], int]] = [
            ("forward", {}, 2),
            ("forward", {"residual": True}, 3),
            ("eval", {"residual": True}, 3),
            ("backward", {}, 3),
            ("backward", {"outputs": 2, "residual": True}, 5),
        ]
        for op, operands, tensors in cases:
            plan = _plan(sizes, op, **operands)
            assert plan["compulsory_bytes"] == tensors * tensor
            again = 0 if sizes == small or op == "eval" else tensors - operands.get("outputs", 1)
            again -= op == "forward" and "residual" in operands and again > 0
            assert plan["predicted_bytes"] == (tensors + again) * tensor, (op, operands, plan)
            level = plan["second_reading"]
            assert level == ("none" if op == "eval" else "L2" if sizes == small else "memory")
    masked = _plan(small, "forward", masked=True, residual=True)
    tensor = math.prod(small[2:]) * 4
    assert masked["compulsory_bytes"] == 3 * tensor + tensor // 4 // 8


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_the_command_refuses_what_are_no_threads(
    threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("--shape", "2,3", "--device", "cpu", "--threads", threads)
    assert "is not a number of at least 1" in capsys.readouterr().err


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--shape", "128,64,56,56", "--device", "h200", "--json") == 0
    assert json.loads(capsys.readouterr().out) == _C.plan_cuda(*CALL, device="h200")


def test_the_command_sees_the_layouts_as_the_bindings_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for shape, layout in [("7,1,5", "channels_first n=1 c=1 s=35"),
                          ("7,3", "channels_last n=7 c=3 s=1"),
                          ("7,3,1,1", "channels_last n=7 c=3 s=1"),
                          ("7,3,2,2", "channels_first n=7 c=3 s=4")]:  # fmt: skip
        command("--shape", shape)
        assert layout in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["", "3", "3x4", "3,0", "3,-4"])
def test_the_command_refuses_what_is_no_shape(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("--shape", shape)
    assert "argument --shape" in capsys.readouterr().err
