"""Runs the steps: each in a process group of its own, within its time, its output in a log.

Nothing that a step does or fails to do stops the next one. What was measured is on disk at once
(journal.py); the summary and the archive of the logs are made anew after each stage.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import items, journal, missing, summary
from benchmarks.gpu.steps import ROOT, Step

#: Asked to end, a step may write down what it has; after as long again nobody waits for it.
GRACE_S = 5.0
#: A step that gets less than this is not begun.
LEAST_S = 3.0
POLL_S = 0.02
TAIL_LINES, TAIL_BYTES = 3, 2000
ARCHIVE = "logs.tar.gz"
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
        return [line.rstrip()[:200] for line in lines if line.strip()][-TAIL_LINES:]
    return []


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return "unknown"


@dataclass
class Running:
    """A step that was begun."""

    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    limit: float
    why: str = ""  # it was asked to end
    asked: float = 0.0
    killed: float = 0.0

    def send(self, number: signal.Signals) -> None:
        """To the whole group, also where its first process is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def ask_to_end(self, why: str) -> None:
        """SIGTERM, on which Python programs say where they are (launch.py)."""
        if not self.why:
            self.why, self.asked = why, time.monotonic()
            self.send(signal.SIGTERM)

    def is_over(self) -> bool:
        """Whether it has ended; one that is late is ended, and at last given up."""
        now = time.monotonic()
        if self.process.poll() is not None:
            self.send(signal.SIGKILL)  # what it left running
            return True
        if now > self.began + self.limit:
            self.ask_to_end(f"took more than {self.limit:.0f} s")
        if self.why and not self.killed and now > self.asked + GRACE_S:
            self.killed = now
            self.send(signal.SIGKILL)
        return bool(self.killed) and now > self.killed + GRACE_S

    def outcome(self) -> tuple[str, str]:
        """A word for it, and the reason where it is not ok."""
        status = self.process.poll()
        if self.why:
            late = " and did not end by itself" if self.killed else ""
            return ("interrupted" if self.why == "interrupted" else "timed out"), self.why + late
        if status == 0:
            return "ok", ""
        if status is not None and status == self.step.time_was_up:
            return "ok", "its time was up"
        last = (tail(self.log) or ["no output"])[-1]
        if status == missing.STATUS:
            return "missing", last.removeprefix("missing: ")
        if status is not None and status < 0:
            return "failed", f"ended by {signal.Signals(-status).name}"
        return "failed", f"exit status {status}: {last}"


