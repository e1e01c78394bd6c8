"""What TensorRT-RTX's builder lists of an engine's kernels, one line each, as data.

The lines are those of TensorRT-RTX 1.7.1 at verbosity DETAILED; the vendor documents no format.
Another version may write others: then nothing is known of the kernels, and nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

START = "Layers:\n"
_WIDTHS = {"Bool": 1, "Int8": 1, "UInt8": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4}
_KERNEL = re.compile(
    r"Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], "
    r"TacticName: .*?, StreamId: \d+, Metadata: (.*)"
)
_TENSOR = re.compile(
    r"\{ Name: [^ ]+, Dimensions: \[([\d,]*)\], Strides: \[[\d,]*\], StrideOrder: \[[\d,]*\], "
    r"Datatype: (\w+), Format: [^{}]* \}"
)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def read_kernels(text: str) -> list[dict[str, Any]] | None:
    """Return every kernel of a listing in its order; None where a line is not understood.

    A kernel has its kind ("correlation" is a convolution, "kgen" what was generated for the nodes
    between), the ONNX nodes that it computes, and per tensor the type and the bytes that it reads,
    writes, or has as a constant.
    """
    if not text.startswith(START):
        return None
    lines = text[len(START) :].partition("\n\n")[0].splitlines()
    kernels = [_kernel(line) for line in lines]
    known = [kernel for kernel in kernels if kernel is not None]
    return known if known and len(known) == len(kernels) else None


def inspection(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the kernels with the sums over them: bytes of one batch, and of all constants."""
    sums = {
        f"{name}_bytes": sum(tensor["bytes"] for kernel in kernels for tensor in kernel[name])
        for name in ("read", "written", "constant")
    }
    return {"kernels": kernels, **sums}


def counts(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """Count kernels as "kind Read to Written", by the types of the first tensors.

    A kernel that reads nothing computes from constants, at each call.
    """
    found: Counter[str] = Counter()
    for kernel in kernels:
        first = (kernel["read"] or kernel["constant"])[0]
        found[f"{kernel['kind']} {first['type']} to {kernel['written'][0]['type']}"] += 1
    return dict(sorted(found.items()))


def _kernel(line: str) -> dict[str, Any] | None:
    found = _KERNEL.fullmatch(line)
    if found is None:
        return None
    kind, *parts, metadata = found.groups()
    read, constant, written = map(_tensors, parts)
    if read is None or constant is None or not written or not read + constant:
        return None
    layers = list(dict.fromkeys(_LAYER.findall(metadata)))
    return {"kind": kind, "layers": layers, "read": read, "constant": constant, "written": written}


def _tensors(text: str) -> list[dict[str, Any]] | None:
    """Return type and bytes of each tensor of a list; None where one is not understood."""
    tensors = []
    rest = text.strip()
    while rest:
        found = _TENSOR.match(rest)
        if found is None or found.group(2) not in _WIDTHS:
            return None
        sizes = [int(size) for size in found.group(1).split(",") if size]
        size = math.prod(sizes) * _WIDTHS[found.group(2)]
        tensors.append({"type": found.group(2), "bytes": size})
        rest = rest[found.end() :].lstrip(", ")
    return tensors
