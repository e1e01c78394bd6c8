"""What TensorRT does not take, found in a typed graph before its builder sees it, by layer.

TensorRT's own messages name few layers, or come after minutes of building; and some wrong graphs it
builds without a word. What TensorRT-RTX 1.7.1 does with each, as run here (the wrong graphs are
those of `tests/export/test_lint.py`):

| rule | TensorRT-RTX without it |
|---|---|
| no int32 DequantizeLinear: biases are float | parser: "Invalid Node" |
| zero points are 0 | parser: "Non-zero zero point is not supported" |
| levels are int8, not uint8 (no zero point is uint8) | builds; its kernels are listed as Int8 |
| weights are int8 constants, without a QuantizeLinear | builds, and keeps them in float, too |
| activations have one scale, weights one or one per output channel | builds with any axis |
| as many zero points as scales | parser: "must have the same volume" |
| scales are positive and finite constants | builds with an infinite one |
| operands have one type: a typed network has no casts of its own | parser: "Invalid Node" |
| uint8 pixels are read by a Cast | parser: "Invalid Node" |
| no float32 Gemm or MatMul on SM75 | builder: "FP32 GEMM is not supported", at the end |
| every number is in the file | reads other files |

TensorRT 10 has the same operators but no uint8 levels (onnx-tensorrt, operators.md).
Weights with one scale are legal, and no rule refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from edgexception.errors import BadArtifact

TURING = 75
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Conv", "Gemm", "MatMul")
_PRODUCTS = ("Gemm", "MatMul")
_SHOWN = 5
"""How many faults a message names."""


def check_typed(path: Path, sm: int | None = None) -> None:
    """Raise BadArtifact naming the layers where a typed graph is not one for TensorRT.

    `sm` is the GPU's compute capability times 10; None leaves out what only some GPUs refuse.
    Nothing outside the file is read.
    """
    found = faults(read_graph(path), sm)
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise BadArtifact(
            f"{path.name}: TensorRT would not run it as it is written: "
            f"{'; '.join(found[:_SHOWN])}{more}"
        )


def read_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, and no other that it names; BadArtifact where that is none."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise BadArtifact(f"{path}: cannot be read as ONNX ({error}); export it again") from error
    if not model.graph.node:
        raise BadArtifact(f"{path}: cannot be read as ONNX (it has no nodes); export it again")
    return model


def faults(model: onnx.ModelProto, sm: int | None = None) -> list[str]:
    """Return every fault of a typed graph, in the order of its nodes, with what to do."""
    return list(_Linter(model).faults(sm))


class _Linter:
    """Walks the nodes once, in their order, and knows every tensor's type so far."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = model.graph.node
        self.constants = {i.name: i for i in model.graph.initializer}
        self.types = {name: tensor.data_type for name, tensor in self.constants.items()}
        self.pixels = set()
        for end in model.graph.input:
            if end.name not in self.constants:
                self.types[end.name] = end.type.tensor_type.elem_type
                if self.types[end.name] == TensorProto.UINT8:
                    self.pixels.add(end.name)
        self.weights: dict[str, onnx.NodeProto] = {}
        """Constants behind a DequantizeLinear, by the tensor that it writes."""

    def faults(self, sm: int | None) -> Iterator[str]:
        for name, tensor in self.constants.items():
            if tensor.data_location == TensorProto.EXTERNAL:
                yield f"constant {name}: is kept outside of the file; save the model in one"
        for node in self.nodes:
            layer = node.name or (node.output[0] if node.output else node.op_type)
            for fault in self._of(node, sm):
                yield f"layer {layer} ({node.op_type}): {fault}"
            self._note(node)

    def _of(self, node: onnx.NodeProto, sm: int | None) -> Iterator[str]:
        kinds = [self.types.get(name) for name in node.input if name]
        if self.pixels.intersection(node.input) and node.op_type != "Cast":
            yield "reads uint8 pixels, which only a Cast may; cast them first"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._quantization(node)
        elif node.op_type in _ARITHMETIC:
            known = {kind for kind in kinds if kind is not None}
            if len(known) > 1:
                names = " and ".join(sorted(_name(kind) for kind in known))
                yield f"has operands of types {names}; cast them to one"
            yield from self._axis(node)
        if sm == TURING and node.op_type in _PRODUCTS and TensorProto.FLOAT in kinds:
            yield (
                "is a float32 matrix product, which SM75 does not have; build from the fp16 or the "
                "int8-fp16 form"
            )

    def _quantization(self, node: onnx.NodeProto) -> Iterator[str]:
        is_weight = node.input[0] in self.constants
        if node.op_type == "QuantizeLinear" and is_weight:
            yield (
                f"quantizes the float constant {node.input[0]}, which stays float in the engine; "
                "store the integers with a DequantizeLinear alone"
            )
        kind = self._levels(node)
        if kind == TensorProto.INT32:
            yield "dequantizes int32, a quantized bias; write biases in float"
        elif kind not in (None, TensorProto.INT8):
            yield f"has {_name(kind)} levels; TensorRT's are int8 with zero point 0"
        zero = self._value(node, 2)
        if zero is not None and np.any(zero):
            worst = zero.ravel()[np.argmax(np.abs(zero.astype(np.int64)))]
            yield f"has the zero point {worst}; quantize with `activations: symmetric`"
        scale = self._value(node, 1)
        if zero is not None and scale is not None and zero.size != scale.size:
            yield f"has {scale.size} scales and {zero.size} zero points; give each scale one"
        yield from self._scale(scale, is_weight=is_weight)

    def _scale(self, scale: np.ndarray | None, *, is_weight: bool) -> Iterator[str]:
        if scale is None:
            yield "has a scale that is no constant; TensorRT has no dynamic INT8"
            return
        numbers = scale.astype(np.float64).ravel()
        bad = numbers[~((numbers > 0) & np.isfinite(numbers))]
        if len(bad):
            yield f"has the scale {bad[0]:g}; scales are positive and finite"
        if not is_weight and numbers.size > 1:
            yield f"has {numbers.size} scales for a tensor that is no weight; give it one"

    def _axis(self, node: onnx.NodeProto) -> Iterator[str]:
        """Weights have their scales along the output channels."""
        read = self.weights.get(node.input[1]) if len(node.input) > 1 else None
        scale = None if read is None else self._value(read, 1)
        if read is None or scale is None or scale.size == 1:
            return
        outputs = 0 if node.op_type == "Conv" or _attribute(node, "transB", 0) else 1
        shape = self.constants[read.input[0]].dims
        axis = _attribute(read, "axis", 1) % max(len(shape), 1)
        if axis != outputs or scale.size != shape[outputs]:
            yield (
                f"has {scale.size} weight scales along axis {axis}; TensorRT has one for each of "
                f"the {shape[outputs]} output channels (axis {outputs})"
            )

    def _levels(self, node: onnx.NodeProto) -> int | None:
        """Return the integer type of a Q or DQ; without a zero point, Q's default is uint8."""
        if node.op_type == "DequantizeLinear":
            return self.types.get(node.input[0])
        if len(node.input) > 2 and node.input[2]:
            return self.types.get(node.input[2])
        return _attribute(node, "output_dtype", 0) or int(TensorProto.UINT8)

    def _value(self, node: onnx.NodeProto, place: int) -> np.ndarray | None:
        """Return a constant that a node reads, None where it reads none or another tensor."""
        name = node.input[place] if len(node.input) > place else ""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        value: np.ndarray = numpy_helper.to_array(tensor)
        return value

    def _note(self, node: onnx.NodeProto) -> None:
        """Note the types of what a node writes."""
        kind: int | None = self.types.get(node.input[0]) if node.input else None
        if node.op_type == "Cast":
            kind = _attribute(node, "to", 0)
        elif node.op_type == "QuantizeLinear":
            kind = self._levels(node)
        elif node.op_type == "DequantizeLinear":
            kind = self.types.get(node.input[1])
            if node.input[0] in self.constants:
                self.weights[node.output[0]] = node
        elif node.op_type == "Constant":
            self._note_constant(node)
            return
        for name in node.output:
            if kind is not None:
                self.types[name] = kind

    def _note_constant(self, node: onnx.NodeProto) -> None:
        for attribute in node.attribute:
            if attribute.name == "value":
                self.constants[node.output[0]] = attribute.t
                self.types[node.output[0]] = attribute.t.data_type


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _name(kind: int | None) -> str:
    return "unknown" if kind is None else str(helper.tensor_dtype_to_np_dtype(kind))
