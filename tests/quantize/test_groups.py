"""Channel groups: what may be rescaled leaves the logits, and nothing else is offered."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import SMALL, architectures, random_images, run_torch, small_graph, sqnr_db
from torch import fx

from edgexception.architecture import Architecture
from edgexception.model.graph import INPUT, layers
from edgexception.quantize.groups import (
    ChannelGroup,
    channel_groups,
    is_depthwise,
    rescale,
    response,
)

IMAGES = random_images(2, (40, 40), seed=3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def variation(**changes: object) -> Architecture:
    return Architecture.model_validate(SMALL.model_dump() | changes)


def by_tensor(graph: fx.GraphModule) -> dict[str, ChannelGroup]:
    return {tensor: group for group in channel_groups(graph) for tensor in group.tensors}


def moved_at_random(graph: fx.GraphModule, seed: int) -> fx.GraphModule:
    """Rescale every group by factors over three decades, and shift those that may be."""
    generator = torch.Generator().manual_seed(seed)
    result = copy.deepcopy(graph)
    found = layers(result)
    for group in channel_groups(graph):
        channels = len(found[group.writers[0]].weight)
        factors = 10 ** (3 * torch.rand(channels, generator=generator) - 1.5)
        shift = torch.randn(channels, generator=generator) if group.shiftable else None
        rescale(result, group, factors.double(), None if shift is None else shift.double())
    return result


@settings(max_examples=25, deadline=None)
@given(architecture=architectures(), seed=st.integers(0, 1000))
def test_random_moves_leave_the_logits(architecture: Architecture, seed: int) -> None:
    graph = small_graph(architecture)
    moved = moved_at_random(graph, seed)
    assert sqnr_db(run_torch(graph, IMAGES), run_torch(moved, IMAGES)) > 100


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": False},
        {"padding": "timm"},
        {"segments": 2},
        {"segments": 1},
        {"intermediate_activation": "elu"},
        {"intermediate_activation": "relu"},
        {"order": "pointwise-first", "intermediate_activation": "relu"},
        {"head": (7, 5)},
    ],
)
def test_every_tensor_is_in_one_group_at_most(changes: dict[str, object]) -> None:
    graph = small_graph(variation(**changes))
    moved = moved_at_random(graph, 1)
    assert sqnr_db(run_torch(graph, IMAGES), run_torch(moved, IMAGES)) > 100
    groups = channel_groups(graph)
    tensors = [tensor for group in groups for tensor in group.tensors]
    readers = [reader for group in groups for reader in group.readers]
    assert len(tensors) == len(set(tensors))
    assert len(readers) == len(set(readers))
    logits = next(iter(reversed(graph.graph.nodes))).args[0].name
    assert not {INPUT, logits} & set(tensors)
    assert "block1_conv1" not in readers


def test_a_network_without_head_keeps_its_pooled_features() -> None:
    graph = small_graph(variation(head=()))
    assert not {"avg_pool", "block6_sepconv1_act"} & by_tensor(graph).keys()


def test_a_move_is_really_made() -> None:
    """Every tensor of a group becomes (x - shift) * factors, no other tensor changes."""
    graph = small_graph()
    group = by_tensor(graph)["block3_sepconv1_depthwise"]
    moved = copy.deepcopy(graph)
    factors = torch.linspace(0.5, 4, 8, dtype=torch.float64)
    shift = torch.linspace(-1, 1, 8, dtype=torch.float64)
    rescale(moved, group, factors, shift)
    before, after = tensors_of(graph), tensors_of(moved)
    for name, value in before.items():
        expected = value.double()
        if name in group.tensors:
            expected = (expected - shift.view(-1, 1, 1)) * factors.view(-1, 1, 1)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-3, atol=1e-4)


def tensors_of(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    found = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.inference_mode():
        Keep(graph).run(torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def test_only_what_no_activation_touches_can_be_shifted() -> None:
    groups = by_tensor(small_graph())
    assert groups["block2_sepconv1_depthwise"] == ChannelGroup(
        tensors=["block2_sepconv1_depthwise"],
        writers=["block2_sepconv1_depthwise"],
        readers=["block2_sepconv1_pointwise"],
        shiftable=True,
    )
    inside = groups["block2_sepconv1_pointwise"]
    assert inside.tensors == ["block2_sepconv1_pointwise", "block2_sepconv2_act"]
    assert inside.readers == ["block2_sepconv2_depthwise"]
    assert not inside.shiftable
    shiftable = {tensor for tensor, group in groups.items() if group.shiftable}
    depthwise = {name for name, layer in layers(small_graph()).items() if is_depthwise(layer)}
    assert shiftable == depthwise


def test_padded_readers_are_not_shifted() -> None:
    """A shift would turn the zeros of the padding into something else."""
    graph = small_graph()
    layers(graph)["block2_sepconv1_pointwise"].padding = (1, 1)
    assert not by_tensor(graph)["block2_sepconv1_depthwise"].shiftable


def test_the_residual_stream_is_one_group() -> None:
    groups = by_tensor(small_graph())
    stream = groups["block3_add"]
    assert stream is groups["block4_add"]
    assert set(stream.writers) == {
        "block3_sepconv2_pointwise",
        "block3_shortcut",
        "block4_sepconv2_pointwise",
    }
    assert set(stream.readers) == {
        "block4_sepconv1_depthwise",
        "block5_sepconv1_depthwise",
        "block5_shortcut",
    }


def test_without_shortcuts_nothing_ties_blocks_together() -> None:
    groups = channel_groups(small_graph(variation(residual=False)))
    assert all(len(group.writers) == 1 for group in groups)


def test_an_elu_stops_a_group() -> None:
    graph = small_graph(variation(intermediate_activation="elu"))
    groups = by_tensor(graph)
    assert isinstance(graph.block2_sepconv1_activation, torch.nn.ELU)
    assert not {"block2_sepconv1_depthwise", "block2_sepconv1_activation"} & groups.keys()
    assert "block2_sepconv1_pointwise" in groups


def test_segments_of_several_channels_are_not_read_as_a_group() -> None:
    """A grouped convolution neither mixes all channels nor keeps them apart."""
    graph = small_graph(variation(segments=2))
    read = {reader for group in channel_groups(graph) for reader in group.readers}
    spatial = [name for name in layers(graph) if name.endswith("_depthwise")]
    assert spatial
    assert not read & set(spatial)


@pytest.mark.parametrize("name", ["block2_sepconv1_depthwise", "block2_shortcut", "predictions"])
def test_response_is_what_a_layer_makes_of_a_constant(name: str) -> None:
    layer = layers(small_graph())[name]
    channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
    constant = torch.randn(channels, dtype=torch.float64)
    unpadded = copy.deepcopy(layer).double()
    unpadded.bias = None
    if isinstance(unpadded, torch.nn.Conv2d):
        unpadded.padding = (0, 0)
        ran = unpadded(constant.view(1, -1, 1, 1).expand(1, -1, 5, 5))[0, :, 0, 0]
    else:
        ran = unpadded(constant[None])[0]
    np.testing.assert_allclose(response(layer, constant), ran, rtol=1e-10, atol=1e-12)
