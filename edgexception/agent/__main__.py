"""The agent's command: `python -m edgexception.agent VERB REQUEST_DIR RESPONSE_DIR`.

A person on the device starts it as `python3 agent.pyz run-kit KIT_FOLDER`.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import traceback
from pathlib import Path

from edgexception.agent.protocol import EXIT_CODES, AgentError, answer_fault, is_full, read_request

INTERRUPTED = 130

# Per verb, the fields its request may have.
FIELDS = {
    "probe": ("power",),
    "build": (
        "runtime",
        "model",
        "batch",
        "batches",
        "threads",
        "sm",
        "tensorrt",
        "timing_cache",
    ),
    "run": (
        "runtime",
        "engine",
        "manifest",
        "batch",
        "threads",
        "images",
        "timing",
        "power",
        "profile",
        "tensorrt",
    ),
}


def main(arguments: list[str]) -> int:
    """Answer one request; return the exit code. Every fault is also written as the response."""
    if arguments[:1] == ["run-kit"]:
        return _run_kit(arguments[1:])
    if len(arguments) != 3 or arguments[0] not in FIELDS:
        sys.stderr.write(
            "usage: python -m edgexception.agent probe|build|run REQUEST_DIR RESPONSE_DIR\n"
        )
        return EXIT_CODES["usage"]
    verb, asked, answered = arguments[0], Path(arguments[1]), Path(arguments[2])
    _end_with_host()
    try:
        from edgexception.agent import verbs  # noqa: PLC0415 - `run-kit` has no use for them

        getattr(verbs, verb)(read_request(asked, FIELDS[verb]), answered)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the boundary: whatever happened becomes an answer
        kind, message = _classify(error)
        if kind == "bug":
            traceback.print_exc()
        try:
            answer_fault(answered, kind, message)
        except OSError as unwritten:
            sys.stderr.write(f"{message} (and no answer could be written: {unwritten})\n")
        return EXIT_CODES[kind]
    return 0


def _run_kit(arguments: list[str]) -> int:
    from edgexception.agent import kit  # noqa: PLC0415 - a host's agent has no use for it

    try:
        return kit.main(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; start it again to go on where it stopped\n")
        return INTERRUPTED
    except OSError as error:
        kind, message = _classify(error)
        sys.stderr.write(f"run-kit: {message}\n")
        return EXIT_CODES[kind]


def _classify(error: Exception) -> tuple[str, str]:
    if isinstance(error, AgentError):
        return error.kind, str(error)
    if isinstance(error, MemoryError):
        return "out-of-resources", "this machine has not enough memory for it"
    if is_full(error):
        return "out-of-resources", f"{error.strerror}: free some space and start again"
    return "bug", f"{type(error).__name__}: {error}"


def _end_with_host() -> None:
    """End this process, and those it started, when the host that holds its stdin is gone.

    Only where stdin is a pipe or a socket, as a transport makes it; a terminal or /dev/null is
    a person who started the agent by hand.
    """
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # The answer is complete; a runtime that crashes while it is torn down must not take it back.
    os._exit(code)
