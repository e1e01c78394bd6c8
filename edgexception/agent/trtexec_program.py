"""Find `trtexec`, start it, and see how it ended.

What it prints and exits with: samples/trtexec/trtexec.cpp and samples/common/logging.h of
NVIDIA/TensorRT, v10.3.0 to v11.1.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import brief, kind_of
from edgexception.agent.telemetry import INTERVAL_NS
from edgexception.agent.tensorrt_options import parse_version
from edgexception.agent.trtexec import Log, parse_log

PLACE = Path("/usr/src/tensorrt/bin/trtexec")
"""Where JetPack puts it, which is not on the PATH."""
HELP_S = 30
MAX_LOG_BYTES = 16 << 20
MAX_LINE_BYTES = 1 << 16
TICK_MS = INTERVAL_NS // 2_000_000
"""How often a sample of the telemetry may be due while trtexec says nothing."""


def find() -> Path | None:
    """Return the program on the PATH, else JetPack's; None where there is none."""
    found = shutil.which("trtexec") or (str(PLACE) if os.access(PLACE, os.X_OK) else None)
    return None if found is None else Path(found).absolute()


@cache
def version() -> str:
    """Return the version in the banner, the first line that trtexec prints, with any options."""
    program = find()
    try:
        said = subprocess.run(  # noqa: S603 - no shell; the device's own program
            [str(program), "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=HELP_S,
            check=False,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        why = f"{program} cannot be started: {brief(error)}"
        raise AgentError("not-possible-here", why) from error
    found = parse_log(said[:MAX_LOG_BYTES].decode("utf-8", "replace")).version
    if found is None:
        said_first = brief(ValueError(said[:500].decode("utf-8", "replace")))
        raise AgentError(
            "not-possible-here", f"{program} tells no version of 10 or 11: {said_first}"
        )
    parse_version(found)
    return found


@contextmanager
def folder(place: Path, **files: Path) -> Iterator[Path]:
    """A folder to run in, with links to files by plain names; it goes with all that is in it."""
    with tempfile.TemporaryDirectory(prefix=".trtexec-", dir=place) as work:
        for name, path in files.items():
            Path(work, name).symlink_to(path.resolve())
        yield Path(work)


def run(
    arguments: list[str],
    place: Path,
    fault: str,
    tick: Callable[[], None] = lambda: None,
    listen: Callable[[str], None] = lambda _: None,
) -> Log:
    """Run trtexec to its end in a folder; return what it logged.

    Warnings and errors go to stderr, too. `tick` is called every now and then meanwhile, `listen`
    with each line. Raises the AgentError of a run that did not pass; `fault` says what could not be
    done.
    """
    log = bytearray()
    child = subprocess.Popen(  # noqa: S603 - no shell; our own arguments
        [str(find()), *arguments],
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for line in _lines(child, tick, fault):
            log += line + b"\n"
            text = line.decode("utf-8", "replace")
            listen(text)
            if re.search(r"\] \[[WEF]\] ", text[:80]):
                sys.stderr.write(f"{text}\n")
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    found = parse_log(log.decode("utf-8", "replace"))
    if code or not found.passed:
        raise AgentError(*_blamed(code, found, log, fault))
    return found


def _blamed(code: int, log: Log, text: bytearray, fault: str) -> tuple[str, str]:
    why = brief(RuntimeError("; ".join(log.errors) or f"it ended with code {code}"))
    if code == -9:
        why += ", most likely by the kernel because memory ran out"
        return "out-of-resources", f"trtexec {fault}: {why}"
    return kind_of(text.decode("utf-8", "replace")), f"trtexec {fault}: {why}"


def _lines(child: subprocess.Popen[bytes], tick: Callable[[], None], fault: str) -> Iterator[bytes]:
    """Yield the lines of a child's output as they come; of a long one the beginning."""
    assert child.stdout is not None  # noqa: S101 - told to the type checker; it was given PIPE
    pipe, pending, taken = child.stdout.fileno(), b"", 0
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    while True:
        ready = readable.poll(TICK_MS)
        chunk = os.read(pipe, 1 << 16) if ready else b""
        if ready and not chunk:
            break
        tick()
        taken += len(chunk)
        if taken > MAX_LOG_BYTES:
            raise AgentError("bad-artifact", f"trtexec {fault}: it prints without an end")
        *whole, rest = (pending + chunk).split(b"\n")
        yield from whole
        pending = rest[:MAX_LINE_BYTES]
    if pending:
        yield pending


def read(path: Path) -> str:
    """Return the text of a file that trtexec was told to write."""
    return made(path).read_bytes().decode("utf-8", "replace")


def made(path: Path) -> Path:
    """Return a file that trtexec was told to write; a bad-artifact AgentError without it."""
    if not path.is_file() or not path.stat().st_size:
        raise AgentError("bad-artifact", f"trtexec says that all went well and left no {path.name}")
    return path
