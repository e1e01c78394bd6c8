"""The power mode and the clocks of a Jetson, with stand-ins for nvpmodel, jetson_clocks and sudo.

The stand-ins keep their state in files and write down every call. Modes and their numbers are as
in /etc/nvpmodel.conf of an Orin Nano (JetPack 6.2).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgexception.agent import power
from edgexception.agent.power import Wanted, held, parse_modes, read_wanted
from edgexception.agent.protocol import AgentError, Request

CONF = """\
# MAXN is the NONE power model to release all constraints
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_1 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""
TOOLS = {
    "nvpmodel": """
case $1 in
-q) echo "NV Power Mode: $(cat mode)";;
-m) echo "nvpmodel $*" >> calls
    case $2 in 0) name=15W;; 1) name=25W;; 2) name=MAXN_SUPER;; *) exit 1;; esac
    [ -e needs_reboot ] || echo $name > mode;;
esac""",
    "jetson_clocks": """
case $1 in
--show) ;;
--store) [ -e "$2" ] && exit 1; cp clocks "$2"; echo "store" >> calls;;
--restore) [ -e stuck ] && exit 1; cp "$2" clocks; echo "restore" >> calls;;
'') echo locked > clocks; echo "lock" >> calls;;
esac""",
}


class Jetson:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mode").write_text("15W\n")
        (folder / "clocks").write_text("free\n")
        for name, text in TOOLS.items():
            self.tool(name, text)

    def tool(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\ncd '{self.folder}'\n{text}\n")
        path.chmod(0o755)

    @property
    def state(self) -> tuple[str, str]:
        mode, clocks = ((self.folder / name).read_text().strip() for name in ("mode", "clocks"))
        return mode, clocks

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jetson]:
    for name in ("tools", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "nvpmodel.conf").write_text(CONF)
    monkeypatch.setattr(power, "MODES_FILE", tmp_path / "nvpmodel.conf")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    yield Jetson(tmp_path / "tools")
    assert os.listdir(tmp_path / "tmp") in ([], ["edgexception-power.lock"])


def test_nothing_is_touched_unasked(jetson: Jetson) -> None:
    with held(None):
        pass
    assert jetson.calls == []


def test_mode_and_clocks_are_held_and_put_back(jetson: Jetson) -> None:
    with held(Wanted("MAXN_SUPER", True)):
        assert jetson.state == ("MAXN_SUPER", "locked")
    assert jetson.state == ("15W", "free")
    assert jetson.calls == ["store", "nvpmodel -m 2", "lock", "nvpmodel -m 0", "restore"]


def test_clocks_that_were_locked_before_are_locked_after(jetson: Jetson) -> None:
    (jetson.folder / "clocks").write_text("locked at 15W\n")
    with held(Wanted("25W", False)):
        assert jetson.state[0] == "25W"
    assert jetson.state == ("15W", "locked at 15W")


def test_the_mode_that_is_set_is_not_set_again(jetson: Jetson) -> None:
    with held(Wanted("15W", True)):
        assert jetson.state == ("15W", "locked")
    assert jetson.calls == ["store", "lock", "restore"]


def test_they_are_put_back_after_an_error(jetson: Jetson) -> None:
    with pytest.raises(KeyboardInterrupt), held(Wanted("25W", True)):
        raise KeyboardInterrupt
    assert jetson.state == ("15W", "free")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_they_are_put_back_when_the_agent_is_ended(jetson: Jetson, number: int) -> None:
    program = (
        "import os, sys, time, pathlib\n"
        "from edgexception.agent import power\n"
        "os.geteuid = lambda: 0\n"
        "power.MODES_FILE = pathlib.Path(sys.argv[1])\n"
        "with power.held(power.Wanted('MAXN_SUPER', True)):\n"
        "    print('held', flush=True); time.sleep(100)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(power.MODES_FILE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(jetson.folder.parent / "tmp")},
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    assert jetson.state == ("MAXN_SUPER", "locked")
    os.killpg(child.pid, number)  # as a transport does
    child.communicate()
    # The next one waits for the guard's lock, so it sees what was there before.
    with held(Wanted(None, True)):
        assert jetson.state == ("15W", "locked")
    assert jetson.state == ("15W", "free")


def refused(wanted: Wanted, match: str, kind: str = "not-possible-here") -> None:
    with pytest.raises(AgentError, match=match) as caught, held(wanted):
        pytest.fail("it must not be measured")
    assert caught.value.kind == kind


def test_a_mode_that_needs_a_restart_is_refused_and_nothing_stays(jetson: Jetson) -> None:
    (jetson.folder / "needs_reboot").touch()
    refused(Wanted("MAXN_SUPER", True), "must be restarted for it: .*nvpmodel -m 2")
    assert jetson.state == ("15W", "free")


def test_an_unknown_mode_is_refused_with_those_there_are(jetson: Jetson) -> None:
    refused(Wanted("40W", False), "no power mode '40W'.*15W, 25W, MAXN_SUPER")
    assert jetson.calls == []


def test_what_cannot_be_put_back_is_said_with_the_command(jetson: Jetson) -> None:
    (jetson.folder / "stuck").touch()
    match = r"by hand: \S*jetson_clocks --restore"
    with pytest.raises(AgentError, match=match) as caught, held(Wanted(None, True)):
        pass
    assert caught.value.kind == "measurement-invalid"
    fault = ValueError("of the measurement")
    with pytest.raises(AgentError, match=match) as caught, held(Wanted(None, True)):
        raise fault
    assert caught.value.__context__ is fault


def test_a_second_one_is_refused(jetson: Jetson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "WAIT_S", 0.2)
    with held(Wanted("25W", True)):
        refused(Wanted("15W", True), "another measurement holds")
        assert jetson.state == ("25W", "locked")


@pytest.mark.parametrize("missing", ["nvpmodel", "jetson_clocks"])
def test_elsewhere_than_on_a_jetson_it_is_refused(jetson: Jetson, missing: str) -> None:
    (jetson.folder / missing).unlink()
    refused(Wanted("25W", True), f"no {missing} here.*leave out --power-mode")
    assert jetson.calls == []


def test_a_sudo_that_wants_a_password_is_refused(
    jetson: Jetson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    jetson.tool("sudo", "exit 1")
    refused(Wanted("25W", True), "sudo wants a password.*NOPASSWD: /")
    assert jetson.calls == []


def test_a_user_changes_them_by_sudo(jetson: Jetson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    jetson.tool("sudo", 'shift; [ "$1" = -k ] && shift; exec "$@"')
    with held(Wanted("25W", True)):
        assert jetson.state == ("25W", "locked")
    assert jetson.state == ("15W", "free")


@given(st.text() | st.text("< POWER_MODEL ID=0 NAME=15W >\n", max_size=80))
def test_any_settings_give_numbers_and_names(text: str) -> None:
    for name, number in parse_modes(text).items():
        assert number.isdigit()
        assert name in text


def test_the_modes_of_an_orin_nano() -> None:
    assert parse_modes(CONF) == {"15W": "0", "25W": "1", "MAXN_SUPER": "2"}


@pytest.mark.parametrize(
    "value", [5, [], {}, {"mode": 3, "lock_clocks": True}, {"mode": "15W"},
              {"mode": "15W", "lock_clocks": True, "fan": 1}]
)  # fmt: skip
def test_a_request_that_asks_otherwise_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(AgentError, match="power must be null or have"):
        read_wanted(Request(tmp_path, {"power": value}))
