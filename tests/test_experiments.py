"""The training experiments: their sentences, and each of them from the command to the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import bench_extra  # noqa: F401  (skips where the extra is missing)
import pandas as pd
import pytest
import rotation
import torch
from bench_cases import invoke
from rotation import drawn
from torch import nn

from benchmarks import plots
from benchmarks.training import (
    against_torch,
    learning_rates,
    page,
    placement,
    run,
    tasks,
)
from benchmarks.training.faster_training import FasterTraining, chosen, steps_needed
from benchmarks.training.networks import FUSED, NONE, TORCH
from benchmarks.training.registry import EXPERIMENTS

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "why-batch-norm.md"


# --- faster training -------------------------------------------------------------------------


def speed_result(
    reached: dict[tuple[str, float], list[int | None]], task: str = "mlp"
) -> dict[str, Any]:
    """Runs of one task, copied to all: the steps to the target by way and rate, by seed."""
    records = [
        {"task": name, "way": way, "rate": rate, "seed": seed, "steps": 160, "reached": steps,
         "accuracies": [[80, 0.5], [160, 0.9]], "test_accuracy": 0.9}
        for name in tasks.TASKS
        for (way, rate), of_seeds in reached.items()
        if (name, way) != ("standardised", FUSED)
        for seed, steps in enumerate(of_seeds)
    ]  # fmt: skip
    step = {"median": 0.001, "q1": 0.001, "q3": 0.001, "minimum": 0.001, "rounds": 3, "calls": 1}
    timings = {name: {NONE: step, FUSED: step} for name in tasks.TASKS}
    return {"records": records, "timings": timings, "settings": {}}


def test_no_run_takes_part_in_choosing_its_rate() -> None:
    # Seed 0 alone is good at 0.3, seeds 1 and 2 at 0.1: seed 0 must be counted at 0.1.
    result = speed_result({(FUSED, 0.1): [90, 20, 20], (FUSED, 0.3): [5, 100, 100],
                           (NONE, 0.1): [1, 1, 1], (NONE, 0.3): [2, 2, 2]})  # fmt: skip
    runs = chosen(result, "mlp", FUSED)
    assert list(runs.seed) == [0, 1, 2]
    assert float(runs.rate.iloc[0]) == 0.1 and steps_needed(runs)[0] == 90


def test_an_unreached_target_counts_as_the_budget_and_is_said() -> None:
    result = speed_result({(FUSED, 0.1): [16, 32, 16], (NONE, 0.1): [None, 120, None]})
    assert steps_needed(chosen(result, "mlp", NONE)) == [160.0, 120.0, 160.0]
    heads, rows = FasterTraining().table(result)
    cells = next(row for row in rows if row[0].startswith("MLP, digits") and row[1] == "without")
    assert cells[heads.index("reached")] == "1 of 3"
    assert cells[heads.index("epochs to it")].startswith("≥ ")
    assert "at least" in FasterTraining().finding(result)


@pytest.mark.parametrize(
    ("with_", "without", "word"),
    [
        ([16, 17, 18], [64, 66, 65], "fewer"),
        ([64, 66, 65], [16, 17, 18], "more"),
        ([16, 64, 40], [40, 15, 66], "no difference shown"),
        ([16, 17, 18], [None, 158, None], "fewer"),
        # The budget is a lower bound: what did not get there is not called quicker.
        ([None, *[100] * 9], [None, *[159] * 9], "no difference shown"),
    ],
)
def test_the_sentence_follows_the_numbers(
    with_: list[int | None], without: list[int | None], word: str
) -> None:
    found = FasterTraining().finding(speed_result({(FUSED, 0.1): with_, (NONE, 0.1): without}))
    assert found.count(f", {word}") == 4, found


# --- learning rates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "text"),
    [
        ({0.1: 0.95, 1.0: 0.91, 10.0: 0.2}, "from 0.1 to 1 with batch norm"),
        ({0.1: 0.95, 1.0: 0.5, 10.0: 0.2}, "at 0.1 only with batch norm"),
        ({0.1: 0.5, 1.0: 0.5, 10.0: 0.2}, "at none of the rates with batch norm"),
    ],
)
def test_range_of_rates(accuracies: dict[float, float], text: str) -> None:
    records = [
        {"task": "mlp", "variant": variant, "rate": rate, "seed": seed, "test_accuracy": accuracy}
        for variant in learning_rates.STYLES
        for rate, accuracy in accuracies.items()
        for seed in range(2)
    ]
    assert text in EXPERIMENTS["learning-rates"].finding({"records": records})


# --- placement -------------------------------------------------------------------------------


def test_largest_difference_is_relative() -> None:
    pair = [torch.tensor([100.0, 1.0]), torch.tensor([0.01])]
    other = [torch.tensor([101.0, 1.0]), torch.tensor([0.0102])]
    assert placement.largest_difference(pair, other) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(("difference", "passed"), [(1e-5, True), (1e-3, False), (math.nan, False)])
def test_fused_must_give_the_same_numbers(difference: float, passed: bool) -> None:
    records = [{"fused_difference": value} for value in (None, 0.0, difference)]
    if math.isnan(difference):
        records = [{"fused_difference": difference}]
    assert EXPERIMENTS["placement"].passed({"records": records}) is passed


# --- against torch ---------------------------------------------------------------------------


def torch_runs(loss: float, accuracy: float, rounding: float = 0.0) -> pd.DataFrame:
    """Four seeds; torch's test losses have a standard deviation of 0.00816."""
    own: list[dict[str, Any]] = [
        {"task": "mlp", "variant": TORCH, "seed": seed, "test_loss": own, "accuracy": 0.98,
         "test_images": 360}
        for seed, own in enumerate((0.04, 0.05, 0.05, 0.06))
    ]  # fmt: skip

    def others(name: str, loss: float, accuracy: float) -> list[dict[str, Any]]:
        return [
            {**run, "variant": name, "test_loss": run["test_loss"] + loss, "accuracy": accuracy}
            for run in own
        ]

    return pd.DataFrame(
        own + others(FUSED, loss, accuracy) + others(against_torch.CONTROL, rounding, 0.98)
    )


