"""ONNX Runtime on the CPU.

The engine is ONNX Runtime's own optimized graph for this processor, saved as .onnx and opened
without further optimization. Measured on Xception at 150x150: same bits and same speed as
optimizing at each open (FP32 and INT8), and the saved graph is the one that was executed, so its
operators can be counted. It holds layouts of this processor's width (NCHWc): not for another one.

Without VNNI its uint8 x int8 kernels add pairs of products in 16 saturating bits. A build for such
a processor turns int8 weights into uint8, whose kernels do not. The kernels for AVX2 forced on an
AMD Zen 5, full-size Xception at 150x150, one thread: uint8 x int8 20.3 ms and 9.1 dB SQNR against
the same plan on VNNI, uint8 x uint8 24.3 ms and equal bit for bit (FP32 35.6 ms); also bit for bit
on an emulated Haswell. Weights of 7 bits fit the 16 bits and stay int8.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgexception.agent import machine
from edgexception.agent.onnx_file import Node, main_graph, operators
from edgexception.agent.placement import Ran, placement
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import (
    PROFILE_WARM_UP,
    KernelTime,
    Options,
    Session,
    blaming,
    check_contract,
)

_PROVIDERS = ["CPUExecutionProvider"]
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}

# Operators of the optimized graph (ONNX Runtime's ContribOperators.md). What it executes in float
# on a processor is float32: this dialect has no float16.
_INT8 = "int8"
_PRECISIONS = {
    "QLinearConv": _INT8,
    "ConvInteger": _INT8,
    "QLinearMatMul": _INT8,
    "MatMulInteger": _INT8,
    "com.microsoft:QLinearConv": _INT8,
    "com.microsoft:QGemm": _INT8,
    "com.microsoft:MatMulIntegerToFloat": _INT8,
    "com.microsoft:DynamicQuantizeMatMul": _INT8,
    "Conv": "fp32",
    "com.microsoft:FusedConv": "fp32",
    "com.microsoft.nchwc:Conv": "fp32",
    "Gemm": "fp32",
    "com.microsoft:FusedGemm": "fp32",
    "MatMul": "fp32",
    "com.microsoft:FusedMatMul": "fp32",
}
_CONVERSIONS = {
    "QuantizeLinear": "quantize",
    "com.microsoft:QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "com.microsoft:DequantizeLinear": "dequantize",
    "com.microsoft.nchwc:ReorderInput": "reorder",
    "com.microsoft.nchwc:ReorderOutput": "reorder",
    "Transpose": "reorder",
    "Cast": "cast",
}
# The profiler names operators without their domains.
_DOES = {name.rpartition(":")[2]: what for name, what in (_PRECISIONS | _CONVERSIONS).items()}
# What its optimizer adds to the names of nodes and tensors that it makes anew.
_ADDED = re.compile(r"^fused |(_nchwc|_token_\d+)+$")


def version() -> dict[str, Any]:
    """Return the version and the execution providers of this build."""
    return {
        "version": onnxruntime.__version__,
        "devices": list(onnxruntime.get_available_providers()),
    }


def build(model: Path, options: Options, out: Path) -> dict[str, Any]:
    """Save the optimized graph; return its operators, by type, and its layers.

    A Conv between DequantizeLinear and QuantizeLinear, which was not fused, runs in float.
    """
    operators(model)
    settings = session_options(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.optimized_model_filepath = str(out)
    fix_batch(settings, options)
    with blaming(f"onnxruntime cannot build {model.name}"):
        if _products_saturate() and _weight_bits(model) != "7":
            settings.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(model), settings, providers=_PROVIDERS)
        _check(session, options)
    return {
        "settings": _describe(options, "ORT_ENABLE_ALL"),
        **executed(model, out),
    }


def executed(model: Path, optimized: Path) -> dict[str, Any]:
    """Return what an optimized graph says of how it executes the layers of `model`."""
    _, nodes = main_graph(optimized)
    conversions = Counter(
        _CONVERSIONS[node.operator] for node in nodes if node.operator in _CONVERSIONS
    )
    return {
        "layers": operators(optimized),
        "conversions": dict(sorted(conversions.items())),
        "placement": placement(model, map(_ran, nodes)),
    }


def _ran(node: Node) -> Ran:
    if node.operator not in _PRECISIONS:
        return Ran((), None, node.operator)
    names = tuple(_ADDED.sub("", name) for name in (node.name, *node.outputs))
    return Ran(names, _PRECISIONS[node.operator], node.operator)


def open(engine: Path, options: Options) -> Session:  # noqa: A001 - the adapter's contract
    """Open a saved graph as it is."""
    operators(engine)
    settings = session_options(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with blaming(f"onnxruntime cannot open {engine.name}"):
        session = onnxruntime.InferenceSession(str(engine), settings, providers=_PROVIDERS)
    shape, classes = _check(session, options)
    outputs = ["logits"]

    def call(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return cast(NDArray[np.float32], session.run(outputs, {"images": images})[0])

    return Session(shape, classes, call, _describe(options, "ORT_DISABLE_ALL"))


def profile(
    engine: Path, options: Options, images: NDArray[np.uint8], calls: int
) -> list[KernelTime]:
    """Return the medians of what ONNX Runtime's profiler writes of every node, in whole us."""
    settings = session_options(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder, blaming(f"onnxruntime cannot profile {engine}"):
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(str(engine), settings, providers=_PROVIDERS)
        for _ in range(PROFILE_WARM_UP + calls):
            session.run(["logits"], {"images": images})
        events = json.loads(Path(session.end_profiling()).read_bytes())
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node":
            name = event["name"].removesuffix("_kernel_time")
            times[name, event["args"]["op_name"]].append(event["dur"])
    return [
        KernelTime(_ADDED.sub("", name), kind, _DOES.get(kind, "other"), _median_ns(us[-calls:]))
        for (name, kind), us in times.items()
    ]


def _median_ns(microseconds: list[int]) -> int:
    return int(1000 * statistics.median(microseconds))


def _products_saturate() -> bool:
    return platform.machine() == "x86_64" and not machine.facts()["cpu"]["vnni"]


def _weight_bits(model: Path) -> str | None:
    """Return what the exporter wrote of the weights, None for a graph that does not say."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), settings, providers=_PROVIDERS)
    props: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return props.get("edgexception.weight_bits")


def session_options(options: Options) -> onnxruntime.SessionOptions:
    """Return what every session is told: the threads, and to be quiet."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Errors only: at optimization level ALL it warns that the saved graph fits this machine alone.
    settings.log_severity_level = 3
    return settings


def fix_batch(settings: onnxruntime.SessionOptions, options: Options) -> None:
    """Give the open dimension its size, if the engine is not to be dynamic.

    The input's free dimension has this name by contract; without it the override does nothing.
    """
    if options.batches is None:
        settings.add_free_dimension_override_by_name("batch", options.batch)


def _describe(options: Options, optimization: str) -> dict[str, Any]:
    return {
        "provider": _PROVIDERS[0],
        "intra_op_num_threads": options.threads,
        "inter_op_num_threads": 1,
        "graph_optimization_level": optimization,
    }


def _check(
    session: onnxruntime.InferenceSession, options: Options
) -> tuple[tuple[int, int, int, int], int]:
    if session.get_providers() != _PROVIDERS:
        raise AgentError("bug", f"onnxruntime chose {session.get_providers()}, not {_PROVIDERS}")
    return check_ends(session, options)


def check_ends(
    session: onnxruntime.InferenceSession, options: Options
) -> tuple[tuple[int, int, int, int], int]:
    """Return image shape and classes of a session that keeps the contract of every engine."""
    ends = [
        [(end.name, _TYPES.get(end.type, str(end.type)), tuple(end.shape)) for end in side]
        for side in (session.get_inputs(), session.get_outputs())
    ]
    return check_contract(ends[0], ends[1], options)
