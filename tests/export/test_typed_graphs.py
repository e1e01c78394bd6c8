"""Typed graphs: what is float16 in them is what was decided, and they compute what is simulated."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
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
    run_literally,
    run_onnxruntime,
    run_torch,
    sizes,
    small_graph,
    sqnr_db,
)
from onnx import TensorProto, numpy_helper
from torch import fx

from edgexception.architecture import Architecture
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph, layers, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.half import (
    FloatTypes,
    is_half_number,
    peaks_of,
    type_graph,
    with_half_scales,
)
from edgexception.quantize.plan import QuantPlan
from edgexception.quantize.precision import resolve, with_precision
from edgexception.quantize.simulate import simulate, simulate_float

TENSORRT = DIALECTS["tensorrt"]
SIZE = (40, 40)
IMAGES = random_images(3, SIZE)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def types_of(graph: fx.GraphModule, plan: QuantPlan | None, images: np.ndarray) -> FloatTypes:
    peaks = peaks_of(graph, [to_graph_input(torch.from_numpy(images))])
    return type_graph(graph, plan, "fp16", peaks)


def kinds_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    ends = (*inferred.graph.value_info, *inferred.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in ends}


def in_powers_of_two(plan: QuantPlan) -> QuantPlan:
    """Return a plan whose scales are powers of two, so that no product with a level rounds."""

    def up(scale: float) -> float:
        return float(2.0 ** np.ceil(np.log2(scale)))

    return plan.model_copy(
        update={
            "activations": {
                name: grid.model_copy(update={"scale": up(grid.scale)})
                for name, grid in plan.activations.items()
            },
            "weights": {
                name: grid.model_copy(update={"scales": tuple(map(up, grid.scales))})
                for name, grid in plan.weights.items()
            },
        }
    )


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(architecture=architectures(), size=sizes)
def test_a_float16_graph_computes_what_is_simulated(
    architecture: Architecture, size: tuple[int, int]
) -> None:
    """Only float32 sums in another order may fall on the other side of a float16 rounding."""
    spec, images = preprocess_of(size), random_images(2, size)
    graph = inference_graph(random_network(architecture), spec)
    types = types_of(graph, None, images)
    model = to_onnx(graph, spec, None, types=types)
    simulated = run_torch(simulate_float(graph, types), images)
    assert sqnr_db(simulated, run_literally(model, images)) > 55
    assert sqnr_db(run_torch(graph, images), simulated) < 100, "nothing was rounded"


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=architectures(),
    size=sizes,
    exceptions=st.sampled_from(({}, {"fp32": ["block*_sepconv1"]}, {"fp16": ["block1_conv*"]})),
    base=st.sampled_from(("fp16", "fp32")),
)
def test_an_int8_graph_in_float16_computes_what_is_simulated(
    architecture: Architecture,
    size: tuple[int, int],
    exceptions: dict[str, list[str]],
    base: str,
) -> None:
    """With scales of powers of two every sum is exact in either arithmetic, and so are levels."""
    spec, images = preprocess_of(size), random_images(2, size)
    graph = inference_graph(random_network(architecture), spec)
    plan = in_powers_of_two(minmax_plan(graph, images, symmetric=True))
    plan = with_precision(graph, plan, resolve(graph, exceptions) if exceptions else {})
    types = types_of(graph, plan, images) if base == "fp16" else type_graph(graph, plan, "fp32")
    model = to_onnx(graph, spec, None, plan=plan, dialect=TENSORRT, types=types)
    simulated = run_torch(simulate(graph, plan, TENSORRT, types), images)
    exact = not exceptions and architecture.intermediate_activation != "elu"
    assert sqnr_db(simulated, run_literally(model, images)) > (90 if exact else 25)


def test_every_tensor_has_the_type_that_was_decided() -> None:
    graph = small_graph()
    plan = minmax_plan(graph, IMAGES, symmetric=True)
    plan = with_precision(graph, plan, {"block2_sepconv1_pointwise": "fp32"})
    for used in (None, plan):
        types = types_of(graph, used, IMAGES)
        dialect = None if used is None else TENSORRT
        model = to_onnx(graph, preprocess_of(SIZE), None, plan=used, dialect=dialect, types=types)
        kinds = kinds_of(model)
        for node in graph.graph.nodes:
            if node.op != "output":
                half = node.name in types.half
                wanted = TensorProto.FLOAT16 if half else TensorProto.FLOAT
                assert kinds[node.name] == wanted, node.name
        assert kinds["logits"] == TensorProto.FLOAT


def test_an_int8_graph_in_float16_holds_nothing_in_float32_that_need_not_be() -> None:
    graph = small_graph()
    plan = minmax_plan(graph, IMAGES, symmetric=True)
    types = types_of(graph, plan, IMAGES)
    model = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=TENSORRT, types=types)
    found = Counter(numpy_helper.to_array(i).dtype for i in model.graph.initializer)
    assert set(found) == {np.dtype(np.float16), np.dtype(np.int8)}
    casts = [n.name for n in model.graph.node if n.op_type == "Cast"]
    assert casts == ["images_float", "logits"]


def test_the_scales_of_a_float16_graph_are_those_that_its_integers_were_made_with() -> None:
    graph = small_graph()
    plan = minmax_plan(graph, IMAGES, symmetric=True)
    types = types_of(graph, plan, IMAGES)
    model = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=TENSORRT, types=types)
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    rounded = with_half_scales(plan, graph, types)
    for name, layer in layers(graph).items():
        scales = values[f"{name}_weight_scale"].astype(np.float64)
        assert np.array_equal(scales, rounded.weights[name].scales)
        integers = values[f"{name}_weight_q"].reshape(len(scales), -1)
        weight = layer.weight.detach().flatten(1).numpy()
        assert np.abs(weight / scales[:, None] - integers).max() <= 0.501
    assert float(values["block1_conv1_act_scale"]) == rounded.activations["block1_conv1_act"].scale


def test_a_float32_layer_among_float16_ones_reads_the_same_levels() -> None:
    """One tensor, read by layers of both types: one grid, dequantized in each."""
    graph = small_graph()
    plan = minmax_plan(graph, IMAGES, symmetric=True)
    types = types_of(graph, plan, IMAGES)
    reader = "block2_shortcut"
    types = FloatTypes(types.half - {reader}, {reader: "a test"})
    model = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=TENSORRT, types=types)
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    (single,) = (n for n in model.graph.node if n.name == "block1_conv2_act_dq_fp32")
    assert values[single.input[1]].dtype == np.float32
    assert is_half_number(float(values[single.input[1]]))
    kinds = kinds_of(model)
    assert kinds[reader] == TensorProto.FLOAT
    assert kinds[f"{reader}_fp16"] == TensorProto.FLOAT16
    simulated = run_torch(simulate(graph, plan, TENSORRT, types), IMAGES)
    assert sqnr_db(simulated, run_literally(model, IMAGES)) > 20


def test_the_photo_is_cast_before_anything_else_reads_it() -> None:
    """TensorRT has uint8 tensors at the ends of a network only."""
    graph = small_graph()
    plan = minmax_plan(graph, IMAGES, symmetric=True)
    for model in (
        to_onnx(graph, preprocess_of(SIZE), None),
        to_onnx(graph, preprocess_of(SIZE), None, types=types_of(graph, None, IMAGES)),
        to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=TENSORRT),
    ):
        (reader,) = (n for n in model.graph.node if "images" in n.input)
        assert reader.op_type == "Cast"


def test_onnxruntime_runs_a_float16_graph_as_it_is() -> None:
    graph = small_graph()
    types = types_of(graph, None, IMAGES)
    model = to_onnx(graph, preprocess_of(SIZE), None, types=types)
    logits = run_torch(graph, IMAGES)
    assert sqnr_db(logits, run_onnxruntime(model, IMAGES, optimize=False)) > 45
