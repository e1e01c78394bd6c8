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

import platform
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgexception.agent import machine
from edgexception.agent.onnx_file import operators
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, Session, blaming, check_contract

_PROVIDERS = ["CPUExecutionProvider"]
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


def version() -> dict[str, Any]:
    """Return the version and the execution providers of this build."""
    return {
        "version": onnxruntime.__version__,
        "devices": list(onnxruntime.get_available_providers()),
    }


def build(model: Path, options: Options, out: Path) -> dict[str, Any]:
    """Save the optimized graph at a fixed batch; return its operators, by type.

    INT8 as executed is QLinearConv (or ConvInteger, MatMulIntegerToFloat ...); a Conv between
    DequantizeLinear and QuantizeLinear ran in float.
    """
    operators(model)
    settings = _settings(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.optimized_model_filepath = str(out)
    # The input's free dimension has this name by contract; without it the override does nothing.
    settings.add_free_dimension_override_by_name("batch", options.batch)
    with blaming(f"onnxruntime cannot build {model.name}"):
        if _products_saturate() and _weight_bits(model) != "7":
            settings.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(model), settings, providers=_PROVIDERS)
        _check(session, options)
    return {
        "settings": _describe(options, "ORT_ENABLE_ALL"),
        "layers": operators(out),
    }


def open(engine: Path, options: Options) -> Session:  # noqa: A001 - the adapter's contract
    """Open a saved graph as it is."""
    operators(engine)
    settings = _settings(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with blaming(f"onnxruntime cannot open {engine.name}"):
        session = onnxruntime.InferenceSession(str(engine), settings, providers=_PROVIDERS)
    shape, classes = _check(session, options)
    outputs = ["logits"]

    def call(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return cast(NDArray[np.float32], session.run(outputs, {"images": images})[0])

    return Session(shape, classes, call, _describe(options, "ORT_DISABLE_ALL"))


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


def _settings(options: Options) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Errors only: at optimization level ALL it warns that the saved graph fits this machine alone.
    settings.log_severity_level = 3
    return settings


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
    ends = [
        [(end.name, _TYPES.get(end.type, str(end.type)), tuple(end.shape)) for end in side]
        for side in (session.get_inputs(), session.get_outputs())
    ]
    if session.get_providers() != _PROVIDERS:
        raise AgentError("bug", f"onnxruntime chose {session.get_providers()}, not {_PROVIDERS}")
    return check_contract(ends[0], ends[1], options)
