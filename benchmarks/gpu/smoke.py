"""One call of each pass, dtype and kind of shape, by one strategy in one layout, checked.

python -m benchmarks.gpu.smoke STRATEGY LAYOUT      "planned" leaves the plan alone
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable

from benchmarks.gpu import device, emulated, items, journal

#: A call that takes longer hangs.
LIMIT_S = 10.0
#: Of each layout: whole vectors; channels with small planes, or without any; nothing aligned.
SHAPES = {
    "channels_first": ((8, 16, 28, 28), (8, 24, 7, 7), (3, 5, 17, 19)),
    "channels_last": ((8, 16, 28, 28), (300, 40), (9, 5, 7)),
}
EMULATED_SHAPES = ((4, 16, 4, 6),)
PASSES = ("forward", "backward", "eval")


def main() -> int:
    """The exit status."""
    strategy, layout = sys.argv[1:]
    here = device.here()
    emulated.use_tests()
    os.environ["BATCHNORM_EXT_TEST_DEVICE"] = here.name
    # After the device is there: the tests ask what they run on when they are imported.
    from strategies import DTYPES, Case, check_backward, check_forward

    lines = journal.Journal.of_the_check()
    fields = {} if strategy == "planned" else {"strategy": strategy}
    shapes = EMULATED_SHAPES if emulated.WANTED else SHAPES[layout]

    def call(name: str, direction: str, case: Case) -> None:
        lines.write("smoke", name=name, strategy=strategy, layout=layout, state="begun")
        began = time.perf_counter()
        try:
            with device.forced(fields):
                (check_backward if direction == "backward" else check_forward)(case)
            here.synchronize()
        except Exception as error:
            lines.write("smoke", name=name, state="failed", why=str(error)[:500])
            raise
        seconds = round(time.perf_counter() - began, 3)
        lines.write("smoke", name=name, state="ok", seconds=seconds)

    calls: dict[str, Callable[[], object]] = {}
    for shape in shapes:
        for direction in PASSES:
            for dtype in DTYPES:
                case = Case(
                    shape,
                    dtype,
                    "channels_last" if layout == "channels_last" else "contiguous",
                    activation="relu",
                    mode="eval" if direction == "eval" else "train",
                )
                words = (strategy, layout, direction, str(dtype), "x".join(map(str, shape)))
                name = " ".join(words)
                calls[name] = functools.partial(call, name, direction, case)
    return items.work_off(calls, LIMIT_S, here.synchronize)


if __name__ == "__main__":
    raise SystemExit(main())
