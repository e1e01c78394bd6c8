"""A smaller network of the same class, with the weights of the channels that a plan keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact
from edgexception.model.xception import Xception
from edgexception.prune.plan import PrunePlan
from edgexception.prune.structure import group_names, is_spatial, trace


def pruned(network: Xception, plan: PrunePlan) -> Xception:
    """Return a network without the channels that a plan takes out; the other weights are copies.

    Raises BadArtifact for a plan of another network.
    """
    graph = trace(network)
    group = group_names(network, graph)
    every = _every_channel(network, graph, group)
    _check(plan, every)
    stays = every | {name: torch.tensor(kept) for name, kept in plan.kept.items()}
    smaller = Xception(
        narrowed(network.architecture, {n: len(stays[name]) for n, name in group.items()})
    )
    state = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        inputs, outputs = stays[group[node.all_input_nodes[0].name]], stays[group[node.name]]
        module = network.get_submodule(cast(str, node.target))
        for name, value in module.state_dict().items():
            if value.ndim == 0:  # BatchNorm's count of batches
                kept = value
            elif name == "weight" and value.ndim > 1:
                kept = value[outputs]
                if not is_spatial(node):
                    kept = kept[:, inputs]
                elif network.architecture.segments is not None:
                    kept = _within_segments(value, outputs, network.architecture.segments)
            else:
                kept = value[outputs]
            state[f"{node.target}.{name}"] = kept
    smaller.load_state_dict(state)
    return smaller.train(network.training)


def narrowed(architecture: Architecture, widths: Mapping[str, int]) -> Architecture:
    """Return an architecture whose layers have other numbers of output channels, by their names."""
    blocks: dict[str, list[int]] = {}
    for spec in architecture.separables():
        block = spec.name.partition("_")[0]
        blocks.setdefault(block, []).append(widths[f"{spec.name}_pointwise"])
    *strided, exit_, tail = (tuple(block) for block in blocks.values())
    entries = len(architecture.entry)
    dense = [f"dense{index}" for index in range(1, len(architecture.head))]
    return Architecture.model_validate(
        {
            **dict(architecture),
            "stem": (widths["block1_conv1"], widths["block1_conv2"]),
            "entry": tuple(strided[:entries]),
            "middle": tuple(strided[entries:]),
            "exit": exit_,
            "tail": tail,
            "head": (*(widths[name] for name in dense), *architecture.head[-1:]),
        }
    )


def _within_segments(weight: torch.Tensor, kept: torch.Tensor, segments: int) -> torch.Tensor:
    """Return a segmented spatial weight (C, C / segments, h, w) with the kept channels of each."""
    inside = kept.view(segments, -1) % weight.shape[1]
    parts = weight.view(segments, -1, *weight.shape[1:])
    return torch.cat(
        [part[own][:, own] for part, own in zip(parts, inside, strict=True)]  # each its own square
    )


def _every_channel(
    network: Xception, graph: torch.fx.Graph, group: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    widths = {group[node.name]: 3 for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        module = network.get_submodule(cast(str, node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            widths[group[node.name]] = module.weight.shape[0]
    return {name: torch.arange(width) for name, width in widths.items()}


def _check(plan: PrunePlan, every: Mapping[str, torch.Tensor]) -> None:
    for name, kept in plan.kept.items():
        if name not in every:
            raise BadArtifact(
                f"the pruning plan cuts {name}, which is no channel group of this network; make "
                "the plan again with `edgex prune`"
            )
        if kept[-1] >= len(every[name]):
            raise BadArtifact(
                f"the pruning plan keeps channel {kept[-1]} of {name}, which has "
                f"{len(every[name])}; make the plan again with `edgex prune`"
            )