class Check:
    """One run of the steps. `lenient`: what is missing here is no failure."""

    def __init__(self, out: Path, work: Path, limit: float, lenient: bool = False) -> None:
        self.out, self.work, self.limit, self.lenient = out, work, limit, lenient
        self.logs = work / "logs"
        self.journal = journal.Journal(out / journal.FILE)
        self.began = time.monotonic()
        self.troubles: list[str] = []
        self.interrupted = ""
        self.width = os.cpu_count() or 1

    @property
    def left(self) -> float:
        """Seconds."""
        return self.began + self.limit - time.monotonic()

    def run(self, stages: Sequence[Sequence[Step]]) -> int:
        """The exit status."""
        before = {number: signal.signal(number, self._interrupt) for number in INTERRUPTS}
        try:
            return self._run(stages)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, stages: Sequence[Sequence[Step]]) -> int:
        self._prepare()
        self.journal.write(
            "run",
            limit=self.limit,
            emulated=self.lenient,
            commit=_commit(),
            machine=platform.node(),
            python=sys.version.split()[0],
            steps=[step.name for stage in stages for step in stage],
        )
        for stage in stages:
            self._stage(stage)
            self._keep()
        self.journal.write("run-end", troubles=self.troubles, interrupted=self.interrupted)
        self._keep()
        return self._finish()

    def _interrupt(self, number: int, frame: object) -> None:
        self.interrupted = signal.Signals(number).name

    def _prepare(self) -> None:
        """An earlier run's lines would be taken for this one's."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.logs.mkdir(parents=True)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if (self.out / journal.FILE).is_file():
                (self.out / journal.FILE).unlink()
        except OSError as error:
            self._trouble(f"{self.out}: {error.strerror}")

    def _trouble(self, text: str) -> None:
        self.troubles.append(text)
        print(f"    {text}", flush=True)

    # ---- steps -------------------------------------------------------------------------------

    def _stage(self, steps: Sequence[Step]) -> None:
        waiting, running = list(steps), list[Running]()
        while waiting or running:
            while waiting and len(running) < self.width:
                running += self._begin(waiting.pop(0))
            for each in [each for each in running if self._is_done(each)]:
                running.remove(each)
                self._end(each)
            time.sleep(POLL_S)

    def _is_done(self, running: Running) -> bool:
        if self.interrupted:
            running.ask_to_end("interrupted")
        return running.is_over()

    def _begin(self, step: Step) -> list[Running]:
        limit = min(step.limit, self.left)
        if self.interrupted:
            return self._left_out(step, "interrupted", f"by {self.interrupted}")
        if lack := step.lacks():
            return self._left_out(step, "missing", lack)
        if limit < min(LEAST_S, step.limit):
            return self._left_out(step, "no time", f"{self.limit:.0f} s are over")
        after = time.monotonic() - self.began
        print(f"=== {step.name} (after {after:.0f} s, at most {limit:.0f} s)", flush=True)
        self.journal.write("step", step=step.name, state="begun", command=list(step.command))
        log = self.logs / step.log
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            journal.VARIABLE: str(self.out / journal.FILE),
            journal.STEP_VARIABLE: step.name,
            **step.environment,
        }
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    step.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=items.end_with_parent,
                )
        except OSError as error:
            return self._left_out(step, "failed", f"{step.command[0]}: {error.strerror}")
        return [Running(step, process, log, time.monotonic(), limit)]

    def _left_out(self, step: Step, state: str, why: str) -> list[Running]:
        print(f"=== {step.name}", flush=True)
        self._record(step, state, why, 0.0)
        return []

    def _end(self, running: Running) -> None:
        for line in tail(running.log):
            print(f"    {running.step.name} | {line}", flush=True)
        self._record(running.step, *running.outcome(), time.monotonic() - running.began)

    def _record(self, step: Step, state: str, why: str, seconds: float) -> None:
        self.journal.write("step", step=step.name, state=state, why=why, seconds=round(seconds, 2))
        text = f"{step.name}: {state}" + (f", {why}" if why else f" in {seconds:.1f} s")
        if state == "ok" or (state == "missing" and self.lenient):
            print(f"    {text}", flush=True)
        else:
            self._trouble(text)

    # ---- what is kept ------------------------------------------------------------------------

    def _keep(self) -> None:
        self._try("the summary", lambda: summary.write(self.out))
        self._try(ARCHIVE, self._archive)

    def _try(self, what: str, keep: Callable[[], object]) -> None:
        try:
            keep()
        except Exception as error:  # nothing here may stop the next step
            self._trouble(f"{what} could not be made: {error}")

    def _archive(self) -> None:
        """By a name of its own first: the archive that was there stays until this one is whole."""
        own = self.out / f".{ARCHIVE}"
        try:
            with tarfile.open(own, "w:gz") as archive:
                archive.add(self.work, arcname=".")
            own.replace(self.out / ARCHIVE)
        finally:
            own.unlink(missing_ok=True)

    def _finish(self) -> int:
        if self.journal.lost:
            self._trouble(f"{self.journal.path} could not be written")
        print(f"\n{time.monotonic() - self.began:.0f} s, output in {self.out}")
        for trouble in dict.fromkeys(self.troubles):
            print(f"TROUBLE: {trouble}")
        return 130 if self.interrupted else int(bool(self.troubles))
