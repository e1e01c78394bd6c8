"""Which layers of an exported network the DLA of a Jetson can run, planned before any build.

The DLA (Deep Learning Accelerator) of Orin NX and AGX Orin has fixed functions. What these are is
the same from TensorRT 10.3 to 11; which versions have a DLA at all is in `agent.tensorrt_options`.

| rule | source |
|---|---|
| operators that TensorRT gives to the DLA, and those that it does not | NVIDIA/Deep-Learning-Accelerator-SW, operators/README.md |
| kernel, stride, dilation, padding, window, groups, output channels | NvInfer.h of v10.3.0, v10.7.0 and v11.1, the same in all |
| no dimension above 8192, two spatial dimensions | DLA Supported Layers and Restrictions |
| data and weights of a convolution fit its buffer, CBUF | TensorRT Developer Guide 8, DLA Supported Layers; FAQ of Deep-Learning-Accelerator-SW |
| a mean over all pixels is a Reduce, and of those only MAX runs | TensorRT Operators, Reduce; onnx-tensorrt, globalPoolingHelper |
| constants stay on the GPU, but for slopes | TensorRT Operators, Constant |
| FP16 and INT8, and INT8 only between scales | Working with DLA; NVIDIA/Model-Optimizer pull request 1661 |

What nobody says that the DLA can do is planned for the GPU. `IBuilderConfig.can_run_on_DLA` has the
last word where an engine is built: `report.assemble` holds this plan against it. Never run on a DLA.
"""  # noqa: E501 - a table of links is read better unbroken

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from edgexception.agent.placement import METADATA
from edgexception.export.lint import read_graph

MAX_DIMENSION = 8192

_RANGES: dict[str, dict[str, tuple[int, int]]] = {
    "Conv": {
        "kernel_shape": (1, 32),
        "strides": (1, 8),
        "dilations": (1, 32),
        "pads": (0, 31),
        "group": (1, 8192),
    },
    "MaxPool": {"kernel_shape": (1, 8), "strides": (1, 16), "pads": (0, 7)},
    "AveragePool": {"kernel_shape": (1, 8), "strides": (1, 16), "pads": (0, 7)},
}
"""Operator -> attribute -> least and greatest of its numbers."""

_OTHERS = ("Relu", "Sigmoid", "Tanh", "Add", "Sub", "Mul", "Max", "Min", "Transpose")
"""The operators of the family, and their like, that have no attribute to bound."""

_GPU = {
    "Cast": "the DLA reads no uint8 and changes no types",
    "Flatten": "TensorRT has no Flatten on the DLA",
    "Elu": "TensorRT has no ELU on the DLA",
    "GlobalAveragePool": "it is a mean over all pixels, and the DLA reduces by maximum only",
}
_RESTS = ("QuantizeLinear", "DequantizeLinear", "Constant")
"""What is no layer of its own: where it is fused it takes no time."""
_MOVES = ("Cast", "Identity", "Transpose", "Flatten")
"""Operators that compute nothing, so that their type loses nothing."""

_BANKS, _BANK_BYTES, _ENTRIES = 16, 32768, 256


@dataclass(frozen=True)
class DlaLayer:
    """One layer of a network that is to run on a DLA."""

    name: str
    macs: int
    """Multiply-accumulates for one image."""
    precision: str | None
    """"int8" or "fp16" on the DLA; None is on the GPU."""
    why: str = ""
    """Why it is on the GPU."""
    float32: bool = False
    """Whether it computes, and in float32 by the graph's types."""


@dataclass(frozen=True)
class DlaPlan:
    """Where the layers of a network go, in their order."""

    layers: tuple[DlaLayer, ...]
    parts: int
    """Into how many parts the GPU's layers cut what the DLA runs, at least."""


def plan_dla(path: Path) -> DlaPlan:
    """Plan an exported ONNX file; BadArtifact where it cannot be read."""
    return dla_plan(read_graph(path))


def dla_plan(model: onnx.ModelProto) -> DlaPlan:
    """Return where a graph's layers go on a device with a DLA."""
    planner = _Planner(model)
    layers = tuple(planner.layer(node) for node in planner.nodes)
    return DlaPlan(layers, planner.parts({la.name for la in layers if la.precision}))


