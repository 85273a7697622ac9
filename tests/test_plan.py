"""The CPU planner: what holds of every plan, whatever the shape."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from batchnorm_ext import _C

LAYOUTS = ("channels_first", "channels_last")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
OPS = ("forward", "backward", "eval")
SHAPES = 24_000


class Call(NamedTuple):
    """Arguments of `_C.plan`, in its order."""

    layout: str
    dtype: str
    n: int
    c: int
    s: int
    threads: int
    op: str
    masked: bool

    @property
    def numel(self) -> int:
        return self.n * self.c * self.s


def size(random_: random.Random, bits: int) -> int:
    """Log-uniform from 1 to about 2**bits; often a power of two or next to one."""
    value = int(2 ** random_.uniform(0, bits))
    if random_.random() < 0.4:
        value = (1 << random_.randint(0, bits)) + random_.randint(-1, 1)
    return max(value, 1)


def calls(count: int, seed: int = 0) -> Iterator[Call]:
    """The same calls on every run."""
    random_ = random.Random(seed)
    for _ in range(count):
        op = random_.choice(OPS)
        yield Call(
            random_.choice(LAYOUTS),
            random_.choice(list(BYTES)),
            size(random_, 12),
            size(random_, 14),
            size(random_, 18),
            random_.choice([1, 2, 3, 4, 7, 8, 16, 48, 64, 128, random_.randint(1, 128)]),
            op,
            op != "eval" and random_.random() < 0.5,
        )


def violations(call: Call, plan: _C.Plan) -> list[str]:
    """What a plan breaks, in words."""
    units = -(-call.c // plan["unit_channels"]) if plan["unit_channels"] > 0 else 0
    last = call.layout == "channels_last"
    rules = {
        "1 <= unit_channels <= c": 1 <= plan["unit_channels"] <= call.c,
        "1 <= threads <= given": 1 <= plan["threads"] <= call.threads,
        "fold >= 1": plan["fold"] >= 1,
        "a folded row is no longer than the tensor": plan["fold"] <= call.n * call.s,
        "a folded row holds all channels": plan["fold"] == 1 or plan["unit_channels"] == call.c,
        "only channels-last folds": plan["fold"] == 1 or last,
        "a folded row has whole bytes of a mask": (
            not call.masked or plan["fold"] == 1 or plan["fold"] * call.c % 8 == 0
        ),
        "channels-last means columns": (plan["scheme"] == "columns") == last,
        "units own whole bytes of the mask": (
            not call.masked
            or plan["scheme"] == "planes"
            or units == 1
            or plan["unit_channels"] % 8 == 0
        ),
        "eval goes in the order of memory": call.op != "eval"
        or (plan["cooperative"] and (units == 1 or plan["scheme"] == "expanded")),
        "half of the threads have a unit, or all a share in each": (
            plan["cooperative"] or 2 * units >= plan["threads"]
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]


def test_every_plan_keeps_the_rules() -> None:
    broken = [(call, plan, v) for call, plan, v in checked(calls(SHAPES)) if v]
    assert not broken, "\n".join(map(str, [f"{len(broken)} of {SHAPES}", *broken[:5]]))


def checked(some: Iterator[Call]) -> Iterator[tuple[Call, _C.Plan, list[str]]]:
    for call in some:
        plan = _C.plan(*call)
        yield call, plan, violations(call, plan)


def test_small_shapes_keep_the_rules() -> None:
    """Every combination of the sizes at which something begins or ends."""
    sizes = (1, 2, 7, 8, 9, 63, 64, 65)
    for n, c, s, layout, threads in itertools.product(sizes, sizes, sizes, LAYOUTS, (1, 3, 128)):
        for op, masked in (("forward", True), ("backward", False), ("eval", False)):
            call = Call(layout, "float32", n, c, s, threads, op, masked)
            plan = _C.plan(*call)
            assert violations(call, plan) == [], (call, plan)


def test_backward_reads_the_mask_as_forward_laid_it_out() -> None:
    for call in calls(4000, seed=4):
        masked = call._replace(masked=True)
        plans = [_C.plan(*masked._replace(op=op)) for op in ("forward", "backward")]
        assert len({(plan["scheme"], plan["fold"]) for plan in plans}) == 1, masked


def test_a_plan_depends_on_nothing_but_its_arguments() -> None:
    some = list(calls(1000, seed=1))
    first = [_C.plan(*call) for call in some]
    again = [_C.plan(*call) for call in reversed(some)]
    assert first == again[::-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_small_problems_stay_on_one_thread(layout: str, op: str) -> None:
    """Waking a second one takes longer than 8 K elements do."""
    for n, c, s in [(1, 1, 1), (2, 64, 16), (8, 3, 49), (1, 4096, 1), (2, 1, 4096)]:
        plan = _C.plan(layout, "float32", n, c, s, 128, op)
        assert plan["threads"] == 1, (n, c, s, plan)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_problems_use_all_threads(layout: str) -> None:
    for threads in (1, 2, 16, 128):
        assert _C.plan(layout, "float32", 64, 256, 3136, threads, "forward")["threads"] == threads


def test_threads_do_not_fall_as_problems_grow() -> None:
    for call in calls(2000, seed=2):
        larger = call._replace(n=call.n + 1)
        assert _C.plan(*call)["threads"] <= _C.plan(*larger)["threads"], call


def test_threads_do_not_fall_as_more_are_offered() -> None:
    for call in calls(2000, seed=3):
        more = call._replace(threads=call.threads + 1)
        assert _C.plan(*call)["threads"] <= _C.plan(*more)["threads"], call


def test_streaming_begins_at_a_size_and_goes_on() -> None:
    """Stores go past the caches only where the caches could not hold what is written."""
    for layout, dtype, op in itertools.product(LAYOUTS, BYTES, OPS):
        streams = [_C.plan(layout, dtype, 1 << bits, 64, 64, 4, op)["stream"] for bits in range(24)]
        assert not streams[0], "a few KB"
        assert streams[-1], "tens of GB"
        assert streams == sorted(streams), (layout, dtype, op, streams)


def test_short_planes_that_end_inside_a_line_are_not_streamed() -> None:
    # 12 GB and more: there are processors with 480 MB of last-level cache.
    streams = {s: _C.plan("channels_first", "float32", 4096, 4096, s, 2, "eval")["stream"]
               for s in (192, 196, 208, 3025, 4097)}  # fmt: skip
    assert streams == {192: True, 196: False, 208: True, 3025: False, 4097: True}


def test_streaming_counts_bytes_not_elements() -> None:
    for call in calls(2000, seed=4):
        narrow, wide = call._replace(dtype="bfloat16"), call._replace(dtype="float64")
        assert _C.plan(*narrow)["stream"] <= _C.plan(*wide)["stream"], call


def test_plans_of_one_element() -> None:
    for layout, op in itertools.product(LAYOUTS, OPS):
        call = Call(layout, "float32", 1, 5, 1, 4, op, False)
        plan = _C.plan(*call)
        assert plan["threads"] == 1, (call, plan)
        assert violations(call, plan) == [], (call, plan)


@pytest.mark.parametrize("sizes", [(0, 5, 1), (1, 0, 1), (1, 5, 0)])
def test_no_plan_for_no_elements(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="should be at least 1"):
        _C.plan("channels_first", "float32", *sizes, 4, "forward", False)


def test_sizes_that_a_32_bit_number_does_not_hold() -> None:
    for layout, op in itertools.product(LAYOUTS, OPS):
        call = Call(layout, "float64", 1 << 16, 1 << 12, 1 << 12, 128, op, False)
        plan = _C.plan(*call)
        assert violations(call, plan) == [], (call, plan)
        assert plan["threads"] == 128


def test_forced_fields_are_kept_within_the_rules() -> None:
    try:
        for index, call in enumerate(calls(2000, seed=5)):
            _C.force_plan(unit_channels=1 + index % 100, fold=1 + index % 9, scheme="expanded")
            plan = _C.plan(*call)
            found = violations(call, plan)
            # Prescribed on purpose, whatever suits the call.
            allowed = {
                "eval goes in the order of memory",
                "half of the threads have a unit, or all a share in each",
            }
            assert set(found) <= allowed, (call, plan, found)
    finally:
        _C.force_plan()


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "strided"},
        {"dtype": "int8"},
        {"op": "sideways"},
        {"n": -1},
        {"c": 0},
        {"s": -1},
        {"threads": 0},
    ],
)
def test_bad_arguments(wrong: dict[str, object]) -> None:
    good = Call("channels_first", "float32", 2, 3, 4, 1, "forward", False)._asdict()
    with pytest.raises(ValueError):
        _C.plan(**(good | wrong))
