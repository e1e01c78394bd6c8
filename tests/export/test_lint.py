"""The linter takes what we write, and names the layer of every graph that is written wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
    small_graph,
)
from onnx import TensorProto, helper, numpy_helper

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact
from edgexception.export.lint import check_typed, faults
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph, layers, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.half import peaks_of, type_graph
from edgexception.quantize.precision import resolve, with_precision

SIZE = (40, 40)
IMAGES = random_images(2, SIZE)
PIXELS = to_graph_input(torch.from_numpy(IMAGES))
GRAPH = small_graph()
PLAN = minmax_plan(GRAPH, IMAGES, symmetric=True)
LAYER = "block2_sepconv1_pointwise"


def written(base: str = "fp16", dialect: str = "tensorrt") -> onnx.ModelProto:
    types = None
    if base == "fp16":
        types = type_graph(GRAPH, PLAN, "fp16", peaks_of(GRAPH, [PIXELS]))
    plan = PLAN if dialect == "tensorrt" else minmax_plan(GRAPH, IMAGES)
    return to_onnx(
        GRAPH, preprocess_of(SIZE), None, plan=plan, dialect=DIALECTS[dialect], types=types
    )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=architectures(),
    int8=st.booleans(),
    half=st.booleans(),
    named=st.sampled_from(({}, {"fp32": ["block*_sepconv1"]}, {"fp16": ["block1_conv*"]})),
)
def test_every_form_that_we_write_is_taken(
    architecture: Architecture, int8: bool, half: bool, named: dict[str, list[str]]
) -> None:
    graph = inference_graph(random_network(architecture), preprocess_of(SIZE))
    plan = minmax_plan(graph, IMAGES, symmetric=True) if int8 else None
    if plan is not None and named:
        plan = with_precision(graph, plan, resolve(graph, named))
    peaks = peaks_of(graph, [PIXELS])
    types = type_graph(graph, plan, "fp16" if half else "fp32", peaks)
    dialect = DIALECTS["tensorrt"] if int8 else None
    model = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=dialect, types=types)
    assert faults(model) == []
    float_head = bool(architecture.head) and not half
    assert bool(faults(model, 75)) == float_head
    assert faults(model, 89) == []


def test_graphs_for_other_runtimes_are_refused() -> None:
    found = "\n".join(faults(written("fp32", "onnxruntime")))
    assert f"layer {LAYER}_bias (DequantizeLinear): dequantizes int32, a quantized bias" in found
    assert "has uint8 levels" in found
    assert "zero point 128" in found


# --- graphs that are written wrongly on purpose


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def constant(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], object]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.array(change(value(tensor))), name))
            return
    raise AssertionError(name)


def value(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor).copy()


def int32_bias(model: onnx.ModelProto) -> None:
    bias = np.zeros(8, np.int32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "integers"))
    read = helper.make_node(
        "DequantizeLinear", ["integers", f"{LAYER}_weight_scale"], ["bias"], name="bias", axis=0
    )
    place = list(model.graph.node).index(node(model, LAYER))
    model.graph.node.insert(place, read)
    node(model, LAYER).input[2] = "bias"


def float_weights(model: onnx.ModelProto) -> None:
    weight = np.ones((8, 8, 1, 1), np.float16)
    model.graph.initializer.append(numpy_helper.from_array(weight, "floats"))
    names = ["floats", f"{LAYER}_weight_scale", f"{LAYER}_weight_zero_point"]
    quantize = helper.make_node("QuantizeLinear", names, ["levels"], name="levels", axis=0)
    model.graph.node.insert(0, quantize)
    node(model, f"{LAYER}_weight").input[0] = "levels"


def zero_point(model: onnx.ModelProto) -> None:
    constant(model, "block2_sepconv2_act_zero_point", lambda _: np.int8(-5))


def uint8_levels(model: onnx.ModelProto) -> None:
    constant(model, "block2_sepconv2_act_zero_point", lambda _: np.uint8(0))


def no_zero_point(model: onnx.ModelProto) -> None:
    del node(model, "block2_sepconv2_act_q").input[2]


def zero_scale(model: onnx.ModelProto) -> None:
    constant(model, f"{LAYER}_weight_scale", lambda s: np.where(np.arange(len(s)) == 2, 0, s))
    constant(model, f"{LAYER}_weight_scale", lambda s: s.astype(np.float16))


def infinite_scale(model: onnx.ModelProto) -> None:
    constant(model, "block2_sepconv2_act_scale", lambda s: np.float16(np.inf))


def scales_per_channel(model: onnx.ModelProto) -> None:
    constant(model, "block2_sepconv2_act_scale", lambda s: np.full(8, s))


def one_zero_point(model: onnx.ModelProto) -> None:
    constant(model, f"{LAYER}_weight_zero_point", lambda _: np.int8(0))


def scales_along_inputs(model: onnx.ModelProto) -> None:
    (axis,) = node(model, f"{LAYER}_weight").attribute
    axis.i = 1


def too_few_scales(model: onnx.ModelProto) -> None:
    constant(model, f"{LAYER}_weight_scale", lambda s: s[:3])


def computed_scale(model: onnx.ModelProto) -> None:
    node(model, "block2_sepconv2_act_q").input[1] = "block1_conv1"


def mixed_add(model: onnx.ModelProto) -> None:
    cast = helper.make_node(
        "Cast", ["block2_shortcut"], ["wide"], name="wide", to=TensorProto.FLOAT
    )
    place = list(model.graph.node).index(node(model, "block2_add"))
    model.graph.node.insert(place, cast)
    node(model, "block2_add").input[1] = "wide"


def float32_bias(model: onnx.ModelProto) -> None:
    constant(model, f"{LAYER}_bias", lambda b: b.astype(np.float32))


def transposed_pixels(model: onnx.ModelProto) -> None:
    node(model, "images_nchw").input[0] = "images"
    node(model, "images_nchw").output[0] = "turned"
    node(model, "images_float").input[0] = "turned"


WRONG = {
    int32_bias: ("layer bias (DequantizeLinear): dequantizes int32", "write biases in float"),
    float_weights: ("layer levels (QuantizeLinear): quantizes the float constant floats", "alone"),
    zero_point: (
        "layer block2_sepconv2_act_q (QuantizeLinear): has the zero point -5",
        "symmetric",
    ),
    uint8_levels: ("layer block2_sepconv2_act_q (QuantizeLinear): has uint8 levels", "int8"),
    no_zero_point: ("layer block2_sepconv2_act_q (QuantizeLinear): has uint8 levels", "int8"),
    zero_scale: (f"layer {LAYER}_weight (DequantizeLinear): has the scale 0", "positive"),
    infinite_scale: ("layer block2_sepconv2_act_q (QuantizeLinear): has the scale inf", "finite"),
    scales_per_channel: ("layer block2_sepconv2_act_q (QuantizeLinear): has 8 scales", "one"),
    scales_along_inputs: (f"layer {LAYER} (Conv): has 8 weight scales along axis 1", "axis 0"),
    too_few_scales: (f"layer {LAYER} (Conv): has 3 weight scales along axis 0", "8 output"),
    one_zero_point: (f"layer {LAYER}_weight (DequantizeLinear): has 8 scales and 1 zero", "one"),
    computed_scale: ("layer block2_sepconv2_act_q (QuantizeLinear): has a scale", "no constant"),
    mixed_add: ("layer block2_add (Add): has operands of types float16 and float32", "cast them"),
    float32_bias: (f"layer {LAYER} (Conv): has operands of types float16 and float32", "cast"),
    transposed_pixels: ("layer images_nchw (Transpose): reads uint8 pixels", "cast them first"),
}


@pytest.mark.parametrize("mistake", WRONG, ids=lambda mistake: mistake.__name__)
def test_a_wrong_graph_is_refused_by_layer(
    mistake: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    model = written()
    assert faults(model) == []
    mistake(model)
    reason, remedy = WRONG[mistake]
    path = tmp_path / "wrong.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadArtifact) as refused:
        check_typed(path)
    assert reason in str(refused.value)
    assert remedy in str(refused.value)
    assert str(refused.value).startswith("wrong.onnx: ")


def test_a_float32_product_is_refused_for_turing_alone(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    for model in (to_onnx(GRAPH, preprocess_of(SIZE), None), written("fp32")):
        path.write_bytes(model.SerializeToString())
        check_typed(path, 89)
        fault = r"layer predictions \(Gemm\): is a float32 matrix product.*SM75.*int8-fp16"
        with pytest.raises(BadArtifact, match=fault):
            check_typed(path, 75)
    path.write_bytes(written().SerializeToString())
    check_typed(path, 75)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_zero_point_but_zero_is_found_wherever_it_is(data: st.DataObject) -> None:
    model = written("fp32")
    names = [i.name for i in model.graph.initializer if i.name.endswith("_zero_point")]
    name = data.draw(st.sampled_from(names))
    zero = data.draw(st.integers(-128, 127).filter(bool))
    constant(model, name, lambda old: np.full(old.shape, zero, np.int8))
    found = faults(model)
    assert found
    assert all(f"zero point {zero}" in fault for fault in found)
    readers = {n.name for n in model.graph.node if name in n.input}
    assert {fault.split()[1] for fault in found} == readers


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_constant_of_another_type_is_found(data: st.DataObject) -> None:
    model = written()
    floats = [i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT16]
    # A DequantizeLinear writes the type of its scale: then its reader has mixed operands.
    name = data.draw(st.sampled_from([i.name for i in floats]))
    constant(model, name, lambda old: old.astype(np.float32))
    assert faults(model), name


def test_more_faults_than_a_message_holds_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(written("fp32", "onnxruntime").SerializeToString())
    with pytest.raises(BadArtifact, match=r"; and \d+ more$"):
        check_typed(path)


@pytest.mark.parametrize("content", [b"", b"not an ONNX file at all", b"\x00" * 64])
def test_what_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    for broken in (path, tmp_path / "missing.onnx"):
        with pytest.raises(BadArtifact, match="cannot be read as ONNX"):
            check_typed(broken)


def test_numbers_outside_of_the_file_are_refused_unread(tmp_path: Path) -> None:
    model = written()
    for tensor in model.graph.initializer:
        if tensor.name == f"{LAYER}_weight_scale":
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../../etc/passwd")
    path = tmp_path / "outside.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadArtifact, match=f"constant {LAYER}_weight_scale: is kept outside"):
        check_typed(path)


def test_weights_with_one_scale_are_legal() -> None:
    model = written()
    for name in layers(GRAPH):
        constant(model, f"{name}_weight_scale", lambda s: s.max())
        constant(model, f"{name}_weight_zero_point", lambda z: np.int8(0))
    assert faults(model) == []
