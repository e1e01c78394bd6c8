"""Read what `trtexec` and TensorRT's engine inspector write.

Formats: samples/common/sampleReporting.cpp of NVIDIA/TensorRT (exportJSONTrace, exportJSONProfile),
the same from v10.3.0 to v11.1; the engine inspector's JSON as in the TensorRT documentation
("Engine Inspector"; for 11 "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x"), and as
recorded in tools/experimental/trt-engine-explorer/tests/inputs of that repository (up to v10.16).
What is not of these formats is refused as bad-artifact.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgexception.agent.placement import Ran, placement
from edgexception.agent.protocol import AgentError


@dataclass(frozen=True)
class LayerTime:
    """One layer of a profile; times in ms for one inference."""

    name: str
    average_ms: float
    median_ms: float


@dataclass(frozen=True)
class Layer:
    """One layer of an engine. All but `name` is empty where it was built without details."""

    name: str
    kind: str = ""
    nodes: tuple[str, ...] = ()
    """The ONNX nodes that were fused into it."""
    read: str | None = None
    """Type of the first tensor that it reads: "int8", "fp16", "bf16", "fp32", None for others."""
    written: str | None = None
    weights: str | None = None
    tactic: str = ""


@dataclass(frozen=True)
class Log:
    """What a log says; None where it does not."""

    version: str | None
    passed: bool | None
    device: str | None
    sm: int | None
    build_s: float | None
    warm_up: int | None
    """Inferences before those that count."""
    dla_fallbacks: tuple[str, ...]
    """Layers that were to run on the DLA and run on the GPU."""
    errors: tuple[str, ...]


# --- times ----------------------------------------------------------------------------------------


def parse_times(text: str) -> list[dict[str, float]]:
    """Return the entries of `--exportTimes`: every field of one inference, in ms.

    `latencyMs` is host to device, compute and device to host; without transfers it is compute.
    """
    entries = _json(text, "--exportTimes")
    if not isinstance(entries, list) or not entries:
        raise _bad("--exportTimes", "it is no list of inferences")
    for entry in entries:
        fits = isinstance(entry, dict) and {"latencyMs", "computeMs"} <= set(entry)
        if not fits or not all(_is_time(value) for value in entry.values()):
            raise _bad("--exportTimes", f"{str(entry)[:80]!r} is no inference")
    return entries


def parse_profile(text: str) -> list[LayerTime]:
    """Return the layers of `--exportProfile`, in the order of execution."""
    entries = _json(text, "--exportProfile")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise _bad("--exportProfile", "it is no list of layers")
    if set(entries[0]) == {"count"}:
        entries = entries[1:]
    found = []
    for entry in entries:
        fits = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not fits or not all(_is_time(entry.get(key)) for key in ("averageMs", "medianMs")):
            raise _bad("--exportProfile", f"{str(entry)[:80]!r} is no layer")
        found.append(LayerTime(entry["name"], entry["averageMs"], entry["medianMs"]))
    return found


def _is_time(value: object) -> bool:
    # NaN and infinity fail the comparison.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


# --- layers ---------------------------------------------------------------------------------------

# "Weights" and kgen tensors say Half or Float; other tensors have a sentence on their layout.
_TYPES = (
    ("int8", re.compile(r"\bint8\b", re.I)),
    ("bf16", re.compile(r"\b(bfloat16|bf16)\b", re.I)),
    ("fp16", re.compile(r"\b(fp16|half)\b", re.I)),
    ("fp32", re.compile(r"\b(fp32|float)\b", re.I)),
)
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_NAME_PARTS = re.compile(r" \+ | \|\| |,")
# They run no layer of the network: "Reformatting CopyNode for Input Tensor 0 to block1_conv1" only
# names the one that it works for.
_HELPERS = ("Reformat", "NoOp", "Constant", "signal", "wait", "shape_call")
_PROPER = re.compile("conv|depthwise|correlation|gemm|matri|fusion", re.I)


def parse_layers(text: str) -> list[Layer]:
    """Return the layers of an engine inspector's JSON, `--exportLayerInfo`, 10.x or 11.x."""
    document = _json(text, "--exportLayerInfo")
    entries = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise _bad("--exportLayerInfo", "it has no list `Layers`")
    return [_layer(entry) for entry in entries]


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("Name"), str):
        raise _bad("--exportLayerInfo", f"{str(entry)[:80]!r} is no layer")
    name, metadata = entry["Name"], entry.get("Metadata")
    nodes = _ONNX_NODE.findall(metadata) if isinstance(metadata, str) else []
    weights = entry.get("Weights")
    return Layer(
        name,
        str(entry.get("LayerType", "")),
        tuple(nodes or _named(name)),
        _type_of_first(entry.get("Inputs")),
        _type_of_first(entry.get("Outputs")),
        _type(weights.get("Type")) if isinstance(weights, dict) else None,
        str(entry.get("TacticName", "")),
    )


def _named(name: str) -> Iterable[str]:
    """Return the nodes in a layer's name: "w + conv + PWN(relu)" is w, conv and relu."""
    for part in _NAME_PARTS.split(name):
        yield re.sub(r"^(PWN\()*|\)*$", "", part.strip())


