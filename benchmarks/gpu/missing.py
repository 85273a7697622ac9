"""How a step says that this machine lacks what it needs."""

from __future__ import annotations

from pathlib import Path
from shutil import which
from typing import NoReturn

#: As automake's tests. The last line that such a step prints is the reason.
STATUS = 77
#: Of a driver; containers hide some of them.
SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")


def leave(reason: str) -> NoReturn:
    """Ends the process."""
    print(f"missing: {reason}", flush=True)
    raise SystemExit(STATUS)


def has_gpu() -> bool:
    """Whether there seems to be one; nothing is loaded to find out."""
    return which("nvidia-smi") is not None or any(Path(sign).exists() for sign in SIGNS)
