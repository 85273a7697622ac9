"""What a person sees of the benchmarks: few lines, tables with nothing cut off, a picture."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import invoke
from rich.console import Console

from benchmarks import environment, goals, measure, overview, plots, report, results, shapes
from benchmarks.console import WIDEST, make_console, show, simple_table
from benchmarks.training import run as training
from benchmarks.training.against_torch import AgainstTorch
from benchmarks.training.registry import EXPERIMENTS

pytestmark = pytest.mark.usefixtures("one_thread")

STORED = results.RESULTS / "cpu-intel-xeon-2026-11-24-quick.json"
TRAINED = sorted(results.RESULTS.glob("*-train-*-full.json"))
CUT = "\N{HORIZONTAL ELLIPSIS}"  # what rich puts where a cell has no room


def trained(name: str) -> dict[str, Any]:
    """A stored result of a training experiment."""
    (path,) = (path for path in TRAINED if f"-train-{name}-" in path.name)
    found: dict[str, Any] = json.loads(path.read_text())
    return {**found, "settings": {**found["settings"], "size": "quick"}}


@pytest.fixture
def training_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "run_one", lambda *_: trained("against-torch"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick preset measures one small shape."""
    block = shapes.Block([shapes.find_shape("4x8x5x5")])
    quick = dataclasses.replace(
        shapes.PRESETS["quick"], blocks=[block], budget_s=0.1, host_rounds=5
    )
    monkeypatch.setitem(shapes.PRESETS, "quick", quick)


# --- the overview ----------------------------------------------------------------------------


def test_a_dozen_lines_and_the_rest_in_files(
    small: None,
    training_is_stored: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overview, "show_warnings", lambda *_: None)  # of other tests' load
    found = invoke("overview", "--output", str(tmp_path / "results"))
    assert found.exit_code == 0, found.output
    assert len(found.output.splitlines()) <= 18, found.output
    assert max(map(len, found.output.splitlines())) <= 120
    where = (environment.device_name(environment.collect()), "1 thread", torch.__version__)
    for text in (*where, environment.extension()["cpu_capability"]):
        assert text in found.output
    for layout in ("channels-first", "channels-last"):
        assert len(re.findall(rf"{layout}( +[\d.]+x \([\d.]+x\)){{3}}", found.output)) == 2
    text = " ".join(found.output.split())
    assert "Training is equal to torch's within noise" in text
    assert re.search(r"residual CNN (~|[\d.]+x) and (~|[\d.]+x)", text)
    assert re.search(r"^Next: \S*python\S* examples/fuse_resnet.py", found.output, re.MULTILINE)
    assert not re.search(rf"goal|reached|{CUT}", found.output)
    (picture,) = re.findall(r"^Picture: (results/.*-speedup\.png)$", found.output, re.MULTILINE)
    assert Path(picture).stat().st_size > 5000
    (tables,) = re.findall(r"^All tables: (results/.*)$", found.output, re.MULTILINE)
    for title in ("Times as fast, over the shapes", "4x8x5x5", "Does it train like nn.BatchNorm?"):
        assert title in Path(tables).read_text()


