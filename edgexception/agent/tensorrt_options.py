"""What TensorRT 10 and 11 are told to build and to measure, as data.

One set of options becomes the calls of the Python API, or the command line of `trtexec`, as each
version wants them; what a version cannot do is refused before anything starts. Not run on hardware.

Sources, by version: samples/common/sampleOptions.cpp and sampleEngines.cpp of NVIDIA/TensorRT on
GitHub at v10.3.0, v10.7.0, v10.13.3, v10.16, v11.0 and v11.1 (trtexec); include/NvInfer.h at the
same tags; the names in the PyPI wheels tensorrt-cu12-bindings 10.3.0 to 11.4.0.106 (Python); the
pages "Migrating trtexec Usage from TensorRT 10.x to 11.x" and "Working with DLA" for 11.4.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgexception.agent.protocol import AgentError

Version = tuple[int, ...]
Compatibility = Literal["none", "ampere-plus", "same-compute-capability"]

FIRST, AFTER = (10,), (12,)
"""The versions known here: from the first on, and before the other."""

# BuilderFlag, HardwareCompatibilityLevel and MemoryPoolType: NvInfer.h, the same names in Python.
_LEVELS = {
    "ampere-plus": ("AMPERE_PLUS", "ampere+"),
    "same-compute-capability": ("SAME_COMPUTE_CAPABILITY", "sameComputeCapability"),
}
_VERBOSITY = {"none": "NONE", "layer-names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}
_VERBOSITY_FLAGS = {"none": "none", "layer-names": "layer_names_only", "detailed": "detailed"}


@dataclass(frozen=True)
class Gpu:
    """What is known of the device; None is not known, and then nothing is refused for it."""

    sm: int | None = None
    board: str | None = None


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built. `shapes` is (min, opt, max) of `images`; None is a fixed graph."""

    precision: Literal["fp32", "fp16", "int8", "int8-fp16"]
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    workspace_bytes: int | None = None
    """Most scratch memory of a layer; None is what the device has."""
    version_compatible: bool = False
    """The engine opens in later versions of the same major version, too."""
    hardware_compatibility: Compatibility = "none"
    sparse_weights: bool = False
    """Use kernels for weights with 2 zeros in every 4."""
    dla_core: int | None = None
    gpu_fallback: bool = False
    """What the DLA cannot run goes to the GPU; otherwise such a layer is an error."""
    profiling_verbosity: Literal["none", "layer-names", "detailed"] = "detailed"


@dataclass(frozen=True)
class MeasureOptions:
    """How trtexec measures. Nothing has a default: version 11 has others than version 10."""

    warmup_ms: int
    duration_ms: int
    min_iterations: int
    cuda_graph: bool
    spin_wait: bool
    transfers: bool
    """Whether images and logits are copied between host and device in the measured time."""
    overlap: bool
    """Whether one inference is copied while another computes: trtexec's own way."""


ONE_INFERENCE = MeasureOptions(
    warmup_ms=0,
    duration_ms=0,
    min_iterations=1,
    cuda_graph=False,
    spin_wait=False,
    transfers=True,
    overlap=False,
)
"""As the agent measures: one after the other, what comes and goes included."""


@dataclass(frozen=True)
class BuilderCalls:
    """What the Python API is told: names of enum members, and values of IBuilderConfig."""

    network_flags: tuple[str, ...] = ()
    set_flags: tuple[str, ...] = ()
    clear_flags: tuple[str, ...] = ()
    values: dict[str, str | int] = field(default_factory=dict)
    """Property -> a number, or "Enum.MEMBER"."""
    memory_pools: dict[str, int] = field(default_factory=dict)


def parse_version(text: str) -> Version:
    """Return "10.3.0.30" as numbers; a not-possible-here AgentError for versions not known here."""
    found = re.match(r"\d+(\.\d+){1,3}", text)
    version = tuple(int(part) for part in found[0].split(".")) if found else ()
    if not FIRST <= version < AFTER:
        raise AgentError(
            "not-possible-here",
            f"TensorRT {text!r} is not known here: 10.0 is the first version whose networks can be "
            "strongly typed from end to end, 11 the last known; install one of these",
        )
    return version


_FIELDS: dict[str, Sequence[object]] = {
    "precision": ("fp32", "fp16", "int8", "int8-fp16"),
    "workspace_bytes": range(1, 1 << 50),
    "version_compatible": (False, True),
    "hardware_compatibility": ("none", *_LEVELS),
    "sparse_weights": (False, True),
    "dla_core": range(16),
    "gpu_fallback": (False, True),
}


def read_options(fields: object) -> BuildOptions | None:
    """Return the options that a request has, None for none; raise a usage AgentError for others."""
    if fields is None:
        return None
    if not isinstance(fields, dict) or fields.get("precision") is None:
        raise AgentError("usage", "request: tensorrt must be null or an object with a precision")
    given: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    for key, value in given.items():
        allowed = _FIELDS.get(key, ())
        # 1 equals True, and a range is asked for integers only.
        if not any(type(value) is type(other) for other in allowed[:1]) or value not in allowed:
            raise AgentError(
                "usage", f"request: tensorrt has no {str(key)[:40]} {str(value)[:40]!r}"
            )
    return BuildOptions(**given)


