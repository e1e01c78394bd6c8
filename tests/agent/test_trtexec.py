"""What trtexec writes: the vendor's own recordings, our layers in its formats, and garbage."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import tiny_model

from edgexception.agent.placement import METADATA
from edgexception.agent.protocol import AgentError
from edgexception.agent.trtexec import (
    Layer,
    conversions,
    counts,
    layer_placement,
    parse_layers,
    parse_log,
    parse_profile,
    parse_times,
)

RECORDED = json.loads(Path(__file__).with_name("trtexec_recorded.json").read_text())


# --- recordings of the vendor ---------------------------------------------------------------------


def test_recorded_layers_of_an_int8_mobilenet() -> None:
    layers = parse_layers(json.dumps(RECORDED["layers"]))
    assert Counter(layer.kind for layer in layers) == {
        "Reformat": 2,
        "CaskConvolution": 3,
        "CudaDepthwiseConvolution": 1,
        "TiledPooling": 1,
    }
    by_kind = {layer.kind: layer for layer in layers[::-1]}
    first = by_kind["CaskConvolution"]
    assert first.nodes == ("features.0.0.weight", "QuantizeLinear_7", "Conv_9", "Clip_13")
    assert (first.read, first.weights, first.written) == ("int8", "int8", "int8")
    assert first.tactic.startswith("volta_int8x4_icudnn")
    assert conversions(layers) == {"quantize": 1, "reorder": 1}
    # One writes float32, and still computes in INT8.
    assert {layer.written for layer in layers if layer.weights} == {"int8", "fp32"}
    assert counts(layers) == {
        "CaskConvolution int8": 3,
        "CudaDepthwiseConvolution int8": 1,
        "Reformat fp16": 1,
        "Reformat fp32": 1,
        "TiledPooling fp16": 1,
    }


def test_recorded_profile_and_times() -> None:
    profile = parse_profile(json.dumps(RECORDED["profile"]))
    names = [layer["Name"] for layer in RECORDED["layers"]["Layers"]]
    assert [layer.name for layer in profile] == names[:3]
    assert profile[0].average_ms == RECORDED["profile"][1]["averageMs"]
    times = parse_times(json.dumps(RECORDED["times"]))
    assert [entry["latencyMs"] for entry in times] == [0.484512, 0.4704, 0.474944]
    assert all(entry["h2dMs"] == 0 for entry in times), "recorded without transfers"


# --- our layers in the formats of 10 and 11 -------------------------------------------------------


def layer(name: str, kind: str, read: str, weights: str | None, nodes: str, version: int) -> Any:
    tensor: dict[str, Any] = {"Name": f"{name}_in", "Dimensions": [1, 8, 9, 9]}
    if version == 10:
        tensor["Format/Datatype"] = f"Thirty-two wide channel vectorized row major {read} format"
    else:
        tensor |= {"Format": "Thirty-two wide channel vectorized", "DataType": read}
    entry = {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor]}
    if weights:
        entry["Weights"] = {"Type": weights, "Count": 1}
    if nodes:
        entry["Metadata"] = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return entry


def planned(path: Path) -> Path:
    """A model with a convolution `conv`, its ReLU `act`, and a dense layer that is not there."""
    model = tiny_model()
    model.graph.node[2].name = "conv"
    model.graph.node.insert(3, onnx.helper.make_node("Relu", ["features"], ["act"], name="act"))
    model.graph.node[4].input[0] = "act"
    plan = {name: {"precision": "int8", "macs": 10} for name in ("conv", "dense")}
    onnx.helper.set_model_props(model, {METADATA: json.dumps(plan)})
    onnx.save(model, path)
    return path


CASES: dict[str, tuple[list[tuple[str, str, str, str | None, str]], str | None]] = {
    "fused": ([("conv + act", "CaskConvolution", "Int8", "Int8", "")], "int8"),
    "by its nodes": ([("__myl_ConvRelu", "fusion", "Int8", None, "conv_q conv act")], "int8"),
    "weights alone in INT8": ([("conv", "CaskConvolution", "FP16", "Int8", "")], "fp16"),
    "in float16": ([("conv", "CaskConvolution", "FP16", "Half", "")], "fp16"),
    "in float32": ([("conv", "CaskConvolution", "FP32", "Float", "")], "fp32"),
    "side by side": ([("conv + act || other", "CaskConvolution", "Int8", "Int8", "")], "int8"),
    "with a copy before it": (
        [
            ("Reformatting CopyNode for Input Tensor 0 to conv", "Reformat", "FP32", None, ""),
            ("conv", "CaskConvolution", "Int8", "Int8", ""),
        ],
        "int8",
    ),
    "with its ReLU alone": (
        [
            ("conv", "CaskConvolution", "Int8", "Int8", "conv"),
            ("PWN(act)", "PointWiseV2", "FP32", None, "act"),
        ],
        "int8",
    ),
    "with what follows it generated": (
        [
            ("conv", "CaskConvolution", "Int8", "Int8", "conv"),
            ("__myl_Relu", "kgen", "Half", None, "conv act"),
        ],
        "int8",
    ),
    "generated alone": ([("__myl_Conv", "kgen", "Half", None, "conv act")], "fp16"),
    "in a type that is not known": ([("conv", "CaskConvolution", "FP4", None, "")], None),
    "without details": ([], None),
}


@pytest.mark.parametrize("version", [10, 11])
@pytest.mark.parametrize("case", CASES)
def test_what_ran_is_led_back_to_the_layer(case: str, version: int, tmp_path: Path) -> None:
    entries, executed = CASES[case]
    document = {"Layers": [layer(*entry, version) for entry in entries] or ["conv + act"]}
    found = parse_layers(json.dumps(document))
    rows = layer_placement(planned(tmp_path / "m.onnx"), found)
    assert [(row["name"], row["executed"]) for row in rows] == [("conv", executed), ("dense", None)]


@pytest.mark.parametrize(
    ("read", "written", "what"),
    [
        ("FP32", "Int8", "quantize"),
        ("Int8", "Half", "dequantize"),
        ("Half", "Float", "cast"),
        ("FP16", "Half", "reorder"),
    ],
)
def test_conversions_are_told_apart(read: str, written: str, what: str) -> None:
    entry = layer("x", "Reformat", read, None, "", 11)
    entry["Outputs"] = [{"Name": "y", "DataType": written}]
    assert conversions(parse_layers(json.dumps({"Layers": [entry]}))) == {what: 1}


def test_an_engine_without_details_has_names_only() -> None:
    found = parse_layers('{"Layers": ["a + b", "c"], "Bindings": ["images"]}')
    assert found == [Layer("a + b"), Layer("c")]
    assert counts(found) == {}


# --- logs -----------------------------------------------------------------------------------------

LOG = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # trtexec --onnx=model.onnx --useDLACore=0
[11/25/2026-10:00:00] [I] === Device Information ===
[11/25/2026-10:00:00] [I] Selected Device: Orin
[11/25/2026-10:00:00] [I] Compute Capability: 8.7
[11/25/2026-10:00:01] [W] [TRT] Layer 'images_nchw' (SHUFFLE): Unsupported on DLA. Switching this layer's device type to GPU.
[11/25/2026-10:00:01] [W] [TRT] Default DLA is enabled but layer logits is not supported on DLA, falling back to GPU.
[11/25/2026-10:00:09] [I] Engine built in 8.5 sec.
&&&& PASSED TensorRT.trtexec [TensorRT v101303] [b9] # trtexec --onnx=model.onnx --useDLACore=0
"""  # noqa: E501 - lines as trtexec writes them


