"""Runs a module as `python -m` does, for a check that may have to end it.

    python -m benchmarks.gpu.launch [--again] module [argument...]

On SIGTERM it prints where all threads are, at once and whatever they wait for, and raises
KeyboardInterrupt where Python is at work: a program can write down what it has. With --again, for a
module that works off a list, another process goes on behind the entry that ended one (items.py).
"""

from __future__ import annotations

import faulthandler
import runpy
import signal
import sys

from benchmarks.gpu import items

NAME = "benchmarks.gpu.launch"
AGAIN = "--again"


def _run(module: str, arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """See above."""
    first, *rest = sys.argv[1:]
    if first == AGAIN:
        raise SystemExit(items.supervise([sys.executable, "-u", "-m", NAME, *rest]))
    _run(first, rest)


if __name__ == "__main__":
    main()
