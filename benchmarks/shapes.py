"""What is measured: the shapes, the presets, and the cases that a preset expands to.

No torch here: the command line reads the choices from this page before torch is loaded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("channels_first", "channels_last")
OPS = ("bn", "bn_relu", "bn_add_relu")
DIRECTIONS = ("forward", "backward", "eval")
MODES = {"train": ("forward", "backward"), "eval": ("eval",)}
BASELINES = ("eager", "cudnn_off", "compile")


@dataclass(frozen=True)
class Shape:
    """One input: `sizes` is (N, C, *spatial), `family` the network it is taken from."""

    family: str
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The sizes joined by x: 32x64x56x56."""
        return "x".join(map(str, self.sizes))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that differ in memory: with one value per channel and row there is one."""
        return LAYOUTS if math.prod(self.sizes[2:]) > 1 else ("channels_last",)


def _images(family: str, batch: int, planes: Iterable[tuple[int, int]]) -> list[Shape]:
    return [Shape(family, (batch, channels, side, side)) for channels, side in planes]


RESNET50_PLANES = (
    # (channels, side) of the 12 distinct batch norms of a ResNet-50 on 224x224 images.
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)
EFFICIENTNET_B0_PLANES = (
    *((32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28), (40, 28)),
    *((240, 28), (240, 14), (80, 14), (480, 14), (112, 14), (672, 14), (672, 7), (192, 7)),
    *((1152, 7), (320, 7), (1280, 7)),
)
CONVNEXT_PLANES = ((96, 56), (192, 28), (384, 14), (768, 7))
UNET_PLANES = ((64, 256), (128, 128), (256, 64), (512, 32), (1024, 16))

RESNET50 = _images("resnet50", 32, RESNET50_PLANES)
EFFICIENTNET_B0 = _images("efficientnet_b0", 16, EFFICIENTNET_B0_PLANES)
CONVNEXT = _images("convnext", 32, CONVNEXT_PLANES)
UNET = _images("unet", 2, UNET_PLANES)
ONE_D = [
    Shape("batchnorm1d", sizes)
    for sizes in ((1_000_000, 16), (100_000, 64), (4096, 1024), (256, 512), (32, 256, 400))
]
VOLUMES = [Shape("volume", (2, 32, 16, 64, 64))]
EDGES = [
    Shape("edge", sizes)
    for sizes in (
        (32, 3, 64, 64),
        (32, 17, 28, 28),
        (64, 256, 1, 1),
        (1, 64, 56, 56),
        (2, 512, 7, 7),
        (1, 3, 2048, 2048),
    )
]
CATALOGUE = [*RESNET50, *EFFICIENTNET_B0, *CONVNEXT, *UNET, *ONE_D, *VOLUMES, *EDGES]


def find_shape(text: str) -> Shape:
    """The shape that `text` (32x64x56x56, or 256x512 for two dimensions) names."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1:
        raise ValueError(f"--shape: expected 2 to 5 positive sizes such as 32x64x56x56, got {text}")
    if math.prod(sizes) == sizes[1]:
        raise ValueError(f"--shape: training needs more than one value per channel, got {text}")
    known = (shape for shape in CATALOGUE if shape.sizes == sizes)
    return next(known, Shape("custom", sizes))


@dataclass(frozen=True)
class Group:
    """The cases that share their tensors, modules and correctness check."""

    shape: Shape
    layout: str
    dtype: str
    op: str
    threads: int
    directions: tuple[str, ...] = DIRECTIONS
    baselines: tuple[str, ...] = ("eager",)
    device: str = "cpu"

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        parts = [self.shape.name, self.layout, self.dtype, self.op, where]
        if self.directions != DIRECTIONS:
            parts.append(",".join(self.directions))
        return " ".join(parts)


@dataclass(frozen=True)
class Block:
    """A product of shapes and choices; a preset is a list of these."""

    shapes: Sequence[Shape]
    layouts: tuple[str, ...] = LAYOUTS
    dtypes: tuple[str, ...] = ("float32",)
    ops: tuple[str, ...] = OPS
    directions: tuple[str, ...] = DIRECTIONS
    baselines: tuple[str, ...] = ("eager",)

    def groups(self, threads: Sequence[int]) -> Iterator[Group]:
        """Every group of the product, in the order in which it is measured."""
        for count in threads:
            for shape in self.shapes:
                for dtype in self.dtypes:
                    for layout in (x for x in self.layouts if x in shape.layouts):
                        for op in self.ops:
                            yield Group(
                                *(shape, layout, dtype, op, count, self.directions, self.baselines)
                            )


# With fewer rounds the quartiles of two equal candidates lie apart too often: in 21 % of draws with
# 5 rounds, 8 % with 7, 2.3 % with 11, 0.2 % with 21 (simulated, see tests/test_benchmarks.py).
FEWEST_ROUNDS = 11


@dataclass(frozen=True)
class Preset:
    """Blocks, and how long to stay with them.

    `budget_s` is the time to spend on checking and timing the groups: what is left of it is
    shared out over the groups that are left, between `rounds[0]` and `rounds[1]` rounds each. A
    slow machine still gets the minimum, so the budget bends before the quartiles lose their sense.
    After `limit_s` the groups that are left are skipped, and named in the result.
    """

    blocks: Sequence[Block]
    budget_s: float
    rounds: tuple[int, int]
    host_rounds: int
    limit_s: float = math.inf
    all_thread_counts: bool = False


