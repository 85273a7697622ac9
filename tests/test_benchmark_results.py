"""The benchmarks' summaries, files and command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import invoke, scaled, stats
from torch import nn

from batchnorm_ext import _C
from benchmarks import (
    candidates,
    environment,
    goals,
    graphs,
    interrupts,
    limits,
    measure,
    micro,
    overhead,
    overview,
    record,
    report,
    results,
    runner,
    shapes,
    summary,
    timing,
    traffic,
)
from benchmarks.candidates import OURS
from benchmarks.console import make_console, show
from benchmarks.timing import Stats, geometric_mean

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--shape", "4x8x5x5", "--threads", "1", "--budget", "0.1"]


# --- summary ---------------------------------------------------------------------------------


def case(ratio: float, decided: bool = True, fraction: float = 0.8, **more: Any) -> dict[str, Any]:
    timings = {OURS: stats(1e-3, 1e-4).as_dict(), "eager": stats(ratio * 1e-3, 1e-4).as_dict()}
    return {
        "family": "test",
        "shape": more.pop("shape", "4x8x5x5"),
        "layout": "channels_first",
        "dtype": "float32",
        "op": "bn",
        "direction": "forward",
        "threads": 2,
        "tensor_bytes": 1 << 26,
        "compulsory_bytes": 1 << 27,
        "beyond_cache": True,
        "check": {},
        "timings": timings,
        "speedup": {"eager": {"ratio": ratio, "decided": decided}},
        "fraction": {
            OURS: {
                "clone": fraction,
                "warm_copy": fraction / 2,
                limits.FASTEST: more.pop("fastest", fraction / 2),
            },
            "eager": {"clone": 0.2, "warm_copy": 0.1, limits.FASTEST: 0.1},
        },
        **more,
    }


def test_summary_is_geometric_and_names_the_worst() -> None:
    rows = summary.summarise(
        [
            case(8.0, shape="a", fraction=0.5),
            case(2.0, shape="b", decided=False, fraction=0.125, beyond_cache=False),
            case(3.0, direction="backward"),
            case(9.0, timings={}, speedup={}),
        ]
    )
    forward, backward = rows
    assert forward["speedup"]["eager"] == {
        "cases": 2,
        "geometric_mean": 4.0,
        "at_limit": 32.0,  # of 8 / 0.25 and 2 / 0.0625
        "worst": 2.0,
        "worst_shape": "b",
        "undecided": 1,
    }
    # not the one in cache
    assert forward["beyond_cache"] == {"clone": 0.5, "warm_copy": 0.25, limits.FASTEST: 0.25}
    assert backward["direction"] == "backward"


@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
@pytest.mark.parametrize("op", shapes.OPS)
def test_the_copy_limit_is_the_baseline_over_a_copy_of_the_bytes(op: str, direction: str) -> None:
    """Against the definition: the baseline's time over the fastest copy's for as many bytes."""
    moved, copied = traffic.compulsory_bytes(op, direction, 1 << 20, 4), 8 << 20
    copy_s, ours_s, eager_s = 2e-3, 6e-3, 9e-3
    share = traffic.fraction_of_limit(moved, ours_s, copied, copy_s)
    (row,) = summary.summarise([case(eager_s / ours_s, op=op, direction=direction, fastest=share)])
    tensors, mask_bits = traffic.FORMULAS[op, direction].tensors, bool("add" in op)
    limit_s = copy_s * (tensors + (mask_bits and direction != "eval") / 32) / 2
    assert row["speedup"]["eager"]["at_limit"] == pytest.approx(eager_s / limit_s, rel=1e-4)


def test_control_counts_what_the_rule_claims_of_equal_copies() -> None:
    def pair(first: float, second: float) -> dict[str, Any]:
        timed = {"clone": stats(first, 0.1).as_dict(), "clone_again": stats(second, 0.1).as_dict()}
        return case(1.0, timings=timed)

    found = summary.control([pair(1.0, 1.1), pair(2.0, 1.0), pair(1.0, 1.0), case(1.0)])
    assert (found["cases"], found["claimed"]) == (3, 1)
    assert found["ratio_median"] == 1.0
    assert summary.control([]) == {"cases": 0, "claimed": 0}


def test_goals_are_measured_and_can_be_missed() -> None:
    host = [{"direction": "forward+backward", "ours_over_eager": 0.95}]
    result = {"cases": [case(8.0), case(4.5), case(0.9, op="bn_relu")], "host_time": host}
    rows = {row["goal"]: row for row in goals.goals(result)}
    first = rows["channels_first bn forward, geometric mean"]
    assert (first["measured"], first["reached"]) == (6.0, True)
    assert not rows["channels_first fused forward, geometric mean"]["reached"]
    assert not rows["slowest case of all"]["reached"]
    assert rows["forward beyond the cache, fraction of clone"]["reached"]
    assert not next(row for name, row in rows.items() if "host time" in name)["reached"]
    assert rows["slowest case of all"]["cases"] == 3
    assert not any("channels_last" in name for name in rows), "what was not measured is left out"


def test_goals_stand_beside_the_copy_limit() -> None:
    host = [{"direction": "forward+backward", "ours_over_eager": 0.95}]
    cases = [case(2.0, fastest=0.5), case(2.0, fastest=0.5), case(0.9, op="bn_relu", fastest=0.1)]
    result = {"cases": cases, "host_time": host}
    rows = {row["goal"]: row for row in goals.goals(result)}
    assert rows["channels_first bn forward, geometric mean"]["at_limit"] == 4.0
    assert rows["slowest case of all"]["at_limit"] == 4.0, "the least of 4, 4 and 9"
    assert rows["forward beyond the cache, fraction of fastest copy"]["at_limit"] == 1.0
    assert rows["forward beyond the cache, fraction of clone"]["at_limit"] == pytest.approx(
        geometric_mean([1.6, 1.6, 8.0]), abs=1e-3
    )
    assert next(row for name, row in rows.items() if "host time" in name)["at_limit"] is None
    console = make_console()
    with console.capture() as shown:
        show(console, report.goal_table(list(rows.values())))
    lines = {line.split("  ")[1].strip(): line for line in shown.get().splitlines() if "  " in line}
    # 5.0 was the goal; the other is missed, but not out of reach
    assert "beyond limit" in lines["channels_first bn forward, geometric mean"]
    assert "beyond limit" not in lines["slowest case of all"]


# --- files -----------------------------------------------------------------------------------


def test_no_file_is_written_over(tmp_path: Path) -> None:
    stem = results.free_stem(tmp_path / "new", "run", [".json", ".png"])
    assert stem.name == "run"
    Path(f"{stem}.png").touch()
    second = results.free_stem(tmp_path / "new", "run", [".json", ".png"])
    assert second.name == "run-2"
    results.write_json({}, Path(f"{second}.json"))
    with pytest.raises(FileExistsError):
        results.write_json({}, Path(f"{second}.json"))


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*resnet50.json")))
def test_a_stored_file_shows_the_copy_limit(path: Path, tmp_path: Path) -> None:
    """Older files hold no such column: it is made of their cases."""
    stored = json.loads(path.read_text())
    for row in stored["summary"]:
        row["speedup"]["eager"].pop("at_limit", None)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(stored))
    read = results.read_json(old)
    for row in read["summary"]:
        members = [c for c in read["cases"] if all(c[key] == row[key] for key in summary.KEYS)]
        tensors = 3 if row["direction"] == "backward" else 2
        times = [{name: t["median"] for name, t in c["timings"].items()} for c in members]
        copies = [min(t[name] for name in limits.LIMITS if name in t) for t in times]
        limit = geometric_mean(
            2 / tensors * t["eager"] / copy for t, copy in zip(times, copies, strict=True)
        )
        assert row["speedup"]["eager"]["at_limit"] == pytest.approx(limit, rel=1e-3)
    shown = invoke("compare", str(old), "--goals").output
    assert f"{read['summary'][0]['speedup']['eager']['at_limit']:.2f}x" in shown
    assert shown.count("at copy limit:") == 2, "under both tables"
    assert results.AT_LIMIT in results.write_markdown(read, tmp_path / "old.md").read_text()


def test_device_slug() -> None:
    model = "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz"
    found = environment.device_slug({"device": "cpu", "cpu": {"Model name": model}})
    assert found == "cpu-intel-xeon-platinum-8480"
    assert environment.device_slug({"device": "cpu", "cpu": {}}) == "cpu-unknown"


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schema": 99, "cases": []}'])
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    found = invoke("compare", str(path))
    assert found.exit_code == 2


# --- command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one tiny run with every format."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--csv", "--md", "--plot", "--op", "bn,bn_add_relu", "--output", str(folder)]
    found = invoke("run", "--preset", "smoke", *TINY, *options)
    assert found.exit_code == 0, found.output
    return folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_run_writes_the_schema(written: Path) -> None:
    result = json.loads(only(written, "*.json").read_text())
    assert result["schema"] == results.SCHEMA
    assert result["failures"] == result["peer_failures"] == result["skipped"] == []
    assert {"commit", "dirty"} <= set(result["git"])
    assert result["settings"]["preset"] == "smoke"
    assert result["environment"]["torch"] == torch.__version__
    assert len(result["cases"]) == 2 * 2 * 3  # layouts, ops, directions
    for entry in result["cases"]:
        assert {OURS, "eager", "clone", "clone_again", "warm_copy"} <= set(entry["timings"])
        for timed in entry["timings"].values():
            assert 0 < timed["minimum"] <= timed["q1"] <= timed["median"] <= timed["q3"]
            assert timed["rounds"] >= shapes.PRESETS["smoke"].rounds[0]
        ours, eager = entry["timings"][OURS], entry["timings"]["eager"]
        ratio = entry["speedup"]["eager"]["ratio"]
        assert ratio == pytest.approx(eager["median"] / ours["median"], rel=1e-3)
        assert set(entry["check"][OURS]) == {"mean 0", "mean 1000"}
        moved = entry["compulsory_bytes"] / ours["median"]
        copied = 2 * entry["tensor_bytes"] / entry["timings"]["clone"]["median"]
        fractions = entry["fraction"][OURS]
        assert fractions["clone"] == pytest.approx(moved / copied, abs=1e-3)
        assert fractions["fastest_copy"] == min(fractions.values())
    assert {row["direction"] for row in result["host_time"]} == {"forward", "forward+backward"}
    assert len(result["saved_bytes"]) == 2 * len(shapes.OPS)
    assert result["summary"] == summary.summarise(result["cases"])
    assert result["control"] == summary.control(result["cases"])
    assert result["control"]["cases"] == len(result["cases"])


def test_run_writes_tables_and_pictures(written: Path) -> None:
    table = results.pd.read_csv(only(written, "*.csv"))
    assert len(table) == 12 * 5
    assert "# smoke" in only(written, "*.md").read_text()
    for ending in ("speedup.png", "speedup.svg", "limit.png", "limit.svg"):
        assert only(written, f"*-{ending}").stat().st_size > 1000


def test_compare_and_plot_read_what_run_wrote(written: Path, tmp_path: Path) -> None:
    file = str(only(written, "*.json"))
    one = invoke("compare", file)
    assert one.exit_code == 0
    assert "4x8x5x5" in one.output
    two = invoke("compare", file, file)
    assert two.exit_code == 0
    assert "~" in two.output, "a file against itself claims nothing"
    assert invoke("compare", file, file, "--candidate", "none").exit_code == 2
    drawn = invoke("plot", file, "--output", str(tmp_path))
    assert drawn.exit_code == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_failed_check_is_not_timed_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(candidates.MAKERS, OURS, scaled(1.01))
    options = ["--op", "bn", "--layout", "channels_first", "--output", str(tmp_path)]
    found = invoke("run", "--preset", "smoke", *TINY, *options)
    assert found.exit_code == 1
    assert "check failed" in found.output
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert result["failures"]
    assert all(entry["timings"] == {} for entry in result["cases"])
    assert result["summary"] == []


def test_time_limit_skips_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset = dataclasses.replace(shapes.PRESETS["smoke"], limit_s=0.0)
    monkeypatch.setitem(shapes.PRESETS, "smoke", preset)
    options = ["--preset", "smoke", "--shape", "4x8x5x5", "--threads", "1", "--op", "bn"]
    found = invoke("run", *options, "--output", str(tmp_path))
    assert found.exit_code == measure.INCOMPLETE
    assert "the time was up" in found.output
    assert "Groups of cases skipped: 2" in found.output
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert len(result["skipped"]) == 2
    assert result["cases"] == []
    # an explicit budget is the user's own choice of how long it may take
    found = invoke("run", *options, "--budget", "0.1", "--no-json")
    assert found.exit_code == 0
    assert "skipped" not in found.output


@pytest.mark.parametrize(
    ("budget", "limit", "expected"),
    [
        (None, None, (3.0, 8.0)),  # the preset's
        (5.0, None, (5.0, math.inf)),
        (None, 2.0, (2.0, 2.0)),  # a run is paced for what time there is
        (None, 100.0, (3.0, 100.0)),
        (50.0, 20.0, (20.0, 20.0)),
    ],
)
def test_the_caller_sets_the_limit(
    budget: float | None, limit: float | None, expected: tuple[float, float]
) -> None:
    assert measure.limits_of(shapes.PRESETS["smoke"], budget, limit) == expected


def test_the_limit_ends_a_group_between_its_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured of it stays; the group counts as skipped."""
    times = iter([False, False, False, True])  # before the group, and before each case
    monkeypatch.setattr(runner.Runner, "_time_is_up", lambda self: next(times))
    options = ["--preset", "smoke", *TINY, "--op", "bn", "--output", str(tmp_path)]
    assert invoke("run", *options).exit_code == measure.INCOMPLETE
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert [entry["direction"] for entry in result["cases"]] == ["forward", "backward"]
    assert [name.split()[1] for name in result["skipped"]] == list(shapes.LAYOUTS)


