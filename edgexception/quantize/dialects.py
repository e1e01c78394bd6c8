"""How each runtime wants INT8 written: one plan, many dialects.

| dialect     | activations            | layer outputs | bias                          | widths |
|-------------|------------------------|---------------|-------------------------------|--------|
| onnxruntime | uint8                  | quantized     | int32, scale = input x weight | 16     |
| openvino    | any grid of the plan   | float         | float                         | 32     |
| tensorrt    | int8 with zero point 0 | float         | float, never quantized        | any    |

ONNX Runtime computes a layer in INT8 only when its output is quantized, too (QLinearConv), and
with a ReLU in between only when that ReLU is the lower end of the grid: a uint8 grid with zero
point 0. On x86 it turns int8 activations into uint8 anyway, and at opset 21 its own rewriting of a
quantized max-pool leaves an `output_dtype` behind that then no longer fits ("output_dtype INT8 does
not match y_zero_point type UINT8", ONNX Runtime 1.32). So its dialect is opset 17 and uint8.

OpenVINO and TensorRT fuse the output's scale into whatever follows. OpenVINO reads a uint8 photo
with a zero point in float, and an int8 one in INT8. TensorRT's parser refuses an int32
DequantizeLinear and any zero point other than 0 (TensorRT documentation, "Working with quantized
types"). Its opset is 19, the first with float16 scales (ONNX, QuantizeLinear), which every version
of it at hand parses (`opset_max` in targets.yaml).

For TensorRT, too, the pools and the adds stay in float. Its documentation would have the residual
input of an add quantized, so that convolution, add and the Q behind them become one kernel. But in
this family a sum is read by a ReLU and by the next add, and a kernel writes one of the two scales.
With Q/DQ on all residual inputs TensorRT-RTX 1.7.1 has as many kernels as without, which read and
write 2% less, and the logits are as near (20.7 and 20.3 dB; full-size network at 150x150,
`tests/benchmarks/typed_graphs.py`). So these grids are left out until TensorRT has been seen to
gain by them on a GPU.

For OpenVINO the pools and the adds stay in float. Integers before the four pools take 2.7% off the
time at 299x299 and add 2% at 150x150, for 0.8 to 1.2 dB less (full-size network, one thread); the
adds take 2% of the time in all, fused with what follows them. ONNX Runtime's adds in float, with
their conversions, take 1% of the time more than QLinearAdd would.

A layer that the plan keeps in float reads its input as it is: in float, but for ONNX Runtime, where
an INT8 layer that writes it has written integers. What a float layer writes is rounded only where
INT8 layers read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from edgexception.errors import UsageError
from edgexception.model.graph import INPUT, layers, module_of
from edgexception.quantize.edges import layer_outputs
from edgexception.quantize.plan import ActivationQuant, QuantPlan
from edgexception.quantize.precision import check_fits
from edgexception.targets import load_dialects


@dataclass(frozen=True)
class Dialect:
    """One row of the table above."""

    name: str
    opset: int
    quantized_outputs: bool
    """Layers write integers, which everyone reads; otherwise they write float and only layers
    read rounded tensors."""
    integer_bias: bool
    unsigned: bool
    """Activations are uint8: an int8 grid is written as the uint8 grid of the same values."""
    widths: int
    """Channels are filled up with zeros to a multiple of it (see `export.widen`)."""


DIALECTS = {
    row.name: row
    for row in (
        Dialect(
            "onnxruntime",
            17,
            quantized_outputs=True,
            integer_bias=True,
            unsigned=True,
            widths=16,
        ),
        Dialect(
            "openvino",
            17,
            quantized_outputs=False,
            integer_bias=False,
            unsigned=True,
            widths=32,
        ),
        Dialect(
            "tensorrt",
            19,
            quantized_outputs=False,
            integer_bias=False,
            unsigned=False,
            widths=1,
        ),
    )
}


def has_half(dialect: Dialect) -> bool:
    """Whether the runtimes of a dialect compute layers in float16."""
    return "fp16" in load_dialects()[dialect.name].float_layers


def check_plan(plan: QuantPlan, dialect: Dialect) -> None:
    """Raise UsageError when `dialect` has no words for the plan."""
    half = [name for name, precision in plan.precision.items() if precision == "fp16"]
    if half and not has_half(dialect):
        raise UsageError(
            f"dialect {dialect.name} cannot compute layer {half[0]} in fp16: processors have no "
            "kernels for it; write `quantize.precision: {fp32: [...]}`, or target tensorrt"
        )
    if plan.symmetric or "asymmetric" in load_dialects()[dialect.name].activations:
        return
    name, grid = next((n, g) for n, g in plan.activations.items() if not g.signed or g.zero_point)
    raise UsageError(
        f"dialect {dialect.name} needs int8 activations with zero point 0, but the plan has "
        f"{'int8' if grid.signed else 'uint8'} with zero point {grid.zero_point} at {name}; "
        "quantize with `activations: symmetric`"
    )


def written_grids(
    graph: fx.GraphModule, plan: QuantPlan, dialect: Dialect
) -> dict[str, ActivationQuant]:
    """Return the grids of a plan as `dialect` writes them, by the node that produces the tensor.

    Raises UsageError when it cannot, BadArtifact when the plan is not one of this graph.
    """
    check_fits(graph, plan)
    check_plan(plan, dialect)
    relus = {
        node.name
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(module_of(graph, node), nn.ReLU)
    }
    return {
        name: _written(name, grid, dialect, name in relus)
        for name, grid in plan.activations.items()
        if grid.role == "input" or dialect.quantized_outputs
    }


def _written(name: str, grid: ActivationQuant, dialect: Dialect, is_relu: bool) -> ActivationQuant:
    signed = grid.signed
    if name == INPUT and dialect.name == "openvino":
        signed = True
    elif dialect.unsigned:
        signed = False
    if signed == grid.signed:
        return grid
    if is_relu and not signed and grid.zero_point == 0:
        zero = 0  # the lower half of this int8 grid is empty: keep levels 0...127, clip later
    else:
        zero = grid.zero_point + (-128 if signed else 128)
    return grid.model_copy(update={"signed": signed, "zero_point": zero})


def rounded_reads(
    graph: fx.GraphModule,
    plan: QuantPlan,
    grids: dict[str, ActivationQuant],
    dialect: Dialect,
) -> dict[str, set[str]]:
    """Return tensor -> the nodes that read it rounded to its grid; the others read it in float."""
    integer = set(layers(graph)).difference(plan.precision)
    written = layer_outputs(graph, plan.precision) if dialect.quantized_outputs else {}
    return {
        node.name: {u.name for u in node.users if node.name in written or u.name in integer}
        for node in graph.graph.nodes
        if node.name in grids
    }
