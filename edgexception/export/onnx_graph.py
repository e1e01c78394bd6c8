"""Write an inference graph as ONNX, in float or with the Q/DQ nodes of a plan.

Nodes and tensors carry the layer names of the graph. The input is the photo itself,
uint8 `images` (batch, H, W, 3); normalization is already folded into the first convolution. The
output is float32 `logits` (batch, classes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from edgexception import __version__
from edgexception.agent.placement import SPARSE
from edgexception.errors import EdgexError
from edgexception.export.lint import faults
from edgexception.export.widen import widened
from edgexception.model.graph import INPUT, PIXEL_OFFSET, module_of
from edgexception.model.sparsity import is_sparse
from edgexception.model.xception import Add, GlobalAveragePool, MaxPoolSame
from edgexception.preprocess import Preprocess
from edgexception.quantize.dialects import Dialect, has_half, rounded_reads, written_grids
from edgexception.quantize.half import FloatTypes, is_half_number, type_graph, with_half_scales
from edgexception.quantize.plan import QuantPlan
from edgexception.quantize.simulate import (
    accumulator_scales,
    quantize_bias,
    quantize_weight,
)

FLOAT_OPSET = 17
IR_VERSION = 10
"""Readable by ONNX Runtime >= 1.18, OpenVINO >= 2024 and TensorRT >= 10."""
BATCH = "batch"


def to_onnx(
    graph: fx.GraphModule,
    preprocess: Preprocess,
    classes: Sequence[str] | None,
    *,
    plan: QuantPlan | None = None,
    dialect: Dialect | None = None,
    types: FloatTypes | None = None,
    batch: int | None = None,
) -> onnx.ModelProto:
    """Return `graph` as a checked ONNX model: float, or INT8 in the words of `dialect`.

    `types` says what is float16; None is float32 but for the plan's fp16 layers. `batch` None
    leaves the batch size open (a dimension named "batch"). Class names and preprocessing go into
    `metadata_props`, and of every layer its precision, its multiply-accumulates and whether the
    weights that are written are 2:4 sparse. Raises UsageError when the dialect cannot say the plan.
    """
    if (plan is None) != (dialect is None):
        raise EdgexError("a plan needs a dialect to be written in, and a dialect a plan")
    if plan is not None and dialect is not None:
        graph, plan = widened(graph, plan, dialect.widths)
    types = types or type_graph(graph, plan, "fp32")
    if plan is not None:
        plan = with_half_scales(plan, graph, types)
    writer = _Writer(graph, preprocess, plan, dialect, types)
    outputs = writer.write()
    height, width = preprocess.input_size
    size: int | str = BATCH if batch is None else batch
    proto = helper.make_graph(
        writer.nodes,
        "xception",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [size, height, width, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [size, outputs])],
        writer.initializers,
    )
    opset = FLOAT_OPSET if dialect is None else dialect.opset
    model = helper.make_model(
        proto,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", opset)],
        producer_name="edgexception",
        producer_version=__version__,
    )
    props = _metadata(preprocess, classes, plan, dialect)
    helper.set_model_props(model, {**props, "edgexception.layers": json.dumps(writer.layers)})
    onnx.checker.check_model(model, full_check=True)
    if types.half or (dialect is not None and has_half(dialect)):
        found = faults(model)
        if found:
            raise EdgexError(f"the exported graph is not one for TensorRT: {'; '.join(found)}")
    return model


def _metadata(
    preprocess: Preprocess,
    classes: Sequence[str] | None,
    plan: QuantPlan | None,
    dialect: Dialect | None,
) -> dict[str, str]:
    props = {"edgexception.preprocess": preprocess.model_dump_json()}
    if classes is not None:
        props["edgexception.classes"] = json.dumps(list(classes), ensure_ascii=False)
    if plan is not None and dialect is not None:
        props["edgexception.dialect"] = dialect.name
        props["edgexception.quantization"] = plan.provenance.model_dump_json()
        props["edgexception.weight_bits"] = str(max(grid.bits for grid in plan.weights.values()))
    return props


class _Writer:
    """Collects the nodes and initializers of one model while it walks the graph once."""

    def __init__(
        self,
        graph: fx.GraphModule,
        preprocess: Preprocess,
        plan: QuantPlan | None,
        dialect: Dialect | None,
        types: FloatTypes,
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.half = types.half
        self.dialect = dialect
        self.sizes = _spatial_sizes(graph, preprocess)
        self.grids = written_grids(graph, plan, dialect) if plan and dialect else {}
        self.reads = rounded_reads(graph, plan, self.grids, dialect) if plan and dialect else {}
        self.precision = plan.precision if plan else {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.layers: dict[str, dict[str, str | int]] = {}
        """What an engine of this graph is to be held to, layer by layer (`agent.placement`)."""

    def write(self) -> int:
        """Write every node; return the number of outputs per image."""
        features = 0
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self._input()
            elif node.op == "call_module":
                self._layer(node, module_of(self.graph, node))
            elif node.op == "output":
                logits = cast(fx.Node, node.args[0])
                self._output(logits.name)
                features = self.sizes[logits.name][1]
            else:
                raise EdgexError(f"node {node.name}: no ONNX form for {node.op} {node.target}")
            self._quantize_output(node)
        return features

    def read(self, producer: fx.Node, consumer: fx.Node) -> str:
        """Return the tensor that `consumer` reads: in float, or through the producer's Q/DQ."""
        if consumer.name not in self.reads.get(producer.name, ()):
            return self._typed(producer.name, consumer.name in self.half)
        if self._computes_in_float(consumer):
            return self._shielded(producer)
        return self._levels(producer.name, consumer.name in self.half)

    def _typed(self, tensor: str, half: bool) -> str:
        """Return a tensor in float16 or float32, cast where it is written in the other."""
        if (tensor in self.half) == half:
            return tensor
        name, kind = _TYPED[half]
        cast_name = f"{tensor}_{name}"
        if not self._is_written(cast_name):
            self.node("Cast", [tensor], cast_name, to=kind)
        return cast_name

    def _levels(self, tensor: str, half: bool) -> str:
        """Return the levels of a tensor as values in float16 or float32."""
        first = f"{tensor}_dq"
        if half == self._is_quantized_in_half(tensor):
            return first
        name = f"{first}_{_TYPED[half][0]}"
        if not self._is_written(name):
            quantized, scale, zero = next(n for n in self.nodes if n.name == first).input
            value = self._float(self.grids[tensor].scale, half)
            scale = self.constant(f"{tensor}_scale_{_TYPED[half][0]}", value)
            self.node("DequantizeLinear", [quantized, scale, zero], name)
        return name

    def _is_written(self, name: str) -> bool:
        return any(node.name == name for node in self.nodes)

    def _is_quantized_in_half(self, tensor: str) -> bool:
        return tensor in self.half and is_half_number(self.grids[tensor].scale)

    def _float(self, value: npt.ArrayLike, half: bool) -> np.ndarray:
        """Return numbers in float16 or float32; a plan's scales are such numbers already."""
        return np.asarray(value, np.float16 if half else np.float32)

    def _computes_in_float(self, consumer: fx.Node) -> bool:
        pool = isinstance(_module(self.graph, consumer), MaxPoolSame)
        readers = [consumer, *consumer.users] if pool else [consumer]
        return any(reader.name in self.precision for reader in readers)

    def _shielded(self, producer: fx.Node) -> str:
        """Return the dequantized tensor for a float layer of a graph of integers.

        Between a DequantizeLinear of one scale and a QuantizeLinear ONNX Runtime 1.32 quantizes the
        weights of a float convolution on its own (WeightBiasQuantization, per tensor; it moves such
        a DequantizeLinear behind a max-pool, too). One equal scale per channel keeps it from it.
        """
        name = f"{producer.name}_dq_channels"
        if not self._is_written(name):
            channels = self.sizes[producer.name][1]
            grid = self.grids[producer.name]
            kind = np.int8 if grid.signed else np.uint8
            scale = self.constant(f"{name}_scale", np.full(channels, grid.scale, np.float32))
            zero = self.constant(f"{name}_zero_point", np.full(channels, grid.zero_point, kind))
            quantized = next(n for n in self.nodes if n.name == f"{producer.name}_dq").input[0]
            self.node("DequantizeLinear", [quantized, scale, zero], name, axis=1)
        return name

    # --- nodes

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str,
        **attributes: int | Sequence[int] | float,
    ) -> None:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def _input(self) -> None:
        grid = self.grids.get(INPUT)
        half = INPUT in self.half
        if self.plan is None or (self.dialect and has_half(self.dialect)):
            # TensorRT reads uint8 at the network's input only, and only a Cast may read it.
            self.node("Cast", ["images"], "images_float", to=_TYPED[half][1])
            self.node("Transpose", ["images_float"], "images_nchw", perm=[0, 3, 1, 2])
            floats = "images_nchw"
        else:
            self.node("Transpose", ["images"], "images_nchw", perm=[0, 3, 1, 2])
            if grid is not None and not grid.signed:
                return  # uint8 with zero point 128 is the photo itself: no rounding, no node
            floats = "images_float"
            self.node("Cast", ["images_nchw"], floats, to=TensorProto.FLOAT)
        offset = self.constant("pixel_offset", self._float(PIXEL_OFFSET, half))
        self.node("Sub", [floats, offset], INPUT)

    def _output(self, logits: str) -> None:
        if logits in self.half:
            self.node("Cast", [logits], "logits", to=TensorProto.FLOAT)
        else:
            self.node("Identity", [logits], "logits")

    def _quantize_output(self, node: fx.Node) -> None:
        grid = self.grids.get(node.name)
        if grid is None:
            return
        name, half = node.name, self._is_quantized_in_half(node.name)
        kind = np.int8 if grid.signed else np.uint8
        scale = self.constant(f"{name}_scale", self._float(grid.scale, half))
        zero = self.constant(f"{name}_zero_point", kind(grid.zero_point))
        if node.op == "placeholder" and not grid.signed:
            quantized = "images_nchw"
        else:
            quantized = f"{name}_q"
            self.node("QuantizeLinear", [self._typed(name, half), scale, zero], quantized)
        self.node("DequantizeLinear", [quantized, scale, zero], f"{name}_dq")

    def _layer(self, node: fx.Node, module: nn.Module) -> None:
        inputs = [self.read(cast(fx.Node, argument), node) for argument in node.args]
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            inputs += self._weights(node, module)
        for kind, write in _WRITERS.items():
            if isinstance(module, kind):
                write(self, node, module, inputs)
                break
        else:
            raise EdgexError(f"node {node.name}: no ONNX form for {type(module).__name__}")

    def _weights(self, node: fx.Node, layer: nn.Conv2d | nn.Linear) -> list[str]:
        name, half = node.name, node.name in self.half
        weight = layer.weight.detach()
        grid = self.plan.weights[name] if self.plan and name not in self.precision else None
        integers = None if grid is None else quantize_weight(weight, grid)
        self.layers[name] = {
            "precision": _TYPED[half][0] if grid is None else "int8",
            "macs": math.prod(self.sizes[name]) * weight[0].numel(),
        }
        if is_sparse(weight if integers is None else integers):
            self.layers[name]["sparse"] = SPARSE
        if grid is None or integers is None or self.dialect is None:
            names = [self.constant(f"{name}_weight", self._float(weight.numpy(), half))]
        else:
            scales = self._float(grid.scales, half)
            names = [self._dequantized(f"{name}_weight", integers.numpy(), scales)]
            if layer.bias is not None and self.dialect.integer_bias:
                steps = accumulator_scales(self.grids[cast(fx.Node, node.args[0]).name], grid)
                bias = quantize_bias(name, layer.bias, steps)
                return [*names, self._dequantized(f"{name}_bias", bias, steps)]
        if layer.bias is not None:
            bias = self._float(layer.bias.detach().numpy(), half)
            names.append(self.constant(f"{name}_bias", bias))
        return names

    def _dequantized(self, name: str, integers: np.ndarray, scales: np.ndarray) -> str:
        quantized = self.constant(f"{name}_q", integers)
        scale = self.constant(f"{name}_scale", scales)
        zero = self.constant(f"{name}_zero_point", np.zeros(scales.shape, integers.dtype))
        self.node("DequantizeLinear", [quantized, scale, zero], name, axis=0)
        return name


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module_of(graph, node) if node.op == "call_module" else None


