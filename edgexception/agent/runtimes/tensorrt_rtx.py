"""TensorRT-RTX: engines for NVIDIA's RTX GPUs, built without a GPU, run where one is.

An engine is built for one compute capability ("CPU-Only AOT and TensorRT-RTX Engines",
docs.nvidia.com/deeplearning/tensorrt-rtx). It holds weights and portable kernels; the rest is
compiled on the GPU when the engine is first opened there. Networks are strongly typed: the types
are those of the ONNX graph. `open` has not been run on hardware.

There is no timing cache: nothing is timed when an engine is built, and the calls for one do nothing
but ask for a GPU ("Timing Cache Migration", same place). What is compiled on the GPU could be kept
in a runtime cache ("Working with Runtime Cache"); no use is made of it, so that the time to open an
engine (`open_s`) is always that of a first start.

The vendor's support matrix (1.0 to 1.7) names no INT8 for activations, only for weights. The
builder takes such graphs none the less, and lists their convolutions as INT8.

An INT8 engine of 1.7.1 is larger than its weights. Read from its bytes, full-size Xception at
150x150 for SM89, 37.2 MB: every INT8 weight of the ONNX file is there once and as int8 (21.0 MB),
and none as float. Beside them are
- 0.6 MB to pad depthwise weights: there is no INT8 depthwise kernel, so such a layer is a grouped
  convolution of 4 channels a group, 3 of them zero;
- 4.8 MB of zeros, one tensor for each size of activation, which generated kernels put between the
  channels of a depthwise layer's input, at each call: it reads 4 times the bytes. At 299x299 they
  are 24.5 MB, and the INT8 engine (57.2 MB) is larger than the FP16 one (43.4 MB);
- 10.4 MB of CUDA source: each of 77 generated kernels, of which 30 differ, has a text of its own,
  125 kB of it the same helper functions in all. The FP16 engine has 8 such texts, and 1.2 MB.
The builder has no option against it: profiling verbosity does not change a byte. A plan that leaves
the depthwise layers in FP16 does: 29.1 MB, of which 21.4 MB are weights, with 98% of the
multiply-accumulates in INT8; its kernels read and write 1.28 times the bytes of the FP16 engine's,
with padding 1.74 times (at 299x299: 29.3 MB, and 1.77 for 2.52 times).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx_bindings as trt

from edgexception.agent.onnx_file import operators, profile_shapes
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, Session, blaming, brief, kind_of
from edgexception.agent.runtimes.cuda import gpus
from edgexception.agent.runtimes.rtx_layers import (
    START,
    conversions,
    counts,
    inspection,
    layer_placement,
    read_kernels,
)
from edgexception.agent.runtimes.trt_family import open_session, set_batch

_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_PADDING = 64
"""Weights have no run of so many zero bytes; what pads them has."""


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, the listing of kernels and the size of the weights; prints warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.listing = ""
        self.weights_bytes: int | None = None

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        """Take one message of the library."""
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)
        elif severity == trt.ILogger.Severity.WARNING:
            sys.stderr.write(f"{message}\n")
        elif message.startswith(START):
            self.listing = message
        elif found := _WEIGHTS.match(message):
            self.weights_bytes = int(found.group(1))

    def why(self) -> str:
        """Return what the library said, as one line."""
        return brief(RuntimeError("; ".join(self.errors) or "no reason is given"))


def version() -> dict[str, Any]:
    """Return the version and the GPUs; the package builds without one."""
    found = gpus()
    return {"version": trt.__version__, "devices": [gpu["name"] for gpu in found], "gpus": found}


def build(model: Path, options: Options, out: Path) -> dict[str, Any]:
    """Build for the compute capability `options.sm`; no GPU is touched."""
    capability = _capability(options.sm)
    operators(model)
    shapes = profile_shapes(model, options.batches)
    log = _Log()
    with blaming(f"tensorrt-rtx cannot build {model.name}"):
        builder = trt.Builder(log)
        builder.max_threads = options.threads
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(model.read_bytes()):
            raise AgentError("bad-artifact", f"tensorrt-rtx cannot read {model.name}: {log.why()}")
        config = builder.create_builder_config()
        set_batch(trt, builder, network, config, options, shapes)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # Else float32 products are rounded to 10 bits of mantissa, and the row is not FP32.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise AgentError(
            kind_of(" ".join(log.errors)),
            f"tensorrt-rtx cannot build {model.name} for SM{options.sm}: {log.why()}",
        )
    out.write_bytes(engine)
    kernels = read_kernels(log.listing, options.batch)
    return {
        "settings": {
            "sm": options.sm,
            "strongly_typed": True,
            "profiling_verbosity": str(config.profiling_verbosity).rpartition(".")[2],
            "builder_optimization_level": config.builder_optimization_level,
            "tf32": config.get_flag(trt.BuilderFlag.TF32),
        },
        "layers": counts(kernels or []),
        "placement": layer_placement(model, kernels or []),
        "conversions": conversions(kernels or []),
        "weights_bytes": log.weights_bytes,
        "zeros_bytes": zeros_bytes(engine),
        "inspection": inspection(kernels) if kernels else None,
    }


def open(engine: Path, options: Options) -> Session:  # noqa: A001 - the adapter's contract
    """Open an engine on the first GPU; one that was built for another is refused by the library."""
    log, context_of = _Log(), _eager_context if options.batches else None
    return open_session(
        trt, trt.Runtime(log), engine, options, "tensorrt-rtx", log, context_of=context_of
    )


def _eager_context(engine: Any) -> Any:
    """Return a context that compiles for a batch size before it first runs it.

    By itself TensorRT-RTX runs other kernels meanwhile, and times would be of both
    (DynamicShapesKernelSpecializationStrategy in its NvInferRuntime.h).
    """
    config = engine.create_runtime_config()
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(runtime_config=config)


def zeros_bytes(engine: Any) -> int:
    """Return how many bytes of an engine are in runs of zeros that only padding has."""
    nonzero = np.flatnonzero(np.frombuffer(engine, np.uint8))
    gaps = np.diff(nonzero) - 1
    return int(gaps[gaps >= _PADDING].sum())


def _capability(sm: int | None) -> trt.ComputeCapability:
    """Return the builder's name of a compute capability; None is refused, it would be guessed."""
    able = {
        int(name.removeprefix("SM")): value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if sm is None:
        raise AgentError("usage", "tensorrt-rtx builds for a compute capability: give `sm`")
    if sm not in able:
        raise AgentError(
            "not-possible-here",
            f"tensorrt-rtx {trt.__version__} does not build for SM{sm}; it builds for "
            f"{', '.join(f'SM{each}' for each in sorted(able))}",
        )
    return able[sm]
