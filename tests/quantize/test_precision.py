"""Mixed plans: what names mean, what runtimes compute, and that they compute it in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    run_onnxruntime,
    run_openvino,
    run_torch,
    sizes,
    small_graph,
    sqnr_db,
)
from onnx import numpy_helper
from torch import fx

from edgexception.agent.runtimes import Options, openvino, ort
from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact, EdgexError, UsageError
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph, layers, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.plan import FloatPrecision, QuantPlan, WeightQuant
from edgexception.quantize.precision import (
    check_fits,
    layers_named,
    resolve,
    units_of,
    with_float_layers,
    with_precision,
)
from edgexception.quantize.simulate import simulate

SIZE = (40, 40)
SPEC = preprocess_of(SIZE)
GRAPH = small_graph()
IMAGES = random_images(3, SIZE)
PLAN = minmax_plan(GRAPH, IMAGES)
SYMMETRIC = minmax_plan(GRAPH, IMAGES, symmetric=True)
RUNTIMES: dict[str, Any] = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def mixed(*names: str, plan: QuantPlan = PLAN, precision: FloatPrecision = "fp32") -> QuantPlan:
    return with_precision(GRAPH, plan, resolve(GRAPH, {precision: names}))


def simulated(plan: QuantPlan, dialect: str, graph: fx.GraphModule = GRAPH) -> np.ndarray:
    return run_torch(simulate(graph, plan, DIALECTS[dialect]), IMAGES)


# --- names


def test_a_name_stands_for_its_layers() -> None:
    sepconv = ("block3_sepconv1_depthwise", "block3_sepconv1_pointwise")
    assert layers_named(GRAPH, "block3_sepconv1") == sepconv
    assert layers_named(GRAPH, "block3_sepconv1_pointwise") == sepconv[1:]
    block = layers_named(GRAPH, "block3")
    assert set(block) == {n for n in layers(GRAPH) if n.startswith("block3_")}
    assert set(layers_named(GRAPH, "*_pointwise")) == {n for n in layers(GRAPH) if "pointw" in n}
    assert layers_named(GRAPH, "predictions") == ("predictions",)
    assert set(layers_named(GRAPH, "*")) == set(layers(GRAPH))


def test_units_cover_every_layer_once_and_in_order() -> None:
    units = units_of(GRAPH)
    assert [layer for names in units.values() for layer in names] == list(layers(GRAPH))
    assert units["block2_sepconv1"] == ("block2_sepconv1_depthwise", "block2_sepconv1_pointwise")
    assert units["block2_shortcut"] == ("block2_shortcut",)


def test_every_unknown_name_is_refused_with_what_is_near() -> None:
    with pytest.raises(UsageError) as error:
        resolve(GRAPH, {"fp32": ["block3_sepcon1", "predictions"], "fp16": ["blok5"]})
    first, second = str(error.value).split("\n")
    assert first.startswith("quantize.precision.fp32: 'block3_sepcon1' is no layer")
    assert "block3_sepconv1" in first.partition("near it are: ")[2]
    assert "quantize.precision.fp16: 'blok5'" in second
    assert "block5" in second


def test_a_layer_with_two_precisions_and_a_network_without_int8_are_refused() -> None:
    with pytest.raises(UsageError, match=r"block3_\w+ is named as fp32 and, .* as fp16"):
        resolve(GRAPH, {"fp32": ["block3"], "fp16": ["block3_sepconv2"]})
    with pytest.raises(UsageError, match="nothing is left in INT8"):
        resolve(GRAPH, {"fp32": ["*"]})


# --- the plan


def test_a_float_layer_has_no_grids_and_its_neighbours_keep_theirs() -> None:
    plan = mixed("block2_sepconv2", "predictions")
    gone = {"block2_sepconv2_depthwise", "block2_sepconv2_pointwise", "predictions"}
    assert set(plan.precision) == gone
    assert set(PLAN.weights) - set(plan.weights) == gone
    # Nobody INT8 reads or writes what is between the two, nor the pooled features.
    assert set(PLAN.activations) - set(plan.activations) == {
        "block2_sepconv2_depthwise",
        "block2_sepconv2_pointwise",
        "avg_pool",
    }
    assert PLAN.activations["block2_sepconv2_act"].role == "input"
    assert plan.activations["block2_sepconv2_act"].role == "output"  # INT8 writes it
    check_fits(GRAPH, plan)
    assert QuantPlan.model_validate_json(plan.to_json()) == plan
    assert PLAN.precision == {}


def test_exceptions_are_added_and_never_taken_back() -> None:
    both = {"predictions": "fp32", "block1_conv1": "fp32"}
    at_once = with_precision(GRAPH, PLAN, both)  # type: ignore[arg-type]
    assert with_precision(GRAPH, mixed("predictions"), both) == at_once  # type: ignore[arg-type]
    with pytest.raises(EdgexError, match="no grids to go back"):
        with_precision(GRAPH, mixed("predictions"), {"block1_conv1": "fp32"})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"precision": {"block9_conv": "fp32"}}, "precision names block9_conv, which is not"),
        ({"precision": {"predictions": "fp32"}}, "predictions is fp32 and has a weight grid"),
        ({"weights": {**PLAN.weights, "prediction": PLAN.weights["predictions"]}}, "is it pred"),
        (
            {"weights": {n: g for n, g in PLAN.weights.items() if n != "predictions"}},
            "layer predictions has no weight grid and is not in `precision`",
        ),
        (
            {"weights": {**PLAN.weights, "predictions": WeightQuant(scales=(1.0, 1.0))}},
            "predictions has 5 output channels and 2 weight scales",
        ),
        (
            {"activations": {n: g for n, g in PLAN.activations.items() if n != "avg_pool"}},
            "tensor avg_pool, which predictions reads, has no input grid",
        ),
        (
            {"activations": {**PLAN.activations, "block2_sum": PLAN.activations["avg_pool"]}},
            "activations names block2_sum, which is not in it",
        ),
    ],
)
@pytest.mark.parametrize("use", ["simulate", "export"])
def test_a_plan_of_another_network_is_refused(change: Any, fault: str, use: str) -> None:
    plan, dialect = PLAN.model_copy(update=change), DIALECTS["openvino"]
    with pytest.raises(BadArtifact, match=f"does not fit the network: .*{fault}.*edgex quantize"):
        _ = (
            simulate(GRAPH, plan, dialect)
            if use == "simulate"
            else to_onnx(GRAPH, SPEC, None, plan=plan, dialect=dialect)
        )


def test_float_layers_get_the_trained_numbers_back() -> None:
    changed = small_graph()
    with torch.no_grad():
        for layer in layers(changed).values():
            layer.weight.mul_(1.5)
    layers(changed)["block2_sepconv1_depthwise"].bias = torch.nn.Parameter(torch.ones(8))
    result = with_float_layers(changed, GRAPH, ["block2_sepconv1_depthwise"])
    layer = layers(result)["block2_sepconv1_depthwise"]
    assert layer.bias is None
    assert torch.equal(layer.weight, layers(GRAPH)["block2_sepconv1_depthwise"].weight)
    assert torch.equal(layers(result)["predictions"].weight, layers(changed)["predictions"].weight)


# --- the numbers


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(architecture=architectures(), size=sizes, symmetric=st.booleans(), data=st.data())
def test_a_runtime_computes_what_a_mixed_simulation_computes(
    runtime: str, architecture: Architecture, size: tuple[int, int], symmetric: bool, data: Any
) -> None:
    """The median image: a float sum in another order may move a level of one, and so its logits.

    7-bit weights: no processor saturates. OpenVINO's ELU is its own.
    """
    spec, images = preprocess_of(size), random_images(3, size)
    graph = inference_graph(random_network(architecture), spec)
    names = data.draw(
        st.lists(st.sampled_from([*layers(graph)]), min_size=1, max_size=6, unique=True)
    )
    plan = with_precision(
        graph,
        minmax_plan(graph, images, symmetric=symmetric, bits=7),
        resolve(graph, {"fp32": names}),
    )
    model = to_onnx(graph, spec, None, plan=plan, dialect=DIALECTS[runtime])
    expected = run_torch(simulate(graph, plan, DIALECTS[runtime]), images)
    executed = RUNTIMES[runtime](model, images)
    elu = architecture.intermediate_activation == "elu" and runtime == "openvino"
    agreements = [sqnr_db(*pair) for pair in zip(expected, executed, strict=True)]
    assert np.median(agreements) > (25 if elu else 60)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_float_layers_bring_the_logits_nearer(dialect: str) -> None:
    exact = run_torch(GRAPH, IMAGES)
    noise = sqnr_db(exact, simulated(SYMMETRIC, dialect))
    some = sqnr_db(exact, simulated(mixed("block[345]", plan=SYMMETRIC), dialect))
    most = mixed("block*", plan=SYMMETRIC)  # all but the classifier
    assert noise < some - 0.5 < sqnr_db(exact, simulated(most, dialect))


@pytest.mark.parametrize("dialect", ["openvino", "tensorrt"])
def test_an_edge_that_only_float_layers_read_is_not_rounded(dialect: str) -> None:
    """With one INT8 layer at the end the noise is that layer's alone."""
    plan = mixed("block*", plan=SYMMETRIC)
    model = to_onnx(GRAPH, SPEC, None, plan=plan, dialect=DIALECTS[dialect])
    assert [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"] == [
        "avg_pool_q"
    ]


