"""Which channels of a network can only go together, read off its traced graph.

Every layer but two kinds passes channels on one by one: BatchNorm, activations, pools, adds. A
pointwise, dense or shortcut layer mixes them, so a group ends there and another begins. The spatial
convolution of a separable one has as many channels out as in, and a channel of it stays or goes on
both sides; where it mixes within segments, each segment loses as many as the others, too.

So a group is the width inside of a block, or all that one residual stream ties together: the last
pointwise of the block before, its shortcut, the last pointwise of every middle block, and the first
spatial convolution of each.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx, nn

from edgexception.architecture import Architecture
from edgexception.model.xception import SeparableConv2d, Xception
from edgexception.prune.plan import Group, LayerShape, Structure


class _Tracer(fx.Tracer):
    """Makes one node of every layer; the two steps of a separable convolution are two layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, SeparableConv2d)


def trace(network: Xception) -> fx.Graph:
    """Return the graph of a network as it is trained, BatchNorm included."""
    return _Tracer().trace(network)


def structure_of(architecture: Architecture, input_size: tuple[int, int]) -> Structure:
    """Return the channel groups of a network and what its layers cost at an input size."""
    with torch.device("meta"):  # shapes without numbers: nothing is computed or allocated
        network = Xception(architecture)
        graph = trace(network)
        positions = _positions(network, graph, input_size)
    group = group_names(network, graph)
    layers = [
        LayerShape(
            name=node.name,
            inputs=group[node.all_input_nodes[0].name],
            outputs=group[node.name],
            positions=positions[node.name],
            taps=layer.weight[0, 0].numel(),
            segments=architecture.segments if is_spatial(node) else 1,
            vectors=_vectors(node, layer),
        )
        for node, layer in _weighted(network, graph)
    ]
    spatial = {group[node.name] for node, _ in _weighted(network, graph) if is_spatial(node)}
    fixed = {group[node.name] for node in graph.nodes if node.op in ("placeholder", "output")}
    mixing = {node.name: layer for node, layer in _weighted(network, graph) if not is_spatial(node)}
    found = []
    for name in dict.fromkeys(group[node.name] for node in graph.nodes):
        nodes = [node for node in graph.nodes if group[node.name] == name and node.op != "output"]
        writers = tuple(node.name for node in nodes if node.name in mixing)
        found.append(
            Group(
                name=name,
                width=mixing[writers[0]].weight.shape[0] if writers else 3,
                writers=writers,
                readers=tuple(u.name for n in nodes for u in n.users if u.name in mixing),
                nodes=tuple(node.name for node in nodes),
                segments=architecture.segments or 1 if name in spatial else 1,
                fixed=name in fixed,
            )
        )
    return Structure(groups=tuple(found), layers=tuple(layers))


def group_names(network: Xception, graph: fx.Graph) -> dict[str, str]:
    """Return for every tensor the name of its group: the first layer that writes it."""
    owner: dict[str, str] = {}

    def find(name: str) -> str:
        while owner[name] != name:
            name = owner[name]
        return name

    mixing = {node.name for node, _ in _weighted(network, graph) if not is_spatial(node)}
    for node in graph.nodes:
        owner[node.name] = node.name
        for source in node.all_input_nodes if node.name not in mixing else ():
            # The earlier root stays, so that a group keeps the name of its first tensor.
            first, second = sorted((find(source.name), find(node.name)), key=list(owner).index)
            owner[second] = first
    return {name: find(name) for name in owner}


def is_spatial(node: fx.Node) -> bool:
    """Return whether a node is the spatial convolution of a separable one."""
    return node.op == "call_module" and str(node.target).endswith(".depthwise")


def _weighted(network: Xception, graph: fx.Graph) -> list[tuple[fx.Node, nn.Conv2d | nn.Linear]]:
    found = []
    for node in graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(cast(str, node.target))
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                found.append((node, module))
    return found


def _vectors(node: fx.Node, layer: nn.Conv2d | nn.Linear) -> int:
    norms = sum(str(user.target).endswith("_bn") for user in node.users)
    return 2 * norms + (layer.bias is not None)


def _positions(network: Xception, graph: fx.Graph, input_size: tuple[int, int]) -> dict[str, int]:
    positions: dict[str, int] = {}

    class Measure(fx.Interpreter):
        def run_node(self, n: fx.Node) -> torch.Tensor:
            value = cast(torch.Tensor, super().run_node(n))
            positions[n.name] = value.shape[2:].numel()
            return value

    Measure(fx.GraphModule(network.eval(), graph)).run(torch.zeros(1, 3, *input_size))
    return positions
