"""The far end of an SSH connection: takes files, runs the agent, gives back its answer.

The host sends this file's text over the connection; the device's own `python3` (>= 3.8) runs it,
with the standard library alone. It lives as long as the connection: when that closes, or goes
silent while an agent runs, it kills the agent's process group, removes its folder and ends.

A message is one line of JSON and, where that says `bytes`, as many bytes after it. The host asks:

    open   place, python, keep               -> opened
    have   files {sha256: bytes}             -> missing files [sha256]
    put    sha256, bytes + data              -> stored
    run    agent, verb, request, files       -> line + data ..., ended code, log, files
    get    sha256                            -> file bytes + data
    still  (sent while the host waits)       -> nothing

`fault`, with the kind and message of the agent's faults, may answer any of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

GREETING = b"\nedgexception far end 1\n"
"""What comes first: whatever a shell's startup files print lies before it."""
STILL_S = 5.0
SILENCE_S = 60.0
"""How often a waiting host says that it is still there, and how long silence is borne."""
MAX_LINE_BYTES = 16 << 10
LOG_LINES = 200
MAX_LOGGED_BYTES = 2000
MAX_MESSAGE_BYTES = 8 << 20
CHUNK_BYTES = 1 << 18
OLDEST_PYTHON = (3, 10)
PREFIX = ".edgexception-"
KEPT = PREFIX + "kept"
# What an agent process is given of the environment here. Not handed over on purpose: PYTHON*
# (foreign code at start) and OMP_*, MKL_*, OV_* or ORT_* settings, which would change a
# measurement without a trace in its record.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


class Gone(Exception):
    """The other side has closed the connection, or is silent."""


