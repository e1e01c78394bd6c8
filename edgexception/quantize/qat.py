"""Quantization-aware training: a quantized network learns to answer like the float one.

Learned step sizes after Esser et al., "Learned Step Size Quantization" (ICLR 2020): rounding passes
gradients straight through, clipping stops them, and the scale of every grid learns, too. The
paper's scaling of the scales' gradients is left out: AdamW divides it out again.

Training starts exactly at the network it is given, and in units in which one learning rate suits
every layer of any network: weights in levels of their grid, a bias in what one level of a weight
makes of the largest input, scales as exponents of their change. BatchNorm is folded before, and
zero points and the photo's own grid stay as they are. Layers that the plan keeps in float do not
learn.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from edgexception.imageset import ImageSet
from edgexception.model.graph import INPUT, layers
from edgexception.quantize.dialects import Dialect, rounded_reads
from edgexception.quantize.plan import ActivationQuant, QuantPlan, WeightQuant
from edgexception.quantize.ptq import BIAS_LIMIT, Quantized
from edgexception.recipe import QatSpec
from edgexception.train.loop import Course, Group, Report, fit
from edgexception.train.objective import Objective
from edgexception.train.state import Keeper

SCALE_FACTOR = 0.1
"""Learning rate of the scales' exponents over that of the weights."""


def quantize_qat(
    graph: fx.GraphModule,
    start: Quantized,
    spec: QatSpec,
    images: ImageSet,
    dialect: Dialect,
    keeper: Keeper | None = None,
    progress: Report | None = None,
) -> Quantized:
    """Train the quantized network `start` of the float `graph`; neither is changed.

    Rounds tensors where `dialect` does. The result's weights lie on the grids of its plan. Raises
    UsageError when the training diverges, and what `fit` raises.
    """
    network = fake_quantized(start, dialect)
    course = Course(
        section="quantize",
        steps=spec.steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        ema=spec.ema,
        seed=spec.seed,
        threads=spec.threads,
    )
    teacher = copy.deepcopy(graph) if spec.distillation > 0.0 else None
    objective = Objective("pixels", spec.distillation, teacher)
    fit(network, objective, images, course, _learning, keeper, progress)
    return _learned(start, network)


def fake_quantized(start: Quantized, dialect: Dialect) -> fx.GraphModule:
    """Return the quantized network in float32 with gradients, as it rounds in `dialect`."""
    plan = start.plan
    result = copy.deepcopy(start.graph)
    nodes = {node.name: node for node in result.graph.nodes}
    grids = {
        name: grid
        for name, grid in plan.activations.items()
        # A photo lies on its grid already.
        if name != INPUT and (grid.role == "input" or dialect.quantized_outputs)
    }
    reads = rounded_reads(result, plan, grids, dialect)
    for name, layer in layers(result).items():
        if name in plan.weights:
            source = plan.activations[cast(fx.Node, nodes[name].args[0]).name]
            result.add_module(name, _RoundedLayer(layer, plan.weights[name], source))
    for name, grid in grids.items():
        result.add_module(_rounded(name), _Rounding(grid))
        with result.graph.inserting_after(nodes[name]):
            rounded = result.graph.call_module(_rounded(name), (nodes[name],))
        for reader in reads[name]:
            nodes[reader].replace_input_with(nodes[name], rounded)
    result.graph.lint()
    result.recompile()
    return result


def _rounded(name: str) -> str:
    return f"{name}_rounded"


def _learning(network: nn.Module) -> list[Group]:
    """Return what learns: nothing decays, a weight of 0 is no better than another."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if name.endswith(".exponent")]
    others = [p for name, p in named if not name.endswith(".exponent")]
    return [
        {"params": others, "factor": 1.0, "weight_decay": 0.0},
        {"params": scales, "factor": SCALE_FACTOR, "weight_decay": 0.0},
    ]


class _Round(torch.autograd.Function):
    """x -> clamp(round(x / scale), low, high) * scale, with the gradients of the paper."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> Any:
        ctx.save_for_backward(x, scale)
        ctx.ends = low, high
        return torch.round(x / scale).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x, scale), (low, high), (gradient,) = ctx.saved_tensors, ctx.ends, gradients
        steps = x / scale
        inside = (steps >= low) & (steps <= high)
        of_x = gradient * inside
        # Inside, round(x / s) - x / s; outside, the end.
        slope = torch.round(steps).clamp_(low, high).sub_(steps.mul_(inside))
        return of_x, slope.mul_(gradient).sum_to_size(scale.shape), None, None


