"""The fake-quantized network: what a plan does to the numbers, in torch."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import fx, nn

from edgexception.model.graph import layers
from edgexception.quantize.edges import input_edges
from edgexception.quantize.plan import ActivationQuant, QuantPlan, WeightQuant


class FakeQuantize(nn.Module):
    """Round a tensor to a plan's grid and back, exactly as ONNX QuantizeLinear and its inverse do."""

    def __init__(self, grid: ActivationQuant) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest grid values of `x` (ties to even), saturated at the ends."""
        low, high = self.grid.levels
        q = torch.round(x / self.grid.scale) + self.grid.zero_point
        return (q.clamp(low, high) - self.grid.zero_point) * self.grid.scale


def quantize_weight(weight: torch.Tensor, grid: WeightQuant) -> torch.Tensor:
    """Return the int8 values of `weight` (out, ...) on its per-output-channel grid."""
    scales = torch.tensor(grid.scales, dtype=torch.float32).view(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scales).clamp(-grid.limit, grid.limit).to(torch.int8)


def fake_quantize_weight(weight: torch.Tensor, grid: WeightQuant) -> torch.Tensor:
    """Return `weight` rounded to its grid, in float32."""
    scales = torch.tensor(grid.scales, dtype=torch.float32).view(-1, *[1] * (weight.ndim - 1))
    return quantize_weight(weight, grid).float() * scales


def simulate(
    graph: fx.GraphModule, plan: QuantPlan, roles: Collection[str] = ("input", "output")
) -> fx.GraphModule:
    """Return `graph` computing on the plan's grids, for the activation roles that a runtime quantizes.

    An "input" tensor is rounded only where layers with weights read it: a residual add reads the
    same tensor in float. An "output" tensor is rounded for everyone.
    """
    result = copy.deepcopy(graph)
    weighted = set(layers(result))
    readers = input_edges(result)
    for node in list(result.graph.nodes):
        grid = plan.activations.get(node.name)
        if grid is None or grid.role not in roles:
            continue
        users = [u for u in node.users if grid.role == "output" or u.name in readers[node.name]]
        name = f"{node.name}_fake_quantize"
        result.add_module(name, FakeQuantize(grid))
        with result.graph.inserting_after(node):
            rounded = result.graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, rounded)
    for name, layer in layers(result).items():
        if name in weighted:
            weight = fake_quantize_weight(layer.weight.detach(), plan.weights[name])
            layer.weight = nn.Parameter(weight, requires_grad=False)
    result.graph.lint()
    result.recompile()
    return result
