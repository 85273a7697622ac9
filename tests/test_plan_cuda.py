"""The CUDA planner: what holds of every plan, whatever the shape and the device.

What a plan says of itself (shared memory, workspace, bytes) is computed again here, from the
kernels' walk over their cells; how many blocks a device holds at once, from its limits.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm_ext import _C
from benchmarks import predict, shapes

THREADS, CELL = 256, 8
LAYOUTS = ("channels_first", "channels_last")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
OPS = ("forward", "backward", "eval")
DEVICES = _C.cuda_devices()
# Limits of every compute capability since 7.5 (CUDA Programming Guide, technical specifications).
REGISTERS, BLOCKS = 65536, 16
SHAPES = 24_000


class Call(NamedTuple):
    """What `_C.plan_cuda` is asked."""

    layout: str
    dtype: str
    n: int
    c: int
    s: int
    op: str
    device: str = "h100"
    reduces: bool = True
    cumulative: bool = False
    aligned: bool = True
    residual: bool = False
    masked: bool = False
    outputs: int = 1

    def plan(self, **forced: Any) -> _C.CudaPlan:
        fields: Any = self._asdict() | forced
        return _C.plan_cuda(**fields)

    @property
    def tensor(self) -> int:
        return self.n * self.c * self.s * BYTES[self.dtype]

    @property
    def kept(self) -> int:
        """Tensors that a unit is made of: x, and dy in backward."""
        return 2 if self.op == "backward" else 1

    @property
    def first(self) -> bool:
        return self.layout == "channels_first"


# ---- which calls --------------------------------------------------------------------------------


def size(random_: random.Random, bits: int) -> int:
    """Log-uniform from 1 to about 2**bits; often a power of two or next to one."""
    value = int(2 ** random_.uniform(0, bits))
    if random_.random() < 0.4:
        value = (1 << random_.randint(0, bits)) + random_.randint(-1, 1)
    return max(value, 1)


def call_of(random_: random.Random, n: int, c: int, s: int, **given_: Any) -> Call:
    """A call with the rest left to chance, but as the bindings could make it."""
    op = given_.pop("op", None) or random_.choice(OPS)
    backward = op == "backward"
    masked = op != "eval" and random_.random() < 0.3
    reduces = op == "forward" or (backward and random_.random() < 0.9)
    call = Call(
        random_.choice(LAYOUTS),
        random_.choice(list(BYTES)),
        n,
        c,
        s,
        op,
        random_.choice(list(DEVICES)),
        reduces,
        op == "forward" and random_.random() < 0.2,
        random_.random() < 0.9,
        random_.random() < 0.3 and not (backward and masked),
        masked,
        random_.choice([1, 1, 2, 0] if reduces else [1, 2]) if backward else 1,
    )
    return call._replace(**given_)


def random_calls(count: int, seed: int = 0) -> Iterator[Call]:
    """The same calls on every run; up to 2**46 elements, small planes as often as large ones."""
    random_ = random.Random(seed)
    for _ in range(count):
        s = size(random_, random_.choice([6, 12, 18]))
        yield call_of(random_, size(random_, 14), size(random_, 14), s)


MORE_SIZES = [
    *((n, c) for n in (2, 64, 4096, 1_000_000) for c in (1, 3, 17, 64, 1000, 100_003)),
    *((2, c, side, side) for c in (1, 3, 17, 64) for side in (1, 2, 3, 7, 8, 13, 17, 35, 4096)),
    *((n, 64, side, side) for n in (1, 2, 8, 128) for side in (1, 2, 4, 5, 6, 7, 9, 10, 15)),
    *((32, 100_003, 2), (32, 100_008, 3), (1024, 2048, 64, 64), (1, 1, 1 << 33), (1 << 20, 4096)),
]


def networks() -> Iterator[tuple[int, int, int]]:
    """n, c and s of the networks' layers at several batch sizes, and of what else is special."""
    for shape in shapes.CATALOGUE:
        for batch in (1, 2, 32, 128, 256) if len(shape.sizes) == 4 else shape.sizes[:1]:
            yield batch, shape.sizes[1], math.prod(shape.sizes[2:])
    for n, c, *spatial in MORE_SIZES:
        yield n, c, math.prod(spatial)


