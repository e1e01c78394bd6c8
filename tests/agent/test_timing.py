from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from edgexception.agent import telemetry as telemetry_module
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


def _tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_the_kernel_tells_clocks_temperatures_and_throttling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as the kernel of a Jetson has them: devfreq, thermal zones, cooling devices, hwmon."""
    gpu = "devfreq/17000000.gpu"
    _tree(
        tmp_path,
        {
            f"{gpu}/cur_freq": "918000000",
            f"{gpu}/min_freq": "306000000",
            f"{gpu}/max_freq": "918000000",
            "devfreq/31b10000.emc/cur_freq": "1",
            "thermal/thermal_zone0/type": "cpu-thermal",
            "thermal/thermal_zone0/temp": "52500",
            "thermal/thermal_zone1/type": "off-thermal",
            "thermal/cooling_device0/type": "pwm-fan",
            "thermal/cooling_device0/cur_state": "3",
            "thermal/cooling_device1/type": "cpufreq-cpu0",
            "thermal/cooling_device1/cur_state": "2",
            "hwmon/hwmon3/oc1_event_cnt": "7",
        },
    )
    monkeypatch.setattr(telemetry_module, "_DEVFREQ", tmp_path / "devfreq")
    monkeypatch.setattr(telemetry_module, "_THERMAL", tmp_path / "thermal")
    monkeypatch.setattr(telemetry_module, "_HWMON", tmp_path / "hwmon")
    monkeypatch.setattr(telemetry_module, "_CPU", tmp_path / "cpu")
    telemetry = Telemetry()
    telemetry.sample()
    _tree(tmp_path, {f"{gpu}/min_freq": "918000000"})
    telemetry.sample()
    first, second = telemetry.samples
    assert first["gpu_mhz"] == [918.0]
    assert (first["gpu_held"], second["gpu_held"]) == (False, True), "jetson_clocks was run"
    assert first["celsius"] == {"thermal_zone0:cpu-thermal": 52.5}
    assert first["throttle"] == {
        "hwmon3 oc1_event_cnt": 7,
        "cooling_device1 (cpufreq-cpu0)": 2,
    }, "a fan does not slow anything down"
    (tmp_path / gpu / "min_freq").unlink()
    telemetry.sample()
    assert telemetry.samples[-1]["gpu_held"] is None
