"""Which nodes are float16: every way in which one cannot be is found, named, and left alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrow import (
    architectures,
    minmax_plan,
    preprocess_of,
    random_images,
    random_network,
    run_torch,
    small_graph,
    sqnr_db,
)
from torch import fx

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact, EdgexError, UsageError
from edgexception.model.graph import inference_graph, layers, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.half import (
    LEAST_SCALE,
    MARGIN,
    FloatTypes,
    is_half_number,
    peaks_of,
    type_graph,
    with_half_scales,
)
from edgexception.quantize.plan import QuantPlan
from edgexception.quantize.precision import with_precision
from edgexception.quantize.simulate import quantize_weight, simulate, simulate_float

SIZE = (40, 40)
IMAGES = random_images(4, SIZE)
BATCH = to_graph_input(torch.from_numpy(IMAGES))
LAYER = "block2_sepconv1_pointwise"
DEPTHWISE = "block3_sepconv1_depthwise"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def symmetric(graph: fx.GraphModule) -> QuantPlan:
    return minmax_plan(graph, IMAGES, symmetric=True)


def kept(graph: fx.GraphModule, plan: QuantPlan | None = None) -> dict[str, str]:
    return dict(type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH])).kept)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(architecture=architectures(), int8=st.booleans())
def test_a_healthy_network_is_float16_throughout(architecture: Architecture, int8: bool) -> None:
    graph = inference_graph(random_network(architecture), preprocess_of(SIZE))
    plan = symmetric(graph) if int8 else None
    types = type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH]))
    nodes = {node.name for node in graph.graph.nodes if node.op != "output"}
    assert (types.half, types.kept) == (nodes, {})
    if plan is None:
        assert (
            sqnr_db(run_torch(graph, IMAGES), run_torch(simulate_float(graph, types), IMAGES)) > 40
        )


def test_peaks_are_the_largest_values_of_all_batches() -> None:
    graph = small_graph()
    whole, parts = peaks_of(graph, [BATCH]), peaks_of(graph, [BATCH[:3], BATCH[3:]])
    assert whole == pytest.approx(parts)
    assert whole["pixels"] == float(BATCH.abs().max())
    assert whole["predictions"] == pytest.approx(abs(run_torch(graph, IMAGES)).max())


def test_float16_without_images_is_refused() -> None:
    graph = small_graph()
    with pytest.raises(UsageError, match=r"FP16 needs calibration images.*65,504.*--calibration"):
        peaks_of(graph, [])
    with pytest.raises(EdgexError, match="largest values"):
        type_graph(graph, None, "fp16")


def test_a_network_that_overflows_float32_is_refused_by_tensor() -> None:
    graph = small_graph()
    layers(graph)[LAYER].weight.mul_(1e38)
    with pytest.raises(BadArtifact, match=f"image 0: tensor {LAYER} is not finite"):
        peaks_of(graph, [BATCH])


# --- what cannot be float16


def louder(graph: fx.GraphModule, by: float) -> None:
    """Make what a layer writes louder and the next layer's weights quieter: the same network."""
    pointwise, depthwise = layers(graph)[LAYER], layers(graph)["block2_sepconv2_depthwise"]
    pointwise.weight.mul_(by)
    if pointwise.bias is not None:
        pointwise.bias.mul_(by)
    depthwise.weight.div_(by)


@pytest.mark.parametrize("int8", [False, True])
def test_a_tensor_beyond_the_range_keeps_what_writes_and_what_reads_it_in_float32(
    int8: bool,
) -> None:
    graph = small_graph()
    by = 65504 / MARGIN / peaks_of(graph, [BATCH])[LAYER]
    louder(graph, 0.99 * by)
    plan = symmetric(graph) if int8 else None
    assert kept(graph, plan) == {}
    louder(graph, 1.02)
    plan = symmetric(graph) if int8 else None
    found = kept(graph, plan)
    # An INT8 layer reads levels, which float16 holds, and not the tensor itself.
    assert set(found) == {LAYER} if int8 else {LAYER, "block2_sepconv2_depthwise"}
    assert LAYER in found[LAYER]
    assert "65,504" in found[LAYER]
    types = type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH]))
    relu = next(iter(next(n for n in graph.graph.nodes if n.name == LAYER).users)).name
    assert relu not in types.half, "it computes where its producer does"
    expected = run_torch(graph, IMAGES)
    simulated = (
        simulate_float(graph, types)
        if plan is None
        else simulate(graph, plan, DIALECTS["tensorrt"], types)
    )
    assert sqnr_db(expected, run_torch(simulated, IMAGES)) > (15 if int8 else 40)


def test_an_add_beyond_the_range_is_named_itself() -> None:
    graph = small_graph()
    by = 1.02 * 65504 / MARGIN / peaks_of(graph, [BATCH])["block2_add"]
    for name in ("block2_sepconv2_pointwise", "block2_shortcut"):
        layer = layers(graph)[name]
        layer.weight.mul_(by)
        if layer.bias is not None:
            layer.bias.mul_(by)
    found = kept(graph)
    assert "tensor block2_add reaches" in found["block2_add"]
    assert "block2_shortcut" not in found
    assert "tensor block2_add reaches" in found["block3_shortcut"], "it reads it"


def tiny_weights(graph: fx.GraphModule) -> None:
    layers(graph)[LAYER].weight[3] *= 1e-6


def large_weight(graph: fx.GraphModule) -> None:
    layers(graph)["predictions"].weight[0, 0] = 7e4


