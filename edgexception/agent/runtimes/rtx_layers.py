"""What TensorRT-RTX's builder lists of an engine's kernels, one line each, as data.

The lines are those of TensorRT-RTX 1.7.1 at verbosity DETAILED; the vendor documents no format.
Another version may write others: then nothing is known of the kernels, and nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgexception.agent.placement import Ran, placement

START = "Layers:\n"
GENERATED = "kgen"
"""The kind of kernels that are generated for nodes, mostly those between layers."""
_WIDTHS = {"Bool": 1, "Int8": 1, "UInt8": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4}
_PRECISIONS = {"Int8": "int8", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32"}
_KERNEL = re.compile(
    r"Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], "
    r"TacticName: .*?, StreamId: \d+, Metadata: (.*)"
)
# Where two streams meet, or sizes are computed: no kernel.
_MEETING = re.compile(
    r"Name: \S+, LayerType: (signal|wait|shape_call), Inputs: \[\], Constants: \[\], .*"
)
_TENSOR = re.compile(
    r"\{ Name: [^ ]+, Dimensions: \[(-1,)?([\d,]*)\], Strides: \[[-\d,]*\], "
    r"StrideOrder: \[[\d,]*\], Datatype: (\w+), Format: [^{}]* \}"
)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def read_kernels(text: str, batch: int) -> list[dict[str, Any]] | None:
    """Return every kernel of a listing in its order; None where a line is not understood.

    A kernel has its kind ("correlation" is a convolution, "kgen" what was generated for the nodes
    between), the ONNX nodes that it computes, and per tensor the type and the bytes that it reads,
    writes, or has as a constant. An open size is the first, and counted as `batch`.
    """
    if not text.startswith(START):
        return None
    lines = text[len(START) :].partition("\n\n")[0].splitlines()
    kernels = [_kernel(line, batch) for line in lines if not _MEETING.fullmatch(line)]
    known = [kernel for kernel in kernels if kernel is not None]
    return known if known and len(known) == len(kernels) else None


def inspection(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the kernels with the bytes that all of them read and write for one batch."""

    def total(*names: str) -> int:
        return sum(t["bytes"] for kernel in kernels for name in names for t in kernel[name])

    return {
        "kernels": kernels,
        "read_bytes": total("read", "constant"),
        "constant_bytes": total("constant"),
        "written_bytes": total("written"),
    }


def counts(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """Count kernels as "kind Read to Written", by the types of the first tensors.

    A kernel that reads nothing computes from constants, at each call.
    """
    return dict(sorted(Counter(map(_name, kernels)).items()))


def conversions(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """Count the generated kernels between layers that read one type and write another."""
    found = Counter(
        _types(kernel)
        for kernel in kernels
        if kernel["kind"] == GENERATED and len(set(_types(kernel).split(" to "))) > 1
    )
    return dict(sorted(found.items()))


def _types(kernel: dict[str, Any]) -> str:
    first = (kernel["read"] or kernel["constant"])[0]["type"]
    return f"{first} to {kernel['written'][0]['type']}"


def _name(kernel: dict[str, Any]) -> str:
    return f"{kernel['kind']} {_types(kernel)}"


def layer_placement(model: Path, kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every layer of an ONNX file with the type that its kernel reads.

    What was generated mostly reads a layer's result, for its ReLU or the next layer's grid; it
    computes the layer itself where no other kernel does.
    """
    proper = placement(model, _ran(kernels, generated=False))
    rest = placement(model, _ran(kernels, generated=True))
    return [a if a["kernel"] else b for a, b in zip(proper, rest, strict=True)]


def _ran(kernels: list[dict[str, Any]], *, generated: bool) -> Iterator[Ran]:
    for kernel in kernels:
        if (kernel["kind"] == GENERATED) == generated:
            read = (kernel["read"] or kernel["constant"])[0]["type"]
            yield Ran(tuple(kernel["layers"]), _PRECISIONS.get(read), _name(kernel))


def _kernel(line: str, batch: int) -> dict[str, Any] | None:
    found = _KERNEL.fullmatch(line)
    if found is None:
        return None
    kind, *parts, metadata = found.groups()
    read, constant, written = (_tensors(part, batch) for part in parts)
    if read is None or constant is None or not written or not read + constant:
        return None
    layers = list(dict.fromkeys(_LAYER.findall(metadata)))
    return {"kind": kind, "layers": layers, "read": read, "constant": constant, "written": written}


def _tensors(text: str, batch: int) -> list[dict[str, Any]] | None:
    """Return type and bytes of each tensor of a list; None where one is not understood."""
    tensors = []
    rest = text.strip()
    while rest:
        found = _TENSOR.match(rest)
        if found is None or found.group(3) not in _WIDTHS:
            return None
        is_open, sizes, kind = found.groups()
        count = math.prod(int(size) for size in sizes.split(",") if size)
        size = count * _WIDTHS[kind] * (batch if is_open else 1)
        tensors.append({"type": kind, "bytes": size})
        rest = rest[found.end() :].lstrip(", ")
    return tensors
