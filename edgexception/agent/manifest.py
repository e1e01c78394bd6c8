"""`engine.json`, which stands beside an engine: what it was built from and for, and with what.

An engine is opened only where its manifest says that it fits: the file is the one that was built,
and this machine has what the engine was built for. A manifest is no signature: who can write both
files can make them agree. What a hostile engine does then, it does to the agent's process alone.

`settings` has what the runtime was told, and the sha256 of its timing cache as read and written.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgexception.agent import machine
from edgexception.agent.protocol import AgentError, write_json
from edgexception.agent.runtimes import Options, is_batches

FILE = "engine.json"
_FORMAT = 1
_MAX_BYTES = 16 << 20
_KEYS = {
    "format", "runtime", "onnx_sha256", "engine_sha256", "needs", "allows", "versions", "built_on",
    "options", "settings", "layers",
}  # fmt: skip
_LATER_VERSION, _AMPERE_ON = "later versions of the major version", "SM80 and newer"


def write(
    folder: Path, model: Path, options: Options, record: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write the manifest of the engine that a build left in a folder.

    `record` is the build's, `facts` what the runtime says of itself (`Runtime.version`).
    """
    here = machine.facts()
    content = {
        "format": _FORMAT,
        "runtime": record["runtime"],
        "onnx_sha256": _sha256(model),
        "engine_sha256": _sha256(folder / record["engine"]),
        "needs": _needs(record["runtime"], options, facts),
        "allows": _allows(options),
        "versions": record["versions"],
        "built_on": {
            "arch": here["arch"],
            "system": here["system"],
            "board": here["board"],
            "cpu": here["cpu"]["model"],
            "gpus": facts.get("gpus", []),
        },
        "options": asdict(options),
        "settings": record["settings"],
        "layers": {layer["name"]: layer["executed"] for layer in record.get("placement", ())},
    }
    write_json(folder / FILE, content)


def check(path: Path, engine: Path, runtime: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest; raise an AgentError unless it fits its engine and this machine."""
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
    needs, here = found["needs"], _has(facts)
    # Only some engines are for one model of GPU; the rest is needed by all.
    asked = [name for name in here if name != "gpu" or name in needs]
    wrong = [
        _difference(name, needs.get(name), here[name])
        for name in asked
        if not _fits(name, needs.get(name), here[name], found["allows"])
    ]
    if wrong:
        raise AgentError(
            "not-possible-here",
            f"{engine.name} was not built for this machine: {'; '.join(wrong)}. Build it here with "
            "`edgex build-engine`",
        )
    return found


def _has(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what of this machine an engine may need, with a runtime that says `facts`.

    Kernels for processors are chosen by their instructions, those for GPUs by compute capability.
    """
    if "gpus" in facts:
        gpu = facts["gpus"][0] if facts["gpus"] else {}
        return {"version": facts["version"], "sm": gpu.get("sm"), "gpu": gpu.get("name")}
    here = machine.facts()
    return {"version": facts["version"], "arch": here["arch"], "flags": here["cpu"]["flags"]}


def _needs(runtime: str, options: Options, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what must be there where an engine is opened.

    An engine of TensorRT is for the model of GPU that it was built on, if nothing else was asked
    for (TensorRT documentation, "Hardware Compatibility").
    """
    needs = _has(facts)
    if "gpus" in facts:
        needs["sm"] = options.sm or needs["sm"]
        told = options.tensorrt
        if runtime != "tensorrt" or (told and told.hardware_compatibility != "none"):
            del needs["gpu"]
    return needs


def _allows(options: Options) -> list[str]:
    """Return in what the machine may differ by what TensorRT was told."""
    told = options.tensorrt
    wider = told is not None and told.hardware_compatibility == "ampere-plus"
    later = told is not None and told.version_compatible
    return [_LATER_VERSION] * later + [_AMPERE_ON] * wider


def _fits(name: str, built: Any, here: Any, allows: list[str]) -> bool:
    if name == "version" and _LATER_VERSION in allows:
        first, now = _numbers(built), _numbers(here)
        return now[:1] == first[:1] and now >= first
    if name == "sm" and _AMPERE_ON in allows:
        return here is not None and here >= 80
    return bool(built == here)


def _numbers(version: object) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(version))]


def _difference(name: str, built: Any, here: Any) -> str:
    if name in ("sm", "gpu") and here is None:
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
    kinds = {"needs": dict, "allows": list, "options": dict, "settings": dict}
    if (
        not fits
        or not all(isinstance(found[name], kind) for name, kind in kinds.items())
        or not is_batches(found["options"].get("batches", ()))
    ):
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
