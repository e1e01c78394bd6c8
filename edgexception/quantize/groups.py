"""Channel groups: which channels of which tensors can be rescaled without changing the logits.

ReLU, max-pool, mean and add commute with a positive factor per channel. So the tensors between the
layers that write them and the layers that read them share their channels, and a factor on one of
these channels can be moved into the weights on both sides:

- inside a separable convolution, depthwise to pointwise: the group is one tensor, and because
  nothing but the two linear layers touches it, its channels can be shifted, too;
- inside a block, pointwise to ReLU to depthwise;
- along the residual stream, everything that the adds tie together.

A depthwise reader and every writer take the factor without any weight error, since their weights
have one scale per output channel; other readers mix channels and pay for unequal columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx, nn

from edgexception.model.graph import INPUT, layers, module_of
from edgexception.model.xception import Add, GlobalAveragePool, MaxPoolSame

_COMMUTES = (nn.ReLU, Add, MaxPoolSame, GlobalAveragePool)


@dataclass
class ChannelGroup:
    """Layers and tensors that share their channels, by name, in the order of the graph."""

    tensors: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    """Layers whose output channels these are."""
    readers: list[str] = field(default_factory=list)
    """Layers whose input channels these are."""
    shiftable: bool = False
    """Whether a constant per channel can be moved through, too."""


def channel_groups(graph: fx.GraphModule) -> list[ChannelGroup]:
    """Return the groups of an inference graph, without the input's and those of the logits.

    A group that some other operation reads or writes (an ELU, say) is left out: it is not free.
    """
    weighted = layers(graph)
    root = _roots(graph)
    frozen = {root[name] for name in _fixed(graph)}
    groups: dict[str, ChannelGroup] = {}
    for node in graph.graph.nodes:
        if node.op == "output" or root[node.name] in frozen:
            continue
        group = groups.setdefault(root[node.name], ChannelGroup())
        group.tensors.append(node.name)
        if node.name in weighted:
            group.writers.append(node.name)
        group.readers += [user.name for user in node.users if user.name in weighted]
    for group in groups.values():
        group.shiftable = group.tensors == group.writers and not any(
            _padded(weighted[name]) for name in group.readers
        )
    return [group for group in groups.values() if group.readers]


def _roots(graph: fx.GraphModule) -> dict[str, str]:
    """Return for every tensor a tensor that stands for all which share its channels."""
    owner: dict[str, str] = {}

    def find(name: str) -> str:
        while owner[name] != name:
            name = owner[name]
        return name

    for node in graph.graph.nodes:
        owner[node.name] = node.name
        if _commutes(graph, node):
            for source in node.all_input_nodes:
                owner[find(source.name)] = node.name
    return {name: find(name) for name in owner}


def _fixed(graph: fx.GraphModule) -> Iterator[str]:
    """Yield tensors whose channels must stay: photo, logits, what other operations touch."""
    weighted = layers(graph)
    yield INPUT
    for node in graph.graph.nodes:
        if node.name in weighted:
            if not (is_depthwise(weighted[node.name]) or _mixes_all(weighted[node.name])):
                yield from (source.name for source in node.all_input_nodes)
        elif not _commutes(graph, node):
            yield node.name
            yield from (source.name for source in node.all_input_nodes)


def _commutes(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module_of(graph, node), _COMMUTES)


def _mixes_all(layer: nn.Conv2d | nn.Linear) -> bool:
    return isinstance(layer, nn.Linear) or layer.groups == 1


def _padded(layer: nn.Conv2d | nn.Linear) -> bool:
    return isinstance(layer, nn.Conv2d) and any(cast(tuple[int, int], layer.padding))


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether every output channel of a layer reads one input channel of its own."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def rescale(
    graph: fx.GraphModule,
    group: ChannelGroup,
    factors: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> None:
    """Turn every tensor x of the group into (x - shift) * factors, in place; the logits stay.

    `factors` (channels,) are positive, `shift` (channels,) is for shiftable groups only. Powers of
    two are exact; other factors cost one float32 rounding per weight.
    """
    found = layers(graph)
    for name in group.writers:
        layer = found[name]
        weight = layer.weight.detach().double()
        _set(layer, "weight", weight * _rows(factors, weight.ndim))
        bias = torch.zeros(len(factors)) if layer.bias is None else layer.bias.detach()
        if layer.bias is not None or shift is not None:
            moved = bias.double() if shift is None else bias.double() - shift.double()
            _set(layer, "bias", moved * factors.double())
    for name in group.readers:
        layer = found[name]
        weight = layer.weight.detach().double()
        if shift is not None:
            bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
            _set(layer, "bias", bias.double() + response(layer, shift.double()))
        _set(layer, "weight", weight / _columns(layer, factors))


def response(layer: nn.Conv2d | nn.Linear, constant: torch.Tensor) -> torch.Tensor:
    """Return what a layer without its bias makes of one constant per input channel: (out,)."""
    weight = layer.weight.detach().to(constant.dtype).flatten(2 if layer.weight.ndim > 2 else 1)
    summed = weight.sum(dim=2) if weight.ndim > 2 else weight
    return summed[:, 0] * constant if is_depthwise(layer) else summed @ constant


def _columns(layer: nn.Conv2d | nn.Linear, factors: torch.Tensor) -> torch.Tensor:
    """Return factors per input channel, shaped to a layer's weight."""
    if is_depthwise(layer):
        return _rows(factors, layer.weight.ndim)
    return factors.double().view(1, -1, *[1] * (layer.weight.ndim - 2))


def _rows(factors: torch.Tensor, ndim: int) -> torch.Tensor:
    return factors.double().view(-1, *[1] * (ndim - 1))


def _set(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(layer, name, nn.Parameter(value.float(), requires_grad=False))
