"""`build` and `run` of device_facts.cu: what the plans rest on, measured on this device."""

from __future__ import annotations

import sys

from benchmarks.gpu import native
from benchmarks.gpu.steps import ROOT

SOURCE = ROOT / "benchmarks" / "device_facts.cu"
PROGRAM = ROOT / "build" / "gpu" / "device_facts"


def main() -> int:
    """The exit status."""
    if sys.argv[1] == "build":
        return native.compile_program([SOURCE], PROGRAM, [])
    return native.relay([PROGRAM], "fact")


if __name__ == "__main__":
    raise SystemExit(main())
