"""`engine.json`, which stands beside an engine: what it was built from and for, and with what.

An engine is opened only where its manifest says that it fits: the file is the one that was built,
and this machine has what the engine was built for. A manifest is no signature: who can write both
files can make them agree. What a hostile engine does then, it does to the agent's process alone.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgexception.agent import machine
from edgexception.agent.protocol import AgentError, write_json

FILE = "engine.json"
_FORMAT = 1
_MAX_BYTES = 16 << 20
_KEYS = {
    "format", "runtime", "onnx_sha256", "engine_sha256", "needs", "versions", "built_on", "options",
    "settings", "layers",
}  # fmt: skip


def write(folder: Path, model: Path, record: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the manifest of the engine that a build left in a folder.

    `record` is the build's, `facts` what the runtime says of itself (`Runtime.version`).
    """
    here = machine.facts()
    content = {
        "format": _FORMAT,
        "runtime": record["runtime"],
        "onnx_sha256": _sha256(model),
        "engine_sha256": _sha256(folder / record["engine"]),
        "needs": _needs(facts, record["settings"].get("sm")),
        "versions": record["versions"],
        "built_on": {
            "arch": here["arch"],
            "system": here["system"],
            "board": here["board"],
            "cpu": here["cpu"]["model"],
            "gpus": facts.get("gpus", []),
        },
        "options": {name: record[name] for name in ("batch", "threads")},
        "settings": record["settings"],
        "layers": {layer["name"]: layer["executed"] for layer in record.get("placement", ())},
    }
    write_json(folder / FILE, content)


def check(path: Path, engine: Path, runtime: str, facts: dict[str, Any]) -> None:
    """Raise an AgentError unless an engine is the one of its manifest and fits this machine."""
    found = _read(path)
    if found["runtime"] != runtime:
        raise AgentError(
            "bad-artifact", f"{engine.name} is an engine of {found['runtime']}, not of {runtime}"
        )
    digest = _sha256(engine)
    if found["engine_sha256"] != digest:
        raise AgentError(
            "bad-artifact",
            f"{engine.name} is not the engine that {path.name} describes: its sha256 is {digest}, "
            f"not {found['engine_sha256']}. It was changed, cut or mixed up; build it again",
        )
    gpus = facts.get("gpus")
    needs, here = found["needs"], _needs(facts, gpus[0]["sm"] if gpus else None)
    differ = [name for name in here if needs.get(name) != here[name]]
    if wrong := [_difference(name, needs.get(name), here[name]) for name in differ]:
        raise AgentError(
            "not-possible-here",
            f"{engine.name} was not built for this machine: {'; '.join(wrong)}. Build it here with "
            "`edgex build-engine`",
        )


def _needs(facts: dict[str, Any], sm: int | None) -> dict[str, Any]:
    """Return what must be equal where an engine is built and where it is opened.

    Kernels for processors are chosen by their instructions, those for GPUs by compute capability.
    """
    if "gpus" in facts:
        return {"version": facts["version"], "sm": sm}
    here = machine.facts()
    return {"version": facts["version"], "arch": here["arch"], "flags": here["cpu"]["flags"]}


def _difference(name: str, built: Any, here: Any) -> str:
    if name == "sm" and here is None:
        return "no NVIDIA GPU here"
    if isinstance(built, list) and isinstance(here, list):
        odd = sorted({str(flag) for flag in built} ^ {str(flag) for flag in here})
        return f"the processor differs in {', '.join(odd)}"
    return f"built for {name} {built}, here is {here}"


def _read(path: Path) -> dict[str, Any]:
    found: Any = None
    if path.stat().st_size <= _MAX_BYTES:
        with suppress(ValueError, RecursionError):
            found = json.loads(path.read_bytes())
    fits = isinstance(found, dict) and found.get("format") == _FORMAT and set(found) == _KEYS
    if not fits or not isinstance(found["needs"], dict):
        raise AgentError(
            "bad-artifact",
            f"{path.name} is no manifest of an engine as this version writes it: build the engine "
            "again",
        )
    return dict(found)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
