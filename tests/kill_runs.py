"""Runs that are killed: starting one, killing it at a moment, and comparing what is there then.

Shared by tests/test_kill.py and the longer tests/benchmarks/kill.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from command import ROOT, digits_sections, edgex_argv, write_recipe

from edgexception.artifacts import sha256_file


def short_recipe(folder: Path) -> Path:
    """Write the digits recipe with a narrow network and a blink of bench; every stage is in it.

    Beside it goes a copy of the package: many runs must be runs of one and the same sources, also
    while somebody edits them.
    """
    shutil.copytree(ROOT / "edgexception", folder / "edgexception")
    small = {"rounds": 1, "min_iterations": 3}
    return write_recipe(folder / "recipe.yaml", digits_sections(bench=small))


class Ended(NamedTuple):
    """How a run ended: exit code (-9: killed), seconds, its last words."""

    code: int
    seconds: float
    err: str


def run_for(
    recipe: Path, out: Path, seconds: float | None, temporary: Path, sources: Path
) -> Ended:
    """Run the recipe as a process; SIGKILL it after so many seconds, or let it end.

    `sources` is the folder with the copy of the package. TMPDIR is `temporary`: it marks every
    process that comes of the run, at any depth.
    """
    start = time.monotonic()
    with (temporary.parent / "stderr.txt").open("w+") as words:
        process = subprocess.Popen(
            edgex_argv("run", recipe, "-o", out, "--json"),
            cwd=temporary.parent,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(sources)},
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        try:
            process.wait(timeout=seconds or 280)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        words.seek(0)
        return Ended(process.returncode, time.monotonic() - start, words.read())


def orphans(temporary: Path, patience: float = 5.0) -> list[str]:
    """Return what still runs with this TMPDIR after a moment to notice that it should end."""
    end = time.monotonic() + patience
    while (left := _marked(temporary)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _marked(temporary: Path) -> list[str]:
    mark = f"TMPDIR={temporary}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark in (entry / "environ").read_bytes() + b"\0":
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has just ended, or is not ours to look at
            continue
    return found


def results(out: Path) -> dict[str, Any]:
    """Return what an undisturbed run must give again: every artifact, by key and content.

    Times are left out: the seconds in a build's record, telemetry, and all of `bench` but its key.
    """
    found: dict[str, Any] = {}
    for manifest in sorted(out.glob("store/*/*/manifest.json")):
        stage = manifest.parent.parent.name
        facts = json.loads(manifest.read_text())
        # From here on keys hold digests of artifacts that hold times.
        name = stage if stage in ("evaluate", "bench") else f"{stage} {facts['key']}"
        content = {
            file: _content(manifest.parent / file)
            for file in sorted(facts["files"])
            if stage != "bench" and "telemetry" not in file and "record" not in file
        }
        found.setdefault(name, []).append(content)
    return {name: sorted(contents, key=repr) for name, contents in found.items()}


def _content(path: Path) -> object:
    if path.name == "logits.npy":
        return np.load(path).tobytes()
    if path.name == "build.json":
        record = json.loads(path.read_text())
        return {key: value for key, value in record.items() if key not in ("seconds", "log")}
    if path.name == "engine.json":
        record = json.loads(path.read_text())
        (engine,) = (p for p in path.parent.glob("engine.*") if p != path)
        assert record.pop("engine_sha256") == sha256_file(engine)
        return record
    return _graph(path) if path.name == "engine.onnx" else sha256_file(path)


def _graph(path: Path) -> str:
    """Hash an ONNX Runtime engine without what differs between builds of one and the same graph.

    Its layout optimizer visits nodes in the order of a hash table: of two reorder nodes it inserts,
    now one and now the other is called "ReorderOutput_token_61" (seen with 1.32).
    """
    graph = onnx.load(path).graph
    for node in graph.node:
        node.ClearField("name")
    parts = [*graph.node, *graph.initializer, *graph.input, *graph.output]
    texts = sorted(part.SerializeToString(deterministic=True) for part in parts)
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def leftovers(out: Path) -> set[str]:
    """Return what lies in the output folder and the store's own places and should not."""
    expected = {"recipe.yaml", "report.json", "report.md", "store", "onnx", "engines"}
    expected |= {"model.safetensors", "plan.json", "calibration.json"}
    hidden = {path.name for path in (out / "store").glob(".*")} - {".lock", ".partial"}
    partial = {path.name for path in (out / "store/.partial").glob("*")}
    return ({path.name for path in out.iterdir()} - expected) | hidden | partial
