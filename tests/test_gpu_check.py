"""`make gpu-check` without a GPU: what becomes of its steps, its lines and its page."""

from __future__ import annotations

import ast
import errno
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import setup_cuda
from batchnorm_ext import _C
from benchmarks import graphs, measure, shapes
from benchmarks.gpu import device, journal, missing, native, profile, run, steps, summary, tensors
from benchmarks.gpu import tests as test_step
from benchmarks.gpu import timings as timing_step
from benchmarks.gpu.steps import Step

ROOT = Path(__file__).resolve().parent.parent
Lines = list[dict[str, Any]]

#: Writes a line down, then says so, again and again.
MEASURES = """
import sys, time
from benchmarks.gpu.journal import Journal
lines = Journal.of_the_check()
for k in range(int(sys.argv[1])):
    lines.write("fact", number=k)
    print("measured", k, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def script(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code), *arguments)


def measures(name: str, count: int = 3, pause: float = 0.0, limit: float = 20) -> Step:
    return Step(name, script(MEASURES, str(count), str(pause)), limit)


class Result:
    """What a check left."""

    def __init__(self, out: Path, work: Path, status: int) -> None:
        self.out, self.work, self.status = out, work, status

    @property
    def lines(self) -> Lines:
        return journal.read(self.out / journal.FILE)[0]

    @property
    def states(self) -> dict[str, str]:
        return {line["step"]: line["state"] for line in self.lines if line["kind"] == "step"}

    def why(self, step: str) -> str:
        found = [line["why"] for line in self.lines if line.get("step") == step and "why" in line]
        return str(found[-1])

    def log(self, step: Step) -> str:
        return (self.work / "logs" / step.log).read_text()

    @property
    def page(self) -> str:
        return (self.out / summary.FILE).read_text()

    def measured(self) -> set[tuple[str, int]]:
        return {(line["step"], line["number"]) for line in self.lines if line["kind"] == "fact"}


Checks = Callable[..., Result]


@pytest.fixture
def check(tmp_path: Path) -> Checks:
    """Runs steps, each a stage."""

    def run_steps(*chosen: Step, limit: float = 60, lenient: bool = False) -> Result:
        out, work = tmp_path / "out", tmp_path / "work"
        status = run.Check(out, work, limit, lenient).run([[step] for step in chosen])
        return Result(out, work, status)

    return run_steps


# ---- steps --------------------------------------------------------------------------------------


def test_no_steps_failure_stops_the_next(check: Checks, capsys: pytest.CaptureFixture[str]) -> None:
    missed = script(f"print('missing: a thing'); raise SystemExit({missing.STATUS})")
    result = check(
        Step("fails", script("print('so it is'); raise SystemExit(3)"), 10),
        Step("dies", script("import os; os.abort()"), 10),
        Step("is not there", ("/nowhere/program",), 10),
        Step("has no tool", ("nvcc-of-nobody",), 10, tools=("nvcc-of-nobody",)),
        Step("finds nothing", missed, 10),
        measures("is well"),
    )
    assert result.states == {
        "fails": "failed",
        "dies": "failed",
        "is not there": "failed",
        "has no tool": "missing",
        "finds nothing": "missing",
        "is well": "ok",
    }
    assert result.why("fails") == "exit status 3: so it is"
    assert "SIGABRT" in result.why("dies")
    assert result.why("has no tool") == "no nvcc-of-nobody"
    assert result.why("finds nothing") == "a thing"
    assert result.measured() == {("is well", k) for k in range(3)}
    assert result.status == 1
    assert "TROUBLE: has no tool: missing, no nvcc-of-nobody" in capsys.readouterr().out
    for name, state in result.states.items():
        assert f"| {name} | {state} |" in result.page


def test_a_step_whose_own_time_was_up_has_not_failed(check: Checks) -> None:
    ends = script("raise SystemExit(3)")
    result = check(Step("measures", ends, 10, time_was_up=3), limit=60)
    assert (result.states, result.status) == ({"measures": "ok"}, 0)
    assert result.why("measures") == "its time was up"
    assert check(Step("measures", ends, 10, time_was_up=4)).status == 1


def test_the_benchmark_ends_by_itself_and_says_so() -> None:
    step = next(s for stage in steps.table(False) for s in stage if s.name == "benchmark")
    own = float(step.command[step.command.index("--limit") + 1])
    assert own + 10 < step.limit
    assert "--lines" in step.command
    assert step.time_was_up == measure.INCOMPLETE


def test_what_is_missing_is_no_failure_of_the_emulated_check(check: Checks) -> None:
    absent = Step("has no tool", ("nvcc-of-nobody",), 10, tools=("nvcc-of-nobody",))
    assert check(absent, lenient=True).status == 0
    assert check(absent, Step("fails", script("raise SystemExit(1)"), 9), lenient=True).status == 1


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


HANGS = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
def waits_here():
    process = subprocess.Popen([sys.executable, "-c", child])
    print("child", process.pid, flush=True)
    time.sleep(60)
if __name__ == "__main__":
    waits_here()
"""


