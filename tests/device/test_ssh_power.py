"""Clocks of a Jetson over a real sshd, with stand-ins for its tools on the far PATH."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import edgex
from sshd import LONG, RUN, SHORT, Sshd, Wire, at, wait_until

from edgexception.bench.conditions import conditions, read_samples
from edgexception.device import Progress
from edgexception.errors import DeviceLost, NotPossibleHere

LINE = (
    "RAM 2147/7620MB (lfb 2x4MB) CPU [0%@729,0%@729] GR3D_FREQ 0%@[612] cpu@47.6C VDD_IN 4556mW/1mW"
)
LOCK = {"mode": None, "lock_clocks": True}
TOOLS = {
    "nvpmodel": "echo 'NV Power Mode: 15W'; echo 0",
    "tegrastats": f"while :; do echo '{LINE}'; sleep 0.05; done",
    "jetson_clocks": """
case $1 in
--show) ;;
--store) cp clocks "$2";;
--restore) cp "$2" clocks;;
'') echo locked > clocks; echo locked >> calls;;
esac""",
}


@pytest.fixture
def tools(machine: Sshd) -> Iterator[Path]:
    """The far PATH's first folder; its `clocks` are as they were after every test."""
    folder = machine.folder / "tools"
    folder.mkdir(exist_ok=True)
    (folder / "clocks").write_text("free\n")
    if os.geteuid() != 0:
        (folder / "sudo").write_text('#!/bin/sh\nshift; [ "$1" = -k ] && shift; exec "$@"\n')
    for name, text in TOOLS.items():
        (folder / name).write_text(f"#!/bin/sh\ncd '{folder}'\n{text}\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    yield folder
    wait_until(lambda: (folder / "clocks").read_text() == "free\n")
    for path in folder.iterdir():
        path.unlink()


def _run(device: object, built: Path, out: Path, timing: dict[str, int], step: object) -> object:
    files = {name: built / name for name in ("engine.onnx", "engine.json")}
    asked = {**RUN, "timing": timing, "power": LOCK}
    return device.call("run", asked, files, out, step)  # type: ignore[attr-defined]


def test_clocks_are_locked_while_it_is_timed(
    sshd: Sshd, tools: Path, built: Path, tmp_path: Path
) -> None:
    with at(sshd) as device:
        answer = _run(device, built, tmp_path / "out", SHORT, None)
        assert answer["power_mode"] == "15W"  # type: ignore[index]
        assert (tools / "calls").read_text() == "locked\n"
        assert (tools / "clocks").read_text() == "free\n", "before the answer is here"
    samples = read_samples(tmp_path / "out/telemetry.json")
    phases = [sample.phase for sample in samples if sample.phase != "warm-up"]  # 1 ms: maybe none
    assert list(dict.fromkeys(phases)) == ["open", "idle", "timing", "images"]
    found = conditions([samples], [np.load(tmp_path / "out/times_ns.npy")], 2, "15W")
    assert found.clock_mhz in (None, (612.0, 612.0)), "timed for 1 ms: maybe between two lines"
    assert found.energy is None or found.energy.idle_watts == pytest.approx(4.556)


def test_a_lost_link_puts_them_back(sshd: Sshd, tools: Path, built: Path, tmp_path: Path) -> None:
    wire = Wire(sshd.port)
    sshd.know(wire.port)
    seen: list[str] = []

    def cut(step: Progress) -> None:
        if step.what == "timing":
            seen.append((tools / "clocks").read_text())
            wire.cut()

    with pytest.raises(DeviceLost), at(sshd, port=wire.port) as device:
        _run(device, built, tmp_path / "out", LONG, cut)
    assert seen == ["locked\n"]


def test_a_mode_that_is_not_there_is_refused_before_anything_is_done(
    sshd: Sshd, tools: Path, world: Path, tmp_path: Path
) -> None:
    done = edgex("bench", world / "net.safetensors", "--target", "cpu-x86", "--precision", "fp32",
                 "--device", sshd.url, "--power-mode", "40W",
                 "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 3
    assert "no power mode '40W'" in done.err
    assert not list((tmp_path / "out").rglob("model.onnx"))


def test_a_machine_that_is_no_jetson_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    with pytest.raises(NotPossibleHere, match=r"no nvpmodel here.*a Jetson"), at(sshd) as device:
        device.call("probe", {"power": LOCK}, {}, tmp_path / "out")