class _Planner:
    """What the rules ask of a graph: types, shapes, and which tensors have a scale."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        props = {prop.key: prop.value for prop in model.metadata_props}
        self.known = json.loads(props.get(METADATA, "{}"))
        self.nodes = [node for node in graph.node if node.op_type not in _RESTS]
        self.constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        self.kinds: dict[str, int] = {}
        self.shapes: dict[str, list[int]] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.kinds[value.name] = tensor.elem_type
            # An open batch size is the only dimension without a number.
            self.shapes[value.name] = [dim.dim_value or 1 for dim in tensor.shape.dim]
        self.dequantized: dict[str, str] = {}
        """What a DequantizeLinear writes -> what it reads."""
        self.readers: dict[str, list[str]] = {}
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                self.dequantized[node.output[0]] = node.input[0]
            for name in node.input:
                self.readers.setdefault(name, []).append(node.op_type)
        self.written = {name: node for node in graph.node for name in node.output}

    def layer(self, node: onnx.NodeProto) -> DlaLayer:
        """Return where one node goes."""
        macs = self.known.get(node.name, {}).get("macs", 0)
        float32 = self.kinds.get(node.output[0]) == TensorProto.FLOAT and node.op_type not in _MOVES
        precision = self._precision(node)
        why = next(self._obstacles(node, precision), "")
        if why or precision is None:
            why = why or "it is float32 by the graph, and the DLA computes in FP16 and INT8"
            return DlaLayer(node.name, macs, None, why, float32)
        return DlaLayer(node.name, macs, precision, "", float32)

    def _precision(self, node: onnx.NodeProto) -> str | None:
        """Return what a node could compute in on the DLA; None: in neither."""
        weights = node.op_type == "Conv" and self._is_constant(
            self.dequantized.get(node.input[1], "")
        )
        scaled = node.input[0] in self.dequantized and set(
            self.readers.get(node.output[0], ())
        ) == {"QuantizeLinear"}
        if weights and scaled:
            return "int8"
        return "fp16" if self.kinds.get(node.output[0]) == TensorProto.FLOAT16 else None

    def _obstacles(self, node: onnx.NodeProto, precision: str | None) -> Iterator[str]:
        kind = node.op_type
        if kind not in _RANGES and kind not in _OTHERS:
            yield _GPU.get(kind, f"TensorRT has no {kind} on the DLA")
            return
        for name, (low, high) in _RANGES.get(kind, {}).items():
            for number in _numbers(node, name):
                if not low <= number <= high:
                    yield f"{name} has {number}, and the DLA's are {low} to {high}"
        if kind != "Conv" and any(self._is_constant(name) for name in node.input):
            yield "one of its operands is a constant, which the DLA does not read"
        shapes = [self.shapes.get(name, []) for name in (node.input[0], node.output[0])]
        if any(len(shape) != 4 for shape in shapes):
            yield "its tensors have no two spatial dimensions"
        large = max((size for shape in shapes for size in shape[1:]), default=0)
        if large > MAX_DIMENSION:
            yield f"a dimension has {large}, and the DLA's have at most {MAX_DIMENSION}"
        if kind == "Conv":
            yield from self._convolution(node, precision, shapes[0])

    def _convolution(
        self, node: onnx.NodeProto, precision: str | None, shape: list[int]
    ) -> Iterator[str]:
        kernel, pads = _numbers(node, "kernel_shape"), _numbers(node, "pads")
        if any(pad >= size for pad, size in zip(pads, kernel * 2, strict=False)):
            yield "its padding is not less than its kernel"
        banks = _buffer_banks(shape, kernel, _numbers(node, "dilations"), precision)
        if banks > _BANKS:
            yield f"it needs {banks} of the convolution buffer's {_BANKS} banks"

    def _is_constant(self, name: str) -> bool:
        return name in self.constants or (
            name in self.written and self.written[name].op_type == "Constant"
        )

    def parts(self, on_dla: set[str]) -> int:
        """Count the connected pieces that these nodes make, over Q/DQ pairs, too."""
        piece: dict[str, int] = {}
        count = 0
        for node in self.nodes:
            if node.name not in on_dla:
                continue
            met = {piece[name] for name in map(self._source, node.input) if name in piece}
            count += 1
            for name, number in piece.items():
                if number in met:
                    piece[name] = count
            piece[node.output[0]] = count
        return len(set(piece.values()))

    def _source(self, name: str) -> str:
        """Return the tensor that a layer wrote, behind the Q/DQ pair that another reads it by."""
        while name in self.written and self.written[name].op_type in _RESTS[:2]:
            name = self.written[name].input[0]
        return name


def _numbers(node: onnx.NodeProto, name: str) -> list[int]:
    for attribute in node.attribute:
        if attribute.name == name:
            return [int(attribute.i)] if attribute.HasField("i") else list(attribute.ints)
    return []


def _buffer_banks(
    shape: list[int], kernel: list[int], dilations: list[int], precision: str | None
) -> int:
    """Return the banks of the buffer for one kernel and the data that one output row reads.

    The check that TensorRT makes by the Developer Guide, for data of `shape` (N, C, H, W).
    """
    if len(shape) != 4 or len(kernel) != 2:
        return 0
    size = 1 if precision == "int8" else 2
    channels, width = shape[1], shape[3]
    kernel_bytes = math.ceil(channels * kernel[0] * kernel[1] * size / 128) * 128
    entries = math.ceil(math.ceil(channels * size / 32) * width / 4)
    rows = (kernel[0] - 1) * (dilations or [1])[0] + 1
    return math.ceil(kernel_bytes / _BANK_BYTES) + math.ceil(entries * rows / _ENTRIES)
