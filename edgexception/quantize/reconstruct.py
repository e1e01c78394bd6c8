"""Sequential reconstruction: every layer is fitted to the inputs that it will really get.

Layers are taken in the order of the graph, each between the tensors of the float network and those
that the quantized layers before it produce: so a layer makes up for errors of those before it, and
none is fitted to inputs that it never sees. What is fitted is its weights' rounding (`rounding`)
and its bias (`biases`).

Rounding takes nearly all the time. With a `Keeper`, the weights that are found are saved now and
then, and a later run repeats what is cheap and takes them over, to the same last bit.
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
from edgexception.train.state import Keeper, State

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
    keeper: Keeper | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> fx.GraphModule:
    """Return the graph with weights on their grids, if `rounding`, and corrected biases.

    A depthwise convolution without a bias gets none: the pointwise one after it makes up for both.
    The bias of the layer that reads the photo is left as it is: its input is exact, and the mean of
    a photo is no photo (correcting it cost 6 dB on images with a dark border, recipes/digits.yaml).
    Holds the float and the quantized tensors between two layers for all `batches` at once. Raises
    BadArtifact when what `keeper` has is not of this network.
    """
    result = copy.deepcopy(graph)
    found, edges = layers(result), input_edges(result)
    learned = _kept(keeper, found) if keeper is not None and rounding else {}
    source = {name: edge for edge, readers in edges.items() for name in readers}
    exact = set(edges.get(INPUT, ()))
    values: dict[str, list[Pair]] = {}
    nodes = list(result.graph.nodes)
    fitted = 0
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
                known = learned.get(node.name)
                outputs = _fit(found[node.name], grid, weight, inputs, rounding, known)
                if biases and node.name not in exact and found[node.name].bias is not None:
                    users = list(node.users)
                    rectified = len(users) == 1 and _is_relu(result, users[0])
                    outputs = correct_bias(found[node.name], outputs, rectified)
                fitted += 1
                if keeper is not None and rounding and len(learned) < fitted and keeper.due():
                    keeper.save(State(fitted, _weights(found)))
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


def _weights(found: Mapping[str, nn.Conv2d | nn.Linear]) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in found.items()}


def _kept(keeper: Keeper, found: Mapping[str, nn.Conv2d | nn.Linear]) -> dict[str, torch.Tensor]:
    """Return the weights that an earlier run has found, of the first layers of the graph."""
    state = keeper.load(_weights(found), len(found) + 1)
    return {name: state.tensors[name] for name in list(found)[: state.steps]} if state else {}


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module_of(graph, node), nn.ReLU)


def _fit(
    layer: nn.Conv2d | nn.Linear,
    grid: ActivationQuant,
    weight: WeightQuant,
    inputs: Iterable[tuple[Pair, ...]],
    rounding: bool,
    known: torch.Tensor | None,
) -> list[Pair]:
    """Return a layer's float outputs, and those of rounded inputs and weights.

    With `rounding` the layer is left with weights on their grid, `known` or learned, otherwise with
    its own.
    """
    pairs = [
        (x, torch.fake_quantize_per_tensor_affine(y, grid.scale, grid.zero_point, *grid.levels))
        for ((x, y),) in inputs
    ]
    rounded = copy.deepcopy(layer)
    if known is not None:
        on_grid = known
    elif rounding:
        on_grid = learned_weight(layer, weight, [y for _, y in pairs])
    else:
        steps = torch.tensor(weight.scales).view(-1, *[1] * (layer.weight.ndim - 1))
        on_grid = quantize_weight(layer.weight.detach(), weight).float() * steps
    rounded.weight = nn.Parameter(on_grid, requires_grad=False)
    outputs = [(layer(x), rounded(y)) for x, y in pairs]
    if rounding:
        layer.weight = rounded.weight
    return outputs