def network_calls() -> Iterator[Call]:
    """Each of them in every layout, pass and capability."""
    random_ = random.Random(5)
    named = ("t4", "a100", "rtx3090", "rtx4090", "h100", "b200", "rtx5090")
    for n, c, s in networks():
        for layout, op, device in itertools.product(LAYOUTS, OPS, named):
            yield call_of(random_, n, c, s, layout=layout, op=op, device=device)


# ---- what a plan has to be ----------------------------------------------------------------------


class Unit(NamedTuple):
    """How a unit of so many channels lies: `rows` of `cells` cells, `groups` rows at once."""

    rows: int
    cells: int
    groups: int

    def each(self, team: int) -> int:
        """Cells of the busiest thread."""
        return -(-self.rows // (self.groups * team))

    def staying(self, team: int, slots: int) -> int:
        """How many cells stay in shared memory, all threads together."""
        few, more = divmod(self.rows, self.groups * team)
        lines = self.groups * team * min(few, slots) + more * (
            min(few + 1, slots) - min(few, slots)
        )
        return lines * self.cells


def unit_of(call: Call, plan: _C.CudaPlan, channels: int) -> Unit:
    if plan["mapping"] == "planes":
        return Unit(call.n * -(-call.s // CELL), 1, THREADS)
    cells = -(-channels * (call.s if call.first else 1) // CELL)
    return Unit(call.n if call.first else call.n * call.s, cells, THREADS // cells)


def shared_bytes(call: Call, plan: _C.CudaPlan) -> int:
    """Slots, and the scratch that csrc/cuda/team.cuh and channel_values.cuh write."""
    slots = plan["slots"] * THREADS * CELL * BYTES[call.dtype] * call.kept
    planes = plan["mapping"] == "planes"
    writers = max(unit_of(call, plan, plan["unit_channels"]).cells, THREADS // 2)
    tree = 2 * (1 if planes else CELL) * (THREADS // 2 if planes else writers)
    values = tree + (3 + 5) * plan["unit_channels"] + THREADS // 2
    return slots + values * (8 if call.dtype == "float64" else 4)


def workspace_bytes(call: Call, plan: _C.CudaPlan) -> int:
    """Three values for each channel, from each block of a team."""
    teams = {"grid": 2 * plan["units_at_once"], "two_kernels": plan["units"]}
    of_team = plan["team"] * plan["unit_channels"] * 3 * (8 if call.dtype == "float64" else 4)
    return teams.get(plan["strategy"], 0) * of_team


def mask_bytes(call: Call) -> int:
    rows, columns = (call.n * call.c, call.s) if call.first else (call.n * call.s, call.c)
    return rows * -(-columns // 8) if call.masked else 0


def compulsory_bytes(call: Call) -> int:
    """Each tensor once."""
    tensors = call.kept + call.residual + (call.outputs if call.op == "backward" else 1)
    return tensors * call.tensor + mask_bytes(call)


def read_again(call: Call, plan: _C.CudaPlan) -> tuple[int, int]:
    """Bytes that the second pass reads from memory: by the share of all cells that do not stay, and
    if every thread were the busiest.
    """
    no_second = call.op == "backward" and call.outputs == 0
    if plan["strategy"] == "single_pass" or no_second:
        return 0, 0
    rest = (call.residual * call.tensor + mask_bytes(call)) if call.op == "backward" else 0
    team, slots, full = plan["team"], plan["slots"], plan["unit_channels"]
    gone = 0
    for channels, count in ((full, call.c // full), (call.c % full, 1)):
        if channels and count:
            unit = unit_of(call, plan, channels)
            cells = unit.rows * unit.cells
            size_ = call.kept * call.tensor // call.c * channels
            gone += count * (size_ * (cells - unit.staying(team, slots)) // cells)
    each = unit_of(call, plan, full).each(team)
    worst = call.kept * call.tensor * max(each - slots, 0) / each
    return rest + gone, rest + math.ceil(worst)


def resident_blocks(call: Call, plan: _C.CudaPlan) -> int:
    """Blocks that the device holds at once, as the occupancy calculator has it."""
    device = DEVICES[call.device]
    # Of __launch_bounds__. Registers are given to a warp 256 at a time, shared memory by 256 bytes.
    bound = 255 if call.dtype == "float64" else 128
    registers = -(-bound * 32 // 256) * 256 * (THREADS // 32)
    shared = -(-plan["shared_bytes"] // 256) * 256 + device["reserved_shared"]
    each = min(
        REGISTERS // registers,
        device["threads_per_multiprocessor"] // THREADS,
        BLOCKS,
        device["shared_per_multiprocessor"] // shared,
    )
    return device["multiprocessors"] * each


def followed_limits(call: Call, plan: _C.CudaPlan) -> dict[str, bool]:
    """What the device and the launch demand."""
    device = DEVICES[call.device]
    strategy, team = plan["strategy"], plan["team"]
    return {
        "blocks": plan["blocks"] == plan["units_at_once"] * team,
        "1 <= blocks <= 2**31 - 1": 1 <= plan["blocks"] < 1 << 31,
        "shared memory of a block": plan["shared_bytes"] <= device["shared_per_block"],
        "a block fits": resident_blocks(call, plan) >= device["multiprocessors"],
        "two blocks fit, where it is not double": call.dtype == "float64"
        or resident_blocks(call, plan) >= 2 * device["multiprocessors"],
        "a cluster is no larger than allowed": strategy != "cluster"
        or (device["max_cluster"] > 1 and team <= device["max_cluster"]),
        "all blocks of a grid fit at once": strategy != "grid"
        or (device["cooperative"] and plan["blocks"] <= resident_blocks(call, plan)),
        "alone means alone": strategy != "block" or team == 1,
    }


def followed_kernels(call: Call, plan: _C.CudaPlan) -> dict[str, bool]:
    """What the kernels take for granted."""
    strategy, channels = plan["strategy"], plan["unit_channels"]
    columns = plan["mapping"] == "columns"
    width = channels * call.s if call.first else channels
    row = (call.c * call.s if columns else call.s) if call.first else call.c
    unit = unit_of(call, plan, channels)
    return {
        "units cover the channels": plan["units"] == -(-call.c // channels),
        "1 <= units_at_once <= units": 1 <= plan["units_at_once"] <= plan["units"],
        "1 <= unit_channels <= c": 1 <= channels <= call.c,
        "planes are of one channel": columns or (channels == 1 and call.first),
        "channels-last means columns": columns or call.first,
        "a row has a thread for each cell": 1 <= unit.cells <= THREADS,
        "units begin at whole cells": not columns or plan["units"] == 1 or width % CELL == 0,
        "rows of a mask without padding": not (columns and call.first) or call.c * call.s % 8 == 0,
        "vectors are aligned": plan["access"] == "scalar" or (call.aligned and row % CELL == 0),
        "a thread's cells fit an int": unit.each(plan["team"]) < 1 << 31,
        "reducing or not": call.reduces == (strategy != "single_pass"),
        "a counter that all read": not call.cumulative
        or plan["units"] == 1
        or strategy not in ("block", "cluster"),
        "slots where they are used": plan["slots"] >= 0
        and (plan["slots"] == 0 or strategy in ("block", "cluster", "grid"))
        and plan["slots"] <= unit.each(plan["team"]),
    }


def followed_accounts(call: Call, plan: _C.CudaPlan) -> dict[str, bool]:
    """What the plan says of itself."""
    exact, worst = read_again(call, plan)
    again = plan["predicted_bytes"] - plan["compulsory_bytes"]
    rounding = 2 * unit_of(call, plan, plan["unit_channels"]).each(plan["team"])
    return {
        "shared_bytes": plan["shared_bytes"] == shared_bytes(call, plan),
        "workspace_bytes": plan["workspace_bytes"] == workspace_bytes(call, plan),
        "compulsory_bytes": plan["compulsory_bytes"] == compulsory_bytes(call),
        "compulsory <= predicted": again >= 0,
        "what is read again is counted": exact <= again + rounding,
        "nothing else is counted": again <= worst,
    }


def chosen(call: Call, plan: _C.CudaPlan) -> dict[str, bool]:
    """What only a plan has to be that nothing was prescribed of."""
    strategy, team = plan["strategy"], plan["team"]
    row = (call.c * call.s if plan["mapping"] == "columns" else call.s) if call.first else call.c
    waves = -(-plan["units"] // plan["units_at_once"])
    return {
        "vectors where they are possible": (plan["access"] == "vector")
        == (call.aligned and row % CELL == 0),
        "a cluster is of several blocks, by a power of 2": strategy != "cluster"
        or (team > 1 and team & (team - 1) == 0),
        "only a grid has waves": strategy == "grid" or waves == 1,
        "even waves": waves * plan["units_at_once"] < plan["units"] + waves,
        "who stays apart holds its unit": strategy not in ("block", "cluster")
        or plan["slots"] == unit_of(call, plan, plan["unit_channels"]).each(team),
        "the grid's barrier is worth it": strategy != "two_kernels"
        or not DEVICES[call.device]["cooperative"],
        "accesses are not narrower than memory's pieces": call.first
        or plan["unit_channels"] == call.c
        or plan["unit_channels"] * BYTES[call.dtype] >= 64,
    }


def violations(call: Call, plan: _C.CudaPlan, *, forced: bool = False) -> list[str]:
    """What a plan breaks, in words."""
    rules = followed_limits(call, plan) | followed_kernels(call, plan)
    if rules["1 <= unit_channels <= c"] and rules["a row has a thread for each cell"]:
        rules |= followed_accounts(call, plan) | ({} if forced else chosen(call, plan))
    return [rule for rule, holds in rules.items() if not holds]


def check(calls: Iterable[Call], at_least: int) -> None:
    broken, count = [], 0
    for call in calls:
        plan, count = call.plan(), count + 1
        if found := violations(call, plan):
            broken.append(f"{call}\n  {plan}\n  {found}")
    assert not broken, "\n".join([f"{len(broken)} of {count}", *broken[:5]])
    assert count >= at_least


# ---- tests --------------------------------------------------------------------------------------


def test_the_devices_are_of_every_architecture() -> None:
    assert {device["compute_capability"] for device in DEVICES.values()} == {
        75, 80, 86, 89, 90, 100, 120
    }  # fmt: skip


def test_every_plan_keeps_the_rules() -> None:
    check(random_calls(SHAPES), SHAPES)


def test_the_networks_plans_keep_the_rules() -> None:
    check(network_calls(), 10_000)


def test_small_shapes_keep_the_rules() -> None:
    """Every combination of the sizes at which something begins or ends."""
    random_, sizes = random.Random(6), (1, 2, 7, 8, 9, 63, 64, 65)
    check((call_of(random_, *ncs) for ncs in itertools.product(sizes, repeat=3)), 512)


def test_sizes_that_a_32_bit_number_does_not_hold() -> None:
    random_ = random.Random(7)
    for n, c, s in [(1 << 16, 1 << 12, 1 << 12), (1 << 40, 1, 1), (1, 1, 1 << 40), (3, 1 << 33, 5)]:
        for op, layout, device in itertools.product(OPS, LAYOUTS, ("t4", "h100")):
            call = call_of(random_, n, c, s, op=op, layout=layout, device=device)
            wrong = violations(call, call.plan())
            # One unit for each group of channels: more blocks than that are a refused launch.
            assert wrong == [], (call, call.plan(), wrong)


def test_devices_that_lack_something() -> None:
    """No cooperative launches, no clusters: what then?"""
    for call in random_calls(2000, seed=8):
        limits: Any = DEVICES[call.device] | {"cooperative": False, "max_cluster": 1}
        plan = call._replace(device=limits).plan()
        assert plan["strategy"] in ("block", "two_kernels", "single_pass"), (call, plan)
        wrong = set(violations(call, plan)) - {"the grid's barrier is worth it"}
        assert not wrong, (call, plan, wrong)


# ---- what the driver answered --------------------------------------------------------------------


def occupancy(blocks: int, clusters: dict[int, int], *, refused: bool = False) -> dict[str, Any]:
    return {"blocks": blocks, "clusters": clusters, "refused": refused}


def test_plans_keep_to_the_occupancy() -> None:
    random_ = random.Random(11)
    for call in random_calls(4000, seed=11):
        device = DEVICES[call.device]
        sizes = random_.sample(range(2, 9), random_.randint(0, 7))
        clusters = {size: random_.randint(1, 40) for size in sizes}
        refused = random_.random() < 0.5
        forced = {"team": random_.randint(1, 9)} if random_.random() < 0.5 else {}
        plan = call.plan(occupancy=occupancy(1, clusters, refused=refused), **forced)
        rules = {
            "all blocks of a grid fit at once": plan["strategy"] != "grid"
            or plan["blocks"] <= device["multiprocessors"],
            "nobody meets who may not": plan["strategy"] != "grid" or not refused,
            "clusters are of a size that is possible": plan["strategy"] != "cluster"
            or plan["team"] == 1
            or plan["team"] in clusters,
            "a block fits": plan["shared_bytes"] <= device["shared_per_block"],
            "the plan says so": plan["refused"] == refused,
        }
        assert all(rules.values()), (call, plan, rules)


def test_one_block_has_what_two_would_share() -> None:
    call = Call("channels_first", "bfloat16", 64, 256, 3136, "forward")
    alone = call.plan(occupancy=occupancy(1, {}), strategy="block")
    assert alone["slots"] > 2 * call.plan(strategy="block")["slots"]


def test_few_clusters_at_once_are_no_good() -> None:
    call = Call("channels_first", "bfloat16", 128, 256, 3136, "forward")
    assert (call.plan()["strategy"], call.plan()["team"]) == ("cluster", 8)
    assert call.plan(occupancy=occupancy(2, {2: 132, 4: 66, 8: 33})) == call.plan()
    plan = call.plan(occupancy=occupancy(2, {2: 132, 4: 66, 8: 3}))
    assert plan["strategy"] == "grid"


def test_a_prescribed_cluster_is_one_that_the_device_takes() -> None:
    call = Call("channels_first", "float32", 32, 96, 49, "forward")
    powers = occupancy(2, {2: 132, 4: 66, 8: 33})
    teams = [call.plan(occupancy=powers, strategy="cluster", team=n)["team"] for n in range(2, 10)]
    assert teams == [2, 2, 4, 4, 4, 4, 8, 8]
    assert call.plan(occupancy=powers, strategy="cluster")["team"] == 2
    without = call.plan(occupancy=occupancy(2, {}), strategy="cluster", team=4)
    assert without["strategy"] != "cluster"


def test_backward_reads_the_mask_as_forward_laid_it_out() -> None:
    """How an image's bits lie follows from the problem, not from the pass or the device."""
    random_ = random.Random(9)
    for call in random_calls(4000, seed=9):
        layouts = set()
        for op in ("forward", "backward"):
            other = call_of(random_, call.n, call.c, call.s, op=op)
            other = other._replace(layout="channels_first", dtype=call.dtype)
            plan = other.plan(
                slots=random_.choice([None, 0]), unit_channels=random_.choice([None, 8])
            )
            layouts.add((plan["mapping"], plan["unit_channels"]))
        assert len(layouts) == 1, call


def test_a_group_that_is_too_large_is_halved() -> None:
    """One that was asked for, whose sums two blocks' halves of shared memory do not hold."""
    call = Call("channels_last", "float64", 64, 4096, 196, "backward", device="t4")
    blocks = occupancy(2, {})
    plans = [call.plan(unit_channels=asked, occupancy=blocks) for asked in (64, 256)]
    assert [plan["unit_channels"] for plan in plans] == [64, 128]
    assert all(2 * p["shared_bytes"] <= DEVICES["t4"]["shared_per_block"] for p in plans)


def test_a_plan_depends_on_nothing_but_its_arguments() -> None:
    calls = list(random_calls(1000, seed=1))
    first = [call.plan() for call in calls]
    assert [call.plan() for call in reversed(calls)][::-1] == first


def test_larger_work_is_not_left_to_fewer_blocks() -> None:
    """100 MB and more keep most of a device busy."""
    for call in network_calls():
        plan, device = call.plan(), DEVICES[call.device]
        if call.tensor >= 100_000_000:
            assert plan["blocks"] * 3 >= 2 * device["multiprocessors"], (call, plan)


def test_many_small_units_are_joined() -> None:
    """Two images' planes of 512 bytes would leave three of four threads without a cell."""
    plan = Call("channels_first", "bfloat16", 2, 1024, 256, "forward").plan()
    assert (plan["mapping"], plan["unit_channels"], plan["units"]) == ("columns", 4, 256)
    few = Call("channels_first", "bfloat16", 2, 64, 256, "forward").plan()
    assert (few["mapping"], few["units"]) == ("planes", 64)


def test_small_odd_planes_have_vectors() -> None:
    """16 planes of 3x3 are whole cells and rows of 256 bytes; the last unit may have but 8."""
    for c in (16, 24, 40, 1000, 8 * 10007):
        plan = Call("channels_first", "bfloat16", 128, c, 9, "forward").plan()
        assert (plan["access"], plan["unit_channels"]) == ("vector", 16), c


def test_groups_of_channels_are_of_about_one_size() -> None:
    """144 channels are two groups of 80 and 64, not of 128 and 16: 32 bytes are slow to write."""
    plan = Call("channels_last", "bfloat16", 128, 144, 784, "forward").plan()
    assert (plan["unit_channels"], plan["units"]) == (80, 2)


def test_a_small_call_is_cut_narrower_than_a_large_one() -> None:
    """Narrow groups cost bandwidth, but four blocks on a whole device cost more."""
    small = Call("channels_last", "bfloat16", 2, 512, 49, "forward").plan()
    large = Call("channels_last", "bfloat16", 128, 512, 784, "forward").plan()
    assert small["unit_channels"] * 2 < 128 < large["unit_channels"] * 2
    assert small["blocks"] >= 16


def test_the_second_level_cache_helps_to_keep_a_unit() -> None:
    """Backward of 128x64x56x56 leaves 22 MB of 64 bytes' channels beside shared memory."""
    call = Call("channels_last", "bfloat16", 128, 64, 3136, "backward", "h200")
    assert call.plan()["unit_channels"] * 2 == 64
    assert call._replace(n=1024).plan()["unit_channels"] == 64
    small: Any = DEVICES["h200"] | {"l2": 1 << 20}
    assert call._replace(device=small).plan()["unit_channels"] == 64


def test_no_second_turn_for_a_few_blocks() -> None:
    """256 blocks that hold more each, rather than 512 on a device for 264."""
    plan = Call("channels_first", "bfloat16", 32, 64, 3136, "forward").plan()
    assert (plan["strategy"], plan["blocks"]) == ("cluster", 256)


def test_blocks_that_do_not_meet_fill_whole_turns() -> None:
    """264 blocks are at work at once: one turn of them for a small call, four for a large one."""
    call = Call("channels_first", "bfloat16", 32, 64, 3136, "eval", reduces=False)
    turns = {n: call._replace(n=n).plan()["blocks"] / 264 for n in (32, 1024)}
    assert 0.9 < turns[32] <= 1
    assert 3 < turns[1024] <= 4


# ---- prescribed fields --------------------------------------------------------------------------

FORCED: dict[str, list[Any]] = {
    "strategy": ["block", "cluster", "grid", "two_kernels", "single_pass"],
    "access": ["vector", "scalar"],
    "team": [1, 2, 3, 8, 9, 100, 100_000],
    "slots": [0, 1, 5, 1000],
    "unit_channels": [1, 8, 20, 512, 2048, 100_000],
    "units_at_once": [1, 2, 7, 1000],
    "stream_stores": [False, True],
}


def could_follow(call: Call, plan: _C.CudaPlan, strategy: str) -> bool:
    device = DEVICES[call.device]
    apart = not call.cumulative or plan["units"] == 1
    possible = {
        "block": apart,
        "cluster": apart and device["max_cluster"] > 1,
        "grid": device["cooperative"],
        "two_kernels": True,
        "single_pass": False,
    }
    return possible[strategy] if call.reduces else strategy == "single_pass"


def followed(call: Call, plan: _C.CudaPlan, forced: dict[str, Any]) -> dict[str, bool]:
    """Each field is as prescribed, or there is a reason why it is not."""
    free, device = call.plan(), DEVICES[call.device]
    too_large = plan["compulsory_bytes"] > device["l2"]
    rules = {"stream_stores": plan["stream_stores"] == forced.get("stream_stores", too_large)}
    if "strategy" in forced:
        wanted = forced["strategy"]
        rules["strategy"] = (plan["strategy"] == wanted) == could_follow(call, plan, wanted)
    if "access" in forced:
        rules["access"] = plan["access"] == forced["access"] or free["access"] == "scalar"
    if "team" in forced:
        held = resident_blocks(call, plan) // plan["units_at_once"]
        most = {"block": 1, "cluster": device["max_cluster"], "grid": held}
        rules["team"] = plan["team"] == min(forced["team"], most.get(plan["strategy"], THREADS))
    if "slots" in forced:
        rules["slots"] = plan["slots"] <= forced["slots"]
    if "unit_channels" in forced and not call.first:
        wanted = min(-(-forced["unit_channels"] // CELL) * CELL, call.c, THREADS * CELL)
        rules["unit_channels"] = plan["unit_channels"] == wanted or wanted > 256
    if "units_at_once" in forced and plan["strategy"] not in ("grid", "cluster"):
        rules["units_at_once"] = plan["units_at_once"] == min(
            forced["units_at_once"], plan["units"]
        )
    return rules


def check_forced(call: Call, forced: dict[str, Any]) -> None:
    plan = call.plan(**forced)
    assert violations(call, plan, forced=True) == [], (call, forced, plan)
    rules = followed(call, plan, forced)
    assert all(rules.values()), (call, forced, plan, rules)


def test_prescribed_fields_are_followed_or_left() -> None:
    random_ = random.Random(10)
    for call in random_calls(6000, seed=10):
        names = random_.sample(list(FORCED), random_.randint(1, len(FORCED)))
        check_forced(call, {name: random_.choice(FORCED[name]) for name in names})


SMALL = st.integers(1, 300)


@settings(max_examples=1500, deadline=None)
@given(
    st.randoms(use_true_random=False),
    SMALL,
    SMALL,
    SMALL,
    st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in FORCED.items()}),
)
def test_small_calls_with_prescribed_fields(
    random_: random.Random, n: int, c: int, s: int, forced: dict[str, Any]
) -> None:
    check_forced(call_of(random_, n, c, s), forced)


@pytest.mark.parametrize(("field", "values"), FORCED.items())
def test_each_field_alone(field: str, values: list[Any]) -> None:
    for value in values:
        for op, layout in itertools.product(OPS, LAYOUTS):
            call = Call(layout, "float32", 32, 96, 49, op, reduces=op != "eval")
            check_forced(call, {field: value})


def test_the_pages_tables_are_what_the_command_prints() -> None:
    """docs/cuda-kernels.md; after a change of the planner: python -m benchmarks predict."""
    page = (Path(__file__).parents[1] / "docs" / "cuda-kernels.md").read_text(encoding="utf-8")
    assert page.endswith(predict.report("bfloat16", 128, "h200") + "\n")


def test_the_pages_limits_are_those_of_the_plans() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cuda-kernels.md").read_text(encoding="utf-8")
    for name, device in DEVICES.items():
        call = Call("channels_first", "bfloat16", 1 << 16, 1024, 4096, "forward", name)
        plan = call.plan()
        held = plan["slots"] * THREADS * CELL * 2
        cluster = f"{8 * held >> 10} KiB" if device["max_cluster"] > 1 else ""
        cells = [str(plan["blocks"]), f"{held >> 10} KiB", cluster]
        cells.append(f"{plan['blocks'] * held / 1e6:.1f} MB")
        row = " | ".join(cells).replace("|  |", "| |")
        (line,) = (ln for ln in page.lower().splitlines() if ln.startswith(f"| {spaced(name)} |"))
        assert row.lower() in line, (row, line)


def spaced(name: str) -> str:
    return name.replace("rtx", "rtx ")
