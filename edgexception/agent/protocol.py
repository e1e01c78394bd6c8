"""What the agent reads and writes: request, response, progress and faults.

REQUEST_DIR holds `request.json`, `{"protocol": 1, ...fields of the verb}`, and the files it names,
by plain names. RESPONSE_DIR gets the files of the answer first and `response.json` last, by
rename: `{"protocol": 1, "ok": true, "record": {...}, "files": {name: bytes}}`, or
`{"protocol": 1, "ok": false, "error": {"kind": ..., "message": ...}}` together with the exit
code of that kind. Progress is one JSON object a line on stderr.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

PROTOCOL = 1

EXIT_CODES = {
    "usage": 2,
    "not-possible-here": 3,
    "bad-artifact": 4,
    "measurement-invalid": 5,
    "out-of-resources": 6,
    "bug": 70,
}

MAX_REQUEST_BYTES = 1 << 20
PROGRESS_NS = 1_000_000_000

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class AgentError(Exception):
    """A request that cannot be answered: one kind of EXIT_CODES, and a message for the user."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def is_full(error: Exception) -> TypeGuard[OSError]:
    """Tell whether the system had no disk, quota or memory left for a call."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
    return isinstance(error, OSError) and error.errno in full


def is_plain_name(name: object) -> bool:
    """Tell whether `name` is a file name that cannot lead out of its folder."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Request:
    """The fields of a request and the folder with its files. Every fault found has kind "usage"."""

    folder: Path
    fields: Mapping[str, Any]

    def integer(self, name: str, low: int, high: int) -> int:
        """Return an integer field within low...high."""
        return _integer(self.fields, name, low, high)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return a text field that is one of `choices`."""
        value = self.fields.get(name)
        if not isinstance(value, str) or value not in choices:
            raise AgentError("usage", f"request: {name} is {value!r}; it must be one of {choices}")
        return value

    def file(self, name: str) -> Path:
        """Return the path of the file that a field names: plain name, regular file, not empty."""
        value = self.fields.get(name)
        if not is_plain_name(value):
            raise AgentError("usage", f"request: {name} is {value!r}; it must be a plain file name")
        path = self.folder / str(value)
        try:
            facts = path.lstat()
        except OSError:
            raise AgentError(
                "usage", f"request: the file {value!r} that {name} names is not in the request"
            ) from None
        if not stat.S_ISREG(facts.st_mode):
            raise AgentError("usage", f"request: {value!r} is not a regular file")
        if not facts.st_size:
            raise AgentError("bad-artifact", f"{value} is empty")
        return path

    def integers(self, name: str, bounds: Mapping[str, tuple[int, int]]) -> dict[str, int] | None:
        """Return a field that is an object of exactly these integers, or None where it is null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict) or set(value) != set(bounds):
            raise AgentError(
                "usage", f"request: {name} must be null or have exactly {sorted(bounds)}"
            )
        return {key: _integer(value, key, *bound) for key, bound in bounds.items()}


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise AgentError(
            "usage", f"request: {name} is {value!r}; it must be an integer {low}...{high}"
        )
    return value


def read_request(folder: Path, known: tuple[str, ...]) -> Request:
    """Read `request.json` of a folder; a field that is not known is a fault."""
    path = folder / "request.json"
    try:
        if path.stat().st_size > MAX_REQUEST_BYTES:
            raise AgentError("usage", f"request.json is larger than {MAX_REQUEST_BYTES} bytes")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise AgentError("usage", f"request.json cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AgentError("usage", f"request.json is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AgentError("usage", "request.json must hold one object")
    if fields.pop("protocol", None) != PROTOCOL:
        raise AgentError(
            "usage", f"this agent speaks protocol {PROTOCOL}; host and agent must be one version"
        )
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise AgentError(
            "usage", f"request: unknown fields {unknown}; this verb knows {list(known)}"
        )
    return Request(folder, fields)


def write_json(path: Path, value: object) -> None:
    """Write strict JSON (NaN is an error) under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)


def answer(folder: Path, record: dict[str, Any], files: tuple[str, ...]) -> None:
    """Write the response of a verb that went well; `files` are already in the folder."""
    sizes = {name: (folder / name).stat().st_size for name in files}
    response = {"protocol": PROTOCOL, "ok": True, "record": record, "files": sizes}
    write_json(folder / "response.json", response)


def answer_fault(folder: Path, kind: str, message: str) -> None:
    """Write the response of a verb that failed."""
    error = {"kind": kind, "message": message}
    write_json(folder / "response.json", {"protocol": PROTOCOL, "ok": False, "error": error})


def progress(what: str, done: int, total: int, left_s: float | None) -> None:
    """Write one progress line to stderr: a single write, so that no log line can split it."""
    event = {"event": "progress", "what": what, "done": done, "total": total, "left_s": left_s}
    os.write(2, (json.dumps(event) + "\n").encode())


class Ticker:
    """Progress at most once a second, with the time left by the pace so far.

    Where no count is given the total is in ms and the time that passed is what is done.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.start = self.last = time.monotonic_ns()

    def tick(self, now: int, done: int | None = None) -> None:
        """Report if it is time to."""
        if now - self.last < PROGRESS_NS:
            return
        self.last = now
        passed_s = (now - self.start) / 1e9
        if done is None:
            done = min(self.total, int(passed_s * 1000))
        left = passed_s / done * (self.total - done) if done else None
        progress(self.what, done, self.total, left)