def test_a_log_tells_version_device_and_end() -> None:
    log = parse_log(LOG)
    assert (log.version, log.passed) == ("10.13.3.9", True)
    assert (log.device, log.sm, log.build_s) == ("Orin", 87, 8.5)
    assert log.dla_fallbacks == ("images_nchw", "logits")
    assert log.errors == ()


def test_recorded_logs_of_an_orin() -> None:
    (newer, older) = (parse_log("\n".join(lines)) for lines in RECORDED["logs"].values())
    assert (newer.device, newer.sm, newer.version) == ("Orin", 87, None)
    assert (older.version, older.passed, older.errors) == ("10.3.0", None, ())


def test_a_log_tells_the_inferences_before_those_that_count() -> None:
    line = "[11/25/2026-10:00:09] [I] Warmup completed 271 queries over 200 ms\n"
    assert parse_log(LOG + line).warm_up == 271
    assert parse_log(LOG).warm_up is None


def test_a_log_of_a_failure_has_its_errors() -> None:
    log = parse_log(
        "&&&& RUNNING TensorRT.trtexec [TensorRT v110400] # trtexec --onnx=x\n"
        "[11/25/2026-10:00:00] [E] Model missing or format not recognized\n"
        "&&&& FAILED TensorRT.trtexec [TensorRT v110400] # trtexec --onnx=x\n"
    )
    assert (log.version, log.passed) == ("11.4.0", False)
    assert log.errors == ("Model missing or format not recognized",)


def test_a_log_that_was_cut_off_has_no_end() -> None:
    assert parse_log(LOG.partition("&&&& PASSED")[0]).passed is None


# --- garbage --------------------------------------------------------------------------------------

PARSERS: tuple[Callable[[str], Any], ...] = (parse_times, parse_profile, parse_layers)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ("Layers", "Name", "Inputs", "Outputs", "Weights", "Type", "DataType", "Metadata",
                 "LayerType", "name", "averageMs", "medianMs", "latencyMs", "computeMs", "count")
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused(content: Any) -> None:
    for parse in PARSERS:
        with contextlib.suppress(AgentError):  # any other error fails
            found = parse(json.dumps(content))
            if parse is parse_layers:
                assert sum(counts(found).values()) <= len(found)
                assert sum(conversions(found).values()) <= len(found)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("[{&0.v]b: \n\\'DLA", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in PARSERS:
        with contextlib.suppress(AgentError):
            parse(text)
    assert parse_log(text + LOG).dla_fallbacks[-2:] == ("images_nchw", "logits")


BROKEN = [
    (parse_times, "[]"),
    (parse_times, "{}"),
    (parse_times, '[{"latencyMs": -1, "computeMs": 1}]'),
    (parse_times, '[{"latencyMs": NaN, "computeMs": 1}]'),
    (parse_times, '[{"latencyMs": true, "computeMs": 1}]'),
    (parse_times, f'[{{"latencyMs": {10**400}, "computeMs": 1}}]'),
    (parse_times, '[{"latencyMs": 1}]'),
    (parse_times, "[" * 100_000),
    (parse_profile, "[]"),
    (parse_profile, '[{"count": 1}, {"name": "a", "averageMs": nan, "medianMs": 1}]'),
    (parse_profile, '[{"count": 1}, {"name": "a", "averageMs": 1e400, "medianMs": 1}]'),
    (parse_profile, '[{"count": 1}, {"name": 5, "averageMs": 1, "medianMs": 1}]'),
    (parse_layers, "[]"),
    (parse_layers, '{"Layers": {}}'),
    (parse_layers, '{"Layers": [{"LayerType": "x"}]}'),
    (parse_layers, ""),
]


@pytest.mark.parametrize(("parse", "text"), BROKEN)
def test_what_is_not_of_the_format_is_refused(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(AgentError, match="what trtexec wrote for --export") as caught:
        parse(text)
    assert caught.value.kind == "bad-artifact"