# --- what a version can -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One option that not every version or device has."""

    asked: bool
    """Whether the options ask for it."""
    versions: tuple[tuple[Version, Version], ...]
    """From each first version on, and before the second."""
    what: str
    can: str
    """Which versions can, in words."""
    source: str


def _rules(options: BuildOptions) -> tuple[Rule, ...]:
    dla = options.dla_core is not None
    return (
        Rule(
            options.hardware_compatibility == "same-compute-capability",
            (((10, 9), AFTER),),
            "hardware compatibility within one compute capability",
            "10.9 is the first that can",
            "NvInfer.h: HardwareCompatibilityLevel has kSAME_COMPUTE_CAPABILITY from v10.9.0 on",
        ),
        Rule(
            dla,
            ((FIRST, (10, 8)), ((11, 4, 1), AFTER)),
            "DLA",
            "10.7 is the last of version 10 that can, and 11.4.1 can on Jetson AGX Orin",
            # The two pages are of two versions: 11.4.0 has none on JetPack, 11.4.1 brings it back.
            "Working with DLA, TensorRT 11.4.0 and 11.4.1",
        ),
        Rule(
            dla and options.precision.startswith("int8"),
            (((11, 4, 1), AFTER),),
            "DLA with Q/DQ nodes",
            "11.4.1 is the first that can (on Jetson AGX Orin); until 10.7 the DLA has implicit "
            "quantization only, so there it runs fp16",
            # 11 has no implicit quantization, and its list of DLA layers has INT8.
            "Strongly Typed Networks for DLA, 11.4.1; NVIDIA/TensorRT issue 2222; trtexec v10.7.0, "
            "which sets kFP16 or kINT8 for it",
        ),
    )


def check(options: BuildOptions, version: Version, gpu: Gpu | None = None) -> None:
    """Raise the AgentError of the first option that this version or device cannot do."""
    for rule in _rules(options):
        if rule.asked and not any(first <= version < end for first, end in rule.versions):
            raise AgentError(
                "not-possible-here",
                f"TensorRT {_text(version)} cannot do {rule.what}: {rule.can} ({rule.source})",
            )
    for fault in _misfits(options, version, gpu or Gpu()):
        raise AgentError("usage", fault)


def _misfits(options: BuildOptions, version: Version, gpu: Gpu) -> list[str]:
    dla, level = options.dla_core is not None, options.hardware_compatibility
    sm, board = gpu.sm, gpu.board or ""
    shapes = set(options.shapes or ())
    minimum = {"ampere-plus": 80, "same-compute-capability": 75}.get(level, 0)
    faults = [
        (options.gpu_fallback and not dla, "gpu_fallback has no effect without dla_core"),
        (
            dla and options.precision == "fp32",
            "the DLA computes in FP16 and INT8 only (Working with DLA): build fp16",
        ),
        (
            dla and not options.gpu_fallback,
            "the network reads uint8 photos, which no DLA reads, and changing the format of inputs "
            "needs the GPU (NVIDIA/TensorRT issue 3438): set gpu_fallback",
        ),
        (
            dla and len(shapes) > 1,
            "on the DLA the least, best and greatest batch must be one (NvInferRuntime.h, "
            "IOptimizationProfile::setDimensions): build one engine per batch size",
        ),
        (
            dla and version >= (11,) and gpu.board is not None and "AGX Orin" not in board,
            f"TensorRT {_text(version)} has DLA on Jetson AGX Orin with JetPack 7.2.2 or later "
            f"only (Working with DLA, 11.4.1); this is {board}: leave out dla_core",
        ),
        (
            sm is not None and sm < minimum,
            f"hardware compatibility {level} needs SM {minimum} or newer (NvInfer.h, "
            f"HardwareCompatibilityLevel); this GPU is SM {sm}",
        ),
        (
            options.sparse_weights and sm is not None and sm < 80,
            "2:4 sparse kernels need SM 80 or newer (TensorRT documentation, Structured Sparsity); "
            f"on this GPU (SM {sm}) sparse_weights has no effect",
        ),
    ]
    return [text for wrong, text in faults if wrong]


# --- the Python API -----------------------------------------------------------------------------


