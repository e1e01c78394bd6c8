"""Channels of zeros that make a network's widths fit the vectors of a runtime's kernels.

Xception's 728 channels are no multiple of 16 or 32, and kernels finish such a layer with a slow
rest, or leave it to slower ones. With 736 channels, of which 8 are always zero, every result is the
same number, and the network is faster: CPU time of one image on one thread of an AMD EPYC (Zen 5,
AVX-512 VNNI), medians of calls in turns:

| size | OpenVINO 2026.4    | ONNX Runtime 1.32    |
|------|--------------------|----------------------|
| 150  | 6.14 -> 5.77 ms    | 6.92 -> 6.30 ms      |
| 299  | 21.68 -> 21.59 ms  | 25.94 -> 22.99 ms    |

By the runtimes' own profiles OpenVINO gains in the 1x1 convolutions (367 -> 410 GMAC/s at 9x9
pixels) and ONNX Runtime in the depthwise ones (at 299 from 6.2 to 3.2 ms, all 34 together). Without
AVX-512 it makes no difference (within 1%).

Pruned widths (150x150): 364 -> 384 takes 8% off OpenVINO's time, 580 -> 592 takes 8% off ONNX
Runtime's; where few channels would be many more (100 -> 128) nothing is gained.
"""

from __future__ import annotations

import copy
from typing import cast

from torch import fx, nn
from torch.nn.functional import pad

from edgexception.model.graph import INPUT, module_of
from edgexception.quantize.plan import QuantPlan, WeightQuant

MOST_ADDED = 1 / 8
"""Widths that would grow by a larger share stay as they are."""


def widened(
    graph: fx.GraphModule, plan: QuantPlan, multiple: int
) -> tuple[fx.GraphModule, QuantPlan]:
    """Return a graph that computes the same with widths that are multiples of `multiple`.

    Added channels are zero in every tensor; the plan gives them scales of their layer. The photo,
    the logits and the channels at a convolution in more than one but not one-channel groups stay.
    """
    added = _added(graph, multiple)
    if not any(added.values()):
        return graph, plan
    result = copy.deepcopy(graph)
    weights = dict(plan.weights)
    for node in result.graph.nodes:
        layer = module_of(result, node) if node.op == "call_module" else None
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            outputs = added[node.name]
            _widen(layer, added[cast(fx.Node, node.args[0]).name], outputs)
            if node.name in weights:
                weights[node.name] = _widened_grid(weights[node.name], outputs)
    return result, plan.model_copy(update={"weights": weights})


def _added(graph: fx.GraphModule, multiple: int) -> dict[str, int]:
    """Return how many channels each tensor gets."""
    group: dict[str, str] = {}  # tensor -> the tensor whose width it must keep
    width: dict[str, int] = {}
    fixed = {INPUT}
    for node in graph.graph.nodes:
        sources = [group[source.name] for source in node.all_input_nodes]
        group[node.name] = node.name
        layer = module_of(graph, node) if node.op == "call_module" else None
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not _is_depthwise(layer):
            width[node.name] = int(layer.weight.shape[0])
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                fixed |= {node.name, *sources}
            continue
        if node.op == "output":
            fixed |= set(sources)
        for source in sources:  # what keeps its channels ties its ends: an add ties three
            group = {tensor: node.name if g == source else g for tensor, g in group.items()}
            fixed |= {node.name} if source in fixed else set()
            width[node.name] = width.get(source, 0)
    return {
        tensor: 0 if name in fixed else _missing(width[name], multiple)
        for tensor, name in group.items()
    }


def _missing(width: int, multiple: int) -> int:
    missing = -width % multiple
    return missing if missing <= width * MOST_ADDED else 0


def _is_depthwise(layer: nn.Conv2d | nn.Linear) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == len(
        layer.weight
    )


def _widen(layer: nn.Conv2d | nn.Linear, inputs: int, outputs: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features += inputs
        layer.out_features += outputs
    else:
        if _is_depthwise(layer):
            layer.groups += outputs
            inputs = 0
        layer.in_channels = (layer.weight.shape[1] + inputs) * layer.groups
        layer.out_channels += outputs
    kernel = [0, 0] * (layer.weight.ndim - 2)
    layer.weight = nn.Parameter(
        pad(layer.weight.detach(), [*kernel, 0, inputs, 0, outputs]), requires_grad=False
    )
    if layer.bias is not None:
        layer.bias = nn.Parameter(pad(layer.bias.detach(), [0, outputs]), requires_grad=False)


def _widened_grid(grid: WeightQuant, outputs: int) -> WeightQuant:
    # The scale of the first channel: it is there, and it adds no scale that the runtimes' choice
    # between one factor and one per channel could depend on.
    return grid.model_copy(update={"scales": (*grid.scales, *grid.scales[:1] * outputs)})