def _convolution(writer: _Writer, node: fx.Node, module: nn.Module, inputs: list[str]) -> None:
    layer = cast(nn.Conv2d, module)
    rows, columns = cast(tuple[int, int], layer.padding)
    strides = list(layer.stride)
    openvino = writer.dialect is not None and writer.dialect.name == "openvino"
    if (
        openvino
        and node.name not in writer.precision
        and layer.kernel_size == (1, 1)
        and strides != [1, 1]
    ):
        # OpenVINO moves the stride of a 1x1 convolution into its input's Q/DQ and then computes the
        # convolution in float; with the pixels picked behind them it stays INT8, results equal.
        picked = f"{node.name}_picked"
        writer.node("MaxPool", inputs[:1], picked, kernel_shape=[1, 1], strides=strides)
        inputs, strides = [picked, *inputs[1:]], [1, 1]
    writer.node(
        "Conv",
        inputs,
        node.name,
        kernel_shape=list(layer.kernel_size),
        strides=strides,
        pads=[rows, columns, rows, columns],
        group=layer.groups,
    )


def _linear(writer: _Writer, node: fx.Node, module: nn.Module, inputs: list[str]) -> None:
    writer.node("Gemm", inputs, node.name, transB=1)


def _max_pool(writer: _Writer, node: fx.Node, module: nn.Module, inputs: list[str]) -> None:
    height, width = writer.sizes[cast(fx.Node, node.args[0]).name][2:]
    rows, columns = cast(MaxPoolSame, module).pads(height, width)
    # The window of the last output may reach one past an even size: Keras's (0, 1).
    ends = (height + 1) // 2 * 2 + 1 - height - rows, (width + 1) // 2 * 2 + 1 - width - columns
    writer.node(
        "MaxPool",
        inputs,
        node.name,
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[rows, columns, *ends],
    )


