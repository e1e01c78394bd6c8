"""Narrow random networks of the family, plans for them, and the runtimes that execute both."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import openvino
import torch
from hypothesis import strategies as st
from onnx import helper
from torch import fx, nn

from edgexception.architecture import Architecture
from edgexception.model.graph import INPUT, inference_graph, layers, to_graph_input
from edgexception.model.xception import Xception
from edgexception.preprocess import Preprocess
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.plan import ActivationQuant, Provenance, QuantPlan, WeightQuant
from edgexception.quantize.ranges import grid_of_range, observe

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]

SMALL = Architecture(
    stem=(4, 8), entry=((8, 8), (16, 16)), middle=((16, 16),), exit=(16, 24), tail=(24,), head=(5,)
)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Members of the family: every variation of the paper, both paddings, missing stages."""
    order = draw(st.sampled_from(("depthwise-first", "pointwise-first")))
    return Architecture(
        stem=(4, 8),
        entry=draw(st.sampled_from(((), ((8, 8),), ((8, 12), (16, 16))))),
        middle=(),
        exit=draw(st.sampled_from(((16,), (12, 16)))),
        tail=draw(st.sampled_from(((16,), (16, 24)))),
        head=draw(st.sampled_from(((), (3,), (7, 5)))),
        segments=draw(st.sampled_from((None, 1, 2, 4))),
        order=order,
        intermediate_activation=(
            "relu"
            if order == "pointwise-first"
            else draw(st.sampled_from(("none", "none", "relu", "elu")))
        ),
        residual=draw(st.booleans()),
        padding=draw(st.sampled_from(("keras", "timm"))),
    )


@st.composite
def deeper_architectures(draw: st.DrawFn) -> Architecture:
    """Members of the family with any number of middle blocks of any widths, too."""
    base = draw(architectures())
    residual = base.entry[-1][-1] if base.entry else base.stem[-1]
    inner = st.lists(st.sampled_from((4, 8, 12)), max_size=2)
    middle = draw(st.lists(inner.map(lambda widths: (*widths, residual)), max_size=3))
    return Architecture.model_validate({**dict(base), "middle": tuple(middle)})


sizes = st.tuples(st.integers(32, 47), st.integers(32, 47))


def random_network(architecture: Architecture, seed: int = 0) -> Xception:
    """Return a network whose BatchNorm statistics fit its activations, as after training."""
    torch.manual_seed(seed)
    network = Xception(architecture)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
            module.momentum = None  # average over the batches below
    network.train()
    with torch.no_grad():
        network(torch.randn(8, 3, 48, 48))
    return network.eval().requires_grad_(False)


def random_images(number: int, size: tuple[int, int], seed: int = 0) -> Images:
    """Return smooth random photos, uint8 (number, H, W, 3)."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.uniform(0, 255, (number, 3, 6, 6)))
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear")
    return smooth.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


def preprocess_of(size: tuple[int, int]) -> Preprocess:
    return Preprocess(input_size=size, mean=(120.0, 115.0, 100.0), std=(60.0, 58.0, 57.0))


def small_graph(
    architecture: Architecture = SMALL, size: tuple[int, int] = (40, 40)
) -> fx.GraphModule:
    return inference_graph(random_network(architecture), preprocess_of(size))


def minmax_plan(
    graph: fx.GraphModule, images: Images, *, symmetric: bool = False, bits: Literal[7, 8] = 8
) -> QuantPlan:
    """Return a plan from observed extremes, without NNCF."""
    inputs, outputs = input_edges(graph), output_edges(graph)
    seen = observe(graph, [*inputs, *outputs], [to_graph_input(torch.from_numpy(images))])
    activations = {}
    for edge, histogram in seen.items():
        scale, zero = grid_of_range(*histogram.range("minmax", 100.0, symmetric), symmetric)
        if edge == INPUT:
            scale, zero = 1.0, 0 if symmetric else 128
        activations[edge] = ActivationQuant(
            scale=scale,
            zero_point=zero,
            signed=symmetric,
            role="input" if edge in inputs else "output",
        )
    limit = 127 if bits == 8 else 64
    return QuantPlan(
        activations=activations,
        weights={
            name: WeightQuant(
                scales=tuple(
                    np.float32(layer.weight.flatten(1).abs().amax(1) / limit).clip(1e-9).tolist()
                ),
                bits=bits,
            )
            for name, layer in layers(graph).items()
        },
        provenance=Provenance(
            method="ptq",
            activations="symmetric" if symmetric else "asymmetric",
            ranges="minmax",
            bias_correction=False,
            rounding="nearest",
            images=len(images),
            calibration_digest="0" * 64,
            versions={},
        ),
    )


def run_torch(graph: fx.GraphModule, images: Images) -> Logits:
    with torch.inference_mode():
        logits: Logits = graph(to_graph_input(torch.from_numpy(images))).numpy()
    return logits


def run_onnxruntime(model: onnx.ModelProto, images: Images, *, optimize: bool = True) -> Logits:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    logits: Logits = session.run(None, {"images": images})[0]
    return logits


def run_literally(model: onnx.ModelProto, images: Images) -> Logits:
    """Run node by node, every tensor in its own type, sums of float16 in float32.

    ONNX Runtime has few float16 kernels for processors: it runs such graphs in float32 and leaves
    out the roundings between two nodes. One session a node keeps every tensor as the graph has it.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    ends = (*inferred.graph.value_info, *model.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in ends}
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    values["images"] = images
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for node in model.graph.node:
        read = {name: values[name] for name in node.input}
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in read.items()
        ]
        output = helper.make_tensor_value_info(node.output[0], kinds[node.output[0]], None)
        single = helper.make_model(
            helper.make_graph([node], "node", inputs, [output]),
            ir_version=model.ir_version,
            opset_imports=model.opset_import,
        )
        session = onnxruntime.InferenceSession(
            single.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        values[node.output[0]] = session.run(None, read)[0]
    logits: Logits = values["logits"]
    return logits


def run_openvino(model: onnx.ModelProto, images: Images) -> Logits:
    core = openvino.Core()
    network = core.read_model(model.SerializeToString())
    network.reshape(list(images.shape))
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    logits: Logits = core.compile_model(network, "CPU", config)([images])[0]
    return logits


def sqnr_db(reference: Logits, other: Logits) -> float:
    """Return the power of `reference` over that of its difference to `other`, in dB."""
    error = float(((reference.astype(np.float64) - other) ** 2).sum())
    power = float((reference.astype(np.float64) ** 2).sum())
    return 10 * np.log10(power / error) if error else np.inf
