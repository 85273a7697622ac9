"""Times of the operators by the plan and by every other, or of modules beside torch's.

    python -m benchmarks.gpu.timings plans       the operators, whose plan is left alone or forced
    python -m benchmarks.gpu.timings peers       modules: ours, eager torch, torch without cuDNN
    python -m benchmarks.gpu.timings compiled    ours and torch.compile, of a few cases

Each case is checked first, then timed beside a copy of the bytes that it has to move at least, the
candidates in turns. A line for each of them, as soon as it is there.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import candidates, graphs, shapes, traffic
from benchmarks.gpu import device, emulated, items, journal
from benchmarks.gpu.tensors import Sample, Samples
from benchmarks.timing import Stats

#: Of a case, with the first calls of its candidates.
LIMIT_S = {"plans": 20.0, "peers": 20.0, "compiled": 60.0}
ROUNDS = 3 if emulated.WANTED else 9
COPY = "copy"
#: What is forced of the plan. Where that makes no other plan, it is not timed again.
PLANS: dict[str, dict[str, Any]] = {
    "planned": {},
    "two_kernels": {"strategy": "two_kernels"},
    "streaming": {"stream_stores": True},
    "ordinary": {"stream_stores": False},
    "block": {"strategy": "block"},
    "cluster": {"strategy": "cluster"},
    "grid": {"strategy": "grid"},
}
#: What is compared, and whether by modules.
MODULES = {"peers": ("ours", "eager", "cudnn_off"), "compiled": ("ours", "compile")}
TRAINING = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    shape: shapes.Shape
    layout: str
    dtype: str
    op: str
    direction: str

    def __str__(self) -> str:
        return f"{self.shape.name} {self.layout} {self.dtype} {self.op} {self.direction}"

    @property
    def bytes(self) -> int:
        """That it has to move at least."""
        itemsize = getattr(torch, self.dtype).itemsize
        return traffic.compulsory_bytes(self.op, self.direction, self.shape.numel, itemsize)

    @property
    def fields(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "shape": self.shape.name,
            "layout": self.layout,
            "dtype": self.dtype,
            "op": self.op,
            "direction": self.direction,
            "bytes": self.bytes,
        }


def _product(
    some: Iterable[shapes.Shape],
    op: str = "bn_relu",
    dtype: str = "bfloat16",
    directions: Iterable[str] = TRAINING,
) -> Iterator[Case]:
    for shape in some:
        for layout in shape.layouts:
            for direction in directions:
                yield Case(shape, layout, dtype, op, direction)


def _resnet50(batch: int) -> list[shapes.Shape]:
    return [
        shapes.Shape("resnet50", (batch, channels, side, side))
        for channels, side in shapes.RESNET50_PLANES
    ]


def cases(what: str) -> list[Case]:
    """In order of worth."""
    if emulated.WANTED:
        return list(_product([shapes.Shape("edge", (2, 16, 5, 4))], directions=shapes.DIRECTIONS))
    large, small = _resnet50(128), _resnet50(32)
    if what == "compiled":
        return list(_product([large[1], large[7], large[10]]))
    ends = [shape for shape in large if shape.sizes[1] in (256, 512, 1024, 2048)]
    edges = [*shapes.ONE_D[:4], *shapes.EDGES]
    found = [
        *_product(large),
        *_product(edges, "bn"),
        *_product(ends, "bn_add_relu"),
        *_product(large, "bn", "float32"),
        *_product(small),
        *_product(large, directions=("eval",)),
        *_product(edges, "bn", "float32"),
        *_product(large, "bn", "float16"),
    ]
    return list(dict.fromkeys(found))


class Timings:
    """Works on the cases of one command."""

    def __init__(self, here: device.Emulated | device.Gpu, what: str) -> None:
        self.here, self.what = here, what
        self.samples = Samples(here.name)
        self.lines = journal.Journal.of_the_check()

    def measure(self, case: Case) -> None:
        """Check it, time it, write it down."""
        with self.here.at_work():
            count = graphs.sets_needed(case.bytes, self.here.cache_bytes)
            sets = [
                self.samples.of(case.shape.sizes, case.layout, case.dtype, case.op, seed)
                for seed in range(2 if emulated.WANTED else count)
            ]
            prepared, facts = (
                self._modules(case, sets) if self.what in MODULES else self._plans(case, sets)
            )
            prepared[COPY] = self.here.prepare(
                [self._copy(case, seed) for seed in range(len(sets))]
            )
            stats = in_turns(prepared)
        for name, found in stats.items():
            times = {key: value for key, value in found.as_dict().items() if key != "calls"}
            self.lines.write(
                "timing",
                what=self.what,
                candidate=name,
                **case.fields,
                **times,
                of_copy=round(stats[COPY].median / found.median, 4),
                **facts.get(name, {}),
            )

    def _failed(self, case: Case, name: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(f"{case} {name}: {why}", flush=True)
        self.lines.write("untimed", what=self.what, candidate=name, **case.fields, why=why)
        self.here.synchronize()  # raises where the device is lost

    def _copy(self, case: Case, seed: int) -> Callable[[], object]:
        source = self.samples.words(case.bytes // 2, seed)
        return functools.partial(torch.empty_like(source).copy_, source)

    # ---- operators ---------------------------------------------------------------------------

    def _plans(
        self, case: Case, sets: list[Sample]
    ) -> tuple[dict[str, device.Timed], dict[str, dict[str, Any]]]:
        prepared: dict[str, device.Timed] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, fields in PLANS.items():
            plan = self._plan(case, sets[0], fields)
            if plan and plan in [each.get("plan") for each in facts.values()]:
                continue
            try:
                with device.forced(fields):
                    error = sets[0].error(case.direction)
                    prepared[name] = self.here.prepare([s.call(case.direction) for s in sets])
            except Exception as failure:
                self._failed(case, name, failure)
                continue
            facts[name] = {"plan": plan, "error": error}
            if error > 1:
                self.lines.write(
                    "wrong", what=self.what, candidate=name, **case.fields, error=error
                )
                print(f"{case} {name}: WRONG, {error:.3g} times the bound", flush=True)
        return prepared, facts

    def _plan(self, case: Case, sample: Sample, fields: Mapping[str, Any]) -> dict[str, Any]:
        if self.here.limits is None:
            return {}
        return sample.plan(case.direction, self.here.limits, fields)

    # ---- modules -----------------------------------------------------------------------------

    def _modules(
        self, case: Case, sets: list[Sample]
    ) -> tuple[dict[str, device.Timed], dict[str, dict[str, Any]]]:
        group = shapes.Group(case.shape, case.layout, case.dtype, case.op, 1, device=self.here.name)
        prepared: dict[str, device.Timed] = {}
        for name in MODULES[self.what]:
            try:
                calls = [candidates.make_calls(name, group, sample.data()) for sample in sets]
                steps = [getattr(each, case.direction) for each in calls]
                with torch.set_grad_enabled(case.direction != "eval"):
                    prepared[name] = self.here.prepare(steps)
            except Exception as failure:
                self._failed(case, name, failure)
        return prepared, {}


def in_turns(prepared: Mapping[str, device.Timed]) -> dict[str, Stats]:
    """Each once in a round, the order drawn anew: a disturbance meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(prepared), len(prepared)):
            samples[name].append(prepared[name]())
    return {name: Stats.of(times) for name, times in samples.items()}


def main() -> int:
    """The exit status."""
    (what,) = sys.argv[1:]
    here = device.here()
    timings = Timings(here, what)
    timings.lines.write("device", what=what, **here.describe())
    work = {str(case): functools.partial(timings.measure, case) for case in cases(what)}
    return items.work_off(work, LIMIT_S[what], here.synchronize)


if __name__ == "__main__":
    raise SystemExit(main())
