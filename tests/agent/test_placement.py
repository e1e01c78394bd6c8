"""What an engine runs in which precision: both real runtimes, whole networks and broken ones."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from broken_placement import broken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrow import (
    architectures,
    minmax_plan,
    preprocess_of,
    random_images,
    run_onnxruntime,
    run_openvino,
    sizes,
    small_graph,
    sqnr_db,
)
from processor import EXACT_BITS, VNNI
from tiny_engine import tiny_model

from edgexception.agent.placement import METADATA, Ran, placement
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, openvino, ort
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.cost import macs_of
from edgexception.quantize.dialects import DIALECTS

SIZE = (40, 40)
ADAPTERS: dict[str, Any] = {"onnxruntime": ort, "openvino": openvino}
RUN = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}
PER_TEST = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

torch.set_num_threads(1)


def build(runtime: str, model: onnx.ModelProto, folder: Path, batch: int = 1) -> dict[str, Any]:
    onnx.save(model, folder / "model.onnx")
    record: dict[str, Any] = ADAPTERS[runtime].build(
        folder / "model.onnx", Options(batch, 1), folder / "engine"
    )
    return record


def int8_model(runtime: str) -> onnx.ModelProto:
    graph = small_graph()
    plan = minmax_plan(graph, random_images(2, SIZE), bits=EXACT_BITS)
    return to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=DIALECTS[runtime])


@pytest.mark.parametrize("runtime", ADAPTERS)
@PER_TEST
@given(architectures(), sizes, st.booleans(), st.sampled_from((1, 3)))
def test_every_convolution_of_the_family_runs_as_planned(
    runtime: str, tmp_path: Path, architecture: Any, size: tuple[int, int], int8: bool, batch: int
) -> None:
    """Whatever a runtime renames or fuses, each convolution is found, and none is elsewhere."""
    graph, spec = small_graph(architecture, size), preprocess_of(size)
    plan = minmax_plan(graph, random_images(2, size)) if int8 else None
    dialect = DIALECTS[runtime] if int8 else None
    model = to_onnx(graph, spec, None, plan=plan, dialect=dialect)
    found = build(runtime, model, tmp_path, batch)["placement"]
    if not int8:  # INT8 forms are wider
        assert sum(layer["macs"] for layer in found) == macs_of(graph, spec)
    wanted = "int8" if int8 else "fp32"
    assert {layer["planned"] for layer in found} == {wanted}
    for layer in found:
        told = layer["executed"] is not None or layer["kind"] == "dense"
        assert layer["executed"] in (None, wanted), layer
        assert told, layer


@pytest.mark.parametrize("runtime", ADAPTERS)
def test_a_layer_that_does_not_fuse_is_seen_in_float(runtime: str, tmp_path: Path) -> None:
    model = int8_model(runtime)
    worse, name = broken(model, runtime)
    record = build(runtime, worse, tmp_path)
    wrong = [layer for layer in record["placement"] if layer["executed"] != layer["planned"]]
    assert [(layer["name"], layer["executed"]) for layer in wrong] == [(name, "fp32")]
    # Neither numbers nor names tell: the graph computes what the whole one does.
    images = random_images(1, SIZE)
    assert sqnr_db(RUN[runtime](model, images), RUN[runtime](worse, images)) > 25


@pytest.mark.parametrize("runtime", ADAPTERS)
def test_conversions_are_counted(runtime: str, tmp_path: Path) -> None:
    whole = build(runtime, int8_model(runtime), tmp_path)
    engine = tmp_path / "engine"
    if runtime == "onnxruntime":
        kinds = [node.op_type for node in onnx.load(engine).graph.node]
        assert whole["conversions"]["quantize"] == kinds.count("QuantizeLinear") > 0
        assert whole["conversions"]["dequantize"] == kinds.count("DequantizeLinear") > 0
        assert whole["conversions"]["reorder"] == kinds.count("Transpose")
    else:
        # Without VNNI OpenVINO quantizes nowhere but in its layers.
        assert whole["conversions"].get("quantize", 0) >= VNNI
        assert whole["conversions"]["reorder"] >= 1
    assert set(whole["conversions"]) <= {"quantize", "dequantize", "reorder", "cast"}


@pytest.mark.parametrize("runtime", ADAPTERS)
def test_a_file_that_says_nothing_of_its_layers_has_none(runtime: str, tmp_path: Path) -> None:
    assert build(runtime, tiny_model(), tmp_path)["placement"] == []


# --- the file and the names -----------------------------------------------------------------------


def planned(path: Path, text: str) -> Path:
    model = tiny_model()
    model.graph.node[2].name = "conv"
    model.graph.node.insert(3, onnx.helper.make_node("Relu", ["features"], ["act"], name="act"))
    model.graph.node[4].input[0] = "act"
    onnx.helper.set_model_props(model, {"other": "x", METADATA: text})
    onnx.save(model, path)
    return path


PLAN = json.dumps({"conv": {"precision": "int8", "macs": 10}})


@pytest.mark.parametrize(
    ("ran", "executed"),
    [
        ([], None),
        ([Ran(("conv",), "int8", "k")], "int8"),
        ([Ran(("act",), "fp16", "k")], "fp16"),
        ([Ran(("other",), "int8", "k")], None),
        ([Ran(("conv",), None, "k")], None),
        ([Ran(("conv",), "int8", "a"), Ran(("conv", "act"), "fp32", "b")], "fp32"),
        ([Ran(("conv",), "int8", "a"), Ran(("conv",), None, "b")], None),
    ],
)
def test_kernels_are_led_back_to_their_layer(
    ran: list[Ran], executed: str | None, tmp_path: Path
) -> None:
    (layer,) = placement(planned(tmp_path / "m.onnx", PLAN), ran)
    assert (layer["name"], layer["kind"], layer["macs"]) == ("conv", "convolution", 10)
    assert (layer["planned"], layer["executed"]) == ("int8", executed)


BROKEN = [
    "{",
    "[]",
    "[" * 100_000,
    '{"conv": 1}',
    '{"conv": {"precision": "int4", "macs": 1}}',
    '{"conv": {"precision": "int8", "macs": -1}}',
    '{"conv": {"precision": "int8", "macs": true}}',
    '{"conv": {"precision": "int8"}}',
    '{"conv": {"precision": [], "macs": 1}}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_plan_in_a_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"m\.onnx: its metadata edgexception\.layers is broken"):
        placement(planned(tmp_path / "m.onnx", text), [])


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda x: st.lists(x) | st.dictionaries(st.text(), x)))  # fmt: skip
def test_any_json_is_a_plan_or_refused(tmp_path_factory: Any, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    with contextlib.suppress(AgentError):  # any other error fails
        assert placement(planned(path, json.dumps(content)), []) == []


def test_the_layers_of_an_export_are_those_of_the_plan() -> None:
    model = int8_model("onnxruntime")
    (text,) = [prop.value for prop in model.metadata_props if prop.key == METADATA]
    layers = json.loads(text)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert {facts["precision"] for facts in layers.values()} == {"int8"}
    assert set(layers) == {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm")}
    # 40 pixels, a 3x3 stride 2 "valid" convolution: 19 x 19 outputs.
    assert layers["block1_conv1"]["macs"] == 19 * 19 * np.prod(
        weights["block1_conv1_weight_q"].shape
    )
