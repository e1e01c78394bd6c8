"""The `edgex` command for tests: in this process, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from processor import EXACT_BITS

from edgexception.cli import app
from edgexception.stage_code import sources

ROOT = Path(__file__).resolve().parents[1]

# The sources may be edited while the tests run; a run must then not find other code.
_START = """
import json, sys
from edgexception import stage_code
frozen = {name: stage_code.Module(*row) for name, row in json.loads(sys.argv.pop(1)).items()}
stage_code.sources = lambda: frozen
from edgexception.cli import main
sys.argv[0] = "edgex"
main()
"""


class Result(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def edgex(*arguments: object) -> Result:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app([str(argument) for argument in arguments], prog_name="edgex")
        except SystemExit as end:
            code = end.code
    return Result(int(code or 0), out.getvalue(), err.getvalue())


def edgex_argv(*arguments: object) -> list[str]:
    """Return the command line that runs the command from the sources as they were imported here."""
    return [sys.executable, "-c", _START, json.dumps(sources()), *map(str, arguments)]


def edgex_process(*arguments: object, cwd: Path | None = None, **environment: str) -> Result:
    """Run the real command, `python -m edgexception`, as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "edgexception", *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def digits_sections(**changes: Any) -> dict[str, Any]:
    """Return recipes/digits.yaml as plain data, made small: a narrow network, a blink of bench.

    `changes` replace whole sections, or with a dict the fields of one.
    """
    sections: dict[str, Any] = yaml.safe_load((ROOT / "recipes/digits.yaml").read_text())
    small: dict[str, Any] = {
        "model": {
            "architecture": {
                "stem": [8, 16],
                "entry": [[16, 16], [32, 32]],
                "middle": [[32, 32, 32]],
                "exit": [32, 32],
                "tail": [32, 32],
                "head": [10],
            },
            "epochs": 1,
        },
        "calibration": {"images": 24},
        "quantize": {"weight_bits": EXACT_BITS},
        "bench": {
            "batch_sizes": [1],
            "warmup_ms": 1,
            "duration_ms": 1,
            "min_iterations": 5,
            "rounds": 2,
        },
        "gates": {"top1_min": None, "agreement_min": 0.2, "sqnr_db_min": 1.0, "top1_drop_max": 1.0},
    }
    for change in (small, changes):
        for name, value in change.items():
            merge = isinstance(value, dict) and isinstance(sections.get(name), dict)
            sections[name] = {**sections[name], **value} if merge else value
    return _present(sections)


def _present(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None: the strict reader wants an absent field absent."""
    return {
        name: _present(value) if isinstance(value, dict) else value
        for name, value in section.items()
        if value is not None
    }


def write_recipe(path: Path, sections: dict[str, Any]) -> Path:
    """Write a recipe file."""
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path