@pytest.mark.parametrize(
    ("loss", "accuracy", "rounding", "equal"),
    [
        # the noise of a mean of four is half of the seeds' deviation, three times that passes
        (0.0122, 0.98, 0.0, True),
        (-0.0123, 0.98, 0.0, False),
        (0.0123, 0.98, 0.01, True),  # a rounding alone changes that much
        (0.0, 0.97, 0.0, True),
        (0.0, 0.968, 0.0, False),  # 360 images at 98 % have a sampling error of 0.74 %
        (math.nan, 0.98, 0.0, False),
    ],
)
def test_equal_is_judged_by_the_noise(
    loss: float, accuracy: float, rounding: float, equal: bool
) -> None:
    runs = torch_runs(loss, accuracy, rounding)
    assert against_torch.judge(runs, "mlp", FUSED)["equal"] is equal


def test_control_is_one_rounding_off() -> None:
    own, control = (
        against_torch.make_model("cnn", name, 0).state_dict()
        for name in (TORCH, against_torch.CONTROL)
    )
    weight, moved = own["head.weight"], control["head.weight"]
    assert not torch.equal(weight, moved)
    assert torch.equal(torch.nextafter(weight, torch.tensor(math.inf)), moved)


def test_converted_network_is_ours() -> None:
    model = against_torch.make_model("transformer", against_torch.CONVERTED, 0)
    kinds = {type(m).__module__ for m in model.modules() if isinstance(m, nn.BatchNorm1d)}
    assert kinds == {"batchnorm_ext.modules"}


# --- each experiment, from the command to the page --------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called quick is tiny; everything in this process."""
    for experiment in EXPERIMENTS.values():
        monkeypatch.setattr(
            type(experiment), "sizes", {**experiment.sizes, "quick": experiment.sizes["tiny"]}
        )
    monkeypatch.setattr(run, "workers", lambda device: 1)


@pytest.mark.parametrize("name", drawn(rotation.EXPERIMENTS, [[name] for name in EXPERIMENTS]))
def test_experiment_in_a_tiny_form(name: str, tiny: None, tmp_path: Path) -> None:
    written = tmp_path / "page.md"
    options = ["--experiment", name, "--output", str(tmp_path), "--page", str(written)]
    found = invoke("train", *options)
    assert found.exit_code == 0, found.output
    (file,) = tmp_path.glob(f"*-train-{name}-quick.json")
    result = page.read(file)
    experiment = EXPERIMENTS[name]
    expected = experiment.runs(experiment.sizes["tiny"])
    assert [{k: r[k] for k in e} for e, r in zip(expected, result["records"], strict=True)] == (
        json.loads(json.dumps(expected))
    )
    for ending in (".png", ".svg"):
        assert file.with_suffix(ending).stat().st_size > 5000
    assert experiment.title in file.with_suffix(".txt").read_text()
    assert plots.plt.get_fignums() == []
    heads, rows = experiment.table(result)
    assert rows and all(len(row) == len(heads) for row in rows)
    text = written.read_text()
    assert text == page.make([file], written)
    for part in (
        experiment.title,
        experiment.finding(result),
        experiment.limits,
        f"{file.stem}.png",
    ):
        assert part in text
    assert re.search(r"\d", experiment.finding(result))
    assert page.command("quick", name) in text


def test_workers_give_the_same_records(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = EXPERIMENTS["gradient-flow"]
    runs = experiment.runs(experiment.sizes["tiny"])[:3]
    records = []
    for count in (1, 2):
        monkeypatch.setattr(run, "workers", lambda device, count=count: count)
        records.append(list(run._records(experiment, runs, "cpu")))
    assert records[0] == records[1]


def test_a_failure_of_the_package_is_the_exit_status(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "TOLERANCE", -1.0)
    found = invoke("train", "--experiment", "placement", "--output", str(tmp_path))
    assert found.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--experiment", "magic"], "'magic' is not one of all, faster-training"),
        (["--device", "tpu"], "'tpu' is not one of auto, cpu, cuda"),
        (["--page", "/nowhere/page.md"], "there is no folder /nowhere"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], text: str) -> None:
    found = invoke("train", *arguments)
    assert found.exit_code == 2
    assert text in re.sub(r"[\s│]+", " ", found.output)


def test_page_refuses_another_file(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"cases": []}')
    with pytest.raises(ValueError, match="not a result file of `python -m benchmarks train`"):
        page.make([other], tmp_path / "page.md")


def test_page_is_made_from_its_result_files() -> None:
    text = PAGE.read_text()
    files = [PAGE.parent / link for link in re.findall(r"\[result file\]\((.*?)\)", text)]
    assert len(files) == len(EXPERIMENTS)
    assert page.make(files, PAGE) == text
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        figure = PAGE.parent / link
        assert figure.exists() and figure.with_suffix(".svg").exists()
