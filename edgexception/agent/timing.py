"""The timed loop: every raw iteration is kept."""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable


def warm_up(call: Callable[[], object], duration_ns: int, pause: Callable[[int], None]) -> int:
    """Call at least once and until the time is over; return the number of calls."""
    return len(_repeat(call, duration_ns, 1, pause))


def measure(
    call: Callable[[], object],
    duration_ns: int,
    min_iterations: int,
    pause: Callable[[int], None],
) -> array[int]:
    """Time every call, for at least the duration and the number of iterations, in ns.

    `pause(now_ns)` runs between two calls, outside the times. Python's garbage collector rests.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _repeat(call, duration_ns, min_iterations, pause)
    finally:
        if collecting:
            gc.enable()


def _repeat(
    call: Callable[[], object],
    duration_ns: int,
    min_iterations: int,
    pause: Callable[[int], None],
) -> array[int]:
    times = array("q")
    clock = time.monotonic_ns
    start = clock()
    while True:
        begin = clock()
        call()
        end = clock()
        times.append(end - begin)
        if end - start >= duration_ns and len(times) >= min_iterations:
            return times
        pause(end)
