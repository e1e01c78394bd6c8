"""The quantized network in exact integers: what a plan does to the numbers, runtime by runtime.

Every dialect computes a layer as an exact integer sum; runtimes differ in the few float32
operations that bring this sum to the next grid. These single roundings cannot be neglected: where a
value lies within one float32 step of the middle between two levels they decide the level, and over
70 layers a handful of such levels grows to a noise nearly as loud as that of quantization itself
(full-size network: 30 dB between two float orders of the same plan, 24 dB between plan and float
network). So a simulation is compared with a runtime only if it rounds where the runtime rounds.
With acc the integer sum, d = scale_input * scale_weight (float32), s and z of the output's grid:

- onnxruntime (QLinearConv, QGemm): q = round((acc + bias) * (d / s)) + z, bias in int32 of scale d.
  A sum of two quantized tensors that is itself only read quantized is QLinearAdd: with a, b the
  integers and r their scales over s, q = round(r_a * a + (r_b * b + (z - r_a * z_a - r_b * z_b)))
  in fused multiply-adds. Integer for integer what ONNX Runtime 1.32 computes with VNNI.
- openvino (oneDNN kernels behind OpenVINO's low precision transformations; found by tapping the
  integers of every edge in 2026.4 and reading FakeQuantize::updateOptimizedFormula in its CPU
  plugin): y = acc * d + bias, then the FakeQuantize of OpenVINO with low = (q_min - z) * s and high
  = (q_max - z) * s: q = round(y * (255 / (high - low)) + (-low * 255 / (high - low)) + q_min). A
  layer that is quantized at once does this in its own kernel: with a bias, as one fused
  multiply-add of y; without one, d is divided into low and high, so that q = round(acc * factor +
  shift) has a factor per channel, and the shift is that of channel 0.
- tensorrt: y = acc * d + bias; q = round(y / s) + z. This is the meaning of the Q/DQ graph; what
  TensorRT rounds has not been seen yet.

All roundings are to even, all q saturate at the ends of their grid, all else is float32. A layer in
fp32 is torch's own. A node in float16 (see `quantize.half`) rounds what it reads, its weights and
bias, and what it writes to float16; an INT8 layer there its bias and what it writes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.functional import conv2d, linear

from edgexception.errors import EdgexError
from edgexception.model.graph import layers, module_of
from edgexception.model.xception import Add, MaxPoolSame
from edgexception.quantize.dialects import Dialect, rounded_reads, written_grids
from edgexception.quantize.edges import layer_outputs
from edgexception.quantize.half import FloatTypes, type_graph, with_half_scales
from edgexception.quantize.plan import ActivationQuant, QuantPlan, WeightQuant

_Float32 = npt.NDArray[np.float32]
_DRIFT = 5e-5
"""Shifts that differ by less are one shift to OpenVINO."""
_NO_SHIFT = 255 * 1e-5
"""Shifts below are none to OpenVINO."""


def quantize_weight(weight: torch.Tensor, grid: WeightQuant) -> torch.Tensor:
    """Return the int8 values of `weight` (out, ...) on its per-output-channel grid."""
    scales = torch.tensor(grid.scales, dtype=torch.float32).view(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scales).clamp(-grid.limit, grid.limit).to(torch.int8)


def accumulator_scales(source: ActivationQuant, grid: WeightQuant) -> _Float32:
    """Return the value of one step of a layer's integer sum, float32 (out,)."""
    scales: _Float32 = np.float32(source.scale) * np.array(grid.scales, dtype=np.float32)
    return scales


def quantize_bias(name: str, bias: torch.Tensor, steps: _Float32) -> npt.NDArray[np.int32]:
    """Return a bias in steps of its layer's integer sum; EdgexError if it does not fit 32 bits."""
    integers = np.rint(bias.detach().double().numpy() / steps)
    if np.abs(integers).max(initial=0.0) >= 2**31:
        raise EdgexError(f"layer {name}: its bias does not fit 32 bits at the plan's scales")
    return integers.astype(np.int32)


