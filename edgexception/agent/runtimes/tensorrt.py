"""TensorRT 10 and 11 through its Python API: engines for the GPU that they are built on.

JetPack brings the package; elsewhere it comes from NVIDIA's own index. Networks are strongly typed:
the types are those of the ONNX graph. What a version is told is decided in
`agent.tensorrt_options`. Not run on hardware: here the calls are made to TensorRT-RTX, whose API is
the same, and to a fake where a GPU is needed.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
from numpy.typing import NDArray

from edgexception.agent import machine
from edgexception.agent.onnx_file import operators, profile_shapes
from edgexception.agent.placement import check_sparse
from edgexception.agent.protocol import AgentError, progress
from edgexception.agent.runtimes import (
    PROFILE_WARM_UP,
    TIMING_CACHE,
    KernelTime,
    Options,
    Session,
    blaming,
    brief,
    kind_of,
)
from edgexception.agent.runtimes.cuda import gpus, own_gpu
from edgexception.agent.runtimes.trt_family import open_session, set_batch
from edgexception.agent.tensorrt_options import (
    BuilderCalls,
    BuildOptions,
    Gpu,
    builder_calls,
    check,
    parse_version,
)
from edgexception.agent.trtexec import (
    Layer,
    conversions,
    counts,
    does,
    layer_placement,
    parse_layers,
)

PROGRESS_S = 1.0


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, and prints warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        """Take one message of the library."""
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)
        elif severity == trt.ILogger.Severity.WARNING:
            sys.stderr.write(f"{message}\n")

    def why(self) -> str:
        """Return what the library said, as one line."""
        return brief(RuntimeError("; ".join(self.errors) or "no reason is given"))


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Reports the builder's outermost phases, at most once a second."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, int] = {}
        self.last = time.monotonic()

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note a phase; those inside another are not reported."""
        if parent is None:
            self.steps[phase] = steps

    def step_complete(self, phase: str, step: int) -> bool:
        """Report a step; True goes on."""
        now, total = time.monotonic(), self.steps.get(phase)
        if total is not None and now - self.last >= PROGRESS_S:
            self.last = now
            progress(f"build tensorrt: {phase}", min(step + 1, total), total, None)
        return True

    def phase_finish(self, phase: str) -> None:
        """Forget a phase."""
        self.steps.pop(phase, None)


def version() -> dict[str, Any]:
    """Return the version and the GPUs."""
    found = gpus()
    return {"version": trt.__version__, "devices": [gpu["name"] for gpu in found], "gpus": found}


def build(model: Path, options: Options, out: Path) -> dict[str, Any]:
    """Build for the first GPU; return what the engine says of its layers."""
    gpu, number = own_gpu(options.sm, "tensorrt"), parse_version(trt.__version__)
    operators(model)
    shapes = profile_shapes(model, options.batches)
    wanted = replace(_build_options(options), shapes=shapes)
    check(wanted, number, Gpu(gpu["sm"], machine.facts()["board"]))
    if wanted.sparse_weights:
        check_sparse(model)
    log = _Log()
    with blaming(f"tensorrt cannot build {model.name}"):
        calls = builder_calls(wanted, number)
        builder = trt.Builder(log)
        builder.max_threads = options.threads
        _check_dla(wanted, builder)
        network = builder.create_network(_bits("NetworkDefinitionCreationFlag", calls))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(model.read_bytes()):
            raise AgentError("bad-artifact", f"tensorrt cannot read {model.name}: {log.why()}")
        config = builder.create_builder_config()
        set_batch(trt, builder, network, config, options, shapes)
        apply(calls, config)
        # The builder keeps no reference to it.
        monitor = _Monitor()
        config.progress_monitor = monitor
        cache = _start_cache(config, out.with_name(TIMING_CACHE), log)
        on_gpu = _not_on_dla(wanted, network, config)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise AgentError(
            kind_of(" ".join(log.errors)), f"tensorrt cannot build {model.name}: {log.why()}"
        )
    out.write_bytes(plan)
    out.with_name(TIMING_CACHE).write_bytes(cache.serialize())
    layers = _layers(plan, wanted, log)
    return {
        "settings": {
            "gpu": gpu["name"],
            "sm": gpu["sm"],
            "driver": gpu["driver"],
            "strongly_typed": bool(calls.network_flags) or number >= (11,),
            "flags": [*calls.set_flags, *(f"no {name}" for name in calls.clear_flags)],
            **calls.values,
            "memory_pools": calls.memory_pools,
            "not_on_dla": on_gpu,
        },
        "layers": counts(layers),
        "placement": layer_placement(model, layers),
        "conversions": conversions(layers),
    }


def open(engine: Path, options: Options) -> Session:  # noqa: A001 - the adapter's contract
    """Open an engine on the first GPU; the library refuses one of another GPU or version."""
    log = _Log()
    runtime = _runtime(_build_options(options), log)
    return open_session(trt, runtime, engine, options, "tensorrt", log)


