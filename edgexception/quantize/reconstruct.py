"""Sequential reconstruction: every layer is fitted to the inputs that it will really get.

Layers are taken in the order of the graph, each between the tensors of the float network and those
that the quantized layers before it produce: so a layer makes up for errors of those before it, and
none is fitted to inputs that it never sees. What is fitted is its weights' rounding (`rounding`)
and its bias (`biases`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx, nn

from edgexception.model.graph import INPUT, layers, module_of
from edgexception.quantize.biases import Pair, correct_bias
from edgexception.quantize.edges import input_edges
from edgexception.quantize.plan import ActivationQuant, WeightQuant
from edgexception.quantize.rounding import learned_weight
from edgexception.quantize.simulate import quantize_weight

MOST_VALUES = 100_000_000
"""Of one tensor of all images together, 400 MB: a few such tensors are in memory at once, each of
the float and of the quantized network."""


def images_held(graph: fx.GraphModule, image: torch.Tensor) -> int:
    """Return how many images like `image`, (1, C, H, W), `reconstruct` can hold."""
    largest = 1

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            nonlocal largest
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                largest = max(largest, value.numel())
            return value

    with torch.inference_mode():
        Watch(graph).run(image)
    return max(MOST_VALUES // largest, 1)


def reconstruct(
    graph: fx.GraphModule,
    activations: Mapping[str, ActivationQuant],
    weights: Mapping[str, WeightQuant],
    batches: Iterable[torch.Tensor],
    *,
    rounding: bool,
    biases: bool,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> fx.GraphModule:
    """Return the graph with weights on their grids, if `rounding`, and corrected biases.

    A depthwise convolution without a bias gets none: the pointwise one after it makes up for both.
    The bias of the layer that reads the photo is left as it is: its input is exact, and the mean of
    a photo is no photo (correcting it cost 6 dB on images with a dark border, recipes/digits.yaml).
    Holds the float and the quantized tensors between two layers for all `batches` at once.
    """
    result = copy.deepcopy(graph)
    found, edges = layers(result), input_edges(result)
    source = {name: edge for edge, readers in edges.items() for name in readers}
    exact = set(edges.get(INPUT, ()))
    values: dict[str, list[Pair]] = {}
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
            inputs = list(zip(*(values[used.name] for used in node.all_input_nodes), strict=True))
            if node.name in found:
                grid, weight = activations[source[node.name]], weights[node.name]
                outputs = _fit(found[node.name], grid, weight, inputs, rounding)
                if biases and node.name not in exact and found[node.name].bias is not None:
                    users = list(node.users)
                    rectified = len(users) == 1 and _is_relu(result, users[0])
                    outputs = correct_bias(found[node.name], outputs, rectified)
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


def _fit(
    layer: nn.Conv2d | nn.Linear,
    grid: ActivationQuant,
    weight: WeightQuant,
    inputs: Iterable[tuple[Pair, ...]],
    rounding: bool,
) -> list[Pair]:
    """Return a layer's float outputs, and those of rounded inputs and weights.

    With `rounding` the layer is left with weights on their grid, otherwise with its own.
    """
    pairs = [
        (x, torch.fake_quantize_per_tensor_affine(y, grid.scale, grid.zero_point, *grid.levels))
        for ((x, y),) in inputs
    ]
    rounded = copy.deepcopy(layer)
    if rounding:
        on_grid = learned_weight(layer, weight, [y for _, y in pairs])
    else:
        steps = torch.tensor(weight.scales).view(-1, *[1] * (layer.weight.ndim - 1))
        on_grid = quantize_weight(layer.weight.detach(), weight).float() * steps
    rounded.weight = nn.Parameter(on_grid, requires_grad=False)
    outputs = [(layer(x), rounded(y)) for x, y in pairs]
    if rounding:
        layer.weight = rounded.weight
    return outputs
