"""What the DLA can run of a graph: rule by rule, of whole networks, and by the real parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
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
from torch import fx

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact
from edgexception.export.dla import DlaLayer, dla_plan, plan_dla
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph, to_graph_input
from edgexception.model.xception import Xception
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.half import peaks_of, type_graph

SIZE = (40, 40)
IMAGES = random_images(2, SIZE)
TENSORRT = DIALECTS["tensorrt"]

torch.set_num_threads(1)


def written(graph: fx.GraphModule, precision: str, images: Any = IMAGES) -> onnx.ModelProto:
    plan = minmax_plan(graph, images, symmetric=True) if precision.startswith("int8") else None
    types = None
    if precision.endswith("fp16"):
        peaks = peaks_of(graph, [to_graph_input(torch.from_numpy(images))])
        types = type_graph(graph, plan, "fp16", peaks)
    preprocess = preprocess_of(images.shape[1:3])
    return to_onnx(
        graph, preprocess, None, plan=plan, dialect=TENSORRT if plan else None, types=types
    )


def one_layer(
    kind: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...] = (),
    element: int = TensorProto.FLOAT16,
    **attributes: Any,
) -> DlaLayer:
    """Return where one node goes that reads a tensor, and a constant of the shape `weight`."""
    value = np.zeros(weight, np.float16 if element == TensorProto.FLOAT16 else np.float32)
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", *(["w"] if weight else [])], ["y"], "layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, None)],
        [numpy_helper.from_array(value, "w")] if weight else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    (layer,) = dla_plan(model).layers
    return layer


# --- rule by rule ---------------------------------------------------------------------------------

CONV: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("kind", "shape", "weight", "attributes"),
    [
        ("Conv", (1, 728, 19, 19), (728, 1, 3, 3), {**CONV, "group": 728}),
        ("Conv", (1, 1536, 10, 10), (2048, 1536, 1, 1), {"kernel_shape": [1, 1]}),
        ("Conv", (4, 3, 299, 299), (32, 3, 3, 3), {"kernel_shape": [3, 3], "strides": [2, 2]}),
        ("Conv", (1, 8, 40, 40), (8, 8, 32, 32), {"kernel_shape": [32, 32]}),
        ("MaxPool", (1, 8, 40, 40), (), {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}),
        ("MaxPool", (1, 8, 40, 40), (), {"kernel_shape": [8, 8], "strides": [16, 16]}),
        ("Relu", (1, 8192, 2, 2), (), {}),
        ("Transpose", (1, 40, 40, 3), (), {"perm": [0, 3, 1, 2]}),
    ],
)
def test_what_the_dla_can(
    kind: str, shape: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    layer = one_layer(kind, shape, weight, **attributes)
    assert (layer.precision, layer.why) == ("fp16", "")


@pytest.mark.parametrize(
    ("kind", "shape", "weight", "attributes", "why"),
    [
        ("Conv", (1, 8, 40, 40), (8, 8, 33, 1), {"kernel_shape": [33, 1]}, "kernel_shape has 33"),
        ("Conv", (1, 8, 40, 40), (8, 8, 3, 3), {**CONV, "strides": [9, 9]}, "strides has 9"),
        ("Conv", (1, 8, 80, 80), (8, 8, 3, 3), {**CONV, "dilations": [33, 33]}, "dilations has 33"),
        ("Conv", (1, 8, 40, 40), (8, 8, 1, 1), {"kernel_shape": [1, 1], "pads": [0, 0, 1, 1]},
         "padding is not less than its kernel"),
        ("Conv", (1, 512, 299, 299), (8, 512, 3, 3), CONV, "convolution buffer's 16 banks"),
        ("Conv", (1, 8, 40), (8, 8, 3), {"kernel_shape": [3]}, "no two spatial dimensions"),
        ("MaxPool", (1, 8, 40, 40), (), {"kernel_shape": [9, 9]}, "kernel_shape has 9"),
        ("MaxPool", (1, 8, 40, 40), (), {"kernel_shape": [2, 2], "strides": [17, 17]},
         "strides has 17"),
        ("Relu", (1, 8193, 2, 2), (), {}, "a dimension has 8193"),
        ("Relu", (1, 10), (), {}, "no two spatial dimensions"),
        ("Sub", (1, 3, 8, 8), (1,), {}, "a constant"),
        ("Elu", (1, 3, 8, 8), (), {}, "no ELU on the DLA"),
        ("GlobalAveragePool", (1, 3, 8, 8), (), {}, "reduces by maximum only"),
        ("Softplus", (1, 3, 8, 8), (), {}, "no Softplus on the DLA"),
    ],
)  # fmt: skip
def test_what_the_dla_cannot_is_the_gpus_and_says_why(
    kind: str, shape: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any], why: str
) -> None:
    layer = one_layer(kind, shape, weight, **attributes)
    assert layer.precision is None
    assert why in layer.why


def test_a_convolution_s_buffer_is_counted_as_the_guide_counts_it() -> None:
    """C=64, W=4096 in FP16: 4 blocks of 32 bytes x 4096 / 4 = 4096 entries a row, 16 banks."""
    one_row = {"kernel_shape": [1, 1]}
    layer = one_layer("Conv", (1, 64, 8, 4096), (8, 64, 1, 1), **one_row)
    assert layer.why == "it needs 17 of the convolution buffer's 16 banks"
    assert one_layer("Conv", (1, 64, 8, 3840), (8, 64, 1, 1), **one_row).precision == "fp16"


def test_float32_is_the_gpu_s() -> None:
    layer = one_layer("Relu", (1, 8, 4, 4), element=TensorProto.FLOAT)
    assert (layer.precision, layer.float32) == (None, True)
    assert "float32 by the graph" in layer.why
    moved = one_layer("Transpose", (1, 8, 4, 4), element=TensorProto.FLOAT)
    assert (moved.precision, moved.float32) == (None, False), "it computes nothing"


# --- whole networks -------------------------------------------------------------------------------


def test_an_fp16_network_runs_on_the_dla_but_for_its_ends() -> None:
    plan = dla_plan(written(small_graph(), "fp16"))
    assert {layer.name for layer in plan.layers if layer.precision is None} == {
        "images_float", "pixels", "avg_pool_mean", "avg_pool", "predictions", "logits",
    }  # fmt: skip
    assert plan.parts == 2, "the transposition of the photo stands alone"
    macs = {layer.name: layer.macs for layer in plan.layers if layer.macs}
    assert sum(macs.values()) - macs["predictions"] == sum(
        layer.macs for layer in plan.layers if layer.precision
    )
    assert not any(layer.float32 for layer in plan.layers)


def test_the_paper_s_network_runs_on_the_dla_but_for_its_ends() -> None:
    """At 299x299; where its weights have been trained to changes nothing."""
    size = (299, 299)
    network = Xception(Architecture()).eval().requires_grad_(False)
    graph = inference_graph(network, preprocess_of(size))
    types = type_graph(graph, None, "fp16", {node.name: 1.0 for node in graph.graph.nodes})
    plan = dla_plan(to_onnx(graph, preprocess_of(size), None, types=types))
    on_dla = [layer for layer in plan.layers if layer.precision == "fp16"]
    assert (len(on_dla), len(plan.layers)) == (126, 132)
    share = sum(layer.macs for layer in on_dla) / sum(layer.macs for layer in plan.layers)
    assert 0.9997 < share < 0.9998


def test_int8_is_for_layers_with_a_scale_at_both_ends() -> None:
    """In our dialect these are the depthwise convolutions: what a pointwise one writes has none."""
    layers = dla_plan(written(small_graph(), "int8-fp16")).layers
    int8 = [layer.name for layer in layers if layer.precision == "int8"]
    assert int8 == [layer.name for layer in layers if layer.name.endswith("_depthwise")]
    pointwise = {layer.precision for layer in layers if layer.name.endswith("_pointwise")}
    assert pointwise == {"fp16"}


def test_int8_beside_float32_is_cut_into_single_layers() -> None:
    plan = dla_plan(written(small_graph(), "int8"))
    on_dla = [layer for layer in plan.layers if layer.precision]
    assert plan.parts == len(on_dla)
    assert {layer.precision for layer in on_dla} == {"int8"}


@settings(deadline=None, max_examples=15)
@given(architectures(), st.sampled_from(("fp32", "fp16", "int8", "int8-fp16")))
def test_every_layer_of_every_network_is_planned(architecture: Any, precision: str) -> None:
    graph = inference_graph(random_network(architecture), preprocess_of(SIZE))
    model = written(graph, precision)
    plan = dla_plan(model)
    computing = [n.name for n in model.graph.node if "Linear" not in n.op_type]
    assert [layer.name for layer in plan.layers] == computing
    assert all((layer.precision is None) == bool(layer.why) for layer in plan.layers)
    count = sum(layer.precision is not None for layer in plan.layers)
    assert (plan.parts > 0) == (count > 0)
    assert plan.parts <= count
    if precision == "fp32":
        assert count == 0


def test_tensorrt_s_parser_calls_its_layers_as_the_plan_does() -> None:
    """So what the builder puts on the GPU can be held against the plan by name."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def log(self, severity: object, message: str) -> None:
            pass

    log = Log()
    builder = trt.Builder(log)
    for precision in ("fp16", "int8-fp16"):
        model = written(small_graph(), precision)
        network = builder.create_network(0)
        assert trt.OnnxParser(network, log).parse(model.SerializeToString())
        kinds = {
            network.get_layer(n).name: network.get_layer(n).type for n in range(network.num_layers)
        }
        planned = {layer.name for layer in dla_plan(model).layers}
        assert planned <= set(kinds)
        assert kinds["avg_pool_mean"] == trt.LayerType.REDUCE
        assert kinds["predictions"] == trt.LayerType.MATRIX_MULTIPLY
        assert kinds["pixel_offset"] == trt.LayerType.CONSTANT


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no")
    with pytest.raises(BadArtifact, match=r"model\.onnx: cannot be read as ONNX"):
        plan_dla(tmp_path / "model.onnx")
