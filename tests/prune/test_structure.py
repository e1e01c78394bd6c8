"""The channel groups of the family against torch-pruning's dependency graph."""

from __future__ import annotations

import torch
import torch_pruning
from hypothesis import example, given, settings
from narrow import deeper_architectures, preprocess_of
from torch import nn

from edgexception.architecture import Architecture
from edgexception.model.cost import macs_of
from edgexception.model.graph import inference_graph
from edgexception.model.xception import Xception
from edgexception.prune.structure import structure_of

End = tuple[str, str]
"""A layer, and its side: "in" or "out"."""


def ours(architecture: Architecture) -> set[frozenset[End]]:
    structure = structure_of(architecture, (40, 40))
    groups = {group.name: set[End]() for group in structure.groups}
    for layer in structure.layers:
        groups[layer.inputs].add((layer.name, "in"))
        groups[layer.outputs].add((layer.name, "out"))
    return {frozenset(ends) for name, ends in groups.items() if name != "x"}


def theirs(architecture: Architecture) -> set[frozenset[End]]:
    network = Xception(architecture).eval()
    names = {module: name.replace(".", "_") for name, module in network.named_modules()}
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(network, torch.zeros(1, 3, 40, 40))
    found: set[frozenset[End]] = set()
    for group in graph.get_all_groups():
        ends = set[End]()
        for item in group:
            module = item.dep.target.module
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # One handler prunes both sides of a depthwise convolution.
                if graph.is_out_channel_pruning_fn(item.dep.handler):
                    ends.add((names[module], "out"))
                if graph.is_in_channel_pruning_fn(item.dep.handler):
                    ends.add((names[module], "in"))
        found.add(frozenset(ends))
    return found


def tied(groups: set[frozenset[End]], architecture: Architecture) -> set[frozenset[End]]:
    """Join the two sides of every spatial convolution, whose widths the family keeps equal.

    torch-pruning knows that of depthwise convolutions alone.
    """
    for spec in architecture.separables():
        name = f"{spec.name}_depthwise"
        touched = [g for g in groups if (name, "in") in g or (name, "out") in g]
        groups = (groups - set(touched)) | {frozenset().union(*touched)}
    return groups


@settings(max_examples=12, deadline=None)
@given(deeper_architectures())
@example(Architecture(stem=(4, 8), entry=((8, 12),), middle=((12,), (4, 8, 12)), exit=(8,)))
def test_groups_are_those_of_torch_pruning(architecture: Architecture) -> None:
    expected = theirs(architecture)
    if architecture.segments is not None:
        expected = tied(expected, architecture)
    first_inputs = {("block1_conv1", "in")}
    assert ours(architecture) == {group for group in expected if group - first_inputs}


@settings(max_examples=8, deadline=None)
@given(deeper_architectures())
def test_costs_are_those_of_the_network(architecture: Architecture) -> None:
    structure = structure_of(architecture, (37, 40))
    widths = structure.widths
    assert sum(layer.parameters(widths) for layer in structure.layers) == architecture.parameters
    graph = inference_graph(Xception(architecture), preprocess_of((37, 40)))
    macs = macs_of(graph, preprocess_of((37, 40)))
    assert sum(layer.macs(widths) for layer in structure.layers) == macs


def test_the_residual_stream_of_the_paper_ties_ten_pointwise_and_nine_depthwise_layers() -> None:
    structure = structure_of(Architecture(), (299, 299))
    stream = next(g for g in structure.groups if g.name == "block4_sepconv2_pointwise")
    assert stream.width == 728
    assert len(stream.writers) == 10  # block 4's last and its shortcut, the last of blocks 5 to 12
    assert sum(name.endswith("depthwise") for name in stream.nodes) == 9  # first of blocks 5 to 13
    assert "block13_shortcut" in {la.name for la in structure.layers if la.inputs == stream.name}
    assert [group.name for group in structure.groups if group.fixed] == ["x", "predictions"]
