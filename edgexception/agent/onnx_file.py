"""Read the few facts the agent needs from an ONNX file, without the onnx package.

An ONNX file is one protobuf message. The reader walks its nested fields by the wire format
(https://protobuf.dev/programming-guides/encoding/) with the field numbers of onnx.proto, and skips
everything else by length, so 90 MB of weights cost nothing.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgexception.agent.protocol import AgentError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Which fields of a message are messages that can hold a tensor or a node, by onnx.proto.
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_NODE_OP_TYPE, _NODE_DOMAIN = 4, 7
_MODEL_GRAPH, _MODEL_METADATA, _GRAPH_NODE = 7, 14, 1
_GRAPH_INPUT, _GRAPH_OUTPUT = 11, 12
_TYPES = {1: "float32", 2: "uint8", 10: "float16"}
"""TensorProto.DataType, as far as messages name it."""
_MAX_DEPTH = 40


@dataclass(frozen=True)
class Node:
    """One node of a model's main graph; `operator` is "domain:Type" where not ONNX's own."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def operators(path: Path) -> dict[str, int]:
    """Count the operators of a model, "domain:Type" where the domain is not ONNX's own.

    Raises a bad-artifact AgentError when it is not an ONNX file or when a tensor lies outside it:
    a runtime would open that other file, wherever it points (both do, also for a model from bytes).
    """
    counts: Counter[str] = Counter()
    name = path.name
    with _content(path) as content:
        _walk(content, "Model", counts, name, 0)
    if not counts:
        raise AgentError("bad-artifact", f"{name} is not an ONNX file: it has no operator")
    return dict(sorted(counts.items()))


def main_graph(path: Path) -> tuple[dict[str, str], list[Node]]:
    """Return a model's `metadata_props`, and the nodes of its main graph in their order."""
    metadata: dict[str, str] = {}
    nodes: list[Node] = []
    with _content(path) as content:
        for number, value in _fields(content):
            if isinstance(value, int):
                continue
            if number == _MODEL_METADATA:
                texts = _texts(value)
                metadata[texts.get(1, [""])[-1]] = texts.get(2, [""])[-1]
            elif number == _MODEL_GRAPH:
                messages = [m for n, m in _fields(value) if n == _GRAPH_NODE]
                nodes += [_node(message) for message in messages if not isinstance(message, int)]
    return metadata, nodes


End = tuple[str, str, tuple[int, ...]]
"""Name, type and shape of an input or output."""
OPEN = -1
"""A size that the model leaves open."""
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The least, the best and the greatest shape of `images`."""


def ends(path: Path) -> tuple[list[End], list[End]]:
    """Return the inputs and the outputs of a model's main graph."""
    found: dict[int, list[End]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: []}
    with _content(path) as content:
        for number, graph in _fields(content):
            if number == _MODEL_GRAPH and not isinstance(graph, int):
                for side, value in _fields(graph):
                    if side in found and not isinstance(value, int):
                        found[side].append(_end(value))
    return found[_GRAPH_INPUT], found[_GRAPH_OUTPUT]


def profile_shapes(path: Path, batches: tuple[int, int, int] | None) -> Shapes | None:
    """Return the shapes of `images` for the least, best and greatest batch; None where it is fixed.

    Raises a bad-artifact AgentError for a model with another open size, or a fixed batch.
    """
    if batches is None:
        return None
    shapes = [shape for _, _, shape in ends(path)[0]]
    if len(shapes) != 1 or shapes[0][:1] != (OPEN,) or min(shapes[0][1:], default=OPEN) < 0:
        raise AgentError(
            "bad-artifact",
            f"{path.name} reads images of {', '.join(map(str, shapes))} ({OPEN} is open): for a "
            "dynamic batch that one size must be open; export it without a batch",
        )
    least, best, greatest = ((batch, *shapes[0][1:]) for batch in batches)
    return least, best, greatest


def _end(value_info: memoryview) -> End:
    """Read a ValueInfoProto: name 1, type 2; in that tensor_type 1: elem_type 1, shape 2."""
    name, kind, shape = _texts(value_info, (1,)).get(1, [""])[-1], 0, []
    for tensor in _inside(_inside([value_info], 2), 1):
        kind = next((v for n, v in _fields(tensor) if n == 1 and isinstance(v, int)), 0)
        for dimension in _inside(_inside([tensor], 2), 1):
            sizes = [v for n, v in _fields(dimension) if n == 1 and isinstance(v, int)]
            # Some exporters write -1 for an open size.
            shape.append(sizes[-1] if sizes and sizes[-1] < 1 << 63 else OPEN)
    return name, _TYPES.get(kind, f"type {kind}"), tuple(shape)


def _inside(messages: Iterable[memoryview], wanted: int) -> list[memoryview]:
    """Return the messages in a field of messages."""
    inner = ((n, v) for message in messages for n, v in _fields(message))
    return [v for n, v in inner if n == wanted and not isinstance(v, int)]


@contextmanager
def _content(path: Path) -> Iterator[memoryview]:
    """Map a file; what is wrong with its wire format becomes a bad-artifact AgentError."""
    with path.open("rb") as file:
        # Not closed by hand: the traceback of a fault still holds views of it.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        yield content
    except (IndexError, UnicodeDecodeError) as error:
        raise AgentError("bad-artifact", f"{path.name} is broken or not an ONNX file") from error


def _node(message: memoryview) -> Node:
    texts = _texts(message, (1, 2, 3))
    name = texts.get(3, [""])[-1]
    return Node(_operator(message), name, tuple(texts.get(1, ())), tuple(texts.get(2, ())))


def _texts(message: memoryview, wanted: tuple[int, ...] = (1, 2)) -> dict[int, list[str]]:
    """Return the strings of some fields of a message."""
    found: dict[int, list[str]] = {}
    for number, value in _fields(message):
        if number in wanted and not isinstance(value, int):
            found.setdefault(number, []).append(str(value, "utf-8"))
    return found


def _walk(message: memoryview, kind: str, counts: Counter[str], name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise AgentError("bad-artifact", f"{name} nests its graphs deeper than {_MAX_DEPTH} levels")
    if kind == "Node":
        counts[_operator(message)] += 1
    children = _CHILDREN.get(kind, {})
    for number, value in _fields(message):
        if isinstance(value, int):
            external = kind == "Tensor" and number == _TENSOR_DATA_LOCATION and value != 0
        else:
            external = kind == "Tensor" and number == _TENSOR_EXTERNAL_DATA
            if number in children:
                _walk(value, children[number], counts, name, depth + 1)
        if external:
            raise AgentError(
                "bad-artifact",
                f"{name} keeps tensors in another file (external data), which the agent never "
                "opens: export the model as one file",
            )


def _operator(node: memoryview) -> str:
    op_type = domain = ""
    for number, value in _fields(node):
        if not isinstance(value, int) and number in (_NODE_OP_TYPE, _NODE_DOMAIN):
            text = str(value, "utf-8")
            op_type, domain = (text, domain) if number == _NODE_OP_TYPE else (op_type, text)
    return f"{domain}:{op_type}" if domain not in ("", "ai.onnx") else op_type


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, integer or bytes); IndexError where the bytes end too early."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise IndexError("wire type that protobuf 3 does not write")
        if size > len(message) - at or number == 0:
            raise IndexError("field runs over the end of its message")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("varint longer than 64 bits")
