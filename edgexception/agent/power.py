"""A Jetson's power mode and clocks, changed for one measurement and put back whatever happens.

`nvpmodel` switches modes (their names and numbers are in /etc/nvpmodel.conf), `jetson_clocks` holds
every clock at the highest of the mode, stores what was there and restores it: NVIDIA's Jetson Linux
Developer Guide, "Platform Power and Performance". Both want root; sudo is asked for no password.

What puts it back is a process of its own, in a session of its own. It waits for the end of a pipe,
which comes when this process ends by any means, also SIGKILL; a lost link ends this process. It
holds a lock until it is done, so nobody takes a changed mode for the one that was there. Only a
device that loses its power is not put back; a restart gives it the clocks of its mode, and nvpmodel
keeps the last mode that was set. Not run on a Jetson by us: the tests have stand-ins for the tools.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgexception.agent.jetson import power_mode
from edgexception.agent.protocol import AgentError, Request

TIMEOUT_S = 60
WAIT_S = 30
"""How long another measurement, or the restoring after a lost link, is waited for."""

MODES_FILE = Path("/etc/nvpmodel.conf")
_MODE = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([\w.()|-]{1,64})\s*>", re.MULTILINE)

# It keeps its own copy of all it needs: the agent's file may be gone when it has to act.
_GUARD = """
import json, shutil, signal, subprocess, sys
steps, folder = json.loads(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
failed = []
try:
    sys.stdin.buffer.read()
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for step in steps:
        try:
            none = subprocess.DEVNULL
            done = subprocess.run(step, stdin=none, stdout=none, stderr=none, timeout=60)
            code = done.returncode
        except Exception:
            code = 1
        if code:
            failed.append(" ".join(step))
    shutil.rmtree(folder, ignore_errors=True)
    print("; ".join(failed))
"""


@dataclass(frozen=True)
class Wanted:
    """What is asked for: a mode by its name, None for the one that is set; clocks held at most."""

    mode: str | None
    lock_clocks: bool


def read_wanted(request: Request) -> Wanted | None:
    """Return the request's field `power`; None where nothing is to be changed."""
    value = request.fields.get("power")
    if value is None:
        return None
    if isinstance(value, dict) and set(value) == {"mode", "lock_clocks"}:
        mode, lock = value["mode"], value["lock_clocks"]
        if (mode is None or isinstance(mode, str)) and isinstance(lock, bool):
            return Wanted(mode, lock)
    raise AgentError("usage", "request: power must be null or have mode and lock_clocks")


def parse_modes(text: str) -> dict[str, str]:
    """Return the numbers of the power modes that nvpmodel's settings have, by their names."""
    return {name: number for number, name in _MODE.findall(text)}


def check(wanted: Wanted) -> tuple[_Runner, str, dict[str, str]]:
    """Return what runs the tools, the mode that is set, and the modes there are, as `held` needs.

    Raises AgentError where `held` could not start; nothing is changed.
    """
    run, before, modes = _root(), power_mode(), _modes()
    if before is None:
        raise AgentError(
            "not-possible-here",
            "nvpmodel tells no power mode here: --power-mode and --lock-clocks are for a Jetson",
        )
    if wanted.mode not in (None, before) and not {wanted.mode, before} <= set(modes):
        raise AgentError(
            "not-possible-here",
            f"there is no power mode {wanted.mode!r} to change to from {before!r} here: this "
            f"device has {', '.join(modes) or 'none that it tells'}",
        )
    return run, before, modes


@contextmanager
def held(wanted: Wanted | None) -> Iterator[None]:
    """Hold the wanted mode and clocks while the body runs, and put back what was there.

    Raises AgentError where this is no Jetson, sudo wants a password, the mode is not known, or the
    mode is not reached without a restart; and where it cannot be put back.
    """
    if wanted is None:
        yield
        return
    with _lock() as lock:
        run, before, modes = check(wanted)
        change = wanted.mode is not None and wanted.mode != before
        folder = tempfile.mkdtemp(prefix="edgexception-power-")
        stored = f"{folder}/clocks"
        # From the outside in: the clocks are those of the mode that is set, and go with it.
        run("jetson_clocks", "--store", stored)
        back = [run.line("nvpmodel", "-m", modes[before])] if change else []
        back.append(run.line("jetson_clocks", "--restore", stored))
        guard = _guard(back, folder, lock)
        try:
            if change:
                _change(run, str(wanted.mode), modes)
            if wanted.lock_clocks:
                run("jetson_clocks")
            yield
        finally:
            if failed := _let_go(guard):
                raise AgentError(
                    "measurement-invalid",
                    f"the power mode or clocks could not be put back; do it by hand: {failed}",
                )


class _Runner:
    """Runs a tool as root."""

    def __init__(self, before: list[str]) -> None:
        self.before = before

    def line(self, *command: str) -> list[str]:
        """Return the command line."""
        path = shutil.which(command[0])
        if path is None:
            raise AgentError(
                "not-possible-here",
                f"there is no {command[0]} here, so power mode and clocks cannot be changed: that "
                "is for a Jetson; leave out --power-mode and --lock-clocks",
            )
        return [*self.before, path, *command[1:]]

    def __call__(self, *command: str) -> None:
        """Run it; AgentError where it fails."""
        said = _output(self.line(*command))
        if said is not None:
            raise AgentError(
                "not-possible-here", f"`{' '.join(command)}` failed on this device: {said}"
            )


def _root() -> _Runner:
    """Return what runs the tools; AgentError where they are not here or want a password."""
    run = _Runner([] if os.geteuid() == 0 else ["sudo", "-n"])
    checks = (run.line("nvpmodel", "-q"), run.line("jetson_clocks", "--show"))
    for line in checks if run.before else ():
        # -k: a password that was given a minute ago is not there when the clocks are put back.
        if _output([*line[:2], "-k", *line[2:]]) is not None:
            tools = ", ".join(check[2] for check in checks)
            raise AgentError(
                "not-possible-here",
                "sudo wants a password here, and power mode and clocks are root's to change: put "
                f"`USER ALL=(root) NOPASSWD: {tools}` into /etc/sudoers.d, or leave out "
                "--power-mode and --lock-clocks",
            )
    return run


def _output(command: list[str]) -> str | None:
    """Run a command without input; return what it said last if it failed."""
    try:
        done = subprocess.run(  # noqa: S603 - the device's own tools; a mode is a checked number
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    said = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return (said[-1][:200] if said else f"code {done.returncode}") if done.returncode else None


def _modes() -> dict[str, str]:
    try:
        return parse_modes(MODES_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _change(run: _Runner, mode: str, modes: dict[str, str]) -> None:
    run("nvpmodel", "-m", modes[mode])
    reached = power_mode()
    if reached != mode:
        raise AgentError(
            "not-possible-here",
            f"the power mode is {reached} and not {mode} after the change, most likely because "
            f"this device must be restarted for it: set it yourself (sudo nvpmodel -m "
            f"{modes[mode]}), then leave out --power-mode",
        )


@contextmanager
def _lock() -> Iterator[int]:
    path = Path(tempfile.gettempdir(), "edgexception-power.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AgentError(
            "not-possible-here", f"{path} belongs to another user who measures here, too"
        ) from error
    try:
        if not _within(WAIT_S, lambda: _locked(lock)):
            raise AgentError(
                "not-possible-here",
                "another measurement holds this device's power mode or clocks: wait for its end",
            )
        yield lock
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _guard(back: list[list[str]], folder: str, lock: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own interpreter and program
        [sys.executable, "-I", "-c", _GUARD, json.dumps(back), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        pass_fds=(lock,),
        start_new_session=True,
    )


def _let_go(guard: subprocess.Popen[bytes]) -> str:
    """Let the guard put everything back; return the commands that failed."""
    said, _ = guard.communicate()
    return said.decode("utf-8", "replace").strip()
