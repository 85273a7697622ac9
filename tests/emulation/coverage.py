"""Which lines of csrc/cuda the checks reach: `cd tests && python -m emulation.coverage`.

A line counts as reached if any instantiation of its template ran it. Lines that only nvcc compiles
do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from emulation.build import CACHE, ROOT
from emulation.kernels import checks_done, program, run_side_by_side

REQUIRED = 95.0  # percent
FOLDER = ROOT / "csrc" / "cuda"
PART = (6, 9)  # of the cases: unoptimised and counted, they take three times as long

Counts = dict[int, int]


def gcov(data: Path) -> dict:
    """What gcov says of one object, by its .gcda file."""
    command = ["gcov", "--json-format", "--stdout", data.name]
    result = subprocess.run(command, cwd=data.parent, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def line_counts(reports: list[dict]) -> dict[Path, Counts]:
    """How often each line of csrc/cuda ran, over all objects and instantiations."""
    counts: dict[Path, Counts] = defaultdict(dict)
    for report in reports:
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if path.parent != FOLDER:
                continue
            of_file = counts[path]
            for line in file["lines"]:
                number = line["line_number"]
                of_file[number] = of_file.get(number, 0) + line["count"]
    return counts


def measure() -> dict[Path, Counts]:
    """Runs the checks and reads what they reached."""
    path = program("coverage")
    folder = CACHE / "coverage"
    for old in folder.glob("*.gcda"):
        old.unlink()
    print(f"{checks_done(run_side_by_side(path, PART))} checks")
    return line_counts([gcov(data) for data in sorted(folder.glob("*.gcda"))])


def summary(counts: dict[Path, Counts]) -> float:
    """Prints what was not reached, and returns the percentage that was."""
    reached = total = 0
    for path, of_file in sorted(counts.items()):
        missed = sorted(number for number, count in of_file.items() if count == 0)
        reached += len(of_file) - len(missed)
        total += len(of_file)
        text = f", not lines {', '.join(map(str, missed))}" if missed else ""
        print(f"{path.relative_to(ROOT)}: {len(of_file) - len(missed)} of {len(of_file)}{text}")
    return 100 * reached / total


def main() -> None:
    percent = summary(measure())
    print(f"coverage of csrc/cuda: {percent:.1f} %")
    if percent < REQUIRED:
        sys.exit(f"at least {REQUIRED:.0f} % are required")


if __name__ == "__main__":
    main()