# --- runs that do not come to their end ------------------------------------------------------


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something after so many cases, as if it came from outside while the next was timed."""

    def after(count: int, what: Callable[[], None]) -> None:
        measured = 0
        usual = runner.Runner._case

        def case(self: runner.Runner, *rest: Any) -> dict[str, Any]:
            nonlocal measured
            if measured == count:
                what()
            measured += 1
            return usual(self, *rest)

        monkeypatch.setattr(runner.Runner, "_case", case)

    return after


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_what_it_has(
    number: signal.Signals,
    stop_after: Callable[[int, Callable[[], None]], None],
    tmp_path: Path,
) -> None:
    usual = [signal.getsignal(each) for each in interrupts.ENDING]
    stop_after(4, lambda: signal.raise_signal(number))
    options = ["--preset", "smoke", *TINY, "--op", "bn", "--md", "--output", str(tmp_path)]
    found = invoke("run", *options)
    assert found.exit_code == 128 + number
    assert f"interrupted by {number.name}. Groups of cases skipped: 1." in found.output
    assert "4x8x5x5" in only(tmp_path, "*.txt").read_text(), "the tables of what there is"
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert number.name in result["incomplete"]
    assert len(result["cases"]) == 4
    assert [name.split()[1] for name in result["skipped"]] == ["channels_last"]
    assert result["summary"] == summary.summarise(result["cases"])
    assert result["skipped"][0] in only(tmp_path, "*.md").read_text()
    assert [signal.getsignal(each) for each in interrupts.ENDING] == usual


def test_an_interruption_that_became_an_error_still_ends_the_run(
    stop_after: Callable[[int, Callable[[], None]], None], tmp_path: Path
) -> None:
    """As where a graph was being captured: its end fails, and that is a candidate's failure."""

    def swallowed() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    stop_after(1, swallowed)
    options = ["--preset", "smoke", *TINY, "--op", "bn", "--output", str(tmp_path)]
    assert invoke("run", *options).exit_code == 130
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert len(result["cases"]) == 2, "that one, and none after it"
    assert invoke("run", *options, "--no-json").exit_code == 0, "the next run knows nothing of it"


