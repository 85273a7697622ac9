"""The benchmarks' arithmetic, cases, checks and timing; what they measure is not tested here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_cases import scaled, stats
from torch import Tensor, nn

from benchmarks import (
    candidates,
    check,
    environment,
    limits,
    overhead,
    shapes,
    timing,
    traffic,
)
from benchmarks.candidates import OURS
from benchmarks.timing import Ratio, Stats, geometric_mean, overlap

pytestmark = pytest.mark.usefixtures("one_thread")


# --- byte counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "direction", "tensors", "mask"),
    [
        ("bn", "forward", 2, False),
        ("bn", "backward", 3, False),
        ("bn", "eval", 2, False),
        ("bn_relu", "forward", 2, False),
        ("bn_relu", "backward", 3, False),
        ("bn_relu", "eval", 2, False),
        ("bn_add_relu", "forward", 3, True),
        ("bn_add_relu", "backward", 4, True),
        ("bn_add_relu", "eval", 3, False),
    ],
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_compulsory_bytes(op: str, direction: str, tensors: int, mask: bool, itemsize: int) -> None:
    numel = 801  # not a multiple of 8: the mask rounds up
    expected = tensors * numel * itemsize + (101 if mask else 0)
    assert traffic.compulsory_bytes(op, direction, numel, itemsize) == expected


def test_every_case_has_a_formula_with_a_reason() -> None:
    wanted = {(op, direction) for op in shapes.OPS for direction in shapes.DIRECTIONS}
    assert set(traffic.FORMULAS) == wanted
    assert all(formula.reason for formula in traffic.FORMULAS.values())
    assert str(traffic.FORMULAS["bn_add_relu", "backward"]) == "4T + 1 bit per element"


def test_a_copy_reaches_exactly_its_own_limit() -> None:
    moved = traffic.compulsory_bytes("bn", "eval", 1000, 4)
    copied = traffic.copy_bytes(1000, 4)
    assert traffic.fraction_of_limit(moved, 0.5, copied, 0.5) == 1.0
    assert traffic.fraction_of_limit(moved, 1.0, copied, 0.5) == 0.5
    backward = traffic.compulsory_bytes("bn", "backward", 1000, 4)
    assert traffic.fraction_of_limit(backward, 1.5, copied, 1.0) == pytest.approx(1.0)


# --- statistics ------------------------------------------------------------------------------


def test_geometric_mean() -> None:
    assert geometric_mean([4.0, 1.0]) == pytest.approx(2.0)
    assert geometric_mean([3.0, 1 / 3]) == pytest.approx(1.0)
    assert math.isnan(geometric_mean([]))


def test_quartiles_of_samples() -> None:
    found = Stats.of([5.0, 1.0, 3.0, 2.0, 4.0], calls=7)
    assert (found.q1, found.median, found.q3) == (2.0, 3.0, 4.0)
    assert (found.minimum, found.rounds, found.calls) == (1.0, 5, 7)


@pytest.mark.parametrize(
    ("a", "b", "meet"),
    [
        (stats(2.0, 0.4), stats(1.0, 0.5), False),
        (stats(2.0, 0.5), stats(1.0, 0.5), True),  # they touch at 1.5
        (stats(2.0, 0.1), stats(2.0, 1.0), True),  # one inside the other
        (stats(1.0, 0.2), stats(2.0, 0.2), False),
    ],
)
def test_overlap_decides_whether_a_ratio_is_claimed(a: Stats, b: Stats, meet: bool) -> None:
    assert overlap(a, b) is meet
    assert overlap(b, a) is meet
    ratio = Ratio.of(a, b)
    assert ratio.decided is not meet
    assert ratio.value == pytest.approx(a.median / b.median)
    assert (str(ratio) == "~") is meet


def test_the_rule_rarely_claims_a_difference_between_equals() -> None:
    """The reason of FEWEST_ROUNDS: two samples of one distribution, with so many rounds."""
    random = np.random.default_rng(0)

    def claimed(rounds: int) -> float:
        draws = random.lognormal(size=(2000, 2, rounds))
        return float(np.mean([not overlap(Stats.of(a), Stats.of(b)) for a, b in draws]))

    assert claimed(shapes.FEWEST_ROUNDS) < 0.035
    assert claimed(5) > 0.15
    assert all(preset.rounds[0] >= shapes.FEWEST_ROUNDS for preset in shapes.PRESETS.values())


def test_drawn_shapes_are_the_same_each_time_and_of_every_kind() -> None:
    blocks = shapes.drawn_blocks(250)
    assert blocks == shapes.drawn_blocks(250) != shapes.drawn_blocks(250, seed=1)
    groups = [group for block in blocks for group in block.groups([1])]
    assert len(groups) == 250
    assert all(2**12 <= group.shape.numel <= 2**22 for group in groups)
    kinds = {(group.layout, group.dtype, group.op) for group in groups}
    assert len(kinds) == len(shapes.LAYOUTS) * 3 * len(shapes.OPS)


def test_a_slow_result_is_shown_as_slow() -> None:
    assert str(Ratio.of(stats(1.0), stats(2.0))) == "0.50x"


def test_interleaving_takes_turns_and_counts_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def block(call: Any, calls: int) -> float:
        order.append(call())
        return {"a": 1.0, "b": 2.0}[order[-1]]

    monkeypatch.setattr(timing, "_block", block)
    found = timing.interleave({"a": lambda: "a", "b": lambda: "b"}, budget_s=9.1, rounds=(2, 5))
    assert order[:4] == ["a", "a", "b", "b"]  # warm-up and estimate
    rounds = [set(order[i : i + 2]) for i in range(4, len(order), 2)]
    assert rounds == [{"a", "b"}] * 3  # 9.1 s are three rounds of 3 s
    assert found["a"].median == 1.0
    assert found["b"].rounds == 3


def test_the_order_of_a_round_changes_and_is_the_same_in_every_run() -> None:
    def orders() -> list[str]:
        seen: list[str] = []
        calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
        timing.interleave(calls, budget_s=0.0, rounds=(9, 9), block_s=0.0)
        turns = seen[9:]  # after two warm-up calls and the estimate of each
        return ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]

    first = orders()
    assert len(first) == 9
    assert all(sorted(turn) == ["a", "b", "c"] for turn in first)
    assert len(set(first)) > 2
    assert orders() == first


def test_short_calls_are_repeated_within_a_block() -> None:
    found = timing.interleave({"a": lambda: None}, budget_s=0.0, rounds=(3, 5))
    assert found["a"].rounds == 3
    assert found["a"].calls > 10


# --- shapes ----------------------------------------------------------------------------------


def test_catalogue_holds_what_it_says() -> None:
    assert len({shape.sizes[1:] for shape in shapes.RESNET50}) == 12
    assert len({shape.sizes for shape in shapes.CATALOGUE}) == len(shapes.CATALOGUE)
    assert max(s.sizes[0] for s in shapes.ONE_D) == 1_000_000
    for shape in shapes.CATALOGUE:
        assert shape.numel > shape.sizes[1], "training needs more than one value per channel"


def test_one_value_per_row_has_one_layout() -> None:
    assert shapes.find_shape("64x256x1x1").layouts == ("channels_last",)
    assert shapes.find_shape("8x256").layouts == ("channels_last",)
    assert shapes.find_shape("8x256x2x2").layouts == shapes.LAYOUTS


@pytest.mark.parametrize("text", ["", "8", "axb", "1x2x3x4x5x6", "0x3", "1x8", "1x8x1x1", "-2x3"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shape"):
        shapes.find_shape(text)


def test_options_narrow_a_preset_and_no_group_comes_twice() -> None:
    preset = shapes.PRESETS["full"]
    narrow = shapes.Selection(dtypes=("float32",), ops=("bn",), layouts=("channels_last",))
    groups = narrow.groups(preset, (1,))
    assert len({(g.shape.sizes, g.threads) for g in groups}) == len(groups)
    assert len(groups) == len(shapes.CATALOGUE)
    # of two equal groups the one with more baselines stays
    assert sum("compile" in g.baselines for g in groups) == 3


@pytest.mark.parametrize("sizes", [(3, 4), (3, 4, 5), (2, 4, 3, 3), (2, 4, 2, 3, 2)])
def test_layouts_are_what_their_names_say(sizes: tuple[int, ...]) -> None:
    x = candidates.in_layout(torch.randn(sizes), "channels_last")
    assert x.stride(1) == 1
    assert candidates.in_layout(x, "channels_first").is_contiguous()


# --- data ------------------------------------------------------------------------------------


def test_data_of_a_seed_stay_what_they_are_on_the_cpu() -> None:
    """Results of different versions are of the same numbers."""
    case = group(dtype="bfloat16", layout="channels_last")
    data = candidates.make_data(case, mean=3.0, seed=5)
    random = torch.Generator().manual_seed(5)
    assert torch.equal(data.x, (torch.randn(4, 6, 5, 5, generator=random) + 3).bfloat16())
    assert data.x.is_contiguous(memory_format=torch.channels_last)
    assert data.residual is not None
    assert torch.equal(data.residual, torch.randn(4, 6, 5, 5, generator=random).bfloat16())


def test_data_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would wait for the CPU's random numbers longer than for anything else."""
    drawn: list[tuple[object, object]] = []

    def spy(make: Any) -> Any:
        def drawing(size: Any, generator: Any, device: Any) -> Tensor:
            drawn.append((generator.device, device))
            return make(size, device="meta")

        return drawing

    class Generator:
        def __init__(self, device: str) -> None:
            self.device = device

        def manual_seed(self, seed: int) -> Generator:
            return self

    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, spy(getattr(torch, name)))
    monkeypatch.setattr(torch, "Generator", Generator)
    data = candidates.make_data(group(device="cuda"))
    assert set(drawn) == {("cuda", "cuda")}
    assert data.x.device == data.running_var.device == torch.device("meta"), "never copied"


