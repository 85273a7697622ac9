"""A page of Markdown from the lines of a check, however many there are.

python -m benchmarks.gpu summary FOLDER      also on another machine
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import journal
from benchmarks.gpu.journal import Line

FILE = "summary.md"
MOST_FAILURES = 40
OF_EVERY_LINE = ("kind", "at", "step")


def cell(value: Any) -> str:
    """A number with its digits, or text that a table can hold."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")[:160]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown; nothing where there are no rows."""
    lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    if not lines:
        return []
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, ""]


def section(title: str, lines: Sequence[str]) -> list[str]:
    """With its head, where there is something to say."""
    return [f"## {title}", "", *lines, ""] if lines else []


def geometric_mean(values: Sequence[float]) -> float:
    """nan of none."""
    if not values:
        return math.nan
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def page(lines: Sequence[Line], unreadable: int) -> str:
    """All of it."""
    of: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        of[line["kind"]].append(line)
    parts = [
        *_head(of, unreadable),
        *section("Steps", _steps(of)),
        *section("First calls", _smoke(of["smoke"])),
        *section("Tests", _tests(of["test"])),
        *section("Wrong results", _named(of["wrong"], "error")),
        *section("Checks of the kernels", _plain(of["check"])),
        *section("Facts of the device", _plain(of["fact"])),
        *section("Times", _times(of["timing"])),
        *section("Not timed", _named(of["untimed"], "why")),
        *section("Metrics of four kernels", _metrics(of["metric"])),
    ]
    return "\n".join(parts) + "\n"


def _head(of: dict[str, list[Line]], unreadable: int) -> list[str]:
    run = of["run"][-1] if of["run"] else {}
    lines = ["# Check on a GPU", ""]
    if run.get("emulated"):
        lines += ["On the emulated device: **no time here is a GPU's.**", ""]
    lines += [f"- commit {run.get('commit', 'unknown')}, Python {run.get('python', 'unknown')}"]
    devices = [
        {k: v for k, v in d.items() if k not in (*OF_EVERY_LINE, "what")} for d in of["device"]
    ]
    if devices:
        lines += [f"- {name}: {value}" for name, value in devices[0].items()]
    if not of["run-end"]:
        lines += ["- **The check was ended before its end.**"]
    if unreadable:
        lines += [f"- {unreadable} lines could not be read"]
    return [*lines, ""]


def _steps(of: dict[str, list[Line]]) -> list[str]:
    planned = of["run"][-1].get("steps", []) if of["run"] else []
    last = {line["step"]: line for line in of["step"]}
    rows = []
    for name in dict.fromkeys([*planned, *last]):
        line = last.get(name, {"state": "not begun"})
        state = "**begun, no end**" if line["state"] == "begun" else line["state"]
        rows.append([name, state, line.get("seconds", ""), line.get("why", "")])
    return table(["step", "", "s", "why"], rows)


def _smoke(lines: Sequence[Line]) -> list[str]:
    last = {line["name"]: line for line in lines}
    where = {line["name"]: (line["strategy"], line["layout"]) for line in lines if "layout" in line}
    counts: dict[Any, Counter[str]] = defaultdict(Counter)
    for name, line in last.items():
        counts[where.get(name, ("", ""))][line["state"]] += 1
    rows = [[*key, c["ok"], c["failed"], c["begun"]] for key, c in counts.items()]
    bad = [[name, line["state"].replace("begun", "did not return"), line.get("why", "")]
           for name, line in last.items() if line["state"] != "ok"]  # fmt: skip
    head = ["strategy", "layout", "ok", "failed", "did not return"]
    return table(head, rows) + table(["call", "", "why"], bad[:MOST_FAILURES])


def _tests(lines: Sequence[Line]) -> list[str]:
    outcomes = Counter(line["outcome"] for line in lines)
    text = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    bad = [[line["id"], line.get("why", "")] for line in lines if line["outcome"] == "failed"]
    return ([text, ""] if text else []) + table(["failed", "why"], bad[:MOST_FAILURES])


CASE = ("shape", "layout", "dtype", "op", "direction")


def _named(lines: Sequence[Line], field: str) -> list[str]:
    head = [*CASE, "candidate", field]
    return table(head, [[line.get(name, "") for name in head] for line in lines[:MOST_FAILURES]])


def _plain(lines: Sequence[Line]) -> list[str]:
    """Facts, and what else programs say: their last lines, where they say much."""
    said = [line for line in lines if "text" in line]
    told = [line for line in lines if "text" not in line]
    texts = [f"- {line.get('step', '')}: {cell(line['text'])}" for line in said[-MOST_FAILURES:]]
    return texts + ["- " + ", ".join(_fields(line)) for line in told]


def _fields(line: Line) -> list[str]:
    return [f"{k} {cell(v)}" for k, v in line.items() if k not in OF_EVERY_LINE]


def _times(lines: Sequence[Line]) -> list[str]:
    """A table for each group of cases; fractions of a copy of the same bytes, and the copy's us."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Line]]] = defaultdict(dict)
    for line in lines:
        key = tuple(line[name] for name in ("what", "op", "direction", "layout", "dtype"))
        groups[key].setdefault(line["shape"], {})[line["candidate"]] = line
    parts: list[str] = []
    for key, by_shape in groups.items():
        names = list(dict.fromkeys(name for found in by_shape.values() for name in found))
        names = [name for name in names if name != "copy"]
        rows: list[list[Any]] = []
        for shape, found in by_shape.items():
            copied = found["copy"]["median"] * 1e6 if "copy" in found else ""
            rows.append([shape, copied, *(_fraction(found.get(name)) for name in names)])
        means = [
            geometric_mean([f[name]["of_copy"] for f in by_shape.values() if name in f])
            for name in names
        ]
        rows.append(["geometric mean", "", *means])
        head = ["fraction of the copy", "copy, us", *names]
        parts += [f"**{', '.join(key)}**", "", *table(head, rows)]
    return parts


def _fraction(line: Line | None) -> str:
    if line is None:
        return ""
    strategy = (line.get("plan") or {}).get("strategy", "")
    return f"{line['of_copy']:.2f}" + (f" {strategy}" if line["candidate"] == "planned" else "")


def _metrics(lines: Sequence[Line]) -> list[str]:
    kernels = list(dict.fromkeys(line["kernel"] for line in lines))
    values: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for line in lines:
        values[line["metric"], line["unit"]][line["kernel"]] = line["value"]
    names = [f"{k}: {cell(name)}" for k, name in enumerate(kernels, 1)]
    head = ["metric", "unit", *(str(k) for k in range(1, len(kernels) + 1))]
    rows = [[*key, *(found.get(name, "") for name in kernels)] for key, found in values.items()]
    return [*(f"- {name}" for name in names), "", *table(head, rows)] if lines else []


def write(folder: Path) -> Path:
    """summary.md beside the lines; what was there stays until the new one is whole."""
    text = page(*journal.read(folder / journal.FILE))
    own = folder / f".{FILE}"
    try:
        own.write_text(text, encoding="utf-8")
        own.replace(folder / FILE)
    finally:
        own.unlink(missing_ok=True)
    return folder / FILE


def main(folder: Path) -> int:
    """The exit status."""
    try:
        print(write(folder))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
