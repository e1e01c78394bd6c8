"""This machine as a device: the agent as a child process."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgexception.agent.protocol import PROTOCOL, is_plain_name
from edgexception.agent.remote import ENVIRONMENT, LOG_LINES, MAX_LINE_BYTES
from edgexception.device.answers import printable, read_answer, read_progress
from edgexception.device.contract import Progress
from edgexception.errors import BadArtifact, OutOfResources, UsageError

# The agent is to come from the very package that runs here, so its folder is first while it is
# found, and last from then on. Python's own library comes before the host's folders: nothing that
# lies in them can shadow a module of it.
_START = """
import json, runpy, sys
root, host = sys.argv.pop(1), json.loads(sys.argv.pop(1))
sys.path.insert(0, root)
import edgexception
sys.path[:] = [*(path for path in sys.path[1:] if path not in host), *host, root]
runpy.run_module("edgexception.agent", run_name="__main__", alter_sys=True)
"""


def _agent_command() -> tuple[str, ...]:
    # -I: no PYTHON* variables, no current folder on the module path. It hides the user site, too,
    # where `pip install --user` puts runtimes: so the folders that the host imports from are named.
    root = str(Path(__file__).resolve().parents[2])
    return (sys.executable, "-I", "-c", _START, root, json.dumps(_host_folders()))


def _host_folders() -> list[str]:
    """Return the folders this process imports from, less the current one and Python's library."""
    library = sysconfig.get_path("stdlib")
    own = (library, os.path.join(library, "lib-dynload"))
    return [
        path
        for path in sys.path
        if os.path.isabs(path)
        and os.path.isdir(path)
        and path not in own
        and not os.path.samefile(path, os.curdir)
    ]


@dataclass(frozen=True)
class LocalDevice:
    """This machine; every call is a child process in a process group of its own.

    The child's stdin is a pipe that stays silent: when the host goes, however it goes, the pipe
    closes and the agent ends. Ctrl-C kills the group before it goes on as KeyboardInterrupt.
    """

    name: str = "local"
    command: tuple[str, ...] = field(default_factory=_agent_command)
    """How the agent is started; verb, request folder and response folder are appended."""

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, Any]:
        """See `Device.call`."""
        with full_disk_named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
                asked, answered = Path(work, "request"), Path(work, "response")
                asked.mkdir()
                answered.mkdir()
                _write_request(asked, request, files)
                command = [*self.command, verb, str(asked), str(answered)]
                code, log = _converse(command, progress)
                record, names = read_answer(verb, self.name, answered, code, log)
                out.mkdir(exist_ok=True)
                for name in names:
                    os.replace(answered / name, out / name)
        return {**record, "log": log}


def local_device() -> LocalDevice:
    """Return this machine as a device."""
    return LocalDevice()


def check_files(files: Mapping[str, Path]) -> None:
    """Refuse files of a request with a name that is not plain, and those that are not there."""
    for name, path in files.items():
        if not is_plain_name(name) or name in ("request.json", "response.json"):
            raise UsageError(f"{name!r} is not a plain file name for a request")
        if not path.is_file():
            raise BadArtifact(f"{path} is not there or not a file: make it again")


def _write_request(folder: Path, request: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    check_files(files)
    for name, path in files.items():
        source = path.resolve()
        try:
            os.link(source, folder / name)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copyfile(source, folder / name)
    content = json.dumps({**request, "protocol": PROTOCOL}, allow_nan=False)
    (folder / "request.json").write_text(content, encoding="utf-8")


def _converse(
    command: list[str], progress: Callable[[Progress], None] | None
) -> tuple[int, list[str]]:
    """Run the agent to its end; return its exit code (-signal) and the last lines it printed."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    child = subprocess.Popen(  # noqa: S603 - a fixed program; nothing of it is user text
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    log: deque[str] = deque(maxlen=LOG_LINES)
    try:
        for line in _lines(child):
            step = read_progress(line)
            if step is None:
                log.append(printable(line))
            elif progress is not None:
                progress(step)
        return child.wait(), list(log)
    finally:
        # Whatever is left of the group goes, too, also when the agent itself has ended.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _lines(child: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield what the child prints, line by line; of an endless line only its beginning."""
    assert child.stdout is not None  # noqa: S101 - told to the type checker; Popen was given PIPE
    pipe = child.stdout.fileno()
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    pending = b""
    while True:
        # Once the agent has ended only what is already there counts: something it left running
        # may hold the pipe open for ever.
        ended = child.poll() is not None
        ready = readable.poll(0 if ended else 1000)
        chunk = os.read(pipe, 1 << 16) if ready else b""
        if not chunk and (ended or ready):
            break
        *whole, rest = (pending + chunk).split(b"\n")
        yield from (line[:MAX_LINE_BYTES].decode("utf-8", "replace") for line in whole)
        pending = rest[:MAX_LINE_BYTES]
    if pending:
        yield pending.decode("utf-8", "replace")


@contextmanager
def full_disk_named(out: Path) -> Iterator[None]:
    """Name the disk of `out` where an error is that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources(f"the disk of {out} is full: free some space") from error
        raise
