from __future__ import annotations

import gc
import time

import pytest

from edgexception.agent import timing
from edgexception.agent.telemetry import INTERVAL_NS, Telemetry


def test_every_call_is_timed_and_the_pauses_are_not() -> None:
    calls = []

    def call() -> None:
        calls.append(gc.isenabled())
        time.sleep(0.002)

    pauses: list[int] = []

    def pause(now: int) -> None:
        pauses.append(now)
        time.sleep(0.01)

    times = timing.measure(call, 0, 8, pause)
    assert len(times) == len(calls) == len(pauses) + 1 == 8
    assert not any(calls), "the garbage collector must rest while times are taken"
    assert gc.isenabled()
    assert times.typecode == "q"
    assert min(times) >= 2_000_000
    assert sorted(times)[4] < 8_000_000, "a pause of 10 ms must not be in a time"


def test_it_goes_on_until_the_duration_is_over() -> None:
    times = timing.measure(lambda: time.sleep(0.001), 60_000_000, 3, lambda _: None)
    assert sum(times) >= 45_000_000
    assert 10 < len(times) < 70


def test_a_failing_call_leaves_the_collector_as_it_was() -> None:
    def call() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.measure(call, 0, 1, lambda _: None)
    assert gc.isenabled()


def test_telemetry_is_sampled_when_due_only() -> None:
    telemetry = Telemetry()
    telemetry.pause(time.monotonic_ns())
    first = telemetry.samples[0]["t_ns"]
    assert isinstance(first, int)
    telemetry.pause(first + INTERVAL_NS - 1)
    assert len(telemetry.samples) == 1
    telemetry.pause(first + INTERVAL_NS)
    assert len(telemetry.samples) == 2
    rss = telemetry.samples[0]["rss_bytes"]
    assert isinstance(rss, int)
    assert rss > 1 << 20
