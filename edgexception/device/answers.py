"""What comes back from an agent, checked as if a stranger had written it."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from edgexception.agent.protocol import is_plain_name
from edgexception.device.contract import RECORDS, Facts, Progress
from edgexception.errors import (
    BadArtifact,
    EdgexError,
    MeasurementInvalid,
    NotPossibleHere,
    OutOfResources,
    UsageError,
)

MAX_RESPONSE_BYTES = 16 << 20

ERRORS: dict[str, type[EdgexError]] = {
    "usage": UsageError,
    "not-possible-here": NotPossibleHere,
    "bad-artifact": BadArtifact,
    "measurement-invalid": MeasurementInvalid,
    "out-of-resources": OutOfResources,
    "bug": EdgexError,
}


class _AgentFault(Facts):
    kind: Literal[
        "usage",
        "not-possible-here",
        "bad-artifact",
        "measurement-invalid",
        "out-of-resources",
        "bug",
    ]
    message: str


class _Response(Facts):
    protocol: Literal[1]
    ok: bool
    record: dict[str, Any] | None = None
    files: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    error: _AgentFault | None = None


def read_answer(
    verb: str, device: str, folder: Path, code: int, log: list[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the record and the names of the files of an answer that went well.

    `folder` is where the agent answered, `code` its exit code, or minus the signal that ended it,
    `log` what it printed. Raises the EdgexError of the agent's fault, that of its death, or
    BadArtifact when the answer itself is broken.
    """
    if code < 0:
        raise _death(verb, device, -code, log)
    path = folder / "response.json"
    if code and not os.path.lexists(path):
        said = f"; it last said: {log[-1]}" if log else ""
        # Where the disk is full the answer cannot be written either.
        full = code == OutOfResources.exit_code
        raise (OutOfResources if full else EdgexError)(
            f"{verb} on {device}: the agent ended with code {code} and no answer{said}"
        )
    try:
        response = _read_response(path, verb, folder)
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtifact(
            f"{verb} on {device}: the agent's answer is broken: {printable(str(error))}"
        ) from error
    if response.error is not None:
        message = printable(response.error.message)
        raise ERRORS[response.error.kind](f"{verb} on {device}: {message}")
    if code:
        raise EdgexError(
            f"{verb} on {device}: the agent said it went well but ended with code {code}"
        )
    return response.record or {}, tuple(response.files)


def read_progress(line: str) -> Progress | None:
    """Return the progress a line tells, or None: then it is something a runtime printed."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
        if event["event"] != "progress":
            return None
        what, done, total, left = (event[key] for key in ("what", "done", "total", "left_s"))
    except (ValueError, KeyError, RecursionError):
        return None
    counts = type(done) is int and type(total) is int and 0 <= done <= total <= 1 << 53
    timed = left is None or (isinstance(left, int | float) and 0 <= left < 1e9)
    if not isinstance(what, str) or not counts or not timed:
        return None
    return Progress(printable(what)[:200], done, total, None if left is None else float(left))


def _read_response(path: Path, verb: str, folder: Path) -> _Response:
    """Read and check an answer and the files it names; ValueError or OSError say what is wrong."""
    if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > MAX_RESPONSE_BYTES:
        raise ValueError(f"response.json is not a file of at most {MAX_RESPONSE_BYTES} bytes")
    content = json.loads(path.read_bytes(), parse_constant=_no_constant)
    try:
        response = _Response.model_validate(content)
        if response.ok != (response.error is None) or response.ok != (response.record is not None):
            raise ValueError("it must have either a record or an error")
        if response.ok:
            RECORDS[verb].model_validate(response.record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"field {place}: {first['msg']}") from error
    for name, size in response.files.items():
        if not is_plain_name(name):
            raise ValueError(f"it names a file {name!r}, which is not a plain name")
        facts = (folder / name).lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
            raise ValueError(f"{name} is not a file of the {size} bytes it is said to have")
    return response


def _no_constant(text: str) -> float:
    raise ValueError(f"it holds {text}")


def _death(verb: str, name: str, number: int, log: list[str]) -> EdgexError:
    """Return the error for an agent that a signal ended."""
    what = f"{verb} on {name}: the agent's process"
    said = f" It last said: {log[-1]}" if log else ""
    if number == signal.SIGKILL:
        return OutOfResources(
            f"{what} was killed, most likely by the kernel because memory ran out: close other "
            "programs, or take a smaller batch or network."
        )
    crashes = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
    if number not in crashes:
        return EdgexError(f"{what} was ended from outside by signal {number}.{said}")
    label = signal.Signals(number).name
    if any("bad_alloc" in line for line in log):
        return OutOfResources(f"{what} ran out of memory ({label}).{said}")
    if verb == "probe":
        return NotPossibleHere(f"{what} crashed ({label}): Python or numpy are broken here.{said}")
    return BadArtifact(f"{what} crashed ({label}): the engine crashed the runtime.{said}")


def printable(text: str) -> str:
    """Return the text as one bounded line of printable characters: a device may send any.

    What is not shown, or turns the direction of what is, becomes a space, too.
    """
    return "".join(each if each.isprintable() else " " for each in text).strip()[:2000]
