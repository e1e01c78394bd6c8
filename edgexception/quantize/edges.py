"""Which tensors of an inference graph are quantized: the edges of a plan."""

from __future__ import annotations

from torch import fx, nn

from edgexception.model.graph import layers, module_of


def input_edges(graph: fx.GraphModule) -> dict[str, list[str]]:
    """Return tensor -> the layers with weights that read it, in the order of the graph."""
    edges: dict[str, list[str]] = {}
    for name in layers(graph):
        node = next(n for n in graph.graph.nodes if n.name == name)
        edges.setdefault(node.args[0].name, []).append(name)
    return edges


def output_edges(graph: fx.GraphModule) -> list[str]:
    """Return the tensors that layers with weights write for other operations to read.

    A ReLU that alone reads a layer belongs to that layer: every runtime computes the two as one.
    The logits are no edge; they leave the network in float.
    """
    weighted = set(layers(graph))
    inputs = input_edges(graph)
    edges = []
    for node in graph.graph.nodes:
        if node.name not in weighted:
            continue
        users = list(node.users)
        if len(users) == 1 and _is_relu(graph, users[0]):
            node, users = users[0], list(users[0].users)  # noqa: PLW2901
        if node.name not in inputs and any(user.op != "output" for user in users):
            edges.append(node.name)
    return edges


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module_of(graph, node), nn.ReLU)