# --- correctness check -----------------------------------------------------------------------


def group(op: str = "bn_add_relu", layout: str = "channels_first", **more: Any) -> shapes.Group:
    sizes = more.pop("sizes", (4, 6, 5, 5))
    dtype = more.pop("dtype", "float32")
    return shapes.Group(shapes.Shape("test", sizes), layout, dtype, op, 1, **more)


def checked(name: str, case: shapes.Group, mean: float = 0.0) -> check.Outcome:
    data = candidates.make_data(case, mean)
    if case.op != "bn":
        check.silence_kinks(data)
    calls = {name: candidates.make_calls(name, case, data)}
    return check.check(calls, data, case.op, case.directions)[name]


@pytest.mark.parametrize("mean", [0.0, check.LARGE_MEAN])
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("op", shapes.OPS)
@pytest.mark.parametrize("name", [OURS, "eager"])
def test_right_results_pass(name: str, op: str, dtype: str, mean: float) -> None:
    for layout in shapes.LAYOUTS:
        outcome = checked(name, group(op, layout, dtype=dtype), mean)
        assert outcome.ok, (outcome, layout)


@pytest.mark.parametrize(
    ("maker", "where"),
    [
        (scaled(1.0, 1e-4), "output"),
        (scaled(1.0001), ""),
        (scaled(math.nan), ""),
    ],
)
def test_wrong_results_fail(monkeypatch: pytest.MonkeyPatch, maker: Any, where: str) -> None:
    monkeypatch.setitem(candidates.MAKERS, OURS, maker)
    outcome = checked(OURS, group("bn", sizes=(16, 6, 5, 5)))
    assert not outcome.ok
    assert where in outcome.where


