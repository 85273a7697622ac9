"""The table of what is done, in order of worth. Whoever adds a step adds it here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import which

import setup_cuda
from benchmarks.gpu import launch, missing

ROOT = Path(__file__).resolve().parents[2]
#: Logs, and files that steps leave: what is kept of them is the archive of all.
WORK = ROOT / "build" / "gpu-check-work"
#: benchmarks.measure's, which loads torch.
INCOMPLETE = 3
#: What tells the steps' programs to take the emulated device, and the smallest setting.
EMULATED = {"BATCHNORM_EXT_EMULATED_CUDA": "1"}


@dataclass(frozen=True)
class Step:
    """A command with a time of its own. It runs beside the other steps of its stage."""

    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    tools: tuple[str, ...] = ()  # that have to be on PATH
    gpu: bool = False  # has no sense on the emulated device
    time_was_up: int | None = None  # the exit status that says so: no failure
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """The name of its log."""
        return f"{self.name.replace(' ', '-')}.log"

    def lacks(self) -> str:
        """What is not there, or nothing."""
        absent = [tool for tool in self.tools if which(tool) is None]
        if self.gpu and not missing.has_gpu():
            absent.append("GPU")
        return f"no {' and no '.join(absent)}" if absent else ""


def find_tools() -> None:
    """Puts the toolkit's programs on PATH, behind what is there: nvcc is found without it."""
    if toolkit := setup_cuda.find_toolkit():
        os.environ["PATH"] += f":{toolkit.home / 'bin'}"


def python(module: str, *arguments: str, again: bool = False) -> tuple[str, ...]:
    """The command of a module (launch.py). `again`: of one that works off a list (items.py)."""
    flags = [launch.AGAIN] if again else []
    return (sys.executable, "-u", "-m", launch.NAME, *flags, module, *arguments)


def _build(emulated: bool) -> list[Step]:
    compiled = (
        Step("build", python("benchmarks.gpu.emulated"), 900)
        if emulated
        else Step(
            "build",
            (sys.executable, "setup.py", "build_ext", "--inplace"),
            240,
            environment={"BATCHNORM_EXT_CUDA": "1"},
        )
    )
    return [
        compiled,
        Step("build checks", python("benchmarks.gpu.checks", "build"), 240),
        Step("build facts", python("benchmarks.gpu.facts", "build"), 60),
        Step("gpu", ("nvidia-smi",), 20, tools=("nvidia-smi",)),
        Step("environment", python("torch.utils.collect_env"), 60),
    ]


def _first_calls(cases: str) -> list[Step]:
    """Each strategy and layout in a process of its own: what breaks one leaves the others."""
    smoke = [
        Step(
            f"smoke {strategy} {layout}",
            python("benchmarks.gpu.smoke", strategy, layout, again=True),
            60,
        )
        for strategy in ("planned", "block", "cluster", "grid", "two_kernels")
        for layout in ("channels_first", "channels_last")
    ]
    return [
        *smoke,
        Step("device checks", python("benchmarks.gpu.checks", "run", cases), 60),
        Step("report", python("batchnorm_ext"), 30),
    ]


def _sanitized(tool: str, cases: str) -> Step:
    return Step(
        tool,
        (
            *("compute-sanitizer", "--tool", tool, "--target-processes", "all"),
            *("--error-exitcode", "7"),
            *python("benchmarks.gpu.checks", "run", cases),
        ),
        60,
        tools=("compute-sanitizer",),
        gpu=True,
    )


def table(emulated: bool) -> list[list[Step]]:
    """Stage after stage. `emulated`: the same, in the smallest setting that each step has."""
    results = str(WORK / "results")
    timings, tests = "benchmarks.gpu.timings", "benchmarks.gpu.tests"
    # Of the program that checks the kernels: every n-th case from the k-th on.
    cases, sanitized = ("0/2000", "0/2000") if emulated else ("0/1", "0/20")
    one_group = ("--op", "bn", "--layout", "channels_last", "--shape", "2x512x7x7")
    # With a limit of its own it writes what it has measured by then.
    lines = ("--limit", "100", "--lines", str(WORK / "benchmark.jsonl"))
    preset = ("smoke", *one_group) if emulated else ("gpu", "--device", "cuda", "--md")
    against_torch = ("train", "--experiment", "against-torch", "--device", "cuda")
    stages = [
        _build(emulated),
        _first_calls(cases),
        [Step("timings", python(timings, "plans", again=True), 75)],
        [Step("facts", python("benchmarks.gpu.facts", "run"), 30, gpu=True)],
        [Step("profile", python("benchmarks.gpu.profile"), 50, tools=("ncu",), gpu=True)],
        [Step("peers", python(timings, "peers", again=True), 50)],
        # Nothing is timed here.
        [
            Step("tests", python(tests, "first"), 90),
            _sanitized("memcheck", sanitized),
            _sanitized("racecheck", sanitized),
        ],
        [Step("cases", python(tests, "cases"), 100)],
        [Step("compiled peers", python(timings, "compiled", again=True), 75)],
        [Step("kernels", python("benchmarks", "kernels"), 45, gpu=True)],
        [
            Step(
                "benchmark",
                python("benchmarks", "run", "--output", results, "--preset", *preset, *lines),
                120,
                time_was_up=INCOMPLETE,
            )
        ],
        [Step("train", python("benchmarks", *against_torch, "--output", results), 60, gpu=True)],
    ]
    given = EMULATED if emulated else {}
    return [
        [replace(step, environment={**step.environment, **given}) for step in stage]
        for stage in stages
    ]


def only(stages: Sequence[Sequence[Step]], names: Sequence[str]) -> list[list[Step]]:
    """The steps whose names begin with one of these; all where none is given."""
    if not names:
        return [list(stage) for stage in stages]
    return [[step for step in stage if step.name.startswith(tuple(names))] for stage in stages]
