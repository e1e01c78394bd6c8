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

import torch
from torch import fx, nn

from edgexception.model.graph import INPUT, layers
from edgexception.quantize.edges import input_edges
from edgexception.quantize.plan import ActivationQuant, WeightQuant
from edgexception.quantize.simulate import quantize_weight


def correct_biases(
    graph: fx.GraphModule,
    activations: Mapping[str, ActivationQuant],
    weights: Mapping[str, WeightQuant],
    batches: Iterable[torch.Tensor],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> fx.GraphModule:
    """Return the graph with corrected biases; layers without one get one.

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
                if node.name not in exact:
                    outputs = _correct(found[node.name], outputs)
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
    layer: nn.Conv2d | nn.Linear, outputs: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Move the layer's bias by the mean error per channel, and the quantized outputs with it."""
    errors = [exact - quantized for exact, quantized in outputs]
    other = [axis for axis in range(errors[0].ndim) if axis != 1]
    count = sum(error.numel() for error in errors) / errors[0].shape[1]
    shift = torch.stack([e.double().sum(dim=other) for e in errors]).sum(0).float() / count
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.bias = nn.Parameter(bias + shift, requires_grad=False)
    column = shift.view(1, -1, *[1] * (errors[0].ndim - 2))
    return [(exact, quantized + column) for exact, quantized in outputs]
