"""Which tensors of an inference graph are quantized: the edges of a plan."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from edgexception.model.graph import layers, module_of


def input_edges(graph: fx.GraphModule) -> dict[str, list[str]]:
    """Return tensor -> the layers with weights that read it, in the order of the graph."""
    weighted = layers(graph)
    edges: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        if node.name in weighted:
            edges.setdefault(node.args[0].name, []).append(node.name)
    return edges


def layer_outputs(graph: fx.GraphModule, floating: Collection[str] = ()) -> dict[str, str]:
    """Return tensor -> the layer with weights that writes it; `floating` layers are left out.

    A ReLU that alone reads a layer belongs to that layer: every runtime computes the two as one.
    The logits are not among them; they leave the network in float.
    """
    weighted = layers(graph)
    outputs = {}
    for node in graph.graph.nodes:
        if node.name not in weighted or node.name in floating:
            continue
        tensor, users = node, list(node.users)
        if len(users) == 1 and _is_relu(graph, users[0]):
            tensor, users = users[0], list(users[0].users)
        if any(user.op != "output" for user in users):
            outputs[tensor.name] = node.name
    return outputs


def output_edges(graph: fx.GraphModule) -> list[str]:
    """Return the layer outputs that no layer reads: they go to adds, pools and activations."""
    inputs = input_edges(graph)
    return [tensor for tensor in layer_outputs(graph) if tensor not in inputs]


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module_of(graph, node), nn.ReLU)