def test_a_run_that_breaks_writes_what_it_has(
    stop_after: Callable[[int, Callable[[], None]], None], tmp_path: Path
) -> None:
    def lost() -> None:
        raise RuntimeError("the device is lost\nand more")

    stop_after(1, lost)
    options = ["--preset", "smoke", *TINY, "--op", "bn", "--output", str(tmp_path)]
    found = invoke("run", *options)
    assert found.exit_code == 1
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert result["incomplete"] == "RuntimeError: the device is lost"
    assert len(result["cases"]) == 1


def test_lines_are_there_before_the_next_case(
    stop_after: Callable[[int, Callable[[], None]], None], tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    seen: list[list[str]] = []
    stop_after(3, lambda: seen.append([kind for kind, _ in record.read(lines)]))
    options = ["--preset", "smoke", *TINY, "--op", "bn", "--output", str(tmp_path)]
    assert invoke("run", *options, "--lines", str(lines)).exit_code == 0
    assert seen[0].count("case") == 3
    assert seen[0][0] == "header"
    assert "end" not in seen[0]
    refused = invoke("run", *options, "--lines", str(lines))
    assert refused.exit_code == 2, "no file of an earlier run is written over"
    with pytest.raises(FileExistsError):
        record.Record(lines)


def test_a_killed_run_s_lines_make_its_result(tmp_path: Path) -> None:
    lines, whole = tmp_path / "lines", tmp_path / "whole"
    options = ["--preset", "smoke", *TINY, "--op", "bn", "--lines", str(lines)]
    assert invoke("run", *options, "--output", str(whole)).exit_code == 0
    run = json.loads(only(whole, "*.json").read_text())
    again = invoke("collect", str(lines), "--output", str(tmp_path / "again"))
    assert again.exit_code == 0, again.output
    assert json.loads(only(tmp_path / "again", "*.json").read_text()) == run

    text = lines.read_text()
    lines.write_text(text[: text.rindex('{"case"') + 100])  # killed while it wrote the last case
    cut = invoke("collect", str(lines), "--output", str(tmp_path / "cut"), "--md")
    assert cut.exit_code == measure.INCOMPLETE
    assert "Incomplete: it was killed. Groups of cases skipped: 1." in cut.output
    result = json.loads(only(tmp_path / "cut", "*.json").read_text())
    assert result["cases"] == run["cases"][:-1]
    assert results.read_json(only(tmp_path / "cut", "*.json"))["incomplete"] == results.KILLED
    assert only(tmp_path / "cut", "*.md").exists()


@pytest.mark.parametrize(
    "text", ["", "{}\n", '{"case": {}}\n', '{"header": {}}\nno json\n', '{"header": {}}\n[]\n']
)
def test_lines_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    lines = tmp_path / "lines"
    lines.write_text(text)
    found = invoke("collect", str(lines))
    assert found.exit_code == 2
    assert "line" in found.stderr
    assert "Traceback" not in found.output


def test_a_candidate_that_raises_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def maker(case: shapes.Group, data: candidates.Data) -> tuple[nn.Module, candidates.Step]:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(candidates.MAKERS, OURS, maker)
    monkeypatch.setattr(overhead, "saved_bytes", list)
    found = invoke("run", "--preset", "smoke", *TINY, "--op", "bn", "--output", str(tmp_path))
    assert found.exit_code == 1
    assert "no such kernel" in found.output


def test_a_wrong_peer_is_left_out_but_is_not_our_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(candidates.MAKERS, "eager", scaled(1.01))
    options = ["--op", "bn", "--layout", "channels_first", "--output", str(tmp_path)]
    found = invoke("run", "--preset", "smoke", *TINY, *options)
    assert found.exit_code == 0
    assert "peer left out" in found.output
    result = json.loads(only(tmp_path, "*.json").read_text())
    assert all("eager" not in entry["timings"] for entry in result["cases"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "none"],
        ["--dtype", "int8"],
        ["--layout", "sideways"],
        ["--op", "bn,gelu"],
        ["--threads", "0"],
        ["--threads", "two"],
        ["--device", "cuda"],
        ["--shape", "3"],
        ["--baseline", "apex"],
        ["--allocator", "magic"],
        ["--mode", "eval", "--direction", "backward"],
    ],
)
def test_bad_options_exit_2(arguments: list[str]) -> None:
    assert invoke("run", *arguments).exit_code == 2