def simulate(
    graph: fx.GraphModule, plan: QuantPlan, dialect: Dialect, types: FloatTypes | None = None
) -> fx.GraphModule:
    """Return `graph` computing `plan` as the runtime of `dialect` does.

    Takes and returns what `graph` does; tensors between the layers hold float32 values on their
    grids. `types` are those of the written graph; None is float32 but for the plan's fp16 layers.
    Raises UsageError when the dialect cannot say the plan.
    """
    result = copy.deepcopy(graph)
    types = types or type_graph(result, plan, "fp32")
    plan = with_half_scales(plan, result, types)
    grids = written_grids(result, plan, dialect)
    reads = rounded_reads(result, plan, grids, dialect)
    outputs = {layer: tensor for tensor, layer in layer_outputs(result, plan.precision).items()}
    rounding = {name: _rounding(grid, dialect) for name, grid in grids.items()}
    nodes = {node.name: node for node in result.graph.nodes}
    for name, layer in layers(result).items():
        if name in plan.precision:
            continue
        source = grids[cast(fx.Node, nodes[name].args[0]).name]
        integer = _IntegerLayer(name, layer, source, plan.weights[name], dialect)
        tensor = outputs.get(name)
        if tensor in grids and len(reads[tensor]) == len(nodes[tensor].users):
            # The integers of the sum go straight to those of the output.
            rounding[tensor] = integer.fold(grids[tensor], rounding[tensor], dialect)
        result.add_module(name, integer)
    if dialect.name == "onnxruntime":
        _add_integers(result, grids, reads, rounding)
    _compute_in_half(result, types)
    for name, grid in grids.items():
        result.add_module(f"{name}_quantize", _Quantize(grid, rounding[name]))
        with result.graph.inserting_after(nodes[name]):
            rounded = result.graph.call_module(f"{name}_quantize", (nodes[name],))
        for reader in reads[name]:
            nodes[reader].replace_input_with(nodes[name], rounded)
    result.graph.lint()
    result.recompile()
    return result


def simulate_float(graph: fx.GraphModule, types: FloatTypes) -> fx.GraphModule:
    """Return `graph` computing in the types of a written float graph."""
    result = copy.deepcopy(graph)
    _compute_in_half(result, types)
    result.graph.lint()
    result.recompile()
    return result


def _compute_in_half(graph: fx.GraphModule, types: FloatTypes) -> None:
    """Let nodes round what they read, hold and write to float16; sums stay float32."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.name in types.half:
            graph.add_module(node.name, _Half(module_of(graph, node)))


@dataclass(frozen=True)
class _Rounding:
    """q = round(x * factor / divisor + shift) + offset; a factor of 1 or shift of 0 is exact."""

    factor: float = 1.0
    divisor: float = 1.0
    shift: float | torch.Tensor = 0.0
    offset: int = 0
    fused: bool = False
    """Whether x * factor + shift rounds once."""


def _rounding(grid: ActivationQuant, dialect: Dialect) -> _Rounding:
    """Return how a dialect rounds a float tensor to `grid`."""
    if dialect.name != "openvino":
        return _Rounding(divisor=float(np.float32(grid.scale)), offset=grid.zero_point)
    low, span = _interval(grid, np.float32(1))
    factor = np.float32(255) / span
    return _Rounding(factor=float(factor), shift=float(-low * factor), offset=grid.levels[0])


def _interval(grid: ActivationQuant, unit: _Float32 | np.float32) -> tuple[_Float32, _Float32]:
    """Return low and high - low of OpenVINO's FakeQuantize, in `unit` (one, or one per channel)."""
    low, high = (
        np.float32(level - grid.zero_point) * np.float32(grid.scale) / unit for level in grid.levels
    )
    return low, high - low


def _openvino_shift(grid: ActivationQuant, low: _Float32, span: _Float32) -> float | torch.Tensor:
    shifts = np.atleast_1d(-low * np.float32(255) / span + np.float32(grid.levels[0]))
    if np.abs(shifts - shifts[0]).max() >= _DRIFT:
        return torch.from_numpy(shifts)
    return float(shifts[0]) if abs(shifts[0]) >= _NO_SHIFT else 0.0


