"""How each runtime wants INT8 written: one plan, many dialects.

| dialect     | activations                  | layer outputs | bias                       |
|-------------|------------------------------|---------------|----------------------------|
| onnxruntime | any grid of the plan         | quantized     | int32, scale = input x weight |
| openvino    | any grid of the plan         | float         | float                      |
| tensorrt    | int8 with zero point 0       | float         | float, never quantized     |

ONNX Runtime computes a layer in INT8 only when its output is quantized, too (QLinearConv); OpenVINO
and TensorRT fuse the output's scale into whatever follows. TensorRT's parser refuses an int32
DequantizeLinear and any zero point other than 0 (TensorRT documentation, "Working with quantized
types").
"""

from __future__ import annotations

from dataclasses import dataclass

from edgexception.errors import UsageError
from edgexception.quantize.plan import QuantPlan


@dataclass(frozen=True)
class Dialect:
    """One row of the table above."""

    name: str
    opset: int
    roles: tuple[str, ...]
    """Roles of the activations that get Q/DQ nodes."""
    integer_bias: bool
    symmetric_only: bool


DIALECTS = {
    row.name: row
    for row in (
        Dialect("onnxruntime", 21, ("input", "output"), integer_bias=True, symmetric_only=False),
        Dialect("openvino", 17, ("input",), integer_bias=False, symmetric_only=False),
        Dialect("tensorrt", 19, ("input",), integer_bias=False, symmetric_only=True),
    )
}


def check_plan(plan: QuantPlan, dialect: Dialect) -> None:
    """Raise UsageError when `dialect` has no words for the plan."""
    if dialect.symmetric_only and not plan.symmetric:
        name, grid = next(
            (n, g) for n, g in plan.activations.items() if not g.signed or g.zero_point
        )
        raise UsageError(
            f"dialect {dialect.name} needs int8 activations with zero point 0, but the plan has "
            f"{'int8' if grid.signed else 'uint8'} with zero point {grid.zero_point} at {name}; "
            "quantize with `activations: symmetric`"
        )