def large_bias(graph: fx.GraphModule) -> None:
    bias = layers(graph)[LAYER].bias
    assert bias is not None
    bias[2] = -7e4


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("change", "layer", "float_reason", "int8_reason"),
    [
        (tiny_weights, LAYER, "of the weights of channel 3,", "weight scale .* of channel 3 "),
        (large_weight, "predictions", r"its weights reach 7e\+04", r"its weights reach 7e\+04"),
        (large_bias, LAYER, r"its biases reach 7e\+04", r"its biases reach 7e\+04"),
    ],
)
def test_a_layer_whose_numbers_float16_cannot_hold_is_named(
    change: Callable[[fx.GraphModule], None],
    layer: str,
    float_reason: str,
    int8_reason: str,
    int8: bool,
) -> None:
    graph = small_graph()
    change(graph)
    found = kept(graph, symmetric(graph) if int8 else None)
    assert re.search(int8_reason if int8 else float_reason, found[layer])


def test_a_channel_that_reaches_nothing_does_not_count() -> None:
    graph = small_graph()
    layers(graph)[DEPTHWISE].weight[3] = 1e-12
    assert kept(graph) == {}
    assert kept(graph, symmetric(graph)) == {}


def test_a_tensor_that_stays_below_the_normal_numbers_is_named() -> None:
    graph = small_graph()
    layer = layers(graph)[DEPTHWISE]
    layer.weight.mul_(1e-5)
    if layer.bias is not None:
        layer.bias.mul_(1e-5)
    assert "loses bits" in kept(graph)[DEPTHWISE]


def test_a_scale_without_bits_keeps_its_readers_in_float32() -> None:
    graph = small_graph()
    plan = symmetric(graph)
    edge = layers_source(graph, LAYER)
    quiet = plan.activations[edge].model_copy(update={"scale": 3.3e-8})
    plan = plan.model_copy(update={"activations": plan.activations | {edge: quiet}})
    found = kept(graph, plan)
    assert set(found) == {LAYER}
    assert f"3.3e-08 of tensor {edge}" in found[LAYER]
    types = type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH]))
    assert with_half_scales(plan, graph, types).activations[edge].scale == 3.3e-8


def layers_source(graph: fx.GraphModule, layer: str) -> str:
    node = next(n for n in graph.graph.nodes if n.name == layer)
    return str(node.all_input_nodes[0].name)


# --- the plan's own precision


def test_layers_that_the_plan_has_in_fp32_stay_there() -> None:
    graph = small_graph()
    plan = with_precision(graph, symmetric(graph), {LAYER: "fp32", "predictions": "fp16"})
    types = type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH]))
    assert types.kept == {LAYER: "the plan has it in fp32"}
    assert "predictions" in types.half


def test_in_a_float32_graph_only_the_plans_layers_are_float16() -> None:
    graph = small_graph()
    plan = with_precision(graph, symmetric(graph), {LAYER: "fp32", "predictions": "fp16"})
    assert type_graph(graph, plan, "fp32").half == {"predictions"}
    assert type_graph(graph, None, "fp32").half == frozenset()


def test_a_named_layer_that_may_overflow_is_refused() -> None:
    graph = small_graph()
    louder(graph, 65504 / peaks_of(graph, [BATCH])[LAYER])
    plan = with_precision(graph, symmetric(graph), {LAYER: "fp16"})
    fault = rf"layer {LAYER}: tensor {LAYER} reaches .* 65,504.*fp32: "
    with pytest.raises(UsageError, match=fault):
        type_graph(graph, plan, "fp32", peaks_of(graph, [BATCH]))


# --- scales


Typed = tuple[fx.GraphModule, QuantPlan, FloatTypes]


@pytest.fixture(scope="module")
def typed() -> Typed:
    graph = small_graph()
    plan = symmetric(graph)
    types = type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH]))
    return graph, plan, type(types)(types.half | {"predictions"})


@settings(max_examples=200, deadline=None)
@given(scales=st.lists(st.floats(1e-9, 500.0), min_size=5, max_size=5))
def test_weight_scales_are_rounded_up_to_float16(typed: Typed, scales: list[float]) -> None:
    graph, plan, types = typed
    grid = plan.weights["predictions"].model_copy(update={"scales": tuple(scales)})
    plan = plan.model_copy(update={"weights": plan.weights | {"predictions": grid}})
    for before, after in zip(
        scales, with_half_scales(plan, graph, types).weights["predictions"].scales, strict=True
    ):
        assert is_half_number(after)
        assert after >= max(before, LEAST_SCALE)
        below = float(np.nextafter(np.float16(after), np.float16(0)))
        assert after == LEAST_SCALE or below < before


def test_no_weight_clips_on_a_rounded_grid() -> None:
    graph = small_graph()
    plan = symmetric(graph)
    types = type_graph(graph, plan, "fp16", peaks_of(graph, [BATCH]))
    rounded = with_half_scales(plan, graph, types)
    assert rounded != plan
    for name, layer in layers(graph).items():
        weight = layer.weight.detach().flatten(1)
        scales = torch.tensor(rounded.weights[name].scales).view(-1, 1)
        levels = quantize_weight(weight, rounded.weights[name]).float()
        assert float(((weight - levels * scales).abs() / scales).max()) <= 0.5 + 1e-4
    for edge, grid in rounded.activations.items():
        if grid.role == "input":
            assert is_half_number(grid.scale), edge
            assert abs(grid.scale / plan.activations[edge].scale - 1) <= 2**-11