def builder_calls(options: BuildOptions, version: Version) -> BuilderCalls:
    """Return what the Python API of a version is told.

    TF32 is on by default and rounds the inputs of float32 layers to 10 bits (NvInfer.h,
    BuilderFlag::kTF32): an engine that is called fp32 has it off. From 11 on every network is
    strongly typed, and the flag is deprecated and ignored. On a DLA of version 10 the precision is
    a builder flag, which a strongly typed network refuses.
    """
    dla = options.dla_core is not None
    weak = dla and version < (11,)
    flags = [
        name
        for name, wanted in (
            ("VERSION_COMPATIBLE", options.version_compatible),
            ("SPARSE_WEIGHTS", options.sparse_weights),
            ("GPU_FALLBACK", options.gpu_fallback),
            ("FP16", weak),
            ("PREFER_PRECISION_CONSTRAINTS", weak),
        )
        if wanted
    ]
    values: dict[str, str | int] = {
        "profiling_verbosity": f"ProfilingVerbosity.{_VERBOSITY[options.profiling_verbosity]}"
    }
    if options.dla_core is not None:
        values |= {"default_device_type": "DeviceType.DLA", "DLA_core": options.dla_core}
    if options.hardware_compatibility != "none":
        level, _ = _LEVELS[options.hardware_compatibility]
        values["hardware_compatibility_level"] = f"HardwareCompatibilityLevel.{level}"
    pools = {} if options.workspace_bytes is None else {"WORKSPACE": options.workspace_bytes}
    return BuilderCalls(
        network_flags=() if weak or version >= (11,) else ("STRONGLY_TYPED",),
        set_flags=tuple(flags),
        clear_flags=("TF32",),
        values=values,
        memory_pools=pools,
    )


# --- trtexec ------------------------------------------------------------------------------------


def build_command(
    options: BuildOptions,
    version: Version,
    model: Path,
    engine: Path,
    timing_cache: Path | None = None,
    layers: Path | None = None,
) -> list[str]:
    """Return the arguments of trtexec that build an engine and run nothing.

    Measured times of kernels are read from the file `timing_cache`, and kept there, where it is
    named. Its name must say what it is valid for: trtexec takes the times of another GPU, too
    (setTimingCache with ignoreMismatch: NVIDIA/TensorRT, samples/utils/timingCache.cpp at v10.3.0,
    shared/utils/cacheUtils.cpp from v10.13.3 on). `layers` is where the layers of the engine are
    written as JSON.
    On a DLA of version 10 trtexec sets FP16 by itself where INT8 is not asked for.
    """
    dla = options.dla_core is not None
    level = options.hardware_compatibility
    arguments = [
        f"--onnx={model}",
        f"--saveEngine={engine}",
        "--skipInference",
        "--noTF32",
        f"--profilingVerbosity={_VERBOSITY_FLAGS[options.profiling_verbosity]}",
        f"--sparsity={'enable' if options.sparse_weights else 'disable'}",
    ]
    for name, shape in zip(("min", "opt", "max"), options.shapes or (), strict=False):
        arguments.append(f"--{name}Shapes={images_of(shape)}")
    optional = {
        "--stronglyTyped": version < (11,) and not dla,
        f"--memPoolSize=workspace:{options.workspace_bytes}B": options.workspace_bytes is not None,
        f"--timingCacheFile={timing_cache}": timing_cache is not None,
        "--versionCompatible": options.version_compatible,
        f"--hardwareCompatibilityLevel={_LEVELS.get(level, ('', ''))[1]}": level != "none",
        f"--useDLACore={options.dla_core}": dla,
        "--allowGPUFallback": options.gpu_fallback,
        f"--exportLayerInfo={layers}": layers is not None,
    }
    return [*arguments, *(text for text, wanted in optional.items() if wanted)]


def measure_command(
    options: MeasureOptions,
    version: Version,
    engine: Path,
    times: Path,
    dla_core: int | None = None,
    profile: Path | None = None,
    shape: tuple[int, ...] | None = None,
) -> list[str]:
    """Return the arguments of trtexec that measure an engine, a dynamic one with images of `shape`.

    `shape` is that of `images`: an engine of an open graph has none of its own, and takes 1 as its
    batch where none is named; one of a fixed graph must have this one (v10.3.0 to v11.1,
    sampleInference.cpp, setUpInference).

    Version 11 turned CUDA graph and spin-wait on and transfers off, and the flags that ask for
    what is now the default are deprecated. Each version gets the flags of what is not its default,
    so the same options measure the same in both.
    """
    arguments = [
        f"--loadEngine={engine}",
        f"--warmUp={options.warmup_ms}",
        f"--duration={options.duration_ms / 1000:g}",
        f"--iterations={options.min_iterations}",
        "--infStreams=1",
        f"--exportTimes={times}",
    ]
    if version < (11,):
        switches = {
            "--useCudaGraph": options.cuda_graph,
            "--useSpinWait": options.spin_wait,
            "--noDataTransfers": not options.transfers,
        }
    else:
        switches = {
            "--noCudaGraph": not options.cuda_graph,
            "--noSpinWait": not options.spin_wait,
            "--includeDataTransfers": options.transfers,
        }
    switches["--exposeDMA"] = not options.overlap
    arguments += [flag for flag, wanted in switches.items() if wanted]
    if shape is not None:
        arguments.append(f"--shapes={images_of(shape)}")
    if dla_core is not None:
        arguments.append(f"--useDLACore={dla_core}")
    if profile is not None:
        arguments.append(f"--exportProfile={profile}")
        # In version 11 the profile is always made in a run of its own; the flag is deprecated.
        arguments += ["--separateProfileRun"] if version < (11,) else []
    return arguments


def images_of(shape: Sequence[int]) -> str:
    """Return a shape of the input as trtexec and ONNX Runtime's TensorRT provider read it."""
    return f"images:{'x'.join(map(str, shape))}"


def _text(version: Version) -> str:
    return ".".join(map(str, version))
