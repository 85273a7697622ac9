"""`python -m benchmarks.gpu run|summary`: see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import run, steps, summary

TOTAL_S = 480.0


def main() -> int:
    """The exit status: 0 where every step did what it is for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="all steps, within a time")
    runs.add_argument("out", type=Path, help="folder for what is kept: at most 8 files")
    runs.add_argument("--limit", type=float, default=TOTAL_S, help="seconds for all of it")
    runs.add_argument("--only", default="", help="steps, by the beginnings of their names: a,b")
    runs.add_argument(
        "--emulated",
        action="store_true",
        help="without a GPU: the CUDA kernels on the emulated device, each step at its smallest",
    )
    shows = commands.add_parser("summary", help="summary.md from the lines that there are")
    shows.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "summary":
        return summary.main(arguments.folder)
    steps.find_tools()
    names = [name for name in arguments.only.split(",") if name]
    stages = steps.only(steps.table(arguments.emulated), names)
    check = run.Check(arguments.out.resolve(), steps.WORK, arguments.limit, arguments.emulated)
    return check.run(stages)


if __name__ == "__main__":
    raise SystemExit(main())