def _type_of_first(tensors: object) -> str | None:
    first = tensors[0] if isinstance(tensors, list) and tensors else None
    if not isinstance(first, dict):
        return None
    # "Format/Datatype" until 10.x; 11.x has a field for each.
    keys = ("DataType", "Datatype", "Format/Datatype")
    return next((_type(first[key]) for key in keys if key in first), None)


def _type(text: object) -> str | None:
    found = (name for name, pattern in _TYPES if pattern.search(str(text)))
    return next(found, None)


def layer_placement(model: Path, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return every layer of an ONNX file with the precision that its kernel computes in.

    A kernel computes in INT8 when both its weights and what it reads are; where the two differ it
    computes in the wider one. A generated kernel mostly does what follows a layer; it counts only
    for layers that no other kernel runs. An engine without details tells nothing.
    """
    known = [layer for layer in layers if layer.kind and layer.kind not in _HELPERS]
    proper = [layer for layer in known if _PROPER.search(layer.kind)]
    rest = [layer for layer in known if not _PROPER.search(layer.kind)]
    first, second = (
        placement(model, map(_ran, found), by_followers=False) for found in (proper, rest)
    )
    return [a if a["kernel"] else b for a, b in zip(first, second, strict=True)]


def _ran(layer: Layer) -> Ran:
    return Ran(layer.nodes, _precision(layer), f"{layer.kind} {layer.tactic}".strip())


def counts(layers: Sequence[Layer]) -> dict[str, int]:
    """Count the layers as "kind precision"."""
    return dict(sorted(Counter(f"{x.kind} {_precision(x)}" for x in layers if x.kind).items()))


def _precision(layer: Layer) -> str | None:
    if layer.weights is None or layer.read is None:
        return layer.weights or layer.read
    order = ("fp32", "bf16", "fp16", "int8")
    return min(layer.weights, layer.read, key=order.index)


def conversions(layers: Sequence[Layer]) -> dict[str, int]:
    """Count the layers that only change type or layout."""
    return dict(sorted(Counter(_change(x) for x in layers if x.kind == "Reformat").items()))


def does(layer: Layer) -> str:
    """Return what a layer does in the words of `runtimes.KernelTime`."""
    if layer.kind == "Reformat":
        return _change(layer)
    return (_PROPER.search(layer.kind) and _precision(layer)) or "other"


def _change(layer: Layer) -> str:
    if layer.read == layer.written:
        return "reorder"
    if layer.written == "int8":
        return "quantize"
    return "dequantize" if layer.read == "int8" else "cast"


# --- log ------------------------------------------------------------------------------------------

_BANNER = re.compile(r"&&&& (RUNNING|PASSED|FAILED) TensorRT\.trtexec \[TensorRT v(\d{6})\]")
_BUILD = re.compile(r"&&&& \w+ TensorRT\.trtexec \[TensorRT v\d{6}\] \[b(\d+)\]")
_SM = re.compile(r"\] Compute Capability: (\d+)\.(\d+)\s*$", re.M)
_DEVICE = re.compile(r"\] Selected Device: (.+?)\s*$", re.M)
_WARM_UP = re.compile(r"\] Warmup completed (\d{1,12}) queries", re.M)
_BUILT = re.compile(r"\] Engine built in ([0-9.]+) sec", re.M)
# Version 10 as 8.6; the second form is the older one.
_FALLBACK = re.compile(
    r"Layer '(.+?)' \(\w+\): Unsupported on DLA\. Switching this layer's device type to GPU"
    r"|layer (.+?) is not supported on DLA, falling back to GPU"
)
_ERROR = re.compile(r"\] \[E\] (.+?)\s*$", re.M)
MAX_ERRORS = 20


def parse_log(text: str) -> Log:
    """Return what a log of trtexec says.

    The banner's "v101303" is 10.13.3 (NV_TENSORRT_VERSION: two digits each for minor and patch),
    with the build in brackets behind it.
    """
    banners = _BANNER.findall(text)
    version = None
    if banners:
        digits = banners[0][1]
        version = ".".join(str(int(part)) for part in (digits[:2], digits[2:4], digits[4:]))
        build = _BUILD.search(text)
        version += f".{build[1]}" if build else ""
    ends = [state for state, _ in banners if state != "RUNNING"]
    sm, device, built = _SM.search(text), _DEVICE.search(text), _BUILT.search(text)
    warm_up = _WARM_UP.search(text)
    return Log(
        version=version,
        passed=ends[-1] == "PASSED" if ends else None,
        device=device[1] if device else None,
        sm=int(sm[1]) * 10 + int(sm[2]) if sm else None,
        build_s=_number(built[1]) if built else None,
        warm_up=int(warm_up[1]) if warm_up else None,
        dla_fallbacks=tuple(dict.fromkeys(a or b for a, b in _FALLBACK.findall(text))),
        errors=tuple(_ERROR.findall(text)[:MAX_ERRORS]),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(what, "it is not JSON") from error


def _bad(what: str, why: str) -> AgentError:
    return AgentError("bad-artifact", f"what trtexec wrote for {what} cannot be read: {why}")