def test_a_step_that_hangs_says_where_and_ends_with_its_children(
    check: Checks, tmp_path: Path
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    command = steps.python("hangs")
    hangs = Step("hangs", command, 1.5, environment={"PYTHONPATH": str(tmp_path)})
    result = check(hangs, measures("is well"))
    assert result.states == {"hangs": "timed out", "is well": "ok"}
    assert result.status == 1
    trace = result.log(hangs).split("most recent call first")[1]
    assert "in waits_here" in trace, "what a wait in C would leave"
    assert "KeyboardInterrupt" in result.log(hangs)
    child = int(result.log(hangs).split("child ")[1].split()[0])
    assert wait_for(lambda: not is_alive(child))


def test_a_step_that_does_not_listen_is_killed(
    check: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE_S", 0.3)
    code = """
    import os, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("process", os.getpid(), flush=True)
    time.sleep(60)
    """
    deaf = Step("deaf", script(code), 0.5)
    result = check(deaf, measures("is well"))
    assert result.states == {"deaf": "timed out", "is well": "ok"}
    assert result.why("deaf").endswith("and did not end by itself")
    assert not is_alive(int(result.log(deaf).split()[1]))


def test_the_time_of_all_bounds_each(check: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    began = time.monotonic()
    slow = measures("slow", count=600, pause=0.1, limit=50)
    result = check(slow, measures("late"), limit=1)
    assert result.states == {"slow": "timed out", "late": "no time"}
    assert ("slow", 0) in result.measured()
    assert time.monotonic() - began < 5


def test_the_steps_of_a_stage_run_side_by_side(tmp_path: Path) -> None:
    meets = """
    import pathlib, sys, time
    mine, other = map(pathlib.Path, sys.argv[1:])
    mine.touch()
    while not other.exists(): time.sleep(0.01)
    """
    names = [str(tmp_path / name) for name in "ab"]
    stage = [Step("a", script(meets, *names), 10), Step("b", script(meets, *names[::-1]), 10)]
    one = run.Check(tmp_path / "out", tmp_path / "work", 30)
    one.width = 2
    assert one.run([stage]) == 0


# ---- lines --------------------------------------------------------------------------------------


def numbers(path: Path) -> tuple[list[int], int]:
    lines, unreadable = journal.read(path)
    return [line["number"] for line in lines], unreadable


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / journal.FILE
    journal.Journal(path).write("fact", number=1)
    with path.open("a") as file:
        file.write('{"kind": "fact", "numb')
    assert numbers(path) == ([1], 1)
    journal.Journal(path).write("fact", number=2)
    assert numbers(path) == ([1, 2], 1)
    summary.write(tmp_path)
    assert "1 lines could not be read" in (tmp_path / summary.FILE).read_text()


def test_a_full_disk_is_said_and_stops_nothing(
    check: Checks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / journal.FILE).symlink_to("/dev/full")
    first, second = measures("first"), measures("second")
    result = check(first, second)
    assert result.status == 1
    said = capsys.readouterr().out
    assert "takes no line (No space left on device)" in said
    assert "second: ok" in said
    assert '"number": 2' in result.log(second), "what was measured is nowhere"


def test_a_folder_that_holds_little(tmp_path: Path) -> None:
    """A real file system that is full from some line on."""
    out = tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        some = [measures("first", 30), measures("second", 300), measures("third", 1)]
        check = run.Check(out, tmp_path / "work", 60)
        assert check.run([[step] for step in some]) == 1
        found = Result(out, tmp_path / "work", 1)
        assert {("first", k) for k in range(30)} <= found.measured()
        log = found.log(some[1])
        in_log = {("second", k) for k in range(300) if f'"number": {k}}}' in log}
        assert len(in_log) > 100
        assert in_log | found.measured() >= {("second", k) for k in range(300)}
        assert "measured 0" in found.log(some[2])
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_the_archive_that_was_there_stays(
    check: Checks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(measures("first")).status == 0
    before = (tmp_path / "out" / run.ARCHIVE).read_bytes()

    def full(*arguments: Any, **more: Any) -> Any:
        Path(arguments[0]).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile, "open", full)
    result = check(measures("second"))
    assert (result.status, result.states) == (1, {"second": "ok"})
    assert (result.out / run.ARCHIVE).read_bytes() == before
    assert {path.name for path in result.out.iterdir()} == {
        journal.FILE, summary.FILE, run.ARCHIVE
    }  # fmt: skip


def test_the_archive_has_the_logs(check: Checks) -> None:
    result = check(measures("some thing"))
    with tarfile.open(result.out / run.ARCHIVE) as archive:
        names = archive.getnames()
    assert "./logs/some-thing.log" in names


def test_lines_of_a_program_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / journal.FILE
    monkeypatch.setenv(journal.VARIABLE, str(path))
    monkeypatch.setenv(journal.STEP_VARIABLE, "facts")
    prints = """
    for line in ('{"fact": "copy", "kind": "mine"}', "words", "case 1", "case 2"):
        print(line)
    raise SystemExit(5)
    """
    assert native.relay(script(prints), "fact", only_printed="case ") == 5
    assert "words\ncase 1\ncase 2\n" in capsys.readouterr().out
    lines = journal.read(path)[0]
    assert [(line["kind"], line["step"]) for line in lines] == [("fact", "facts")] * 3
    assert lines[0]["fact"] == "copy"
    assert [line["text"] for line in lines[1:]] == ["words", "ended with 5 after: case 2"]


# ---- interrupts ---------------------------------------------------------------------------------

#: A check of several steps, as a process of its own: what it measures takes some two seconds.
WHOLE = """
import sys
from pathlib import Path
from benchmarks.gpu.run import Check
from benchmarks.gpu.steps import Step
out, work, measures = sys.argv[1:]
step = lambda name: Step(name, (sys.executable, "-c", measures, "40", "0.02"), 20)
fails = Step("fails", (sys.executable, "-c", "raise SystemExit(1)"), 20)
raise SystemExit(Check(Path(out), Path(work), 60).run(
    [[step("a")], [fails, step("b"), step("c")], [step("d")]]
))
"""


def said(work: Path) -> set[tuple[str, int]]:
    """What the steps say that they have measured: each after it had written the line."""
    return {
        (log.stem, int(line.split()[1]))
        for log in (work / "logs").glob("*.log")
        for line in log.read_text().splitlines()
        if line.startswith("measured ") and line.split()[1:]
    }


def processes_of(marker: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (folder / "environ").read_bytes()
            if marker.encode() in environment and is_alive(int(folder.name)):
                found.append(int(folder.name))
    return found


def some_kills(count: int, ordinary: int) -> list[Any]:
    return [pytest.param(k, marks=() if k < ordinary else pytest.mark.slow) for k in range(count)]


@pytest.mark.parametrize("number", some_kills(20, 3))
def test_what_was_measured_before_an_interrupt_is_there(number: int, tmp_path: Path) -> None:
    draw = random.Random(number)
    sent = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[number % 3]
    out, work = tmp_path / "out", tmp_path / "work"
    process = subprocess.Popen(
        [sys.executable, "-c", WHOLE, str(out), str(work), MEASURES],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    assert wait_for(lambda: bool(said(work)) or process.poll() is not None, 20)
    time.sleep(draw.uniform(0, 2))
    process.send_signal(sent)
    status = process.wait(20)
    assert wait_for(lambda: not processes_of(str(out))), "steps go on without their check"
    result = Result(out, work, status)
    assert said(work) <= result.measured()
    assert len(result.measured()) >= 1
    ends = [line for line in result.lines if line["kind"] == "run-end"]
    if sent != signal.SIGKILL and not any(not end["interrupted"] for end in ends):
        assert status == 130
        assert "interrupted" in result.states.values()
        assert "| interrupted |" in result.page
    # -S: of the standard library only.
    summarise = [sys.executable, "-S", "-m", "benchmarks.gpu", "summary", str(out)]
    subprocess.run(summarise, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for number, count in Counter(number for _, number in result.measured()).items():
        assert result.page.count(f"- number {number}\n") == count
    assert ("was ended before its end" in result.page) == (not ends)


def test_a_summary_of_nothing_is_refused(tmp_path: Path) -> None:
    summarise = [sys.executable, "-m", "benchmarks.gpu", "summary", str(tmp_path)]
    result = subprocess.run(summarise, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"{tmp_path}/{journal.FILE}: No such file or directory" in result.stderr


# ---- lists --------------------------------------------------------------------------------------

LIST = """
import os, sys, time
from benchmarks import measure
from benchmarks.gpu import items

def fine(): pass
def wrong(): raise ValueError("a result is wrong")
def crashes(): os.abort()
def never_returns(): time.sleep(60)
def loses_the_device(): lost.append(1); raise RuntimeError("an illegal access")
lost = []
def recover():
    if lost: raise RuntimeError("the context is corrupt")

calls = [fine, wrong, crashes, fine, never_returns, fine, loses_the_device, fine, fine]
work = {f"{k} {call.__name__}": call for k, call in enumerate(calls) if k < int(sys.argv[1])}
raise SystemExit(items.work_off(work, 1.0, recover))
"""


def work_off(tmp_path: Path, count: int) -> subprocess.CompletedProcess[str]:
    (tmp_path / "works_off_a_list.py").write_text(LIST)
    return subprocess.run(
        steps.python("works_off_a_list", str(count), again=True),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_list_goes_on_behind_what_ends_its_process(tmp_path: Path) -> None:
    result = work_off(tmp_path, 9)
    begun = [line for line in result.stdout.splitlines() if line[:1].isdigit()]
    assert begun == [
        *("0 fine", "1 wrong", "2 crashes", "3 fine", "4 never_returns", "5 fine"),
        *("6 loses_the_device", "7 fine", "8 fine"),
    ]
    assert result.returncode != 0
    assert "a result is wrong" in result.stdout
    assert "in never_returns" in result.stdout, "where it hung"
    assert "the device is lost to this process: the context is corrupt" in result.stdout
    assert "exit status 70; another process goes on" in result.stdout


def test_the_status_of_a_list(tmp_path: Path) -> None:
    assert work_off(tmp_path, 1).returncode == 0
    assert work_off(tmp_path, 2).returncode == 1


WAITS = """
import os, time
from benchmarks import measure
from benchmarks.gpu import items
raise SystemExit(items.work_off({f"at {os.getpid()}": lambda: time.sleep(60)}, 60, lambda: None))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_list_ends_with_who_looks_after_it(number: int, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    process = subprocess.Popen(
        steps.python("waits", again=True),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    assert is_alive(pid)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    rest = process.stdout.read()
    assert process.wait(10) != 0
    assert wait_for(lambda: not is_alive(pid))
    assert ("KeyboardInterrupt" in rest) == (number == signal.SIGTERM)


# ---- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("emulated", [False, True])
def test_the_tables_steps_can_be_told_apart_and_exist(emulated: bool) -> None:
    every = [step for stage in steps.table(emulated) for step in stage]
    logs = [step.log for step in every]
    assert len(set(logs)) == len(logs)
    for step in every:
        assert step.limit > 0
        for word in step.command:
            if word.startswith("benchmarks."):
                assert Path(ROOT, *word.split(".")).with_suffix(".py").is_file(), word
        assert emulated == ("BATCHNORM_EXT_EMULATED_CUDA" in step.environment)


def test_what_is_worth_most_comes_first() -> None:
    names = [step.name for stage in steps.table(False) for step in stage]
    order = ["build", "smoke planned channels_first", "timings", "facts", "profile", "peers",
             "memcheck", "cases", "compiled peers", "benchmark"]  # fmt: skip
    places = [names.index(name) for name in order]
    assert places == sorted(places)


def test_some_steps_by_name() -> None:
    chosen = steps.only(steps.table(False), ["smoke grid", "tests"])
    assert [step.name for stage in chosen for step in stage] == [
        *("smoke grid channels_first", "smoke grid channels_last", "tests"),
    ]


def test_the_toolkits_programs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "a-sanitizer"
    program.parent.mkdir()
    program.touch(0o755)
    toolkit = setup_cuda.Toolkit(tmp_path, (13, 0))
    monkeypatch.setattr(setup_cuda, "find_toolkit", lambda: toolkit)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    step = Step("checks", ("a-sanitizer",), 1, tools=("a-sanitizer",))
    assert step.lacks() == "no a-sanitizer"
    steps.find_tools()
    assert step.lacks() == ""


def test_what_only_a_gpu_shows_comes_first() -> None:
    tree = ast.parse((ROOT / "tests" / "test_gpu.py").read_text())
    names = [each.name for each in tree.body if isinstance(each, ast.FunctionDef)]
    tests = [name for name in names if name.startswith("test_")]
    assert tests[:4] == [
        *("test_a_graph_replays_with_updated_buffers", "test_two_streams_at_once"),
        *("test_the_host_never_waits", "test_more_than_two_to_the_31_elements"),
    ]
    for name in (test_step.AGREES, test_step.SANITIZED):  # that are left to others
        assert name.partition("::")[2] in tests


def without_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    if missing.has_gpu():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "run", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--emulated"], 0)])
def test_a_machine_without_the_tools(options: list[str], status: int, tmp_path: Path) -> None:
    """Nothing is begun that can not be: this takes no time."""
    out = tmp_path / "out"
    result = without_gpu(str(out), "--only", "gpu,facts,profile,memcheck,kernels,train", *options)
    assert result.returncode == status, result.stdout
    for step in ("profile", "memcheck", "facts"):
        assert re.search(rf"^    {step}: missing, no .*\bGPU$", result.stdout, re.MULTILINE)
    assert "gpu: missing, no nvidia-smi" in result.stdout
    assert ("TROUBLE: kernels: missing, no GPU" in result.stdout) == (not options)
    assert len(list(out.iterdir())) <= 8


def test_a_torch_without_cuda_is_named() -> None:
    if missing.has_gpu():
        pytest.skip("there is a GPU")
    result = subprocess.run(
        steps.python("benchmarks.gpu.smoke", "grid", "channels_last"),
        cwd=ROOT,
        env={**os.environ, "BATCHNORM_EXT_EMULATED_CUDA": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == missing.STATUS, result.stderr
    assert result.stdout.startswith("missing: torch ")


def test_a_machine_without_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_cuda, "find_toolkit", lambda: None)
    with pytest.raises(SystemExit) as ended:
        native.compile_program([], Path("nothing"), [])
    assert (ended.value.code, capsys.readouterr().out) == (missing.STATUS, "missing: no nvcc\n")


# ---- times --------------------------------------------------------------------------------------


@pytest.fixture
def timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of the CPU's kernels, which have no CUDA plan: the same code measures those of a GPU."""
    monkeypatch.setattr(tensors, "POOL", 1 << 16)
    monkeypatch.setattr(timing_step, "ROUNDS", 3)
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / journal.FILE))
    yield lambda what: timing_step.Timings(device.Emulated(), what)


def a_case(direction: str, op: str = "bn_relu", layout: str = "channels_first") -> Any:
    shape = shapes.Shape("edge", (3, 16, 5, 4))
    return timing_step.Case(shape, layout, "bfloat16", op, direction)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("op", shapes.OPS)
@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_a_line_for_every_plan(
    direction: str, op: str, layout: str, timings: Any, tmp_path: Path
) -> None:
    timings("plans").measure(a_case(direction, op, layout))
    lines = journal.read(tmp_path / journal.FILE)[0]
    assert {line["kind"] for line in lines} == {"timing"}, lines
    assert {line["candidate"] for line in lines} == {*timing_step.PLANS, "copy"}
    assert all(line["median"] > 0 and line["rounds"] == 3 for line in lines)
    assert all(line["error"] <= 1 for line in lines if line["candidate"] != "copy")


def test_a_line_for_every_peer(timings: Any, tmp_path: Path) -> None:
    for direction in shapes.DIRECTIONS:
        timings("peers").measure(a_case(direction, "bn_add_relu", "channels_last"))
    lines = journal.read(tmp_path / journal.FILE)[0]
    assert {line["kind"] for line in lines} == {"timing"}, lines
    assert len(lines) == 3 * 4
    assert {line["candidate"] for line in lines} == {"ours", "eager", "cudnn_off", "copy"}


@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_a_wrong_result_is_seen(
    direction: str, timings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tensors.Sample.call

    def wrong(sample: tensors.Sample, direction: str) -> Any:
        def call() -> Any:
            first, *rest = right(sample, direction)()
            return (first + 0.03 * first.abs() + 0.01, *rest)

        return call

    monkeypatch.setattr(tensors.Sample, "call", wrong)
    timings("plans").measure(a_case(direction))
    kinds = [line["kind"] for line in journal.read(tmp_path / journal.FILE)[0]]
    assert kinds.count("wrong") == len(timing_step.PLANS)


def test_a_candidate_that_fails_leaves_the_others(
    timings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: dict[str, Any] = {"planned": {}, "of nobody": {"strategy": "of nobody"}}
    monkeypatch.setattr(timing_step, "PLANS", plans)
    timings("plans").measure(a_case("forward"))
    lines = journal.read(tmp_path / journal.FILE)[0]
    assert [(line["kind"], line["candidate"]) for line in lines][:1] == [("untimed", "of nobody")]
    assert {line["candidate"] for line in lines[1:]} == {"planned", "copy"}


def test_a_plan_that_is_not_another_is_timed_once(
    timings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.Emulated, "limits", _C.cuda_devices()["h200"])
    timings("plans").measure(a_case("eval"))  # nothing to reduce: no strategy can be forced
    lines = journal.read(tmp_path / journal.FILE)[0]
    assert {line["candidate"] for line in lines} == {"planned", "streaming", "copy"}
    assert lines[0]["plan"]["strategy"] == "single_pass"


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla T4", "t4"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA Nothing 1", None)],
)  # fmt: skip
def test_the_plans_of_the_device_at_hand(name: str, known: str | None) -> None:
    assert device.limits_of(name) == (_C.cuda_devices()[known] if known else None)


def test_the_time_of_a_call_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the clock is one that counts what is put between its events."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            assert self.at > 0

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def replay() -> None:
        clock[0] += 30.0  # milliseconds

    monkeypatch.setattr(graphs, "capture", lambda calls: (replay, 10 * len(calls)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = device.Gpu.__new__(device.Gpu)
    assert gpu.prepare([lambda: None, lambda: None])() == pytest.approx(30e-3 / 20)


def test_every_tensor_has_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "POOL", 1 << 16)
    samples = tensors.Samples("cpu")
    made = [samples.of((2, 8, 4, 4), "channels_last", "float32", "bn", seed) for seed in range(4)]
    addresses = {each.x.data_ptr() for each in made} | {each.grad.data_ptr() for each in made}
    assert len(addresses) == 8
    assert all(each.x.is_contiguous(memory_format=torch.channels_last) for each in made)
    assert all(0.7 < float(each.x.std()) < 1.3 for each in made), "never zeros as data"


# ---- pages --------------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 7
channels_first forward
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel<a, b>","GPU Speed Of Light Throughput","Duration","us","100.5"
"0","7","forward_kernel<a, b>","Occupancy","","",""
==PROF== Disconnected
"1","7","backward_kernel","GPU Speed Of Light Throughput","Duration","us","1,200"
"""


def test_the_profilers_table_is_read() -> None:
    found = list(profile.rows(NCU.splitlines(keepends=True)))
    assert [(row["kernel"], row["metric"], row["value"]) for row in found] == [
        ("0 forward_kernel<a, b>", "Duration", "100.5"), ("1 backward_kernel", "Duration", "1,200")
    ]  # fmt: skip


def test_the_page_shows_what_matters() -> None:
    case = {"what": "plans", "op": "bn", "direction": "forward", "layout": "channels_last",
            "dtype": "bfloat16", "shape": "2x8"}  # fmt: skip
    planned = {"candidate": "planned", "median": 2e-6, "plan": {"strategy": "grid"}}
    lines: Lines = [
        {"kind": "run", "emulated": True, "commit": "abc", "python": "3", "steps": ["a", "b"]},
        {"kind": "step", "step": "a", "state": "begun"},
        {"kind": "smoke", "name": "x", "strategy": "grid", "layout": "l", "state": "begun"},
        {"kind": "smoke", "name": "y", "strategy": "grid", "layout": "l", "state": "begun"},
        {"kind": "smoke", "name": "y", "state": "ok", "seconds": 1},
        {"kind": "test", "id": "test_it", "outcome": "failed", "seconds": 1, "why": "a | b"},
        {"kind": "timing", **case, **planned, "of_copy": 0.5},
        {"kind": "timing", **case, "candidate": "copy", "median": 1e-6, "of_copy": 1.0},
        {"kind": "timing", **case, **planned, "shape": "4x8", "of_copy": 0.125},
        {"kind": "from a later version"},
    ]
    page = summary.page(lines, 0)
    for text in (
        "no time here is a GPU's",
        "was ended before its end",
        "| a | **begun, no end** |",
        "| b | not begun |",
        "| grid | l | 1 | 0 | 1 |",
        "| x | did not return |",
        "| test_it | a / b |",
        "| 2x8 | 1 | 0.50 grid |",
        "| geometric mean |  | 0.25 |",
    ):
        assert text in page, f"{text}\n\n{page}"


# ---- tests --------------------------------------------------------------------------------------

TESTS = """
import time
def test_that_hangs(): time.sleep(60)
def test_that_is_well(): pass
"""


def test_a_test_that_hangs_is_named_and_ends_alone(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", *test_step.bounded(0.5, 1)),
            *("--rootdir", tmp_path, "-p", "no:cacheprovider", tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    crashed = re.findall(r"crashed while running '(.*?)'", result.stdout)
    # Once or twice: the summary's line is cut at the terminal's width, but not where CI is set.
    assert set(crashed) == {"test_some.py::test_that_hangs"}
    assert "1 failed, 1 passed" in result.stdout
    assert "in test_that_hangs" in result.stderr
    assert "PASSED" in result.stdout and "::test_that_is_well" in result.stdout


# ---- all of it ----------------------------------------------------------------------------------


def emulated_check(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu", "run", str(out), "--emulated"]
    return subprocess.Popen([*command, "--limit", "3000"], cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_whole_of_it_on_the_emulated_device(tmp_path: Path) -> None:
    process = emulated_check(tmp_path)
    assert process.wait(3000) == 0, (tmp_path / summary.FILE).read_text()
    lines = journal.read(tmp_path / journal.FILE)[0]
    states = {line["step"]: line["state"] for line in lines if line["kind"] == "step"}
    assert set(states.values()) <= {"ok", "missing"}
    ok = {name for name, state in states.items() if state == "ok"}
    assert {"build", "build checks", "device checks", "timings", "peers", "cases"} <= ok
    called = {line["name"] for line in lines if line["kind"] == "smoke" and line["state"] == "ok"}
    assert len(called) == 5 * 2 * 3 * 4
    assert len(list(tmp_path.iterdir())) <= 8
    assert "no time here is a GPU's" in (tmp_path / summary.FILE).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_emulated_check_is_interrupted(number: int, tmp_path: Path) -> None:
    process = emulated_check(tmp_path)
    path = tmp_path / journal.FILE
    kind = ("smoke", "timing", "test")[number]
    assert wait_for(lambda: path.exists() and f'"kind": "{kind}"' in path.read_text(), 1500)
    time.sleep(random.Random(number).uniform(0, 3))
    before = len(journal.read(path)[0])
    process.send_signal((signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[number])
    process.wait(30)
    assert wait_for(lambda: not processes_of(str(tmp_path)))
    assert len(journal.read(path)[0]) >= before
    summary.write(tmp_path)
    page = (tmp_path / summary.FILE).read_text()
    assert "interrupted" in page or "**begun, no end**" in page
