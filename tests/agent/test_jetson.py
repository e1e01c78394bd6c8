"""tegrastats and nvpmodel. `tegrastats_recorded.json` holds lines that others recorded on devices,
each with its source; what nvpmodel prints is from the first of these.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgexception.agent import jetson
from edgexception.agent.jetson import Tegrastats, parse_power_mode, parse_tegrastats
from edgexception.agent.telemetry import Telemetry

RECORDED = {
    name: row["line"]
    for name, row in json.loads(
        Path(__file__).with_name("tegrastats_recorded.json").read_text()
    ).items()
}


def test_a_line_of_jetpack_6_on_an_orin_nano() -> None:
    assert parse_tegrastats(RECORDED["orin-nano-jetpack-6.2"]) == {
        "ram_mb": 2147,
        "ram_total_mb": 7620,
        "cores": [[0, 729]] * 6,
        "gpu_percent": 0,
        "gpu_mhz": [],
        "memory_percent": None,
        "memory_mhz": [],
        "celsius": {
            "cpu": 47.687, "soc2": 46.718, "soc0": 47.468, "gpu": 48.625, "tj": 48.625,
            "soc1": 48.25,
        },
        "milliwatts": {"VDD_IN": 4556, "VDD_CPU_GPU_CV": 483, "VDD_SOC": 1451},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cores", "gpu", "memory", "tj", "rails"),
    [
        ("agx-orin-jetpack-6.2", 12, (0, [0, 0]), (3, [2133]), 52.343,
         {"VDD_GPU_SOC": 2412, "VDD_CPU_CV": 1607, "VIN_SYS_5V0": 4607}),
        ("agx-orin-jetpack-7.2", 12, (32, []), (None, []), 51.968,
         {"VDD_GPU_SOC": 4385, "VDD_CPU_CV": 1196, "VIN_SYS_5V0": 5552}),
        ("thor-r38.4", 14, (None, [0, 0, 0]), (0, [665]), 36.031,
         {"VDD_GPU": 0, "VDD_CPU_SOC_MSS": 4923, "VIN_SYS_5V0": 4327}),
        ("thor-jetpack-7.2", 14, (None, [314] * 3), (7, [3200]), 35.906,
         {"VDD_GPU": 4925, "VDD_CPU_SOC_MSS": 7953, "VIN_SYS_5V0": 6667}),
    ],
)  # fmt: skip
def test_lines_of_other_modules_and_releases(
    name: str,
    cores: int,
    gpu: tuple[int | None, list[int]],
    memory: tuple[int | None, list[int]],
    tj: float,
    rails: dict[str, int],
) -> None:
    found = parse_tegrastats(RECORDED[name])
    assert found is not None
    assert len(found["cores"]) == cores
    assert (found["gpu_percent"], found["gpu_mhz"]) == gpu
    assert (found["memory_percent"], found["memory_mhz"]) == memory
    assert found["celsius"]["tj"] == tj
    assert found["milliwatts"] == rails


def test_parts_that_are_off_have_no_value() -> None:
    line = (
        RECORDED["orin-nano-jetpack-6.2"]
        .replace("0%@729]", "off]")
        .replace("gpu@48.625C", "gpu@-256C")
    )
    found = parse_tegrastats(line)
    assert found is not None
    assert found["cores"][-1] is None
    assert "gpu" not in found["celsius"]
    assert "tj" in found["celsius"]


@settings(deadline=None)
@given(st.sampled_from(sorted(RECORDED.values())), st.data())
def test_a_cut_or_mangled_line_gives_no_number_that_is_not_there(
    line: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, len(line)))
    found = parse_tegrastats(line[:start] + data.draw(st.text(max_size=20)) + line[end:])
    assert found is None or json.dumps(found)


@settings(deadline=None)
@given(st.text(alphabet="RAMCPU GR3D_FREQ0123456789%@[],./mWCoff-\n", max_size=200))
def test_garbage_is_no_line_or_plain_data(text: str) -> None:
    found = parse_tegrastats(text)
    assert found is None or json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER"),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n0\n", "15W"),
        ("Power Mode: 15W", None),
        ("", None),
    ],
)
def test_the_power_mode_is_read_by_its_name(text: str, mode: str | None) -> None:
    assert parse_power_mode(text) == mode


def _tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_telemetry_has_the_lines_that_tegrastats_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = RECORDED["thor-jetpack-7.2"]
    _tool(tmp_path, "tegrastats", f'[ "$1 $2" = "--interval 250" ] && echo "{line}"; sleep 50')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    telemetry = Telemetry()
    end = time.monotonic() + 20
    while not any(sample["tegrastats"] for sample in telemetry.samples):
        assert time.monotonic() < end
        telemetry.sample()
        time.sleep(0.02)
    assert telemetry.samples[-1]["tegrastats"] == [parse_tegrastats(line)]
    telemetry.sample()
    assert telemetry.samples[-1]["tegrastats"] == [], "each line is told once"
    telemetry.close()


@pytest.mark.parametrize("tool", [None, "exit 1", "head -c 300000 /dev/zero"])
def test_without_a_tegrastats_that_works_there_are_no_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str | None
) -> None:
    if tool is not None:
        _tool(tmp_path, "tegrastats", tool)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stats = Tegrastats()
    for _ in range(20):
        assert stats.read() == []
        time.sleep(0.005)
    stats.close()


@pytest.mark.parametrize(
    ("tool", "mode"), [("echo 'NV Power Mode: 25W'; echo 1", "25W"), ("exit 1", None), (None, None)]
)
def test_the_power_mode_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str | None, mode: str | None
) -> None:
    if tool is not None:
        _tool(tmp_path, "nvpmodel", tool)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert jetson.power_mode() == mode
