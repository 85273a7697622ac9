"""What an experiment is: settings, one run of them, and what is said and drawn of the records.

A record is the settings of a run with what was measured added, all of it JSON. Tables, sentences
and figures are made from the records of a result file and nothing else.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, ClassVar

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.timing import Ratio, Stats

Settings = dict[str, Any]
Size = Mapping[str, Any]  # number of seeds and steps, rates: what makes a run quick or full
Steps = dict[str, dict[str, Callable[[], Any]]]  # by group and name
Table = tuple[list[str], list[list[str]]]  # heads, rows
ORDER_SEED = 0
WARM_UP_TURNS = 5


class Experiment(ABC):
    """One experiment; the subclass's docstring is not used, its texts are below."""

    name: ClassVar[str]  # on the command line and in file names
    title: ClassVar[str]
    method: ClassVar[str]  # what is run, for the page
    limits: ClassVar[str]  # what it does not show
    height: ClassVar[float] = 3.2  # of the figure, in inches; it is 9 wide
    sizes: ClassVar[Mapping[str, Size]]  # quick, full, and tiny for the tests

    @abstractmethod
    def runs(self, size: Size) -> list[Settings]:
        """The settings of every run; runs are independent of each other."""

    @abstractmethod
    def measure(self, settings: Settings, device: str) -> Settings:
        """Do one run: what is added to its record."""

    def timed(self, device: str, size: Size) -> Steps:
        """Groups of steps to be timed in turns, by the name of the group and of the step."""
        return {}

    @abstractmethod
    def table(self, result: dict[str, Any]) -> Table:
        """The numbers behind the sentence and the figure."""

    @abstractmethod
    def finding(self, result: dict[str, Any]) -> str:
        """One sentence of what it shows, made from the records."""

    @abstractmethod
    def draw(self, figure: Figure, result: dict[str, Any]) -> None:
        """The figure, made from the records."""

    def passed(self, result: dict[str, Any]) -> bool:
        """False where something is wrong with the package itself."""
        return True


def grid(**choices: Iterable[Any]) -> list[Settings]:
    """Settings of every combination; the last choice changes fastest."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def frame(result: dict[str, Any]) -> pd.DataFrame:
    """One line per run."""
    return pd.DataFrame(result["records"])


def cells(records: pd.DataFrame, keys: list[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Groups of the runs that agree in `keys`, in the order of the runs; by seed in each."""
    for key, group in records.groupby(keys, sort=False, dropna=False):
        yield key, group.sort_values("seed")


def one_cell(records: pd.DataFrame, **want: Any) -> pd.DataFrame:
    """The runs with these settings, by seed."""
    for key, value in want.items():
        records = records[records[key] == value]
    return records.sort_values("seed")


def take_turns(
    steps: Mapping[str, Callable[[], Any]], turns: int, device: str
) -> dict[str, dict[str, Any]]:
    """Seconds per call of each step, one after the other in random order."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(ORDER_SEED)
    for turn in range(WARM_UP_TURNS + turns):
        for name in order.sample(list(steps), len(steps)):
            wait()
            begin = time.perf_counter()
            steps[name]()
            wait()
            if turn >= WARM_UP_TURNS:
                samples[name].append(time.perf_counter() - begin)
    return {name: Stats.of(values).as_dict() for name, values in samples.items()}


def as_fast(ratio: Ratio) -> str:
    """A ratio of times in a sentence."""
    return f"{ratio} as fast" if ratio.decided else "no difference shown"


def speedup(timings: dict[str, dict[str, Any]], baseline: str, name: str) -> Ratio:
    """How many times as fast a step of `name` is as one of `baseline`."""
    return Ratio.of(Stats(**timings[baseline]), Stats(**timings[name]))
