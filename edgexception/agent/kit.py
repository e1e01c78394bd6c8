"""`run-kit`: a kit's builds and measurements on this device, without a host.

A kit is a folder with `kit.json` and the files that it names. Its `calls` are the very requests
that a host would make over SSH; here this process makes them, one after the other, each in an agent
process of its own. A file of a call lies in the kit, or is one that an earlier call left in its
folder, `results/NNN-verb`. Such a folder has the agent's answer and a `call.json`, written last; a
run that was interrupted goes on after the last call that went well. `results.json` comes at the end
and names every file with its sha256.

Standard library only: numpy is the need of the calls, of those that are not trtexec's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from edgexception.agent.protocol import (
    EXIT_CODES,
    PROTOCOL,
    AgentError,
    write_json,
)
from edgexception.agent.remote import LOG_LINES, MAX_LINE_BYTES, sha256_of
from edgexception.agent.room import check_disk

FORMAT = 1
KIT, RESULTS, CALL = "kit.json", "results.json", "call.json"
MAX_KIT_BYTES = 16 << 20
TERMINAL_S = 10.0
"""Least time between two progress lines where there is no terminal to rewrite a line of."""


def run_kit(folder: Path, results: Path) -> int:
    """Do all that a kit asks for; return the exit code of the first call that failed, or 0.

    What would use the engine of a call that failed is left out. Raises an AgentError for a kit that
    is broken, and where there is too little room.
    """
    kit = read_kit(folder)
    results.mkdir(exist_ok=True)
    models = [call["files"]["model.onnx"] for call in kit["calls"] if call["verb"] == "build"]
    check_disk(results, [folder / model for model in models])
    done: list[dict[str, Any]] = []
    useless: set[str] = set()
    code = 0
    for number, call in enumerate(kit["calls"]):
        name = f"{number:03d}-{call['verb']}"
        used = {path.partition("/")[0] for path in call["made"].values()}
        if used & useless:
            continue
        files = {name: folder / path for name, path in call["files"].items()}
        files |= {name: results / path for name, path in call["made"].items()}
        where = f"[{number + 1}/{len(kit['calls'])}] {call['label']}"
        done.append(_do(call, files, results / name, where))
        if done[-1]["code"]:
            useless |= used | {name}
            code = code or done[-1]["code"]
    content = {
        "format": FORMAT,
        "name": kit["name"],
        "kit": sha256_of(folder / KIT),
        "calls": done,
    }
    write_json(results / RESULTS, content)
    say(f"results: {results.resolve()}")
    return code


def read_kit(folder: Path) -> dict[str, Any]:
    """Return what `kit.json` says, its files verified; a bad-artifact AgentError if broken."""
    path = folder / KIT
    try:
        kit = dict(json.loads(path.read_bytes()[:MAX_KIT_BYTES]))
        known = kit["format"] == FORMAT
        wrong = [name for name, digest in kit["files"].items() if not _is(folder / name, digest)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise AgentError("bad-artifact", f"{path} is no kit: {error}; copy it again") from error
    if not known:
        raise AgentError("bad-artifact", f"{path}: this agent reads format {FORMAT} only")
    if wrong:
        raise AgentError(
            "bad-artifact",
            f"{folder / wrong[0]} is not what the kit says (sha256): it was cut or changed; copy "
            "the kit again",
        )
    return kit


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _do(call: dict[str, Any], files: dict[str, Path], folder: Path, where: str) -> dict[str, Any]:
    """Do a call, or find it done; return what was asked and answered."""
    asked = {
        "folder": folder.name,
        "verb": call["verb"],
        "request": call["request"],
        "inputs": {name: sha256_of(path) for name, path in sorted(files.items())},
    }
    done = _done_before(folder, asked)
    if done is not None:
        say(f"{where}: done before")
        return done
    start = time.monotonic()
    done = _ask(asked, files, folder, where)
    say(f"{where}: {_fault(folder, done) or f'{time.monotonic() - start:.1f} s'}")
    return done


def _done_before(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the answer of an earlier run, whole and to the same question, that went well."""
    try:
        done = dict(json.loads((folder / CALL).read_bytes()))
        same = {name: done[name] for name in asked} == asked and done["code"] == 0
        whole = all(_is(folder / name, digest) for name, digest in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return done if same and whole else None


def _ask(asked: dict[str, Any], files: dict[str, Path], folder: Path, where: str) -> dict[str, Any]:
    """Let an agent process answer into the folder; return what is noted of it."""
    request = folder.with_name(".request")
    for old in (folder, request):
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
    for name, path in files.items():
        _put(path, request / name)
    write_json(request / "request.json", {**asked["request"], "protocol": PROTOCOL})
    code, log = _converse([*_agent(), asked["verb"], str(request), str(folder)], where)
    shutil.rmtree(request, ignore_errors=True)
    answered = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    done = {**asked, "code": code, "log": log, "files": answered}
    write_json(folder / CALL, done)
    return done


def _put(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, place)


def _agent() -> list[str]:
    """Return how an agent process is started: from the very file that this one is."""
    archive = Path(__file__).parents[2]
    if archive.is_file():
        return [sys.executable, str(archive)]
    return [sys.executable, "-m", "edgexception.agent"]


def _converse(command: list[str], where: str) -> tuple[int, list[str]]:
    """Run a command to its end; return its exit code (-signal) and the last lines it printed."""
    log: deque[str] = deque(maxlen=LOG_LINES)
    child = subprocess.Popen(  # noqa: S603 - our own interpreter and program
        # A pipe that stays silent: the agent ends when this process does, and with it its process
        # group, where trtexec is.
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None  # noqa: S101 - told to the type checker; it was given PIPE
    shown = time.monotonic()
    try:
        for line in child.stdout:
            text = line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
            if not text.startswith('{"event": "progress"'):
                log.append(text)
            elif sys.stderr.isatty() or time.monotonic() - shown > TERMINAL_S:
                shown = time.monotonic()
                _show(where, text)
        return child.wait(), list(log)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _show(where: str, text: str) -> None:
    try:
        event = json.loads(text)
        left = "" if event["left_s"] is None else f", {event['left_s']:.0f} s left"
        line = f"{where}: {event['what']} {event['done']}/{event['total']}{left}"
    except (ValueError, KeyError, TypeError):
        return
    end = "" if sys.stderr.isatty() else "\n"
    sys.stderr.write(f"\r\x1b[K{line}" if not end else line + end)
    sys.stderr.flush()


def _fault(folder: Path, done: dict[str, Any]) -> str | None:
    if not done["code"]:
        return None
    try:
        error = json.loads((folder / "response.json").read_bytes())["error"]
        return f"failed: {error['message']}"
    except (OSError, ValueError, KeyError, TypeError):
        said = f"; it last said: {done['log'][-1]}" if done["log"] else ""
        return f"failed: the agent ended with code {done['code']}{said}"


def say(text: str) -> None:
    """Write one line for the person who started it."""
    sys.stderr.write(f"\r\x1b[K{text}\n" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """Run the kit in the folder that is named; results go to `results` in it, or where named."""
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python3 agent.pyz run-kit KIT_FOLDER [RESULTS_FOLDER]\n")
        return EXIT_CODES["usage"]
    folder = Path(arguments[0])
    try:
        code = run_kit(folder, Path(arguments[1]) if arguments[1:] else folder / "results")
    except AgentError as error:
        sys.stderr.write(f"run-kit: {error}\n")
        return EXIT_CODES[error.kind]
    return code if code >= 0 else 128 - code