class _Quantize(nn.Module):
    """Round a tensor to a grid and back."""

    def __init__(self, grid: ActivationQuant, rounding: _Rounding) -> None:
        super().__init__()
        self.grid = grid
        self.rounding = rounding
        self.scale = float(np.float32(grid.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by, (low, high) = self.rounding, self.grid.levels
        shift = by.shift
        if isinstance(shift, torch.Tensor):
            shift = _per_channel(shift, x.ndim)
        if by.fused:  # the product of two float32 is exact in float64
            y = (x.double() * by.factor + shift).float()
        else:
            y = x * by.factor / by.divisor + shift
        q = torch.round(y) + by.offset
        return (q.clamp(low, high) - self.grid.zero_point) * self.scale


class _IntegerLayer(nn.Module):
    """A convolution or linear layer over integers: (acc + integer bias) * factor + bias."""

    def __init__(
        self,
        name: str,
        layer: nn.Conv2d | nn.Linear,
        source: ActivationQuant,
        grid: WeightQuant,
        dialect: Dialect,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scale = float(np.float32(source.scale))
        self.steps = accumulator_scales(source, grid)
        self.factor = self.steps
        weight = quantize_weight(layer.weight.detach(), grid).double()
        largest = max(abs(level - source.zero_point) for level in source.levels)
        # float32 sums integers exactly, in any order, as long as no partial sum passes 2**24.
        exact = float(weight.abs().flatten(1).sum(dim=1).max()) * largest < 2**24
        self.weight = weight.float() if exact else weight
        self.integer_bias: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if layer.bias is not None and dialect.integer_bias:
            self.integer_bias = torch.from_numpy(
                quantize_bias(name, layer.bias, self.steps).astype(np.float64)
            )
        elif layer.bias is not None:
            self.bias = layer.bias.detach()

    def fold(self, grid: ActivationQuant, plain: _Rounding, dialect: Dialect) -> _Rounding:
        """Compute steps of the output `grid` in the layer; return the rounding left to do."""
        if dialect.name == "onnxruntime":
            self.factor = self.steps / np.float32(grid.scale)
            return _Rounding(offset=grid.zero_point)
        if dialect.name != "openvino":
            return plain
        if self.bias is None:
            low, span = _interval(grid, self.steps)
            self.factor = np.float32(255) / span
            return _Rounding(shift=_openvino_shift(grid, low, span))
        low, span = _interval(grid, np.float32(1))
        factor, shift = np.float32(255) / span, _openvino_shift(grid, low, span)
        if isinstance(shift, float) and shift == 0.0:
            factor = np.float32(1) / (np.float32(1) / factor)
        return _Rounding(factor=float(factor), shift=shift, fused=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.round(x / self.scale).to(self.weight.dtype)
        layer = self.layer
        if isinstance(layer, nn.Linear):
            acc = linear(q, self.weight)
        else:
            acc = conv2d(
                q,
                self.weight,
                None,
                layer.stride,
                cast(tuple[int, int], layer.padding),
                layer.dilation,
                layer.groups,
            )
        if self.integer_bias is not None:
            acc = acc.double() + _per_channel(self.integer_bias, x.ndim)
        y = acc.float() * _per_channel(torch.from_numpy(self.factor), x.ndim)
        return y if self.bias is None else y + _per_channel(self.bias, x.ndim)


def _add_integers(
    graph: fx.GraphModule,
    grids: dict[str, ActivationQuant],
    reads: dict[str, set[str]],
    rounding: dict[str, _Rounding],
) -> None:
    """Compute the sums of integers that are only read as integers like ONNX Runtime."""
    for node in graph.graph.nodes:
        if node.name in grids and len(reads[node.name]) == len(node.users):
            sources = _integer_sources(graph, node, grids, reads)
            if sources is not None:
                graph.add_module(node.name, _IntegerAdd(*sources, grids[node.name]))
                rounding[node.name] = _Rounding()


class _Half(nn.Module):
    """A node in float16, summed in float32. Levels on a grid of INT8 are read as they are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        self.integer = isinstance(module, _IntegerLayer)
        if isinstance(self.module, (nn.Conv2d, nn.Linear)):
            weight = _halved(self.module.weight)
            self.module.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            rounded = nn.Parameter(_halved(bias), requires_grad=False)
            self.module.bias = rounded.data if self.integer else rounded

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        read = inputs if self.integer else tuple(_halved(x) for x in inputs)
        return _halved(cast(torch.Tensor, self.module(*read)))


def _halved(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to float16's."""
    return values.detach().half().float()


def _integer_sources(
    graph: fx.GraphModule,
    node: fx.Node,
    grids: dict[str, ActivationQuant],
    reads: dict[str, set[str]],
) -> tuple[ActivationQuant, ActivationQuant] | None:
    """Return the grids of both operands of an add, or None if it is none or one is in float."""
    if node.op != "call_module" or not isinstance(module_of(graph, node), Add):
        return None
    sources = []
    for operand in cast(tuple[fx.Node, fx.Node], node.args):
        tensor, reader = operand, node
        while tensor.op == "call_module" and isinstance(module_of(graph, tensor), MaxPoolSame):
            tensor, reader = cast(fx.Node, tensor.args[0]), tensor  # a maximum of integers is one
        if reader.name not in reads.get(tensor.name, ()):
            return None
        sources.append(grids[tensor.name])
    return sources[0], sources[1]


class _IntegerAdd(nn.Module):
    """ONNX Runtime's QLinearAdd, before it rounds."""

    def __init__(self, a: ActivationQuant, b: ActivationQuant, out: ActivationQuant) -> None:
        super().__init__()
        self.grids = (a, b)
        self.ratios = [float(np.float32(g.scale) / np.float32(out.scale)) for g in (a, b)]
        # A fused multiply-add rounds once; the product of two float32 is exact in float64.
        zero = a.zero_point * self.ratios[0] + float(np.float32(b.zero_point * self.ratios[1]))
        self.constant = float(np.float32(out.zero_point) - np.float32(zero))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        qa, qb = (
            torch.round(x / float(np.float32(g.scale))) + g.zero_point
            for x, g in zip((a, b), self.grids, strict=True)
        )
        inner = (qb.double() * self.ratios[1] + self.constant).float()
        return (qa.double() * self.ratios[0] + inner).float()


def _per_channel(values: torch.Tensor, ndim: int) -> torch.Tensor:
    return values.view(1, -1, *[1] * (ndim - 2))
