"""Bias correction: every layer's mean output is brought back to that of the float network.

Rounding weights and clipping activations shifts the mean of a layer's outputs, and a shift is worse
than noise of the same size: it is the same at every position and adds up over layers. Layers are
corrected in the order of the graph, each on the inputs that the quantized layers before it really
produce (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.2, the empirical form).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import fx, nn

from edgexception.model.graph import INPUT, layers, module_of
from edgexception.quantize.edges import input_edges
from edgexception.quantize.plan import ActivationQuant, WeightQuant
from edgexception.quantize.simulate import quantize_weight

RECTIFIED_STEPS = 4
"""Newton steps where a ReLU follows, whose slope is the share of positive values."""
LEAST_ACTIVE = 0.05
"""Least slope of such a step: a channel that is nearly always off is not moved far."""


def correct_biases(
    graph: fx.GraphModule,
    activations: Mapping[str, ActivationQuant],
    weights: Mapping[str, WeightQuant],
    batches: Iterable[torch.Tensor],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> fx.GraphModule:
    """Return the graph with corrected biases.

    A depthwise convolution without a bias gets none: the pointwise one after it makes up for both.

    The layer that reads the photo is left as it is: its input is exact, and the mean of a photo is
    no photo (correcting it cost 6 dB on images with a dark border, recipes/digits.yaml). Holds the
    float and the quantized tensors between two layers for all `batches` at once.
    """
    result = copy.deepcopy(graph)
    found, edges = layers(result), input_edges(result)
    source = {name: edge for edge, readers in edges.items() for name in readers}
    exact = set(edges.get(INPUT, ()))
    values: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    nodes = list(result.graph.nodes)
    last_reader = {used.name: node.name for node in nodes for used in node.all_input_nodes}
    with torch.inference_mode():
        for number, node in enumerate(nodes):
            if node.op == "placeholder":
                values[node.name] = [(batch, batch) for batch in batches]
                continue
            if node.op != "call_module":
                break
            layer = result.get_submodule(str(node.target))
            inputs = zip(*(values[used.name] for used in node.all_input_nodes), strict=True)
            if node.name in found:
                grid = activations[source[node.name]]
                outputs = _layer(found[node.name], grid, weights[node.name], inputs)
                if node.name not in exact and found[node.name].bias is not None:
                    users = list(node.users)
                    rectified = len(users) == 1 and _is_relu(result, users[0])
                    outputs = _correct(found[node.name], outputs, rectified)
            else:
                outputs = [
                    (layer(*(pair[0] for pair in pairs)), layer(*(pair[1] for pair in pairs)))
                    for pairs in inputs
                ]
            values[node.name] = outputs
            for used in node.all_input_nodes:
                if last_reader[used.name] == node.name:
                    del values[used.name]
            progress(number + 1, len(nodes))
    return result


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module_of(graph, node), nn.ReLU)


def _layer(
    layer: nn.Conv2d | nn.Linear,
    grid: ActivationQuant,
    weight: WeightQuant,
    inputs: Iterable[tuple[tuple[torch.Tensor, torch.Tensor], ...]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a layer's float output, and its output from rounded inputs and weights."""
    rounded = copy.deepcopy(layer)
    steps = torch.tensor(weight.scales).view(-1, *[1] * (layer.weight.ndim - 1))
    integers = quantize_weight(layer.weight.detach(), weight).float()
    rounded.weight = nn.Parameter(integers * steps, requires_grad=False)
    return [
        (
            layer(exact),
            rounded(
                torch.fake_quantize_per_tensor_affine(
                    quantized, grid.scale, grid.zero_point, *grid.levels
                )
            ),
        )
        for ((exact, quantized),) in inputs
    ]


def _correct(
    layer: nn.Conv2d | nn.Linear,
    outputs: list[tuple[torch.Tensor, torch.Tensor]],
    rectified: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Move the layer's bias until its mean output per channel is the float one's.

    Where only a ReLU reads the layer, it is the mean after the ReLU: noise around zero comes out of
    a ReLU with a positive mean, and a correction before it would leave that in.
    """
    shift = torch.zeros(outputs[0][0].shape[1])
    column = [1, -1, *[1] * (outputs[0][0].ndim - 2)]
    for _ in range(RECTIFIED_STEPS if rectified else 1):
        error, active = torch.zeros(2, len(shift), dtype=torch.float64)
        for exact, quantized in outputs:
            moved = quantized + shift.view(column)
            if rectified:
                active += _sums(moved > 0)
                error += _sums(exact.relu() - moved.relu())
            else:
                error += _sums(exact - moved)
        count = sum(exact.numel() for exact, _ in outputs) / len(shift)
        slope = (active / count).clamp_min(LEAST_ACTIVE) if rectified else 1.0
        shift = shift + (error / count / slope).float()
    layer.bias = nn.Parameter(cast(torch.Tensor, layer.bias) + shift, requires_grad=False)
    return [(exact, quantized + shift.view(column)) for exact, quantized in outputs]


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum per channel in float64."""
    return values.double().sum(dim=[axis for axis in range(values.ndim) if axis != 1])