# The quick preset's own batch sizes: _LARGE just exceeds a 32 MB last-level cache, the others are
# what a small machine trains with.
_LARGE = _images("resnet50", 12, ((64, 112),))
_QUICK = [
    *_images("resnet50", 4, ((256, 56), (512, 28))),
    *_images("resnet50", 8, ((256, 14), (512, 7))),
    *_images("unet", 1, ((64, 128),)),
]
_QUICK_1D = [Shape("batchnorm1d", (50_000, 64))]
_SMOKE = [Shape("edge", (2, 512, 7, 7)), Shape("edge", (32, 17, 28, 28))]


def drawn_blocks(count: int, seed: int = 0) -> list[Block]:
    """Single groups by chance, of 4 K to 4 M elements: sizes that no network has, and that no
    threshold was chosen by. The same for a seed."""
    draw = random.Random(seed)

    def size(powers: int) -> int:
        return draw.choice((draw.randint(1, 70), 2 ** draw.randint(0, powers)))

    blocks: list[Block] = []
    while len(blocks) < count:
        height = size(7)
        shape = Shape("drawn", (size(9), size(11), height, draw.choice((height, 1, size(6)))))
        choices = tuple((draw.choice(c),) for c in (shape.layouts, DTYPES[:3], OPS))
        values = shape.numel // shape.sizes[1]
        if 2**12 <= shape.numel <= 2**22 and values > 1:
            layouts, dtypes, ops = choices
            blocks.append(Block([shape], layouts, dtypes, ops))
    return blocks


# A GPU's batch size: ResNet-50 as it is trained, and what lies at the edges. torch.compile takes
# longest, so it comes last; its groups are others, since no group is measured twice.
_GPU = _images("resnet50", 128, RESNET50_PLANES)
_GPU_EDGES = [*ONE_D[:4], *EDGES]
_GPU_COMPILED = _images("resnet50", 64, [RESNET50_PLANES[i] for i in (1, 7, 10)])
_ON_CUDA = ("eager", "cudnn_off")
_TRAIN = MODES["train"]
_COMPILED = [RESNET50[1], RESNET50[7], RESNET50[10]]

PRESETS = {
    "smoke": Preset(
        [Block(_SMOKE)], budget_s=3.0, rounds=(FEWEST_ROUNDS, 11), host_rounds=5, limit_s=8.0
    ),
    "quick": Preset(
        [
            Block(_QUICK),
            Block(_QUICK_1D),
            Block(_QUICK[:4], dtypes=("bfloat16",), ops=("bn",)),
            Block(_LARGE, ops=("bn",), directions=("forward", "backward")),  # the slowest
        ],
        budget_s=32.0,
        rounds=(FEWEST_ROUNDS, 31),
        host_rounds=15,
        limit_s=42.0,
    ),
    "resnet50": Preset(
        [Block(RESNET50, dtypes=("float32", "bfloat16"))],
        budget_s=480.0,
        rounds=(15, 41),
        host_rounds=31,
        all_thread_counts=True,
    ),
    "drawn": Preset(drawn_blocks(250), budget_s=200.0, rounds=(FEWEST_ROUNDS, 31), host_rounds=15),
    "gpu": Preset(
        [
            # By value: whatever ends the run, the first blocks are what it should have measured.
            Block(_GPU, dtypes=("bfloat16",), ops=("bn", "bn_relu"), directions=_TRAIN),
            Block(_GPU, dtypes=("bfloat16",), ops=("bn_add_relu",), directions=_TRAIN),
            Block(_GPU, dtypes=("float16", "float32"), ops=("bn",), baselines=_ON_CUDA),
            Block(_GPU_EDGES, dtypes=("bfloat16", "float32"), ops=("bn",), baselines=_ON_CUDA),
            Block(_GPU, dtypes=("bfloat16",), directions=MODES["eval"]),
            Block(_GPU_COMPILED, dtypes=("bfloat16",), baselines=BASELINES),
        ],
        budget_s=150.0,
        rounds=(FEWEST_ROUNDS, 31),
        host_rounds=15,
        limit_s=210.0,
    ),
    "full": Preset(
        [
            Block(CATALOGUE, dtypes=("float32", "bfloat16")),
            Block(RESNET50, dtypes=("float16",), ops=("bn",)),
            Block(_COMPILED, baselines=("eager", "compile")),
        ],
        budget_s=2400.0,
        rounds=(15, 41),
        host_rounds=31,
        all_thread_counts=True,
    ),
}


@dataclass(frozen=True)
class Selection:
    """What the options of the command line narrow a preset to; empty means as the preset says."""

    shapes: tuple[Shape, ...] = ()
    layouts: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    device: str = "cpu"

    def blocks(self, preset: Preset) -> list[Block]:
        """The preset's blocks with the options put in; one block where shapes are named."""
        names = ("shapes", "layouts", "dtypes", "ops", "directions", "baselines")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        blocks = preset.blocks[:1] if self.shapes else preset.blocks
        return [replace(block, **given) for block in blocks]

    def groups(self, preset: Preset, threads: Sequence[int]) -> list[Group]:
        """The groups to measure, each once: options can make two blocks of a preset the same."""
        every = (
            replace(group, device=self.device)
            for block in self.blocks(preset)
            for group in block.groups(threads)
        )
        widest: dict[tuple[object, ...], Group] = {}
        for group in every:
            what = (group.shape.sizes, group.layout, group.dtype, group.op)
            key = (*what, group.directions, group.threads)
            if key not in widest or len(group.baselines) > len(widest[key].baselines):
                widest[key] = group
        return list(widest.values())
