"""What `edgex` shows: progress and messages on stderr, data on stdout."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING

from edgexception.errors import EdgexError

if TYPE_CHECKING:
    from edgexception.device import Progress
    from edgexception.report.record import StageLine

_QUIET_SECONDS = 10.0
"""Least time between two progress lines where there is no terminal to rewrite a line of."""


class Console:
    """Writes stages and progress with the time left to stderr, unless it is told to be quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self._last = time.monotonic()

    def stage(self, line: StageLine) -> None:
        """Say that a stage is done."""
        took = "done before" if line.reused else f"{line.seconds:.1f} s"
        self.say(f"{line.stage:<9} {line.what}: {took}")

    def progress(self, progress: Progress) -> None:
        """Say how far something is: on one line of a terminal, else now and then."""
        now = time.monotonic()
        if self.quiet or (not self.terminal and now - self._last < _QUIET_SECONDS):
            return
        self._last = now
        left = "" if progress.left_s is None else f", {progress.left_s:.0f} s left"
        count = f": {progress.done}/{progress.total}" if progress.total > 1 else " ..."
        text = f"{'':<10}{progress.what}{count}{left}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()
        else:
            self.say(text)

    def warn(self, text: str) -> None:
        """Say what may spoil the result, even when told to be quiet."""
        self.tell(f"warning: {text}")

    def tell(self, text: str) -> None:
        """Say what was chosen for the user, even when told to be quiet."""
        clear = "\r\x1b[K" if self.terminal else ""
        sys.stderr.write(f"{clear}edgex: {_plain(text)}\n")

    @contextmanager
    def data_only(self) -> Iterator[None]:
        """Keep stdout for data: whatever a library prints goes to stderr, or nowhere if quiet."""
        other = open(os.devnull, "w") if self.quiet else nullcontext(sys.stderr)  # noqa: SIM115
        with other as stream, redirect_stdout(stream):
            yield

    def say(self, text: str) -> None:
        """Write one line to stderr."""
        if not self.quiet:
            sys.stderr.write(f"\r\x1b[K{_plain(text)}\n" if self.terminal else f"{_plain(text)}\n")

    @contextmanager
    def reader_may_leave(self) -> Iterator[None]:
        """Write data for a reader who may stop reading: that changes nothing of the exit code."""
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn every way to fail into one paragraph on stderr and the exit code of its branch."""
    try:
        yield
        sys.stdout.flush()
    except EdgexError as error:
        _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on where it stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:  # noqa: BLE001 - the last boundary: a bug of ours is named as such
        if os.environ.get("EDGEX_DEBUG"):
            traceback.print_exc()
        _leave(*_of_the_machine(error) or _bug(error))


def _of_the_machine(error: Exception) -> tuple[str, int] | None:
    """Return message and exit code of an error that is not ours but the machine's."""
    text = str(error)
    # torch raises a plain RuntimeError when its allocator gets nothing.
    torch_full = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    if isinstance(error, MemoryError) or torch_full:
        return "out of memory: close other programs, or take fewer images or a smaller batch", 6
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'}: {error.strerror}; free some space", 6
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("edgexception"):
        return f"{error.name} is not installed: pip install 'edgexception[workstation]'", 3
    return None


def _bug(error: Exception) -> tuple[str, int]:
    return (
        f"this is a bug in edgex: {type(error).__name__}: {error}. Set EDGEX_DEBUG=1 for the "
        "traceback, and report it with the command",
        70,
    )


def _leave(message: str, code: int) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}edgex: {_plain(message)}\n")
    raise SystemExit(code)


def _plain(text: str) -> str:
    """File names and a device's words may hold anything; a terminal obeys control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
