"""Pythons without numpy, as a device may have them: 3.10 of JetPack 6 and 3.12 of JetPack 7."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

VERSIONS = ("3.10", "3.12")


def bare_python(version: str) -> str:
    """Return a Python of that version that has no numpy; skip, saying so, where there is none."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = [path for path in (shutil.which(f"python{version}"), *map(str, pyenv)) if path]
    for path in found:
        asked = [path, "-I", "-c", f"import sys; assert sys.version.startswith('{version}.')"]
        without = [path, "-I", "-c", "import numpy"]
        if _runs(asked) and not _runs(without):
            return path
    pytest.skip(f"there is no Python {version} without numpy here (on the PATH, or of pyenv)")


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    except OSError:
        return False