class Fault(Exception):
    """Something that cannot be done here: a kind of the agent's faults, and a message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Pipe:
    """Messages to and from the other side; every call raises Gone when it has left."""

    def __init__(self, reads: int, writes: int, waiting: Callable[[], None] = lambda: None) -> None:
        self.reads = reads
        self.writes = writes
        self.waiting = waiting
        """Called while this side listens and has sent nothing for a few seconds."""
        self.sent = time.monotonic()
        self.buffer = b""
        self._readable = select.poll()
        self._readable.register(reads, select.POLLIN)

    def send(self, message: Mapping[str, Any], data: bytes = b"") -> None:
        """Send a message, and the data that belongs to it."""
        if data:
            message = {**message, "bytes": len(data)}
        self.write(json.dumps(message).encode() + b"\n" + data)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.sent, rest = time.monotonic(), memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self.writes, rest) :]
        except OSError as error:
            raise Gone from error

    def receive(self) -> dict[str, Any]:
        """Return the next message that is more than a sign of life; ValueError if it is none."""
        while True:
            message = json.loads(self.line(MAX_MESSAGE_BYTES))
            if not isinstance(message, dict):
                raise ValueError("a message is not an object")  # noqa: TRY004 - a fault of what was sent
            if message.get("op") != "still":
                return message

    def line(self, most: int) -> bytes:
        """Return the bytes up to the next line break."""
        while b"\n" not in self.buffer:
            if len(self.buffer) > most:
                raise ValueError(f"a message is longer than {most} bytes")
            self.fill()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def data(self, count: int) -> Iterator[bytes]:
        """Yield the `count` bytes that follow a message."""
        if type(count) is not int or count < 0:
            raise ValueError(f"a message is followed by {count!r} bytes")
        while count:
            if not self.buffer:
                self.fill()
            chunk, self.buffer = self.buffer[:count], self.buffer[count:]
            count -= len(chunk)
            yield chunk

    def fill(self) -> None:
        """Wait for bytes and put them into the buffer."""
        ready = False
        while not ready:
            if time.monotonic() - self.sent > STILL_S:
                self.waiting()
            ready = bool(self._readable.poll(STILL_S * 1000))
        try:
            chunk = os.read(self.reads, CHUNK_BYTES)
        except OSError as error:
            raise Gone from error
        if not chunk:
            raise Gone
        self.buffer += chunk


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


class FarEnd:
    """One host's folder on this device: private, locked while it is in use, removed at the end."""

    def __init__(self, pipe: Pipe, opening: Mapping[str, Any]) -> None:
        self.pipe = pipe
        place = Path(opening["place"] or "~").expanduser().absolute()
        self.python = _python(opening["python"])
        kept = _private(place / KEPT) if opening["keep"] else None
        _clear_abandoned(place)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))  # mode 0700
        self.lock = _locked(self.folder)
        os.chdir(self.folder)
        self.files = kept or _private(self.folder / "files")
        self.verified: set[str] = set()

    def close(self) -> None:
        """Remove everything but the files to keep."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def have(self, message: Mapping[str, Any]) -> None:
        """Say which files are not here; refuse them if the disk cannot take them."""
        missing = [digest for digest in message["files"] if not self._is_here(digest)]
        wanted = sum(message["files"][digest] for digest in missing)
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise Fault(
                "out-of-resources",
                f"{wanted >> 20} MiB are to be sent and the disk of {self.folder} has "
                f"{free >> 20} MiB free: free some space there",
            )
        self.pipe.send({"op": "missing", "files": missing})

    def put(self, message: Mapping[str, Any]) -> None:
        """Store a file under its sha256. All of it is read, also when it cannot be stored."""
        part, digest = self.folder / "part", hashlib.sha256()
        chunks = self.pipe.data(message["bytes"])
        try:
            with part.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != message["sha256"]:
                raise Fault(
                    "bad-artifact", "a file is not what it was when it was sent: start again"
                )
            self._store(part, message["sha256"])
        finally:
            deque(chunks, maxlen=0)
            with contextlib.suppress(OSError):
                part.unlink()
        self.pipe.send({"op": "stored"})

    def run(self, message: Mapping[str, Any]) -> None:
        """Let the agent answer one request, in a process group of its own."""
        asked, answered = self.folder / "request", self.folder / "response"
        for folder in (asked, answered):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name, digest in message["files"].items():
            _link_or_copy(self.files / digest, asked / name)
        (asked / "request.json").write_text(json.dumps(message["request"]), encoding="utf-8")
        # -E: no PYTHON* variables; but the user's site-packages, where runtimes often are. The
        # archive is first on the module path, and the current folder is not on it.
        agent = [self.python, "-E", str(self.files / message["agent"])]
        code, log = self._converse([*agent, message["verb"], str(asked), str(answered)])
        found = {}
        for path in sorted(answered.iterdir()):
            if stat.S_ISREG(path.lstat().st_mode):
                size, digest = path.stat().st_size, sha256_of(path)
                self._store(path, digest)
                found[path.name] = [size, digest]
        self.pipe.send({"op": "ended", "code": code, "log": log, "files": found})

    def get(self, message: Mapping[str, Any]) -> None:
        """Send a file."""
        path = self.files / message["sha256"]
        with path.open("rb") as file:
            self.pipe.send({"op": "file", "bytes": path.stat().st_size})
            for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
                self.pipe.write(chunk)

    def _is_here(self, digest: str) -> bool:
        path = self.files / digest
        if digest not in self.verified and path.is_file():
            if sha256_of(path) == digest:
                self.verified.add(digest)
            else:
                path.unlink()
        return digest in self.verified

    def _store(self, path: Path, digest: str) -> None:
        os.replace(path, self.files / digest)
        self.verified.add(digest)

    def _converse(self, command: list[str]) -> tuple[int, list[str]]:
        """Run the agent; send its progress as it comes, return exit code and last lines."""
        child = subprocess.Popen(  # noqa: S603 - no shell; the verb and our own paths
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            cwd=str(self.folder),
            start_new_session=True,
        )
        log: deque[str] = deque(maxlen=LOG_LINES)
        try:
            for line in self._lines(child):
                if line.startswith(b"{"):
                    self.pipe.send({"op": "line"}, line)
                else:
                    log.append(line[:MAX_LOGGED_BYTES].decode("utf-8", "replace"))
            return child.wait(), list(log)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _lines(self, child: subprocess.Popen[bytes]) -> Iterator[bytes]:
        """Yield what the child prints, of an endless line the beginning; Gone without the host."""
        assert child.stdout is not None  # noqa: S101 - told to the type checker; Popen was given PIPE
        printed, heard, pending = child.stdout.fileno(), time.monotonic(), b""
        pause_ms = 1000
        poll = select.poll()
        poll.register(self.pipe.reads, select.POLLIN)
        poll.register(printed, select.POLLIN)
        while True:
            ended = child.poll() is not None
            ready = {number for number, _ in poll.poll(0 if ended else pause_ms)}
            if self.pipe.reads in ready:
                self.pipe.fill()
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE_S:
                raise Gone
            chunk = os.read(printed, 1 << 16) if printed in ready else b""
            if printed in ready and not chunk:
                poll.unregister(printed)
                pause_ms = 20  # it is about to end
            if ended and not chunk:
                break
            *whole, rest = (pending + chunk).split(b"\n")
            yield from (line[:MAX_LINE_BYTES] for line in whole)
            pending = rest[:MAX_LINE_BYTES]
        if pending:
            yield pending


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _python(wanted: str | None) -> str:
    """Return the Python that runs the agent: the one asked for, or this one."""
    path = os.path.expanduser(wanted) if wanted else sys.executable
    try:
        said = subprocess.run(  # noqa: S603 - no shell; the user's own interpreter
            [path, "-E", "-c", "import sys; print(*sys.version_info[:2])"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        ).stdout
        version = tuple(int(part) for part in said.split())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Fault("not-possible-here", f"{path} is not a Python that starts: {error}") from error
    if version < OLDEST_PYTHON:
        raise Fault(
            "not-possible-here",
            f"{path} is Python {'.'.join(map(str, version))} and the agent needs "
            f"{'.'.join(map(str, OLDEST_PYTHON))}: name another one as `python:` in devices.yaml",
        )
    return path


def _private(folder: Path) -> Path:
    """Make a folder that only its owner can enter; refuse one that is something else."""
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise Fault("bad-artifact", f"{folder} is not a private folder (0700) of this user")
    return folder


def _locked(folder: Path) -> int:
    number = os.open(folder, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return number


def _clear_abandoned(place: Path) -> None:
    """Remove folders whose far end died without a chance to: killed, or without power."""
    for folder in place.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            facts = folder.lstat()
            ours = facts.st_uid == os.geteuid() and stat.S_ISDIR(facts.st_mode)
            # A minute: one that was made just now may not be locked yet.
            if ours and folder.name != KEPT and time.time() - facts.st_mtime > 60:
                os.close(_locked(folder))
                shutil.rmtree(folder)


def _blamed(error: Exception, pipe: Pipe) -> None:
    """Tell the host what went wrong."""
    if isinstance(error, Fault):
        kind, text = error.kind, str(error)
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in _FULL
        kind = "out-of-resources" if full else "not-possible-here"
        text = f"{place}{error.strerror}" + "; free some space there" * full
    else:
        kind, text = "bug", f"{type(error).__name__}: {error}"
    pipe.send({"op": "fault", "kind": kind, "message": text})


def serve() -> None:
    """Answer one host until it leaves."""
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    pipe, far = Pipe(0, 1), None
    verbs = ("have", "put", "run", "get")
    try:
        pipe.write(GREETING)
        while True:
            message = pipe.receive()
            try:
                if far is None:
                    far = FarEnd(pipe, message)
                    pipe.send({"op": "opened"})
                elif message["op"] in verbs:
                    getattr(far, message["op"])(message)
            except Gone:
                raise
            except Exception as error:  # noqa: BLE001 - the boundary: it becomes an answer
                _blamed(error, pipe)
    except Gone:
        pass
    finally:
        if far is not None:
            far.close()


if __name__ == "__main__":
    serve()
