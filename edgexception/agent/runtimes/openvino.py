"""OpenVINO on the CPU.

The engine is the compiled model as OpenVINO exports it; importing needs the same OpenVINO build and
the same instruction set, and OpenVINO itself refuses another one.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino
from numpy.typing import NDArray

from edgexception.agent.onnx_file import operators
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

_TYPES = {"u8": "uint8", "f32": "float32"}
_PRECISIONS = {"i8": "int8", "u8": "int8", "f16": "fp16", "bf16": "bf16", "f32": "fp32"}
# layerType as the CPU plugin calls its nodes (openvino, src/plugins/intel_cpu/src/cpu_types.cpp).
_LAYERS = ("Convolution", "FullyConnected", "MatMul")
_Node = tuple[str, str, str]
"""Name, kind, and what it does."""
_CONVERSIONS = {
    "FakeQuantize": "quantize",
    "Reorder": "reorder",
    "Transpose": "reorder",
    "Convert": "cast",
}
_READ_BACK = (
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
    "INFERENCE_PRECISION_HINT",
    "ENABLE_CPU_PINNING",
    "ENABLE_HYPER_THREADING",
)


def version() -> dict[str, Any]:
    """Return the version and the devices that OpenVINO finds."""
    return {"version": openvino.__version__, "devices": list(openvino.Core().available_devices)}


def build(model: Path, options: Options, out: Path) -> dict[str, Any]:
    """Compile for the CPU; return executed layers as "Type precision" counts."""
    operators(model)
    core = openvino.Core()
    with blaming(f"openvino cannot build {model.name}"):
        graph = core.read_model(model)
        if len(graph.inputs) != 1 or graph.inputs[0].partial_shape.rank != 4:
            raise AgentError("bad-artifact", f"{model.name} must have one input of four dimensions")
        shape = graph.inputs[0].partial_shape
        least, _, greatest = options.batches or (options.batch,) * 3
        shape[0] = openvino.Dimension(least, greatest)
        graph.reshape({graph.inputs[0]: shape})
        compiled = core.compile_model(graph, "CPU", _properties(options))
        _check(compiled, options)
        exported = io.BytesIO()
        compiled.export_model(exported)
    out.write_bytes(exported.getbuffer())
    return {"settings": _read_back(compiled), **executed(model, compiled)}


def open(engine: Path, options: Options) -> Session:  # noqa: A001 - the adapter's contract
    """Import a compiled model."""
    compiled, weights = _import(engine, _properties(options))
    shape, classes = _check(compiled, options)
    settings = _read_back(compiled)
    threads = settings["INFERENCE_NUM_THREADS"]
    if threads != str(options.threads):
        raise AgentError(
            "usage", f"openvino runs with {threads} threads, asked were {options.threads}"
        )
    request = compiled.create_infer_request()
    logits = compiled.outputs[0]

    def call(
        images: NDArray[np.uint8], _held: tuple[object, object] = weights
    ) -> NDArray[np.float32]:
        # The images are read where they are; the logits are copied out, into host memory.
        return cast(NDArray[np.float32], request.infer([images], share_inputs=True)[logits])

    return Session(shape, classes, call, settings)


def profile(
    engine: Path, options: Options, images: NDArray[np.uint8], calls: int
) -> list[KernelTime]:
    """Return what OpenVINO counts of every node that takes time.

    It tells the mean since the model was opened, in whole us: calls to warm up are subtracted.
    """
    compiled, _held = _import(engine, {**_properties(options), "PERF_COUNT": True})
    request = compiled.create_infer_request()
    done, before, after = 0, dict[_Node, int](), dict[_Node, int]()
    with blaming(f"openvino cannot profile {engine.name}"):
        for count in (PROFILE_WARM_UP, calls):
            for _ in range(count):
                request.infer([images], share_inputs=True)
            done += count
            before, after = after, {node: done * us for node, us in _means(compiled)}
    return [
        KernelTime(*node, max(0, 1000 * (total - before.get(node, 0)) // calls))
        for node, total in after.items()
    ]


def _means(compiled: openvino.CompiledModel) -> Iterator[tuple[_Node, int]]:
    """Yield every node that takes time, and its mean in us."""
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        kind, names = facts["layerType"], facts["originalLayersNames"]
        if kind in _LAYERS:
            does = _PRECISIONS.get(facts["runtimePrecision"], "other")
        else:
            does = _conversion(kind, names) or "other"
        if facts["execTimeMcs"].isdecimal():  # else it is not executed, or takes less than 1 us
            yield (names or node.get_friendly_name(), kind, does), int(facts["execTimeMcs"])


def _import(
    engine: Path, properties: dict[str, Any]
) -> tuple[openvino.CompiledModel, tuple[object, object]]:
    """Return a compiled model, and what must be held on to as long as it runs.

    OpenVINO reads weights from the blob all that time without a reference of its own: else the map
    is gone when the caller returns (seen: SIGSEGV).
    """
    # Mapped, not read: the blob would else be in memory twice while it is opened. "c" because
    # OpenVINO takes only writable arrays; nothing is written to the file.
    blob = np.memmap(engine, np.uint8, "c")
    with blaming(f"openvino cannot open {engine.name}"):
        tensor = openvino.Tensor(blob, shared_memory=True)
        compiled = openvino.Core().import_model(tensor, "CPU", properties)
    return compiled, (blob, tensor)


def _properties(options: Options) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": options.threads,
        # Without it OpenVINO runs a float model in bfloat16 where the processor can (AVX512-BF16,
        # AMX): twice as fast, but then the row is not FP32.
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _read_back(compiled: openvino.CompiledModel) -> dict[str, str]:
    return {name: _text(compiled.get_property(name)) for name in _READ_BACK}


def _text(value: object) -> str:
    """Return a property as text; a type is printed as "<Type: 'float32'>"."""
    return str(value.get_type_name()) if isinstance(value, openvino.Type) else str(value)


def executed(model: Path, compiled: openvino.CompiledModel) -> dict[str, Any]:
    """Return what a compiled model says of how it executes the layers of `model`."""
    layers: Counter[str] = Counter()
    conversions: Counter[str] = Counter()
    kernels = []
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        kind, precision = facts["layerType"], facts["runtimePrecision"]
        if kind in ("Const", "Input", "Output"):
            continue
        layers[f"{kind} {precision}"] += 1
        if kind in _LAYERS:
            names = tuple(facts["originalLayersNames"].split(","))
            kernels.append(Ran(names, _PRECISIONS.get(precision), facts["primitiveType"]))
        elif (what := _conversion(kind, facts["originalLayersNames"])) is not None:
            conversions[what] += 1
    return {
        "layers": dict(sorted(layers.items())),
        "conversions": dict(sorted(conversions.items())),
        "placement": placement(model, kernels),
    }


def _conversion(kind: str, names: str) -> str | None:
    # A Subgraph is generated code for what was fused; one FakeQuantize alone may be one.
    alone = kind == "Subgraph" and names.startswith("FakeQuantize") and "," not in names
    return "quantize" if alone else _CONVERSIONS.get(kind)


def _check(
    compiled: openvino.CompiledModel, options: Options
) -> tuple[tuple[int, int, int, int], int]:
    ends = [
        [(_name(end, wanted), _type(end), _sizes(end)) for end in side]
        for side, wanted in ((compiled.inputs, "images"), (compiled.outputs, "logits"))
    ]
    return check_contract(ends[0], ends[1], options)


def _name(end: openvino.ConstOutput, wanted: str) -> str:
    """Return `wanted` if it is a name of that end, else any of its names.

    OpenVINO drops an Identity at the end, and the output then has the names of both its sides: the
    output of a network without a head is `avg_pool`, too.
    """
    return wanted if wanted in end.get_names() else str(end.get_any_name())


def _sizes(end: openvino.ConstOutput) -> tuple[int, ...]:
    """Return the sizes of an end; -1 is an open one."""
    return tuple(size.get_length() if size.is_static else -1 for size in end.partial_shape)


def _type(end: openvino.ConstOutput) -> str:
    name = str(end.element_type.get_type_name())
    return _TYPES.get(name, name)
