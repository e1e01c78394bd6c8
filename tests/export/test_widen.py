"""Zero channels change no number, and only widths that may change do."""

from __future__ import annotations

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
    run_onnxruntime,
    run_openvino,
    run_torch,
    sizes,
    small_graph,
    sqnr_db,
)
from onnx import numpy_helper
from processor import EXACT_BITS
from torch import fx, nn

from edgexception.architecture import Architecture
from edgexception.export import widen
from edgexception.export.onnx_graph import to_onnx
from edgexception.export.widen import widened
from edgexception.model.graph import inference_graph, layers
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.precision import resolve, with_precision
from edgexception.quantize.simulate import simulate

SIZE = (40, 40)
ODD = Architecture(
    stem=(4, 8), entry=((8, 8), (30, 30)), middle=((30, 30),), exit=(30, 60), tail=(62,), head=(5,)
)
"""30, 60 and 62 are widened to 32 and 64; 4 and 8 would grow by too much."""
RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def shapes(graph: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in layers(graph).items()}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=architectures(),
    size=sizes,
    multiple=st.sampled_from((5, 7, 16)),
    symmetric=st.booleans(),
    dialect=st.sampled_from(sorted(DIALECTS)),
)
def test_zero_channels_change_no_number(
    architecture: Architecture, size: tuple[int, int], multiple: int, symmetric: bool, dialect: str
) -> None:
    graph = inference_graph(random_network(architecture), preprocess_of(size))
    images = random_images(2, size)
    plan = minmax_plan(graph, images, symmetric=symmetric or dialect == "tensorrt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widen, "MOST_ADDED", 100)
        wide, wide_plan = widened(graph, plan, multiple)
    for name, shape in shapes(wide).items():
        if architecture.segments is None and name == "block1_conv2":
            assert shape[0] % multiple == shape[1] % multiple == 0
    expected = run_torch(simulate(graph, plan, DIALECTS[dialect]), images)
    found = run_torch(simulate(wide, wide_plan, DIALECTS[dialect]), images)
    # Integers are equal; an average pool may sum its floats in another order.
    assert sqnr_db(expected, found) >= 100
    assert sqnr_db(run_torch(graph, images), run_torch(wide, images)) >= 100


def test_every_width_that_grows_little_is_widened() -> None:
    graph = small_graph(ODD)
    plan = minmax_plan(graph, random_images(2, SIZE))
    before, wide = shapes(graph), widened(graph, plan, 32)
    found = shapes(wide[0])
    grown = {30: 32, 60: 64, 62: 64}
    assert found == {name: tuple(grown.get(n, n) for n in shape) for name, shape in before.items()}
    assert all(len(grid.scales) == found[name][0] for name, grid in wide[1].weights.items())
    assert shapes(graph) == before
    depthwise = layers(wide[0])["block4_sepconv2_depthwise"]
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (32, 32, 32)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"head": ()}, {62}),  # the features are the network's output
        ({"head": (31,)}, {31}),
        ({"segments": 2}, {30, 60}),
    ],
)
def test_outputs_and_segments_keep_their_channels(
    change: dict[str, object], kept: set[int]
) -> None:
    graph = small_graph(ODD.model_copy(update=change))
    images = random_images(2, SIZE)
    plan = minmax_plan(graph, images)
    wide, _ = widened(graph, plan, 32)
    assert run_torch(wide, images).shape == run_torch(graph, images).shape
    assert kept <= {shape[0] for shape in shapes(wide).values()}


def test_nothing_to_widen_is_the_graph_itself() -> None:
    graph = small_graph()
    plan = minmax_plan(graph, random_images(2, SIZE))
    assert widened(graph, plan, 32) == (graph, plan)
    odd = small_graph(ODD)
    assert widened(odd, plan, 1) == (odd, plan)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "mixed"])
def test_runtimes_execute_widened_networks_as_simulated(dialect: str, kind: str) -> None:
    if dialect == "tensorrt" and kind == "asymmetric":
        pytest.skip("tensorrt has symmetric activations only")
    graph, images = small_graph(ODD), random_images(3, SIZE)
    plan = minmax_plan(graph, images, symmetric=kind != "asymmetric", bits=EXACT_BITS)
    if kind == "mixed":
        plan = with_precision(graph, plan, resolve(graph, {"fp32": ["block3_sepconv1"]}))
    model = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=DIALECTS[dialect])
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    width = {"onnxruntime": 32, "openvino": 32, "tensorrt": 30}[dialect]
    assert weights["block4_sepconv2_depthwise_weight_q"].shape == (width, 1, 3, 3)
    if dialect in RUNTIMES:
        simulated = run_torch(simulate(graph, plan, DIALECTS[dialect]), images)
        assert sqnr_db(simulated, RUNTIMES[dialect](model, images)) >= 40
