"""Throttling, clocks and energy, judged from samples as an agent takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgexception.agent.jetson import parse_tegrastats
from edgexception.bench.conditions import Conditions, conditions, read_samples
from edgexception.errors import BadArtifact

RECORDED = json.loads(
    (Path(__file__).parents[1] / "agent/tegrastats_recorded.json").read_text(encoding="utf-8")
)
TIMES = [np.array([4_000_000, 6_000_000], np.int64)]  # 5 ms


def sample(phase: str, **changes: Any) -> dict[str, Any]:
    plain = {"cpu_mhz": [1000.0, 3000.0], "gpu_mhz": [], "celsius": {"cpu": 40.5}, "throttle": {},
             "tegrastats": []}  # fmt: skip
    return {"t_ns": 1, "phase": phase, **plain, **changes}


def line(**milliwatts: int) -> dict[str, Any]:
    return {"gpu_mhz": [], "celsius": {}, "milliwatts": milliwatts}


def judged(path: Path, *samples: dict[str, Any], batch: int = 1) -> Conditions:
    path.joinpath("telemetry.json").write_text(json.dumps(samples))
    found = read_samples(path / "telemetry.json")
    return conditions([found], TIMES, batch, "15W")


def test_nothing_is_marked_on_a_machine_that_keeps_its_clock(tmp_path: Path) -> None:
    slow_start = sample("warm-up", cpu_mhz=[500.0])
    found = judged(tmp_path, sample("open"), slow_start, sample("timing"), sample("timing"))
    assert (found.samples, found.marked, found.throttled) == (2, 0, False)
    assert found.clock_mhz == (3000.0, 3000.0)
    assert found.hottest == ("cpu", 40.5)
    assert found.power_mode == "15W"
    assert found.energy is None


@pytest.mark.parametrize(("clock", "marked"), [(2701.0, 0), (2699.0, 1)])
def test_a_clock_that_drops_is_marked(tmp_path: Path, clock: float, marked: int) -> None:
    found = judged(tmp_path, sample("timing"), sample("timing", cpu_mhz=[clock, 800.0]))
    assert (found.samples, found.marked) == (2, marked)
    assert found.reasons == (("its clock fell below 90% of 3000 MHz",) if marked else ())


def test_the_clock_of_a_gpu_counts_and_not_that_of_the_cores(tmp_path: Path) -> None:
    idle_cores = sample("timing", gpu_mhz=[1020.0], cpu_mhz=[100.0])
    found = judged(tmp_path, sample("timing", gpu_mhz=[1020.0]), idle_cores)
    assert (found.marked, found.clock_mhz) == (0, (1020.0, 1020.0))
    between_lines = sample("timing", cpu_mhz=[100.0])
    found = judged(tmp_path, sample("timing", gpu_mhz=[1020.0]), between_lines)
    assert (found.marked, found.clock_mhz) == (0, (1020.0, 1020.0))
    told = line() | {"gpu_mhz": [612, 500]}
    found = judged(tmp_path, idle_cores, sample("timing", gpu_mhz=[1020.0], tegrastats=[told]))
    assert (found.marked, found.clock_mhz) == (1, (612.0, 1020.0))


def test_a_counter_that_has_risen_marks_all_that_comes_after(tmp_path: Path) -> None:
    counts = (5, 5, 6, 6)
    phases = ("open", "timing", "timing", "timing")
    samples = [sample(p, throttle={"oc1": n}) for p, n in zip(phases, counts, strict=True)]
    found = judged(tmp_path, *samples, sample("images", throttle={"oc1": 9}))
    assert (found.samples, found.marked, found.reasons) == (3, 2, ("oc1 rose",))


def test_energy_is_what_the_module_takes_more_than_idle(tmp_path: Path) -> None:
    idle = [line(VDD_IN=9999), line(VDD_IN=4000, VDD_SOC=1000), line(VDD_IN=5000, VDD_SOC=1000)]
    busy = [line(VDD_IN=4500), line(VDD_IN=10_500, VDD_SOC=3000)]
    found = judged(
        tmp_path, sample("idle", tegrastats=idle), sample("timing", tegrastats=busy), batch=2
    )
    assert found.energy is not None
    assert found.energy.rails == ("VDD_IN",)
    assert (found.energy.idle_watts, found.energy.busy_watts) == (4.5, 10.5)
    assert found.energy.millijoules == pytest.approx(6.0 * 5 / 2)


def test_without_a_rail_of_the_whole_all_rails_are_added(tmp_path: Path) -> None:
    recorded = parse_tegrastats(RECORDED["agx-orin-jetpack-7.2"]["line"])
    assert recorded is not None
    found = judged(
        tmp_path,
        sample("idle", tegrastats=[line(), line(VDD_GPU_SOC=1, VDD_CPU_CV=2, VIN_SYS_5V0=3)]),
        sample("timing", tegrastats=[recorded, recorded]),
    )
    assert found.energy is not None
    assert found.energy.busy_watts == pytest.approx((4385 + 1196 + 5552) / 1000)
    assert found.energy.idle_watts == pytest.approx(0.006)


def test_rails_that_are_told_in_one_phase_only_give_no_energy(tmp_path: Path) -> None:
    idle = sample("idle", tegrastats=[line(A=1), line(A=1)])
    assert judged(tmp_path, idle, sample("timing", tegrastats=[line(), line(B=1)])).energy is None
    assert judged(tmp_path, idle, sample("timing")).energy is None
    assert judged(tmp_path, idle).energy is None


@pytest.mark.parametrize(
    ("told", "held"),
    [((True, True), True), ((True, False), False), ((True, None), None), ((), None)],
)
def test_clocks_are_held_where_they_were_all_the_time(
    tmp_path: Path, told: tuple[bool | None, ...], held: bool | None
) -> None:
    samples = [sample("timing", gpu_held=each) for each in told]
    found = judged(tmp_path, sample("warm-up", gpu_held=False), *samples)
    assert found.clocks_held is held


# --- a desktop GPU, as NVML tells of it -----------------------------------------------------------


def gpu(
    seconds: float, phase: str, watts: float | None = 70.0, *reasons: str, **changes: Any
) -> Any:
    milliwatts = None if watts is None else int(1000 * watts)
    told = {"gpu_mhz": 2505, "memory_mhz": 10501, "celsius": 61, "milliwatts": milliwatts}
    told |= {"reasons": list(reasons), **changes}
    return sample(phase, nvml=told, t_ns=int(1e9 * seconds))


def test_what_a_driver_holds_back_is_marked_and_what_a_user_set_is_not(tmp_path: Path) -> None:
    found = judged(
        tmp_path,
        gpu(0, "open", 70, "power cap"),
        gpu(1, "timing", 70, "application clocks", "display clocks"),
        gpu(2, "timing", 70, "idle"),
        gpu(3, "timing", 70, "power cap"),
        gpu(4, "timing", 70, "software thermal slowdown", "power cap"),
        gpu(5, "images", 70, "hardware slowdown"),
    )
    assert (found.samples, found.marked, found.throttled) == (4, 2, True)
    assert found.reasons == (
        "the GPU is held by power cap",
        "the GPU is held by software thermal slowdown",
    )
    assert found.clock_mhz == (2505.0, 2505.0), "not that of the processor's cores"
    assert found.hottest == ("GPU", 61)


def test_a_gpu_s_clock_that_drops_is_marked(tmp_path: Path) -> None:
    found = judged(tmp_path, gpu(1, "timing"), gpu(2, "timing", gpu_mhz=2200))
    assert (found.marked, found.clock_mhz) == (1, (2200.0, 2505.0))


def test_a_gpu_s_energy_is_its_board_s_after_a_second(tmp_path: Path) -> None:
    """NVML's power is a mean of the last second: the first of a phase is of what was before."""
    busy = [gpu(3, "timing", 40), gpu(3.9, "timing", 50), gpu(4, "timing", 110)]
    idle = [gpu(1, "idle", 100), gpu(1.9, "idle", 60), gpu(2.1, "idle", 10)]
    found = judged(tmp_path, *idle, *busy, batch=2)
    assert found.energy is not None
    assert found.energy.rails == ("GPU board",)
    assert (found.energy.idle_watts, found.energy.busy_watts) == (10.0, 110.0)
    assert found.energy.millijoules == pytest.approx(100 * 5 / 2)
    assert judged(tmp_path, *idle, *busy[:2]).energy is None, "too short to tell"
    silent = [gpu(1, "idle", None), gpu(3, "idle", None), gpu(5, "timing", None)]
    assert judged(tmp_path, *silent, gpu(7, "timing", None)).energy is None


@pytest.mark.parametrize("text", ["", "{}", "[5]", '[{"phase": "timing"}]', "[NaN]"])
def test_what_no_agent_writes_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "telemetry.json").write_text(text)
    with pytest.raises(BadArtifact, match=r"telemetry\.json: field"):
        read_samples(tmp_path / "telemetry.json")


PHASES = st.sampled_from(("open", "idle", "warm-up", "timing", "images"))
NUMBERS = st.dictionaries(st.sampled_from(("VDD_IN", "A")), st.integers(0, 10**6))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(PHASES, NUMBERS, NUMBERS, st.floats(0, 1e4)), max_size=8))
def test_any_samples_are_judged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, Any, Any, float]]
) -> None:
    samples = [
        sample(phase, throttle=counts, tegrastats=[line(**rails)] * 2, cpu_mhz=[clock])
        for phase, counts, rails, clock in rows
    ]
    found = judged(tmp_path_factory.mktemp("any"), *samples)
    assert found.samples == sum(phase == "timing" for phase, *_ in rows)
    assert found.throttled == bool(found.reasons) == bool(found.marked)
