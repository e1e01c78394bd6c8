"""The folded inference graph computes the network's logits, over the whole family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from narrow import (
    SMALL,
    architectures,
    preprocess_of,
    random_images,
    random_network,
    run_torch,
    sizes,
    small_graph,
)
from torch import nn

from edgexception.architecture import Architecture
from edgexception.model.graph import INPUT, inference_graph, layers, to_graph_input


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(architecture=architectures(), size=sizes)
def test_the_graph_computes_the_logits_of_the_network(
    architecture: Architecture, size: tuple[int, int]
) -> None:
    network, spec = random_network(architecture), preprocess_of(size)
    images = random_images(2, size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    with torch.no_grad():
        expected = network((pixels - mean) / std).numpy()
    logits = run_torch(inference_graph(network, spec), images)
    assert abs(logits - expected).max() <= 1e-4 * max(1.0, abs(expected).max())


def test_names_are_those_of_the_layers_and_no_normalization_is_left() -> None:
    network = random_network(SMALL)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    graph = inference_graph(network, preprocess_of((40, 40)))
    assert next(iter(graph.graph.nodes)).name == INPUT
    assert "block2_sepconv1_depthwise" in layers(graph)
    assert list(layers(graph))[-1] == "predictions"
    for node in graph.graph.nodes:
        assert node.op != "call_module" or node.target == node.name
    kinds = {type(module) for module in graph.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.Dropout}
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())


def test_every_bias_that_folding_made_belongs_to_a_layer_with_batch_norm() -> None:
    for name, layer in layers(small_graph()).items():
        assert (layer.bias is None) == name.endswith("_depthwise"), name


def test_pixels_enter_as_int8_values() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert to_graph_input(images).flatten().tolist() == [-128.0, 0.0, 127.0]
