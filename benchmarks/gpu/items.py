"""A list that is worked off entry by entry, also where an entry ends or hangs the process.

What an illegal access leaves of a CUDA context is of no use, and a kernel that does not return can
not be given up: the process ends, and another one goes on behind the entry (`supervise`). Each
entry is named before it is begun, so that it is known which one that was.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence

#: Where to begin, and the file to say in how far one has come.
FIRST, PROGRESS = "BATCHNORM_EXT_FIRST_ITEM", "BATCHNORM_EXT_ITEM_PROGRESS"
END = "end"
#: The exit status of a process that is of no use any more.
LOST = 70
#: Where each entry ends its process, more of them tell nothing more.
MOST_STARTS = 6
_SET_DEATH_SIGNAL = 1  # of prctl(2)


def end_with_parent() -> None:
    """Between fork and exec: also a parent that is killed takes this process with it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def work_off(
    items: Mapping[str, Callable[[], object]], limit: float, recover: Callable[[], object]
) -> int:
    """Calls each. An exception is printed, and is the exit status 1 in the end.

    An entry that takes longer than `limit` seconds ends the process. `recover` is called after an
    exception, and raises where the device is lost.
    """
    failed = False
    for name, call in list(items.items())[int(os.environ.get(FIRST, "0")) :]:
        print(name, flush=True)
        _tell(str(list(items).index(name)))
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            call()
        except Exception:
            failed = True
            traceback.print_exc()
            _recover(recover)
        finally:
            faulthandler.cancel_dump_traceback_later()
    _tell(END)
    return int(failed)


def _recover(recover: Callable[[], object]) -> None:
    try:
        recover()
    except Exception as error:
        print(f"the device is lost to this process: {error}", flush=True)
        sys.stderr.flush()
        os._exit(LOST)  # what is left at an exit may wait for the device


def _tell(text: str) -> None:
    if file := os.environ.get(PROGRESS):
        os.write(int(file), f"{text}\n".encode())


def supervise(command: Sequence[str]) -> int:
    """Runs it as often as it takes to come to the list's end. 0 where every entry was well."""
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended  # the command has got the signal too: it is waited for
        ended = True

    signal.signal(signal.SIGTERM, end)
    first, worst = 0, 0
    for _ in range(MOST_STARTS):
        with tempfile.TemporaryFile() as progress:
            environment = {**os.environ, FIRST: str(first), PROGRESS: str(progress.fileno())}
            process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[progress.fileno()],
                preexec_fn=end_with_parent,
            )
            status = abs(process.wait())
            progress.seek(0)
            told = progress.read().decode().split()
        worst = max(worst, status)
        if ended or not told or told[-1] == END:
            return worst
        print(f"exit status {status}; another process goes on behind this", flush=True)
        first = int(told[-1]) + 1
    print(f"given up after {MOST_STARTS} processes", flush=True)
    return max(worst, 1)