class _Profiler(trt.IProfiler):  # type: ignore[misc]
    """Keeps the times of each layer in ms; called after each call (NvInferRuntime.h, IProfiler)."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Take the time of one layer in one call."""
        self.times.setdefault(layer_name, []).append(ms)


def profile(
    engine: Path, options: Options, images: NDArray[np.uint8], calls: int
) -> list[KernelTime]:
    """Return the medians of what TensorRT tells of every layer."""
    log, wanted, profiler = _Log(), _build_options(options), _Profiler()
    runtime = _runtime(wanted, log)
    session = open_session(trt, runtime, engine, options, "tensorrt", log, profiler)
    for _ in range(PROFILE_WARM_UP + calls):
        session.call(images)
    layers = {layer.name: layer for layer in _layers(engine.read_bytes(), wanted, log)}
    return [
        KernelTime(name, layer.kind, does(layer), int(1e6 * statistics.median(times[-calls:])))
        for name, times in profiler.times.items()
        for layer in [layers.get(name, Layer(name))]
    ]


def apply(calls: BuilderCalls, config: trt.IBuilderConfig) -> None:
    """Tell a builder's configuration everything of `calls`, and see that it took it."""
    for name in calls.set_flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in calls.clear_flags:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    for name, size in calls.memory_pools.items():
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, name), size)
    for name, value in calls.values.items():
        setattr(config, name, _value(value))
        if getattr(config, name) != _value(value):
            raise AgentError("not-possible-here", f"tensorrt does not take {name} = {value} here")


def _start_cache(config: trt.IBuilderConfig, path: Path, log: _Log) -> Any:
    """Give a build the times of kernels from a file, or none; return the cache, which it extends.

    They are those of one GPU, CUDA and version of TensorRT ("Optimizing Builder Performance",
    TensorRT 10.16). With `ignore_mismatch` off TensorRT refuses those of another GPU (NvInfer.h,
    IBuilderConfig::setTimingCache). Of a file that it cannot read it only makes an entry in the log
    and an empty cache (NVIDIA/TensorRT issue 3566; so does TensorRT-RTX); here that is an error.
    The cache must outlive the build.
    """
    known, before = path.read_bytes() if path.exists() else b"", len(log.errors)
    cache, empty = config.create_timing_cache(known), config.create_timing_cache(b"")
    nothing = bytes(empty.serialize())
    lost = cache is None or (known not in (b"", nothing) and bytes(cache.serialize()) == nothing)
    if lost or not config.set_timing_cache(cache, False) or log.errors[before:]:
        raise AgentError(
            "bad-artifact",
            f"the timing cache of an earlier build is broken, or not one of TensorRT "
            f"{trt.__version__} on this GPU ({log.why()}): remove the folder .timing in the store "
            "of the run, and kernels are timed anew",
        )
    return cache


def _value(value: str | int) -> Any:
    """Return a number, or the enum member that "Enum.MEMBER" names."""
    if isinstance(value, int):
        return value
    kind, _, member = value.partition(".")
    return getattr(getattr(trt, kind), member)


def _bits(kind: str, calls: BuilderCalls) -> int:
    # Members have other numbers in version 10 and 11, so only their names count.
    return sum(1 << int(_value(f"{kind}.{name}")) for name in calls.network_flags)


def _build_options(options: Options) -> BuildOptions:
    return options.tensorrt or BuildOptions(precision="fp32")


def _check_dla(wanted: BuildOptions, builder: trt.Builder) -> None:
    if wanted.dla_core is not None and wanted.dla_core >= builder.num_DLA_cores:
        raise AgentError(
            "not-possible-here",
            f"there is no DLA core {wanted.dla_core}: this device has {builder.num_DLA_cores}",
        )


def _not_on_dla(wanted: BuildOptions, network: Any, config: trt.IBuilderConfig) -> list[str]:
    """Return the layers of a network for the DLA that go to the GPU."""
    if wanted.dla_core is None:
        return []
    layers = (network.get_layer(number) for number in range(network.num_layers))
    return [layer.name for layer in layers if not config.can_run_on_DLA(layer)]


def _runtime(wanted: BuildOptions, log: _Log) -> trt.Runtime:
    runtime = trt.Runtime(log)
    if wanted.dla_core is not None:
        # Else an engine for core 1 runs on core 0 (microsoft/onnxruntime issue 26680).
        runtime.DLA_core = wanted.dla_core
    if wanted.version_compatible:
        # Such an engine brings code of its own (TensorRT documentation, "Version Compatibility").
        runtime.engine_host_code_allowed = True
    return runtime


def _layers(plan: Any, wanted: BuildOptions, log: _Log) -> list[Any]:
    engine = _runtime(wanted, log).deserialize_cuda_engine(plan)
    if engine is None:
        raise AgentError("bad-artifact", f"tensorrt cannot open what it built: {log.why()}")
    inspector = engine.create_engine_inspector()
    return parse_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
