"""INT8 graphs with one layer that a runtime cannot fuse: right numbers, wrong kernel."""

from __future__ import annotations

import copy

import onnx
from onnx import helper


def broken(model: onnx.ModelProto, runtime: str) -> tuple[onnx.ModelProto, str]:
    """Return a copy with a layer that the runtime runs in float, and that layer's name.

    ONNX Runtime fuses a convolution only where its QuantizeLinear follows at once: here a LeakyRelu
    that changes nothing stands between. OpenVINO moves the stride of a 1x1 convolution into its
    input's Q/DQ and then computes in float: here the pixels are not picked before.
    """
    result = copy.deepcopy(model)
    nodes = {node.name: node for node in result.graph.node}
    if runtime == "onnxruntime":
        name = "block3_sepconv2_pointwise"
        nodes[f"{name}_q"].input[0] = f"{name}_same"
        same = helper.make_node("LeakyRelu", [name], [f"{name}_same"], f"{name}_same", alpha=1.0)
        place = list(result.graph.node).index(nodes[f"{name}_q"])
        result.graph.node.insert(place, same)
    else:
        name = "block3_shortcut"
        picked = nodes[f"{name}_picked"]
        nodes[name].input[0] = picked.input[0]
        (strides,) = [a for a in nodes[name].attribute if a.name == "strides"]
        strides.ints[:] = [2, 2]
        result.graph.node.remove(picked)
    return result, name
