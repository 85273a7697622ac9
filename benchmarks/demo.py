"""Does it train the same, and faster? A small residual CNN on real images, three ways.

The network is trained on scikit-learn's 8x8 digits with torch's batch norm and ReLU, with the same
model after `convert_batchnorm`, and with fused `BatchNormAct2d` modules: from the same seed, the
same initial weights, the same order of batches. Only rounding differs, but training magnifies that:
after some dozen steps two runs are as far apart as if more had changed. So there is a fourth run
per seed, the control: torch's own model with every initial weight moved to the next float.
"""

from __future__ import annotations

import datetime
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import batchnorm_ext
from benchmarks import demo_report, environment, results
from benchmarks.report import make_console
from benchmarks.timing import Ratio, Stats

VARIANTS = ("torch", "converted", "fused")
CONTROL = "control"
CHANNELS = (16, 32)
THREADS = 1  # more of them mostly wait for each other on planes of 8x8
BATCH = 64
TEST_SHARE = 0.2
SPLIT_SEED = 0
LEARNING_RATE = 0.05
# A mean difference over the seeds passes up to this many of its own standard errors.
STANDARD_ERRORS = 3.0
TIMED_STEPS = 100
WARM_UP_STEPS = 3


def _norm_act(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """act(BN(x) + residual): one module where it is fused, separate ops in place where not."""
    if isinstance(norm, batchnorm_ext.BatchNormAct2d):
        return norm(x, residual)
    y = norm(x)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""
        y = _norm_act(self.norm1, self.conv1(x))
        return _norm_act(self.norm2, self.conv2(y), self.shortcut(x))


class Network(nn.Module):
    """Stem, four residual blocks, mean over the plane, one linear layer."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        narrow, wide = CHANNELS
        self.stem = nn.Conv2d(1, narrow, 3, 1, 1, bias=False)
        self.norm = norm(narrow)
        self.blocks = nn.Sequential(
            Block(narrow, narrow, 1, norm),
            Block(narrow, narrow, 1, norm),
            Block(narrow, wide, 2, norm),
            Block(wide, wide, 1, norm),
        )
        self.head = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        y = self.blocks(_norm_act(self.norm, self.stem(x)))
        return self.head(y.mean((2, 3)))


def make_model(variant: str, seed: int) -> nn.Module:
    """The network with torch's batch norm and the weights of `seed`, then turned into `variant`."""
    torch.manual_seed(seed)
    model = Network()
    if variant == "converted":
        return batchnorm_ext.convert_batchnorm(model)
    if variant == "fused":
        fused = Network(batchnorm_ext.BatchNormAct2d)
        fused.load_state_dict(model.state_dict())
        return fused
    if variant == CONTROL:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, math.inf)))
    return model


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; the split is always the same."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    indices = list(range(len(targets)))
    train, test = train_test_split(
        indices, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=labels
    )
    return pixels[train], targets[train], pixels[test], targets[test]


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    return iter(order.split(BATCH)[: count // BATCH])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.item()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)


def train(variant: str, seed: int, epochs: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Train one model; the loss of every step, and loss and accuracy on the test images."""
    images, labels, test_images, test_labels = data
    model = make_model(variant, seed).train()
    optimizer = _optimizer(model)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        for batch in _batches(len(images), generator):
            losses.append(_step(model, optimizer, images[batch], labels[batch]))
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = model(test_images)
    return {
        "variant": variant,
        "seed": seed,
        "losses": [round(loss, 6) for loss in losses],
        "test_loss": F.cross_entropy(logits, test_labels).item(),
        "accuracy": (logits.argmax(1) == test_labels).double().mean().item(),
        "test_images": len(test_labels),
    }


def time_steps(data: tuple[Tensor, ...]) -> dict[str, Stats]:
    """Seconds per training step; the three models take turns on the same batches."""
    images, labels = data[:2]
    models = {variant: make_model(variant, 0).train() for variant in VARIANTS}
    optimizers = {variant: _optimizer(model) for variant, model in models.items()}
    samples: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order = random.Random(0)
    for turn in range(WARM_UP_STEPS + TIMED_STEPS):
        start = turn * BATCH % (len(images) - BATCH)
        x, target = images[start : start + BATCH], labels[start : start + BATCH]
        for variant in order.sample(VARIANTS, len(VARIANTS)):
            begin = time.perf_counter()
            _step(models[variant], optimizers[variant], x, target)
            if turn >= WARM_UP_STEPS:
                samples[variant].append(time.perf_counter() - begin)
    return {variant: Stats.of(values) for variant, values in samples.items()}


def _differences(runs: list[dict[str, Any]], variant: str, figure: str) -> list[float]:
    """`figure` of `variant` minus torch's at the same seed."""
    own = {run["seed"]: run[figure] for run in runs if run["variant"] == "torch"}
    return [run[figure] - own[run["seed"]] for run in runs if run["variant"] == variant]


def _noise(runs: list[dict[str, Any]], figure: str) -> float:
    """How much `figure` differs between runs that are equal for all that matters.

    The largest of: what a rounding changes (control against torch, root mean square), what a seed
    changes (standard deviation of torch's runs), and for the accuracy the sampling error of that
    many test images, since a few runs can agree by chance.
    """
    own = [run for run in runs if run["variant"] == "torch"]
    values = [run[figure] for run in own]
    rounding = math.sqrt(statistics.fmean(d * d for d in _differences(runs, CONTROL, figure)))
    noise = max(rounding, statistics.stdev(values))
    if figure == "accuracy":
        mean = statistics.fmean(values)
        noise = max(noise, math.sqrt(mean * (1 - mean) / own[0]["test_images"]))
    return noise


def judge(runs: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    """Whether `variant` trains like torch: mean difference over the seeds against its noise."""
    verdict: dict[str, Any] = {"variant": variant, "equal": True}
    for figure in ("test_loss", "accuracy"):
        differences = _differences(runs, variant, figure)
        difference = statistics.fmean(differences)
        noise = _noise(runs, figure) / math.sqrt(len(differences))
        verdict[figure] = {"difference": difference, "noise": noise}
        # Not "> limit": a nan from diverged training must not pass.
        within = abs(difference) <= STANDARD_ERRORS * noise
        verdict["equal"] = bool(verdict["equal"] and within)
    return verdict


def run(epochs: int, seeds: int, output: Path | None) -> int:
    """Train, time, report, draw; the exit status: 1 where a model is not equal within noise."""
    console = make_console()
    torch.set_num_threads(THREADS)
    data = load_data()
    console.print(
        f"{len(data[0])} training and {len(data[2])} test images of 8x8 (scikit-learn's digits), "
        f"{epochs} epochs, {seeds} seeds, batches of {BATCH}, {THREADS} thread",
        highlight=False,
    )
    timings = time_steps(data)
    variants = (*VARIANTS, CONTROL)
    runs = [train(v, seed, epochs, data) for seed in range(seeds) for v in variants]
    result: dict[str, Any] = {
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": environment.git_state(),
        "environment": environment.collect(),
        "runs": runs,
        "verdicts": [judge(runs, variant) for variant in VARIANTS[1:]],
        "step_time": {variant: stats.as_dict() for variant, stats in timings.items()},
        "speedup": {
            variant: {"ratio": ratio.value, "decided": ratio.decided}
            for variant in VARIANTS[1:]
            for ratio in (Ratio.of(timings["torch"], timings[variant]),)
        },
    }
    demo_report.show(result, console)
    name = f"{environment.device_slug(result['environment'])}-{result['created'][:10]}-demo"
    stem = results.free_stem(output or results.RESULTS, name, (".json", ".png", ".svg"))
    for path in (results.write_json(result, Path(f"{stem}.json")), *demo_report.draw(result, stem)):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return 0 if all(verdict["equal"] for verdict in result["verdicts"]) else 1