def _round(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return cast(torch.Tensor, _Round.apply(x, scale, low, high))  # type: ignore[no-untyped-call]


class _Rounding(nn.Module):
    """An activation's grid with a scale that learns."""

    def __init__(self, grid: ActivationQuant) -> None:
        super().__init__()
        low, high = grid.levels
        self.ends = low - grid.zero_point, high - grid.zero_point
        self.register_buffer("start", torch.tensor(grid.scale, dtype=torch.float32))
        self.exponent = nn.Parameter(torch.zeros(()))

    @property
    def scale(self) -> torch.Tensor:
        """The scale: where it began, times e to the exponent; so it is never 0 or negative."""
        return cast(torch.Tensor, self.start) * self.exponent.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _round(x, self.scale, *self.ends)


class _RoundedLayer(nn.Module):
    """A convolution or linear layer whose weights, their scales and its bias learn."""

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, grid: WeightQuant, source: ActivationQuant
    ) -> None:
        super().__init__()
        self.limit = grid.limit
        self.convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.convolution = {name: getattr(layer, name) for name in names}
        shape = (-1, *[1] * (layer.weight.ndim - 1))
        start = torch.tensor(grid.scales, dtype=torch.float32)
        self.register_buffer("start", start.view(shape))
        self.levels = nn.Parameter(layer.weight.detach() / start.view(shape))
        self.exponent = nn.Parameter(torch.zeros_like(start.view(shape)))
        self.register_buffer("first_bias", None)
        if layer.bias is not None:
            self.first_bias = layer.bias.detach().clone()
            largest = max(abs(level - source.zero_point) for level in source.levels)
            self.register_buffer("bias_unit", start * (source.scale * largest))
            self.bias_change = nn.Parameter(torch.zeros_like(start))

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias as it is by now."""
        if self.first_bias is None:
            return None
        return self.first_bias + self.bias_change * cast(torch.Tensor, self.bias_unit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = _round(self.levels, self.exponent.exp(), -self.limit, self.limit)
        weight = rounded * cast(torch.Tensor, self.start)
        if self.convolution is None:
            return functional.linear(x, weight, self.bias)
        return functional.conv2d(x, weight, self.bias, **self.convolution)

    def snapped(self, input_scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return weights on their grid, its scales (out,), and the bias.

        Where a bias would not fit 32 bits, the scale grows, as at the start of the plan.
        """
        start = cast(torch.Tensor, self.start)
        scale = start * self.exponent.exp()
        bias = self.bias
        if bias is not None:
            scale = scale.maximum((bias.abs() / (input_scale * BIAS_LIMIT)).view_as(scale))
        q = torch.round(self.levels * (start / scale)).clamp(-self.limit, self.limit)
        return q * scale, scale.flatten(), bias


def _learned(start: Quantized, network: fx.GraphModule) -> Quantized:
    """Read a trained network back as weights and a plan."""
    graph, plan = copy.deepcopy(start.graph), start.plan
    activations = dict(plan.activations)
    for name, grid in plan.activations.items():
        if hasattr(network, _rounded(name)):
            scale = cast(_Rounding, network.get_submodule(_rounded(name))).scale
            activations[name] = grid.model_copy(update={"scale": float(scale.detach())})
    nodes = {node.name: node for node in graph.graph.nodes}
    weights = dict(plan.weights)
    with torch.no_grad():
        for name, layer in layers(graph).items():
            if name in weights:
                source = activations[cast(fx.Node, nodes[name].args[0]).name]
                rounded = cast(_RoundedLayer, network.get_submodule(name))
                weight, scales, bias = rounded.snapped(source.scale)
                layer.weight = nn.Parameter(weight, requires_grad=False)
                if bias is not None:
                    layer.bias = nn.Parameter(bias, requires_grad=False)
                found = tuple(float(s) for s in np.float32(scales.numpy()))
                weights[name] = weights[name].model_copy(update={"scales": found})
    return Quantized(graph, _plan(plan, activations, weights))


def _plan(
    plan: QuantPlan, activations: dict[str, ActivationQuant], weights: dict[str, WeightQuant]
) -> QuantPlan:
    """Return a validated plan with other grids."""
    provenance = plan.provenance.model_copy(update={"method": "qat"})
    changed = {"activations": activations, "weights": weights, "provenance": provenance}
    return QuantPlan.model_validate(plan.model_copy(update=changed).model_dump())
