"""The inference graph: a trained network as a flat list of named steps, BatchNorm folded.

Everything from quantization to export works on this one form. Its nodes are the layers of
`Xception` by name (`block5_sepconv1_depthwise`); a node's name also names the tensor it produces.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from edgexception.model.xception import Add, GlobalAveragePool, MaxPoolSame, Xception
from edgexception.preprocess import Preprocess

PIXEL_OFFSET = 128
"""What is subtracted from a uint8 pixel before the first layer, so that it is an int8 value."""

INPUT = "pixels"
"""Name of the graph's input: float32 (N, 3, H, W), RGB pixels minus `PIXEL_OFFSET`."""

_LEAVES = (Add, GlobalAveragePool, MaxPoolSame)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def inference_graph(network: Xception, preprocess: Preprocess) -> fx.GraphModule:
    """Return `network` as a graph over pixels: BatchNorm and normalization folded, dropout gone.

    The result computes the network's logits from `float(pixels) - 128`. Normalization
    (pixel - mean) / std folds exactly into the first convolution, because that convolution has no
    padding; so the input edge of a quantized network is the photo itself, without rounding.
    """
    graph = _Tracer().trace(network)
    folded = fx.GraphModule(copy.deepcopy(network).eval(), graph, class_name="XceptionGraph")
    for node in list(folded.graph.nodes):
        if node.op == "placeholder":
            _rename_input(folded.graph, node)
            continue
        node.type = None  # the output's is an annotation as text, with which a graph cannot pickle
        module = folded.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.BatchNorm2d):
            producer = cast(fx.Node, node.args[0])
            convolution = cast(nn.Conv2d, folded.get_submodule(cast(str, producer.target)))
            _fold_batch_norm(convolution, module)
            node.replace_all_uses_with(producer)
            folded.graph.erase_node(node)
        elif isinstance(module, nn.Dropout):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            folded.graph.erase_node(node)
    _fold_normalization(cast(nn.Conv2d, folded.get_submodule("block1_conv1")), preprocess)
    _flatten(folded)
    folded.graph.lint()
    folded.recompile()
    return folded.requires_grad_(False)


def _flatten(graph: fx.GraphModule) -> None:
    """Make every layer a direct child named like its node, so that one name serves everywhere."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target != node.name:
            graph.add_module(node.name, graph.get_submodule(node.target))
            node.target = node.name
    graph.delete_all_unused_submodules()


def _rename_input(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        renamed = graph.placeholder(INPUT)
    node.replace_all_uses_with(renamed)
    graph.erase_node(node)


def _fold_batch_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold in float64, so that the fold itself costs less than one float32 rounding."""
    weight, bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        None if convolution.bias is None else convolution.bias.double(),
        cast(torch.Tensor, norm.running_mean).double(),
        cast(torch.Tensor, norm.running_var).double(),
        norm.eps,
        norm.weight.double(),
        norm.bias.double(),
    )
    convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
    convolution.bias = nn.Parameter(bias.float(), requires_grad=False)


def _fold_normalization(convolution: nn.Conv2d, preprocess: Preprocess) -> None:
    mean = torch.tensor(preprocess.mean, dtype=torch.float64)
    std = torch.tensor(preprocess.std, dtype=torch.float64)
    weight = convolution.weight.double() / std.view(1, 3, 1, 1)
    shift = (weight * (PIXEL_OFFSET - mean).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    bias = cast(torch.Tensor, convolution.bias).double() + shift
    convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
    convolution.bias = nn.Parameter(bias.float(), requires_grad=False)


def to_graph_input(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images (N, H, W, 3) as the graph's float32 input (N, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float().contiguous() - PIXEL_OFFSET


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module:
    """Return the layer that a `call_module` node runs."""
    return graph.get_submodule(cast(str, node.target))


def layers(graph: fx.GraphModule) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers that have weights, by node name, in the order of the graph."""
    found: dict[str, nn.Conv2d | nn.Linear] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = module_of(graph, node)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                found[node.name] = module
    return found
