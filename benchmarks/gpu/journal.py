"""The file of JSON lines that all processes of a check write what they measured to.

A line is one write to a file that is open for appending: lines of several processes do not mix, and
what was written stays, whatever becomes of the process.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "measurements.jsonl"
#: Where the file is and whose lines these are, for the processes of a step.
VARIABLE, STEP_VARIABLE = "BATCHNORM_EXT_GPU_CHECK_FILE", "BATCHNORM_EXT_GPU_CHECK_STEP"
#: A power cut may take the lines of so many seconds; nothing else takes any.
SYNC_S = 1.0

Line = dict[str, Any]


class Journal:
    """Appends lines to a file; without one, prints them."""

    def __init__(self, path: Path | None, **always: Any) -> None:
        self.path = path
        self.always = always  # in every line
        self.lost = 0
        self._synced = 0.0

    @staticmethod
    def of_the_check() -> Journal:
        """The one that the check has named to its steps."""
        path = os.environ.get(VARIABLE)
        return Journal(Path(path) if path else None, step=os.environ.get(STEP_VARIABLE, ""))

    def write(self, kind: str, **fields: Any) -> None:
        """One line. Where the file takes none, the line is printed: a step's output is kept too."""
        fields = {"kind": kind, "at": round(time.time(), 3), **self.always, **fields}
        line = json.dumps(fields, default=str)
        if self.path is None:
            print(line, flush=True)
            return
        try:
            self._append(line)
        except OSError as error:
            self.lost += 1
            print(f"{self.path} takes no line ({error.strerror}): {line}", flush=True)

    def _append(self, line: str) -> None:
        assert self.path is not None
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            data = f"{line}\n".encode()
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data  # a full disk has cut the line before
            written = os.write(file, data)
            if written < len(data):
                raise OSError(0, f"{written} of {len(data)} bytes were written")
            if time.monotonic() > self._synced + SYNC_S:
                os.fsync(file)
                self._synced = time.monotonic()
        finally:
            os.close(file)


def _parsed(text: bytes) -> Line | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("kind"), str) else None


def read(path: Path) -> tuple[list[Line], int]:
    """The lines, and how many could not be read: that of a process that was ended, at most."""
    with path.open("rb") as file:
        data = file.read(os.fstat(file.fileno()).st_size)  # so far: others may be writing
    texts = [text for text in data.split(b"\n") if text.strip()]
    parsed = [_parsed(text) for text in texts]
    lines = [line for line in parsed if line is not None]
    return lines, len(texts) - len(lines)
