"""The edges of a plan, on graphs small enough to list them by hand."""

from __future__ import annotations

from narrow import SMALL, small_graph

from edgexception.architecture import Architecture
from edgexception.quantize.edges import input_edges, layer_outputs, output_edges

TINY = Architecture(stem=(4, 8), entry=(), middle=(), exit=(8,), tail=(8,), head=(5, 3))


def test_the_edges_of_a_tiny_network() -> None:
    graph = small_graph(TINY)
    assert input_edges(graph) == {
        "pixels": ["block1_conv1"],
        "block1_conv1_act": ["block1_conv2"],
        "block1_conv2_act": ["block2_sepconv1_depthwise", "block2_shortcut"],
        "block2_sepconv1_depthwise": ["block2_sepconv1_pointwise"],
        "block2_add": ["block3_sepconv1_depthwise"],
        "block3_sepconv1_depthwise": ["block3_sepconv1_pointwise"],
        "avg_pool": ["dense1"],
        "dense1_act": ["predictions"],
    }
    assert output_edges(graph) == [
        "block2_sepconv1_pointwise",  # read by the pool
        "block2_shortcut",  # read by the add
        "block3_sepconv1_act",  # read by the average pool; the ReLU is the pointwise layer's
    ]


def test_a_layer_and_the_relu_that_alone_reads_it_write_one_tensor() -> None:
    outputs = layer_outputs(small_graph(TINY))
    assert outputs["block1_conv1_act"] == "block1_conv1"
    assert "block1_conv1" not in outputs
    assert "predictions" not in outputs  # the logits leave in float


def test_an_elu_is_no_part_of_a_layer() -> None:
    graph = small_graph(TINY.model_copy(update={"intermediate_activation": "elu"}))
    assert "block2_sepconv1_depthwise" in output_edges(graph)
    assert "block2_sepconv1_activation" in input_edges(graph)


def test_a_sum_is_an_edge_only_where_a_layer_reads_it() -> None:
    graph = small_graph(SMALL)
    assert input_edges(graph)["block2_add"] == ["block3_shortcut"]  # the ReLU is an edge itself
    assert "block3_add" not in input_edges(graph)
    assert "block3_add" not in output_edges(graph)