def _average_pool(writer: _Writer, node: fx.Node, module: nn.Module, inputs: list[str]) -> None:
    writer.node("GlobalAveragePool", inputs, f"{node.name}_mean")
    writer.node("Flatten", [f"{node.name}_mean"], node.name)


_TYPED = {False: ("fp32", TensorProto.FLOAT), True: ("fp16", TensorProto.FLOAT16)}
_LayerWriter = Callable[[_Writer, fx.Node, nn.Module, list[str]], None]
_WRITERS: Mapping[type[nn.Module], _LayerWriter] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    MaxPoolSame: _max_pool,
    GlobalAveragePool: _average_pool,
    nn.ReLU: lambda w, node, _, inputs: w.node("Relu", inputs, node.name),
    nn.ELU: lambda w, node, _, inputs: w.node("Elu", inputs, node.name, alpha=1.0),
    Add: lambda w, node, _, inputs: w.node("Add", inputs, node.name),
}


def _spatial_sizes(graph: fx.GraphModule, preprocess: Preprocess) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor at batch 1; pool padding depends on it."""
    sizes: dict[str, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                sizes[n.name] = tuple(value.shape)
            return value

    with torch.inference_mode():
        Shapes(graph).run(torch.zeros(1, 3, *preprocess.input_size))
    return sizes