# --- float16


def test_a_half_layer_is_half_in_the_graph_and_computes_so() -> None:
    plan = mixed("block2_sepconv1", "predictions", plan=SYMMETRIC, precision="fp16")
    model = to_onnx(GRAPH, SPEC, None, plan=plan, dialect=DIALECTS["tensorrt"])
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for name in plan.precision:
        assert values[f"{name}_weight"].dtype == np.float16
    assert values["predictions_bias"].dtype == np.float16
    shapes = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in shapes.graph.value_info}
    assert kinds["predictions"] == onnx.TensorProto.FLOAT16
    assert kinds["block2_sepconv2_depthwise"] == onnx.TensorProto.FLOAT
    only = mixed("predictions", plan=SYMMETRIC, precision="fp16")
    model = to_onnx(GRAPH, SPEC, None, plan=only, dialect=DIALECTS["tensorrt"])
    expected = simulated(only, "tensorrt")
    assert sqnr_db(expected, run_onnxruntime(model, IMAGES, optimize=False)) > 60
    assert np.array_equal(expected, expected.astype(np.float16).astype(np.float32))


def test_a_half_layer_rounds_where_the_graph_says() -> None:
    """One layer, read where it leaves float16: ONNX Runtime drops the Cast there and back."""
    plan = mixed("block1_conv1", plan=SYMMETRIC, precision="fp16")
    model = to_onnx(GRAPH, SPEC, None, plan=plan, dialect=DIALECTS["tensorrt"])
    half = onnx.helper.make_tensor_value_info("block1_conv1", onnx.TensorProto.FLOAT16, None)
    model.graph.output.insert(0, half)
    executed = run_onnxruntime(model, IMAGES, optimize=False).astype(np.float32)
    network = simulate(GRAPH, plan, DIALECTS["tensorrt"])
    pixels = to_graph_input(torch.from_numpy(IMAGES))
    expected = network.get_submodule("block1_conv1")(pixels).numpy()
    assert np.mean(expected == executed) > 0.99  # the rest: float32 sums in another order
    assert np.allclose(expected, executed, rtol=2**-9)
    assert not np.allclose(expected, layers(GRAPH)["block1_conv1"](pixels).numpy(), rtol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_processors_refuse_float16(runtime: str) -> None:
    plan = mixed("block2_sepconv1", precision="fp16")
    fault = f"{runtime} cannot compute layer block2_sepconv1_depthwise in fp16.*fp32: .*tensorrt"
    with pytest.raises(UsageError, match=fault):
        simulate(GRAPH, plan, DIALECTS[runtime])


def test_weights_beyond_float16_are_refused_by_name() -> None:
    graph = small_graph()
    with torch.no_grad():
        layers(graph)["predictions"].weight[0, 0] = 7e4
    plan = with_precision(graph, SYMMETRIC, {"predictions": "fp16"})
    for use in (
        lambda: simulate(graph, plan, DIALECTS["tensorrt"]),
        lambda: to_onnx(graph, SPEC, None, plan=plan, dialect=DIALECTS["tensorrt"]),
    ):
        with pytest.raises(UsageError, match=r"layer predictions: .* 65,504 of float16"):
            use()


# --- what is executed


@pytest.mark.parametrize("runtime", [ort, openvino], ids=["onnxruntime", "openvino"])
def test_named_layers_run_in_float_and_all_others_in_int8(runtime: Any, tmp_path: Path) -> None:
    dialect = runtime.__name__.rpartition(".")[2].replace("ort", "onnxruntime")
    names = ("block2_sepconv2", "block3_sepconv1_pointwise", "block3_shortcut", "predictions")
    plan = mixed(*names)
    path = tmp_path / "model.onnx"
    onnx.save(to_onnx(GRAPH, SPEC, None, plan=plan, dialect=DIALECTS[dialect]), path)
    found = runtime.build(path, Options(1, 1), tmp_path / "engine")["layers"]
    convolutions = len(layers(GRAPH)) - 1
    assert len(plan.precision) == 5
    if dialect == "onnxruntime":
        floats = sum(n for kind, n in found.items() if kind.rpartition(":")[2] == "Conv")
        integers = found["com.microsoft:QLinearConv"]
        assert (integers, floats) == (convolutions - 4, 4), found
        assert (found["Gemm"], found.get("com.microsoft:QGemm")) == (1, None), found
    else:
        integers = found.get("Convolution u8", 0) + found.get("Convolution i8", 0)
        assert (integers, found["Convolution f32"]) == (convolutions - 4, 4), found
        assert found["FullyConnected f32"] == 1, found
