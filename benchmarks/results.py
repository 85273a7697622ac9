"""Result files: a JSON document with all medians and quartiles, and the tables made of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.candidates import OURS
from benchmarks.environment import collect, device_slug, git_state
from benchmarks.record import KINDS, Entry
from benchmarks.summary import control, summarise

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
AT_LIMIT = "at the copy limit"
KILLED = "it was killed"
CASE_KEYS = ["shape", "layout", "dtype", "op", "direction", "threads"]
NOTES = [
    "Times are seconds per call, medians with quartiles; candidates took turns in one run. No "
    "speed-up is claimed (~) where the ranges between the quartiles overlap.",
    "fraction: (compulsory bytes / time) over (bytes / time) of a copy of the input, see "
    "traffic.py. clone: x.clone(), allocation included, with the allocator's pages; warm_copy: "
    "into a buffer that exists already; huge_clone: into fresh huge pages; fastest_copy: the least "
    "fraction of these.",
    "at the copy limit: what a kernel would reach that takes no longer than the fastest copy takes "
    "for the compulsory bytes: each case's figure divided by its fraction of the fastest copy.",
    "batchnorm_ext keeps the memory of its outputs in training and asks for transparent huge "
    "pages, torch by default does neither, so for outputs that the allocator takes from the kernel "
    "at each call (above 32 MB always) part of a speed-up is saved page faults, and a fraction of "
    "clone can exceed 1. BATCHNORM_EXT_CPU_CACHE=0 with --allocator huge-pages shows what is left.",
]


def header(settings: dict[str, Any]) -> dict[str, Any]:
    """What every result file starts with."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_state(),
        "settings": settings,
        "environment": collect(settings.get("device", "cpu")),
    }


def build_result(entries: Iterable[Entry]) -> dict[str, Any]:
    """The document of one run, whether it came to its end or not.

    `incomplete` says why it ended early, `skipped` names the groups that lack a case.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for kind, value in entries:
        found[kind].append(value)
    cases, done = found["case"], set(found["done"])
    return {
        **found["header"][0],
        "notes": NOTES,
        "incomplete": found["end"][0] if found["end"] else KILLED,
        "skipped": [name for name in found["planned"] if name not in done],
        "failures": found["failures"],
        "peer_failures": found["peer_failures"],
        "control": control(cases),
        "summary": summarise(cases),
        "host_time": found["host_time"],
        "saved_bytes": found["saved_bytes"],
        "cases": cases,
    }


def free_stem(folder: Path, stem: str, suffixes: Iterable[str]) -> Path:
    """`folder/stem`, or with -2, -3, ... so that no file of an earlier run is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    endings = list(suffixes)
    number = 1
    while True:
        candidate = folder / (stem if number == 1 else f"{stem}-{number}")
        if not any(Path(f"{candidate}{ending}").exists() for ending in endings):
            return candidate
        number += 1


def stem_for(result: dict[str, Any]) -> str:
    """The file name without ending: device, date, preset, and the allocator if it is not usual."""
    parts = [device_slug(result["environment"]), result["created"][:10]]
    parts.append(str(result["settings"]["preset"]))
    if result["environment"]["torch_allocator"] != "default":
        parts.append("hugepages")
    return "-".join(parts)


def write_json(result: dict[str, Any], path: Path, indent: int | None = 1) -> Path:
    """Write the document; refuses to write over a file."""
    with path.open("x", encoding="utf-8") as file:
        json.dump(result, file, indent=indent)
        file.write("\n")
    return path


def write_result(result: dict[str, Any], folder: Path | None) -> Path:
    """Write the document alone, under a name that is free; `folder` is by default RESULTS."""
    stem = free_stem(folder or RESULTS, stem_for(result), [".json"])
    return write_json(result, Path(f"{stem}.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a document; ValueError where it is not one that this version knows.

    What is made of the cases is made anew: an older file gets the columns that came after it.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a result file ({error})") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or "cases" not in result:
        raise ValueError(f"{path}: not a result file with schema {SCHEMA}")
    result["summary"] = summarise(result["cases"])
    return result


def frame(result: dict[str, Any]) -> pd.DataFrame:
    """One line per case and candidate, the copies included; times in microseconds."""
    rows = []
    for case in result["cases"]:
        ours = case["timings"].get(OURS)
        for name, timing in case["timings"].items():
            row = {key: case[key] for key in ["family", *CASE_KEYS]}
            row["candidate"] = name
            row.update({f"{key}_us": timing[key] * 1e6 for key in ("median", "q1", "q3")})
            row["rounds"], row["calls"] = timing["rounds"], timing["calls"]
            speedup = case["speedup"].get(name)
            row["times_ours"] = timing["median"] / ours["median"]
            row["decided"] = speedup["decided"] if speedup else None
            for limit, value in case["fraction"].get(name, {}).items():
                row[f"fraction_{limit}"] = value
            row["beyond_cache"] = case["beyond_cache"]
            rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else [*CASE_KEYS, "candidate"])


def summary_frame(result: dict[str, Any]) -> pd.DataFrame:
    """The summary as a table: one line per (op, direction, layout, dtype, threads)."""
    rows = []
    for entry in result["summary"]:
        row = {key: value for key, value in entry.items() if not isinstance(value, dict)}
        for baseline, values in entry["speedup"].items():
            row[f"x {baseline}"] = values["geometric_mean"]
            row[f"x {baseline} {AT_LIMIT}"] = values["at_limit"]
            row[f"worst {baseline}"] = values["worst"]
            row[f"worst shape {baseline}"] = values["worst_shape"]
            row[f"~ {baseline}"] = f"{values['undecided']}/{values['cases']}"
        for limit, value in entry["beyond_cache"].items():
            row[f"fraction {limit}"] = value
        rows.append(row)
    return pd.DataFrame(rows)


def incomplete_text(result: dict[str, Any]) -> str:
    """What is not in a result, and why; empty where all is. Older files do not say why."""
    reason = result.get("incomplete", "")
    if not reason and not result["skipped"]:
        return ""
    because = f": {reason}" if reason else ""
    return f"Incomplete{because}. Groups of cases skipped: {len(result['skipped'])}."


def write_markdown(result: dict[str, Any], path: Path) -> Path:
    """Summary and every case as Markdown."""
    cases = frame(result)
    sections = {
        "Summary": summary_frame(result),
        "Bytes kept for backward": pd.DataFrame(result["saved_bytes"]),
        "Cases": cases,
    }
    environment = result["environment"]
    incomplete = incomplete_text(result)
    lines = [
        f"# {result['settings']['preset']}, {result['created']}",
        *(["", f"**{incomplete}** " + "; ".join(result["skipped"])] if incomplete else []),
        "",
        f"{environment['cpu'].get('Model name', '')}, torch {environment['torch']}, "
        f"commit {result['git']['commit'] or 'unknown'}",
        "",
        *(f"- {note}" for note in result["notes"]),
    ]
    for title, table in sections.items():
        text = table.to_markdown(index=False, floatfmt=".3f") if len(table) else "(none)"
        lines += ["", f"## {title}", "", text]
    with path.open("x", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path