@pytest.mark.parametrize(
    ("measured", "equal", "status", "trains"),
    [
        (0, True, 0, True),
        (measure.INCOMPLETE, True, measure.INCOMPLETE, True),
        (measure.INCOMPLETE, False, 1, True),
        (0, False, 1, True),
        (1, True, 1, False),
        (130, True, 130, False),
    ],
)
def test_exit_status(
    measured: int,
    equal: bool,
    status: int,
    trains: bool,
    training_is_stored: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = measure.Run(results.read_json(STORED), {"txt": [tmp_path / "tables.txt"]}, measured)
    monkeypatch.setattr(measure, "run", lambda *_: run)
    monkeypatch.setattr(AgainstTorch, "passed", lambda *_: equal)
    monkeypatch.setattr(training, "write", lambda *_: {})
    found = invoke("overview")
    assert found.exit_code == status
    assert ("Training is" in found.output) is trains
    assert "tables.txt" in found.output


def test_the_summary_has_the_largest_difference() -> None:
    result = trained("against-torch")
    text = AgainstTorch().summary(result)
    records = results.pd.DataFrame(result["records"])
    means = records.groupby(["task", "variant"]).accuracy.mean().unstack()
    largest = max((means[name] - means["torch"]).abs().max() for name in ("converted", "fused"))
    assert f"over 10 seeds the test accuracy differs by {largest:.2%} at most" in text
    for record in result["records"]:
        record["accuracy"] -= 0.5 * (record["variant"] == "fused")
    assert "Training is NOT equal" in AgainstTorch().summary(result)


def test_typical_and_worst() -> None:
    result = results.read_json(STORED)
    first = [
        case["speedup"]["eager"]["ratio"]
        for case in result["cases"]
        if (case["op"], case["layout"], case["direction"]) == ("bn", "channels_first", "forward")
    ]
    mean = results.pd.Series(first).prod() ** (1 / len(first))
    cells = [list(column.cells) for column in overview.speed_table(result).columns]
    assert cells[2][0] == f"{mean:.2f}x ({min(first):.2f}x)"


@pytest.mark.parametrize(
    ("load", "claimed", "busy"), [(1.9, 10, False), (2.1, 0, True), (0.1, 14, True)]
)
def test_a_busy_machine_is_said(load: float, claimed: int, busy: bool) -> None:
    result = results.read_json(STORED)
    result["settings"]["load_average_before"] = load
    result["control"] |= {"claimed": claimed, "cases": 127}
    console = Console(file=io.StringIO(), width=200)
    report.show_warnings(result, console)
    assert isinstance(console.file, io.StringIO)
    assert ("do not quote this run" in console.file.getvalue()) is busy


# --- nothing is cut off ----------------------------------------------------------------------


@functools.cache
def shown(what: str, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    if what == "run":
        report.print_report(results.read_json(STORED), console)
    elif what == "overview":
        overview.print_run(measure.Run(results.read_json(STORED), {}, 0), console)
    elif what == "goals":
        show(console, report.goal_table(goals.goals(results.read_json(STORED))))
    else:
        training.print_report(EXPERIMENTS[what], trained(what), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 110])
@pytest.mark.parametrize(
    "what", ["run", "overview", "goals", "against-torch", "learning-rates", "placement"]
)
def test_nothing_is_cut_off(what: str, width: int) -> None:
    text = shown(what, width)
    assert CUT not in text + shown(what, WIDEST)
    assert max(map(len, text.splitlines())) <= width
    told = "Left out here, for a wider terminal"
    assert words_of(text) - words_of(shown(what, WIDEST)) <= words_of(told), "no word is broken"
    assert told not in shown(what, WIDEST)


def words_of(text: str) -> set[str]:
    return {word.strip(",.:") for word in re.split(r"[\s─]+", text)}


def test_columns_that_say_nothing_go_first() -> None:
    table = simple_table("title")
    for name in ("shape", "same", "worst of all", "fastest copy"):
        table.add_column(name)
    table.add_row("a", "constant", "1.2345", "0.1")
    table.add_row("b", "constant", "9.8765", "0.2")
    console = Console(file=io.StringIO(), width=30)
    show(console, table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "9.8765" in text and "fastest" in text and "constant" not in text
    assert "Left out here, for a wider terminal: same." in " ".join(text.split())


def test_only_a_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert make_console().width == WIDEST, "pytest's output is no terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert make_console().width == 60
    with (tmp_path / "file").open("w") as file:
        console = make_console(file)
        assert (console.width, console.is_terminal) == (WIDEST, False)


# --- goals -----------------------------------------------------------------------------------


def test_goals_are_shown_where_they_are_asked_for(tmp_path: Path) -> None:
    plain, asked = (invoke("compare", str(STORED), *option) for option in ((), ("--goals",)))
    assert "reached" not in plain.output
    assert "reached" in asked.output and "slowest case of all" in asked.output
    text = results.write_markdown(results.read_json(STORED), tmp_path / "x.md").read_text()
    assert "goal" not in text.lower()


# --- the picture -----------------------------------------------------------------------------


def test_the_picture_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, stem: figures.append(figure))
    plots.draw_speedups(results.read_json(STORED), "eager", Path("unused"))
    (figure,) = figures
    (legend,) = figure.legends
    assert legend.get_title().get_text() == (
        "How many times as fast as torch: batchnorm_ext on Intel(R) Xeon(R) Processor, 2 threads"
    )
    assert "2x = twice as fast" in figure.get_supxlabel()
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [
        "a shape, float32",
        "a shape, bfloat16",
        "too close to tell (quartiles overlap)",
        "typical (geometric mean)",
    ]
    for axes in figure.axes:
        assert axes.get_title(loc="left") in plots.DIRECTION_NAMES.values()
    plots.plt.close(figure)


def test_every_peer_has_a_look_of_its_own() -> None:
    assert {"ours", *shapes.BASELINES} == set(plots.CANDIDATE_STYLE)
