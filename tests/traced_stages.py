"""Watching every stage that a test runs in its process: did other code run than its key names?

A stage whose key misses a module gives stale results after an edit there, and no other test would
see it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from edgexception import artifacts, stage_code
from edgexception.stage_code import PACKAGE, WITHOUT_PART, stage_modules

ROOT = Path(stage_code.__file__).parents[1]
LISTENERS = {f"{PACKAGE}.{name}" for name in ("artifacts", "cli", "console", "pipeline")}
"""The store itself, and who hears of progress: they run within a stage and give it nothing."""


class StaleKey(BaseException):
    """A stage ran code that its key does not name; nothing of the package catches this."""


def watch_stages() -> None:
    """From now on, raise StaleKey after a stage of this package that ran what it does not name."""
    original = artifacts._run

    def watched(write: Callable[[Path], None], work: Path) -> None:
        with _files_that_run() as files:
            original(write, work)
        if write.__module__.startswith(f"{PACKAGE}."):
            stray = {_module_of(file) for file in files if _is_ours(file)}
            stray -= stage_modules(write) | WITHOUT_PART | LISTENERS
            if stray:
                raise StaleKey(f"{write.__qualname__}: not in its key: {', '.join(sorted(stray))}")

    artifacts._run = watched


@contextmanager
def _files_that_run() -> Iterator[set[str]]:
    """Note the file of every Python function called, in any thread that starts meanwhile."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # A package's own text is run when a module of it is imported, and defines names only.
        package = code.co_name == "<module>" and code.co_filename.endswith("__init__.py")
        if event == "call" and not package:
            files.add(code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def _is_ours(file: str) -> bool:
    return file.startswith(f"{ROOT / PACKAGE}/")


def _module_of(file: str) -> str:
    parts = Path(file).relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")
