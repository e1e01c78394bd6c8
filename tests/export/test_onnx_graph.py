"""The written ONNX: valid, what torch computes, and with everything a device must know."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from narrow import (
    SMALL,
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
)
from onnx import numpy_helper

from edgexception.architecture import Architecture
from edgexception.errors import EdgexError, UsageError
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph
from edgexception.preprocess import Preprocess
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.plan import Provenance

SIZE = (40, 40)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(architecture=architectures(), size=sizes)
def test_both_runtimes_compute_the_float_logits(
    architecture: Architecture, size: tuple[int, int]
) -> None:
    spec, images = preprocess_of(size), random_images(2, size)
    graph = inference_graph(random_network(architecture), spec)
    expected = run_torch(graph, images)
    model = to_onnx(graph, spec, None)
    for run in (run_onnxruntime, run_openvino):
        difference = abs(run(model, images) - expected).max()
        assert difference <= 1e-4 * max(1.0, abs(expected).max()), run


def quantized(dialect: str, *, symmetric: bool = True, batch: int | None = None) -> onnx.ModelProto:
    graph, images = small_graph(), random_images(2, SIZE)
    plan = minmax_plan(graph, images, symmetric=symmetric)
    classes = ["a", "b", "c", "d", "ö"]
    return to_onnx(
        graph, preprocess_of(SIZE), classes, plan=plan, dialect=DIALECTS[dialect], batch=batch
    )


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def test_input_and_output_are_photos_and_logits() -> None:
    model = to_onnx(small_graph(), preprocess_of(SIZE), None)
    (images,), (logits,) = model.graph.input, model.graph.output
    dims = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, dims) == ("images", ["batch", 40, 40, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim]
    assert (logits.name, dims) == ("logits", ["batch", 5])


@pytest.mark.parametrize("dialect", [None, *DIALECTS])
def test_an_open_batch_takes_any_size_and_a_fixed_one_only_its_own(dialect: str | None) -> None:
    images = random_images(3, SIZE)
    if dialect is None:
        models = [to_onnx(small_graph(), preprocess_of(SIZE), None, batch=b) for b in (None, 3)]
    else:
        models = [quantized(dialect, batch=b) for b in (None, 3)]
    whole = run_onnxruntime(models[0], images)
    assert np.allclose(run_onnxruntime(models[0], images[:1]), whole[:1], atol=1e-5)
    assert np.allclose(run_onnxruntime(models[1], images), whole, atol=1e-5)
    with pytest.raises(Exception, match="Got: 1 Expected: 3"):
        run_onnxruntime(models[1], images[:1])


def test_everything_a_device_must_know_is_in_the_metadata() -> None:
    spec, model = preprocess_of(SIZE), quantized("onnxruntime")
    props = {p.key: p.value for p in model.metadata_props}
    assert Preprocess.model_validate_json(props["edgexception.preprocess"]) == spec
    assert json.loads(props["edgexception.classes"]) == ["a", "b", "c", "d", "ö"]
    assert props["edgexception.dialect"] == "onnxruntime"
    assert Provenance.model_validate_json(props["edgexception.quantization"]).images == 2
    plain = {p.key for p in to_onnx(small_graph(), spec, None).metadata_props}
    assert plain == {"edgexception.preprocess", "edgexception.layers"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weights_are_stored_as_int8_and_nothing_else_is_large(dialect: str) -> None:
    values = constants(quantized(dialect))
    weights = [v for name, v in values.items() if name.endswith("_weight_q")]
    assert len(weights) == len([n for n in values if n.endswith("_weight_scale")]) > 10
    assert all(w.dtype == np.int8 and abs(w.astype(int)).max() == 127 for w in weights)
    assert max(v.size for v in values.values() if v.dtype == np.float32) <= 24


def test_onnxruntime_has_uint8_activations_and_int32_biases() -> None:
    model = quantized("onnxruntime")
    values = constants(model)
    zeros = [values[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {z.dtype for z in zeros} == {np.dtype(np.uint8)}
    biases = [v for name, v in values.items() if name.endswith("_bias_q")]
    assert biases
    assert all(b.dtype == np.int32 for b in biases)
    assert not [name for name in values if name.endswith("_bias")]


def test_tensorrt_has_int8_without_zero_points_and_float_biases() -> None:
    model = quantized("tensorrt")
    values = constants(model)
    for name, value in values.items():
        if name.endswith("_zero_point"):
            assert value.dtype == np.int8, name
            assert not value.any(), name
    assert values["block1_conv1_bias"].dtype == np.float32
    assert not [name for name in values if name.endswith("_bias_q")]


def test_tensorrt_refuses_zero_points() -> None:
    with pytest.raises(UsageError, match=r"tensorrt needs int8 .* uint8 with zero point"):
        quantized("tensorrt", symmetric=False)


def test_onnxruntime_computes_every_layer_in_int8(tmp_path: Any) -> None:
    model = quantized("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    layers = Counter(n.op_type for n in model.graph.node)
    assert kinds["QLinearConv"] == layers["Conv"] > 10
    assert kinds["QGemm"] == layers["Gemm"] == 1
    assert not kinds["Conv"] + kinds["FusedConv"] + kinds["Gemm"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_openvino_computes_every_layer_in_int8(symmetric: bool) -> None:
    core = openvino.Core()
    network = core.read_model(quantized("openvino", symmetric=symmetric).SerializeToString())
    network.reshape([1, *SIZE, 3])
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    precisions = [
        info["runtimePrecision"].value
        for info in found
        if info["layerType"].value in ("Convolution", "FullyConnected")
    ]
    assert len(precisions) > 10
    assert set(precisions) <= {"u8", "i8"}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dialect", ["onnxruntime", "openvino"])
def test_quantized_models_load_optimized_in_onnxruntime(dialect: str, symmetric: bool) -> None:
    logits = run_onnxruntime(quantized(dialect, symmetric=symmetric), random_images(1, SIZE))
    assert np.isfinite(logits).all()


def test_a_plan_and_a_dialect_come_together() -> None:
    with pytest.raises(EdgexError, match="a plan needs a dialect"):
        to_onnx(small_graph(), preprocess_of(SIZE), None, dialect=DIALECTS["openvino"])


def test_a_dead_channel_is_written_and_computed() -> None:
    network = random_network(SMALL)
    with torch.no_grad():
        network.block2_sepconv1.pointwise.weight[3] = 0.0
        network.block2_sepconv1_bn.bias[3] = 0.0
        network.block2_sepconv1_bn.running_mean[3] = 0.0
    spec, images = preprocess_of(SIZE), random_images(2, SIZE)
    graph = inference_graph(network, spec)
    plan = minmax_plan(graph, images)
    model = to_onnx(graph, spec, None, plan=plan, dialect=DIALECTS["onnxruntime"])
    assert np.isfinite(run_onnxruntime(model, images)).all()