def test_a_missing_extension_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "batchnorm_ext", None)
    found = invoke("run", "--preset", "smoke")
    assert found.exit_code == 2
    assert "build it first" in found.output
    assert "Traceback" not in found.output


def test_mode_is_a_choice_of_directions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[shapes.Selection] = []

    def fake(preset: str, selection: shapes.Selection, *rest: object) -> measure.Run:
        seen.append(selection)
        return measure.Run({}, {}, 0)

    monkeypatch.setattr(measure, "run", fake)
    monkeypatch.setattr(overview, "print_run", lambda *_: None)
    monkeypatch.setattr(overview, "name_files", lambda *_: None)
    monkeypatch.delenv(environment.HUGE_PAGES_VARIABLE, raising=False)
    assert invoke("run", "--mode", "train").exit_code == 0
    assert invoke("run", "--mode", "eval", "--direction", "all").exit_code == 0
    assert [selection.directions for selection in seen] == [("forward", "backward"), ("eval",)]
    assert environment.HUGE_PAGES_VARIABLE not in os.environ


# --- micro ----------------------------------------------------------------------------------


def test_micro_writes_what_its_tables_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials = (
        micro.Trial("kRowBytes", "16x32x7x7", {"unit_channels": 1}),
        micro.Trial("kLongPlane", "2x3x5x5", {"stream": True}, mode="eval"),
    )
    monkeypatch.setattr(micro, "TRIALS", trials)
    monkeypatch.setattr(micro, "MEMORY_SHAPE", (2, 3, 64, 64))
    usual = _C.cpu_capability()
    _C.set_cpu_capability("portable")  # not the one that is measured last
    found = invoke("micro", "--budget", "0", "--output", str(tmp_path))
    after = _C.cpu_capability()
    _C.set_cpu_capability(usual)
    assert found.exit_code == 0, found.output
    assert after == "portable"
    assert not _C.plan("channels_first", "float32", 2, 3, 25, 1, "eval")["stream"]
    result = json.loads(only(tmp_path, "*-micro.json").read_text())
    assert result["schema"] == results.SCHEMA
    assert [row["shape"] for row in result["plans"]] == ["16x32x7x7", "2x3x5x5"]
    assert result["plans"][1]["forced"] == {"stream": True}
    for row in result["plans"]:
        assert set(row["timings"]) == {"chosen", "forced"}
        assert row["forced_over_chosen"]["ratio"] > 0
    assert len(result["memory"]) == 6
    measured = {(row["cpu_capability"], row["dtype"]) for row in result["kernels"]}
    assert {(usual, dtype) for dtype in micro.KERNEL_DTYPES} <= measured
    assert all(set(row["costs"]) == set(micro.KERNELS) for row in result["kernels"])
    for text in ("fill, fresh huge pages", "kRowBytes", "stream False / True", "moments of a run"):
        assert text in found.output
    assert usual in found.output


