"""A plugin of pytest: `--test-limit SECONDS` ends the process of a test that takes longer.

No signal and no exception ends a test that waits for a device. With xdist another process goes on
behind it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Generator
from typing import TextIO

import pytest

NAME = "benchmarks.gpu.time_limit"
OPTION = "--test-limit"
#: What says where the test was: it is not captured with the test's output.
TRACES = pytest.StashKey[TextIO]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption(OPTION, type=float, default=60.0, help="seconds of one test")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is captured."""
    config.stash[TRACES] = os.fdopen(os.dup(sys.stderr.fileno()), "w")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """All of a test, what prepares it included."""
    limit = item.config.getoption(OPTION)
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[TRACES])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
