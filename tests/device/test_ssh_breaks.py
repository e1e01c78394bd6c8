"""Connections, processes and disks that break while an SSH device works, on a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import ASKED, LONG, Sshd, Wire, at, processes, run_on, wait_until

from edgexception.device import Progress, open_device
from edgexception.errors import DeviceLost, OutOfResources


def test_a_connection_cut_while_a_file_is_sent(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(os.urandom(3 << 20))
    wire = Wire(sshd.port, cut_after=1 << 20)
    sshd.know(wire.port)
    with (
        pytest.raises(DeviceLost, match=r"build on orin: the connection ended.*again"),
        at(sshd, port=wire.port) as device,
    ):
        device.call("build", {}, {"m": tmp_path / "model"}, tmp_path / "out")
    wait_until(lambda: not sshd.left())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_connection_cut_while_the_agent_measures(sshd: Sshd, built: Path, tmp_path: Path) -> None:
    wire = Wire(sshd.port)
    sshd.know(wire.port)
    agents: dict[int, str] = {}

    def cut(step: Progress) -> None:
        if step.what == "timing":
            agents.update(processes(sshd))
            wire.cut()

    with at(sshd, port=wire.port) as device:
        with pytest.raises(DeviceLost, match="run on orin: the connection ended"):
            run_on(device, built, tmp_path / "out", LONG, cut)
        assert any(" run " in command for command in agents.values())
        wait_until(lambda: not processes(sshd))
        wait_until(lambda: not sshd.left())
        device.address = device.address.model_copy(update={"port": sshd.port})
        run_on(device, built, tmp_path / "out", None)  # it connects anew


def test_a_connection_cut_while_an_engine_is_built(
    sshd: Sshd, tiny_onnx: Path, tmp_path: Path
) -> None:
    """The far end has told of the build's start when the wire is cut: it is in it, or just done."""
    wire = Wire(sshd.port)
    sshd.know(wire.port)
    told: list[str] = []

    def cut(step: Progress) -> None:
        if step.what.startswith("build "):
            told.append(step.what)
            wire.cut()

    request, files = {**ASKED, "model": "m"}, {"m": tiny_onnx}
    with at(sshd, port=wire.port) as device:
        with pytest.raises(DeviceLost, match="build on orin: the connection ended"):
            device.call("build", request, files, tmp_path / "out", cut)
        assert told
        wait_until(lambda: not processes(sshd))
        wait_until(lambda: not sshd.left())
        assert list(tmp_path.iterdir()) == [], "nothing half-built is here"
        device.address = device.address.model_copy(update={"port": sshd.port})
        device.call("build", request, files, tmp_path / "out")  # it connects anew


def test_a_killed_agent_is_out_of_resources_and_the_device_stays(
    sshd: Sshd, built: Path, tmp_path: Path
) -> None:
    def kill(step: Progress) -> None:
        if step.what == "timing":
            for pid, command in processes(sshd).items():
                if " run " in command:
                    os.kill(pid, signal.SIGKILL)

    with at(sshd) as device:
        with pytest.raises(OutOfResources, match="run on orin: the agent's process was killed"):
            run_on(device, built, tmp_path / "out", LONG, kill)
        folder = sshd.left()
        run_on(device, built, tmp_path / "out", None)
        assert sshd.left() == folder, "the same connection"


def test_a_connection_that_ended_between_two_calls_is_made_anew(
    sshd: Sshd, built: Path, tmp_path: Path
) -> None:
    with at(sshd) as device:
        run_on(device, built, tmp_path / "out", None)
        link = device._link
        assert link is not None
        link.process.kill()
        link.process.wait()
        wait_until(lambda: not sshd.left())
        run_on(device, built, tmp_path / "out", None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_far_end_leaves_no_agent(
    sshd: Sshd, built: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def kill(step: Progress) -> None:
        if step.what == "timing":
            agent = next(pid for pid, command in processes(sshd).items() if " run " in command)
            parent = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(parent), number)

    with at(sshd) as device, pytest.raises(DeviceLost):
        run_on(device, built, tmp_path / "out", LONG, kill)
    wait_until(lambda: not processes(sshd))
    if number == signal.SIGKILL:  # it could not clear up: the next one does
        assert len(sshd.left()) == 1
        os.utime(sshd.home / sshd.left()[0], (0, 0))
        with at(sshd) as device:
            run_on(device, built, tmp_path / "out", None)


def test_a_full_disk_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk: each makes a write fail in the middle."""
    full = Sshd(tmp_path / "full", file_limit=1 << 20)
    monkeypatch.setenv("PATH", f"{full.folder / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "model").write_bytes(os.urandom(2 << 20))
    try:
        with (
            pytest.raises(OutOfResources, match=f"{full.url}: .*File too large; free some space"),
            open_device(full.url) as device,
        ):
            device.call("build", {}, {"m": tmp_path / "model"}, tmp_path / "out")
        wait_until(lambda: not full.left())
    finally:
        full.stop()


HOST = """
import sys
from pathlib import Path
from edgexception.device import open_device
timing = {"warmup_ms": 60_000, "duration_ms": 60_000, "min_iterations": 1}
asked = {"runtime": "onnxruntime", "batch": 2, "threads": 1, "engine": "engine.onnx",
         "manifest": "engine.json", "images": None, "timing": timing}
built, out = Path(sys.argv[2]), Path(sys.argv[3])
files = {name: built / name for name in ("engine.onnx", "engine.json")}
with open_device(sys.argv[1]) as device:
    device.call("run", asked, files, out, lambda step: print(step.what, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_survives_an_interrupted_host(
    sshd: Sshd, built: Path, tmp_path: Path, number: signal.Signals
) -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, sshd.url, str(built), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert host.stdout is not None
    assert any(line == "timing\n" for line in host.stdout)
    assert any(" run " in command for command in processes(sshd).values())
    host.send_signal(number)
    _, errors = host.communicate(timeout=30)
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert processes(sshd) == {}, "they were ended before the host went on"
        assert sshd.left() == []
        assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not processes(sshd))
