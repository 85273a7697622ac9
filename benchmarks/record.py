"""What a run finds, entry by entry: in memory and, where asked for, at once in a file.

An entry is one kind and its value. A result is made of entries alone (results.build_result), so
a run that was interrupted has one as a whole run has, and so have the lines of one that was killed.

    header                    what every result file starts with; the first entry
    planned, done             a group's name: before anything is measured, and after its last case
    host_time, saved_bytes    a row
    case                      a case
    failures, peer_failures   a text
    end                       why the run ended before its last group, or nothing; the last entry
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KINDS = (
    *("header", "planned", "done", "host_time", "saved_bytes", "case"),
    *("failures", "peer_failures", "end"),
)
Entry = tuple[str, Any]


class Record:
    """The entries of a run. A file at `path` has each of them as a line as soon as it is added."""

    def __init__(self, path: Path | None = None) -> None:
        """Refuses to write over a file."""
        self.entries: list[Entry] = []
        # A buffer of one line: a line that was written survives whatever ends the process.
        self._file = path.open("x", buffering=1, encoding="utf-8") if path else None

    def add(self, kind: str, value: Any) -> None:
        """Keep a value of one of KINDS."""
        self.entries.append((kind, value))
        if self._file:
            self._file.write(json.dumps({kind: value}) + "\n")


def read(path: Path) -> list[Entry]:
    """The entries in a file. What was cut off while it was written is left out.

    ValueError where it is not such a file.
    """
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    entries: list[Entry] = []
    for number, line in enumerate(whole_lines, start=1):
        try:
            ((kind, value),) = json.loads(line).items()
        except (ValueError, AttributeError):
            kind, value = "", None
        if kind not in KINDS or (kind == "header") != (number == 1):
            raise ValueError(f"{path}: line {number} is not one of a run")
        entries.append((kind, value))
    if not entries:
        raise ValueError(f"{path}: there is no whole line of a run in it")
    return entries