@pytest.mark.parametrize(
    "trial", micro.TRIALS, ids=lambda trial: f"{trial.threshold}-{trial.shape}"
)
def test_a_trial_compares_two_plans(trial: micro.Trial) -> None:
    sizes = shapes.find_shape(trial.shape).sizes
    chosen = micro._plans(trial, sizes)
    seen: list[dict[str, dict[str, Any]]] = []
    steps = {name: lambda: seen.append(micro._plans(trial, sizes)) for name in trial.passes}
    try:
        for fields in (micro.opposite(trial, chosen), {}):
            micro._under(fields, SimpleNamespace(**steps), trial.passes)()  # type: ignore[arg-type]
    finally:
        _C.force_plan()
    count = len(trial.passes)
    assert len(seen) == 2 * count
    for name in trial.passes:
        assert all(plans[name] != chosen[name] for plans in seen[:count])
        assert all(plans[name] == chosen[name] for plans in seen[count:])


def test_kernel_costs_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call costs 5 us, 16 elements so many ns; the quartiles lie 10 ns from the median."""
    ns = {"clone": 0.5, "forward_eval": 1.0, "forward_train": 1.75, "sums": 2.0, "backward": 5.0}

    def fake(calls: Any, **_: Any) -> dict[str, Stats]:
        parts = (key.split() for key in calls)
        return {
            f"{name} {length}": stats(5e-6 + ns[name] * 1e-9 * int(length) / 16, 1e-8)
            for name, length in parts
        }

    monkeypatch.setattr(micro, "interleave", fake)
    costs = micro.kernel_costs("float32", 0.0)
    assert [cost["ns"] for cost in costs.values()] == [0.75, 2.0, 1.0, 3.0, 0.5]
    one = 2e-8 / ((micro.LENGTHS[1] - micro.LENGTHS[0]) / 16 * 1e-9)
    spreads = [cost["spread"] for cost in costs.values()]
    assert spreads == pytest.approx([2 * one, one, one, 2 * one, one], abs=1e-3)


# ---- a GPU's measurements, as far as they need none ----


@pytest.mark.parametrize(
    "bytes_of_one, cache, sets, calls",
    [
        (400 << 20, 50 << 20, 2, 10),  # one is more than the cache: two take turns
        (100 << 20, 50 << 20, 2, 10),
        (60 << 20, 50 << 20, 4, 12),
        (1 << 20, 50 << 20, 16, 16),  # no more than 16, whatever the cache
    ],
)
def test_rotating_sets_are_larger_than_the_cache(
    bytes_of_one: int, cache: int, sets: int, calls: int
) -> None:
    assert graphs.sets_needed(bytes_of_one, cache) == sets
    assert graphs.calls_in_graph(sets) == calls
    assert calls % sets == 0


def test_a_graph_s_time_is_shared_by_its_calls() -> None:
    whole = timing.Stats(median=8.0, q1=6.0, q3=10.0, minimum=4.0, rounds=3, calls=5)
    assert whole.shared_by(2) == timing.Stats(4.0, 3.0, 5.0, 2.0, 3, 10)


def test_a_gpu_s_result_is_named_after_the_gpu_and_has_no_goals_of_the_cpu() -> None:
    gpu = {"device": "cuda", "gpu": {"name": "NVIDIA H100 80GB HBM3"}, "cpu": {}}
    assert environment.device_slug(gpu) == "cuda-nvidia-h100-80gb-hbm3"
    assert goals.goals({"environment": gpu, "cases": [], "host_time": []}) == []


def test_the_gpu_preset_times_all_peers_on_the_gpu() -> None:
    groups = shapes.Selection(device="cuda").groups(shapes.PRESETS["gpu"], (1,))
    assert {group.device for group in groups} == {"cuda"}
    assert {name for group in groups for name in group.baselines} == set(shapes.BASELINES)
    assert {group.dtype for group in groups} == {"bfloat16", "float16", "float32"}
    sizes = {group.shape.sizes for group in groups}
    assert {(128, c, side, side) for c, side in shapes.RESNET50_PLANES} <= sizes


def test_the_gpu_preset_measures_what_matters_first() -> None:
    groups = shapes.Selection(device="cuda").groups(shapes.PRESETS["gpu"], (1,))
    first = groups[: 12 * 2 * 2]
    assert {(group.shape.sizes, group.layout, group.op) for group in first} == {
        ((128, channels, side, side), layout, op)
        for channels, side in shapes.RESNET50_PLANES
        for layout in shapes.LAYOUTS
        for op in ("bn", "bn_relu")
    }
    assert {group.dtype for group in first} == {"bfloat16"}
    assert {group.baselines for group in first} == {("eager",)}
    assert {group.directions for group in first} == {("forward", "backward")}
    compiled = ["compile" in group.baselines for group in groups]
    assert compiled == sorted(compiled), "torch.compile takes longest"
    assert len({str(group) for group in groups}) == len(groups), "each has a name of its own"


def test_a_gpu_that_is_not_there_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = invoke("run", "--device", "cuda", "--preset", "smoke")
    assert done.exit_code == 2
    assert "--device cuda, but torch sees no GPU" in done.stderr