def test_a_channel_in_the_last_chunk_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CPU_CHUNK", 100)  # one channel at a time

    def maker(case: shapes.Group, data: candidates.Data) -> tuple[nn.Module, candidates.Step]:
        module, step = candidates._eager(case, data)

        def spoilt(x: Tensor, residual: Tensor | None) -> Tensor:
            y = step(x, residual).clone()
            y[-1, -1, -1, -1] += 0.01
            return y

        return module, spoilt

    assert checked(OURS, group("bn")).ok
    monkeypatch.setitem(candidates.MAKERS, OURS, maker)
    assert not checked(OURS, group("bn")).ok


def test_a_gpu_checks_in_few_parts() -> None:
    """Each part is two hundred small kernels: of a large layer, half a second with the CPU's."""
    big = group("bn", sizes=(128, 256, 56, 56), dtype="bfloat16")

    def parts_of(x: Tensor) -> list[slice]:
        return list(check._chunks(candidates.Data(*[x] * 3, *[torch.empty(256)] * 4)))

    parts = parts_of(torch.empty(big.shape.sizes, device="meta"))
    assert len(parts) < 10
    assert len(parts_of(torch.empty(2, 256, 56, 56))) > 5, "the CPU's stay in its cache"
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, 256)


def test_the_unstable_variance_fails_on_a_large_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """E[x^2] - E[x]^2 in float32, which is right on centred data."""

    class Unstable(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = (x * x).mean((0, 2, 3), keepdim=True) - mean * mean
            weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
            return (x - mean) / (var + self.eps).sqrt() * weight + bias

    def maker(case: shapes.Group, data: candidates.Data) -> tuple[nn.Module, candidates.Step]:
        module = Unstable(case.shape.sizes[1])
        return module, lambda x, _: module(x)

    monkeypatch.setitem(candidates.MAKERS, OURS, maker)
    case = group("bn", directions=("forward",), sizes=(16, 6, 8, 8))
    assert checked(OURS, case).ok
    assert not checked(OURS, case, check.LARGE_MEAN).ok


# --- copies and overhead ---------------------------------------------------------------------


def test_the_copies_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FRESH_PAGES_BYTES", 0)
    x = candidates.in_layout(torch.randn(2, 3, 4, 5), "channels_last")
    copies = limits.copies(x)
    assert set(copies) <= {*limits.LIMITS, limits.CONTROL}
    for name, copy in copies.items():
        found = copy()
        assert isinstance(found, Tensor)
        assert torch.equal(found, x), name
        assert found.stride() == x.stride()
        assert found.data_ptr() != x.data_ptr()


def test_huge_pages_are_huge() -> None:
    smaps = Path("/proc/self/smaps")
    if environment.collect()["transparent_huge_pages"] in ("", "never") or not smaps.exists():
        pytest.skip("this system gives no huge pages")
    pages = limits.huge_empty_like(torch.empty(16 << 20, dtype=torch.uint8)).fill_(1)
    sizes, inside = 0, False
    for line in smaps.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= pages.data_ptr() < int(span[2], 16)
        elif inside and (size := re.match(r"AnonHugePages: +(\d+) kB", line)):
            sizes += int(size[1])
    assert sizes >= 8 << 10


def test_saved_bytes_of_torch_are_what_torch_saves() -> None:
    rows = {(row["op"], row["candidate"]): row for row in overhead.saved_bytes()}
    tensor = rows["bn", "eager"]["tensor_bytes"]
    assert tensor < rows["bn", "eager"]["total"] < 1.01 * tensor
    assert rows["bn", "eager"]["kept"] < 0.01 * tensor
    # ReLU keeps its result, which is the output; batch norm keeps its input
    assert tensor <= rows["bn_relu", "eager"]["kept"] < 1.01 * tensor
    assert rows["bn_relu", "eager"]["hidden"] < 0.01 * tensor


def test_saved_bytes_of_ours_are_a_mask_at_most() -> None:
    rows = {row["op"]: row for row in overhead.saved_bytes() if row["candidate"] == OURS}
    assert rows["bn"]["kept"] < 0.01 * rows["bn"]["tensor_bytes"]
    assert rows["bn_relu"]["kept"] <= 0.04 * rows["bn_relu"]["tensor_bytes"]
    assert rows["bn_add_relu"]["kept"] <= 0.04 * rows["bn_add_relu"]["tensor_bytes"]
