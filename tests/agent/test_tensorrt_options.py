"""Options by version of TensorRT, held against what the vendor's own sources know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgexception.agent.protocol import AgentError
from edgexception.agent.tensorrt_options import (
    BuildOptions,
    Gpu,
    MeasureOptions,
    build_command,
    builder_calls,
    check,
    measure_command,
    parse_version,
    read_options,
)

VENDOR = json.loads(Path(__file__).with_name("tensorrt_vendor.json").read_text())
VERSIONS = {
    "10.3.0.30": ("10.3.0", "10.3.0"),
    "10.7.0.23": ("10.7.0", "10.7.0"),
    "10.13.3.9": ("10.13.3", "10.13.3.9"),
    "10.16.1.11": ("10.16", "10.16.1.11"),
    "11.4.1.0": ("11.1", "11.4.0.106"),
}
"""Version -> the nearest tag of trtexec and the nearest wheel of the Python API."""
MODEL, ENGINE, TIMES = Path("model.onnx"), Path("engine.plan"), Path("times.json")

MEASURES = st.builds(
    MeasureOptions,
    warmup_ms=st.integers(1, 10_000),
    duration_ms=st.integers(0, 60_000),
    min_iterations=st.integers(1, 1000),
    cuda_graph=st.booleans(),
    spin_wait=st.booleans(),
    transfers=st.booleans(),
    overlap=st.booleans(),
)
SHAPES = ((1, 150, 150, 3), (4, 150, 150, 3), (8, 150, 150, 3))
BUILDS = st.builds(
    BuildOptions,
    precision=st.sampled_from(("fp32", "fp16", "int8", "int8-fp16")),
    shapes=st.sampled_from((None, SHAPES, SHAPES[:1] * 3)),
    workspace_bytes=st.none() | st.integers(1, 1 << 40),
    version_compatible=st.booleans(),
    hardware_compatibility=st.sampled_from(("none", "ampere-plus", "same-compute-capability")),
    sparse_weights=st.booleans(),
    dla_core=st.none() | st.integers(0, 1),
    gpu_fallback=st.booleans(),
    profiling_verbosity=st.sampled_from(("none", "layer-names", "detailed")),
)


def known_flags(tag: str) -> set[str]:
    """Flags that trtexec of a tag reads: those of the tags before, and what changed."""
    flags: set[str] = set()
    for name, changes in VENDOR["trtexec"].items():
        flags = (flags | set(changes["added"].split())) - set(changes["removed"].split())
        if name == tag:
            return flags
    raise KeyError(tag)


def names(arguments: list[str]) -> set[str]:
    return {argument.partition("=")[0] for argument in arguments}


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"precision": "int8-fp16", **changes})


def accepted(build: BuildOptions, version: tuple[int, ...]) -> bool:
    try:
        check(build, version)
    except AgentError:
        return False
    return True


# --- against the vendor -------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@given(build=BUILDS, measure=MEASURES, shape=st.none() | st.just(SHAPES[0]))
def test_every_flag_is_one_that_this_trtexec_reads(
    version: str, build: BuildOptions, measure: MeasureOptions, shape: tuple[int, ...] | None
) -> None:
    number, flags = parse_version(version), known_flags(VERSIONS[version][0])
    if not accepted(build, number):
        return
    built = build_command(build, number, MODEL, ENGINE, Path("cache"), Path("layers.json"))
    profile = Path("profile.json")
    measured = measure_command(measure, number, ENGINE, TIMES, build.dla_core, profile, shape)
    assert names(built) | names(measured) <= flags
    assert len(names(built)) == len(built)
    assert len(names(measured)) == len(measured)


@pytest.mark.parametrize("version", VERSIONS)
@given(build=BUILDS)
def test_every_name_is_one_that_this_python_api_has(version: str, build: BuildOptions) -> None:
    number, known = parse_version(version), set(VENDOR["python"][VERSIONS[version][1]].split())
    if not accepted(build, number):
        return
    calls = builder_calls(build, number)
    told = {*calls.network_flags, *calls.set_flags, *calls.clear_flags, *calls.memory_pools}
    for name, value in calls.values.items():
        told |= {name, *(value.split(".") if isinstance(value, str) else ())}
    # Members of three letters are no strings of their own in a compiled library.
    assert {name for name in told if len(name) > 3} <= known | {"TF32"}


def test_the_lists_are_told_apart() -> None:
    """What version 11 removed is in the older lists and not in its own."""
    for gone in ("--fp16", "--best", "--calib"):
        assert gone in known_flags("10.16")
        assert gone not in known_flags("11.1")
    assert {"--noCudaGraph", "--noSpinWait", "--includeDataTransfers"} <= known_flags("11.1")
    assert "int8_calibrator" in VENDOR["python"]["10.16.1.11"].split()
    assert "int8_calibrator" not in VENDOR["python"]["11.4.0.106"].split()


# --- the same options, version by version -------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_in_the_words_of_the_version(version: str) -> None:
    number = parse_version(version)
    calls = builder_calls(options(), number)
    command = build_command(options(), number, MODEL, ENGINE)
    assert (calls.network_flags == ("STRONGLY_TYPED",)) == (number < (11,))
    assert ("--stronglyTyped" in command) == (number < (11,))
    assert calls.set_flags == ()
    for text in ("--fp16", "--int8", "--best", "--calib"):
        assert not any(argument.startswith(text) for argument in command)


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_is_float32(version: str) -> None:
    number = parse_version(version)
    assert builder_calls(options(precision="fp32"), number).clear_flags == ("TF32",)
    assert "--noTF32" in build_command(options(precision="fp32"), number, MODEL, ENGINE)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_measured_does_not_depend_on_the_defaults(version: str, wanted: bool) -> None:
    """Defaults of trtexec: off, off, transfers on until 10; on, on, off from 11."""
    number = parse_version(version)
    measure = MeasureOptions(
        200, 3, 10, cuda_graph=wanted, spin_wait=wanted, transfers=wanted, overlap=wanted
    )
    given_flags = names(measure_command(measure, number, ENGINE, TIMES))
    if number < (11,):
        state = {
            "cuda_graph": "--useCudaGraph" in given_flags,
            "spin_wait": "--useSpinWait" in given_flags,
            "transfers": "--noDataTransfers" not in given_flags,
        }
    else:
        state = {
            "cuda_graph": "--noCudaGraph" not in given_flags,
            "spin_wait": "--noSpinWait" not in given_flags,
            "transfers": "--includeDataTransfers" in given_flags,
        }
    state["overlap"] = "--exposeDMA" not in given_flags
    assert state == dict.fromkeys(state, wanted)


def test_a_whole_command_line() -> None:
    build = options(
        shapes=SHAPES,
        workspace_bytes=1 << 30,
        version_compatible=True,
        hardware_compatibility="same-compute-capability",
        sparse_weights=True,
    )
    command = build_command(build, (10, 13), MODEL, ENGINE, Path("t.cache"), Path("l.json"))
    assert command == [
        "--onnx=model.onnx",
        "--saveEngine=engine.plan",
        "--skipInference",
        "--noTF32",
        "--profilingVerbosity=detailed",
        "--sparsity=enable",
        "--minShapes=images:1x150x150x3",
        "--optShapes=images:4x150x150x3",
        "--maxShapes=images:8x150x150x3",
        "--stronglyTyped",
        "--memPoolSize=workspace:1073741824B",
        "--timingCacheFile=t.cache",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=sameComputeCapability",
        "--exportLayerInfo=l.json",
    ]
    calls = builder_calls(build, (10, 13))
    assert calls.set_flags == ("VERSION_COMPATIBLE", "SPARSE_WEIGHTS")
    assert calls.memory_pools == {"WORKSPACE": 1 << 30}
    assert calls.values == {
        "profiling_verbosity": "ProfilingVerbosity.DETAILED",
        "hardware_compatibility_level": "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
    }


def test_a_dla_of_version_10_has_its_precision_as_a_flag_and_one_of_11_has_not() -> None:
    build = options(precision="fp16", dla_core=1, gpu_fallback=True)
    for version, weak in (((10, 3), True), ((11, 4, 1), False)):
        calls = builder_calls(build, version)
        assert ("FP16" in calls.set_flags) == weak
        assert "GPU_FALLBACK" in calls.set_flags
        assert calls.values["default_device_type"] == "DeviceType.DLA"
        assert calls.values["DLA_core"] == 1
        assert calls.network_flags == ()
        command = build_command(build, version, MODEL, ENGINE)
        assert {"--useDLACore=1", "--allowGPUFallback"} <= set(command)
        assert "--stronglyTyped" not in command


# --- what is refused ----------------------------------------------------------------------------

ORIN = Gpu(87, "NVIDIA Jetson AGX Orin Developer Kit")
DLA = {"dla_core": 0, "gpu_fallback": True}
REFUSED: list[tuple[str, dict[str, Any], Gpu, str, str]] = [
    ("10.3.0", {"precision": "int8", **DLA}, ORIN, "not-possible-here", "11.4.1 is the first"),
    ("10.8.0", {"precision": "fp16", **DLA}, ORIN, "not-possible-here", "10.7 is the last"),
    ("10.13.3", {"precision": "fp16", **DLA}, ORIN, "not-possible-here", "11.4.1 can"),
    ("11.4.0", {"precision": "fp16", **DLA}, ORIN, "not-possible-here", "11.4.1 can"),
    ("11.4.1", {"precision": "fp16", **DLA}, Gpu(110, "Jetson Thor"), "usage", "this is Jetson T"),
    ("10.3.0", {"precision": "fp32", **DLA}, ORIN, "usage", "FP16 and INT8 only"),
    ("10.3.0", {"precision": "fp16", "shapes": SHAPES, **DLA}, ORIN, "usage", "one engine per"),
    ("10.3.0", {"precision": "fp16", "dla_core": 0}, ORIN, "usage", "set gpu_fallback"),
    ("10.3.0", {"gpu_fallback": True}, ORIN, "usage", "no effect without dla_core"),
    (
        "10.7.0",
        {"hardware_compatibility": "same-compute-capability"},
        Gpu(),
        "not-possible-here",
        "10.9 is the first that can",
    ),
    ("10.3.0", {"hardware_compatibility": "ampere-plus"}, Gpu(75), "usage", "needs SM 80"),
    ("10.3.0", {"sparse_weights": True}, Gpu(75), "usage", "no effect"),
]


@pytest.mark.parametrize(("version", "changes", "gpu", "kind", "says"), REFUSED)
def test_what_cannot_be_is_refused_with_what_can(
    version: str, changes: dict[str, Any], gpu: Gpu, kind: str, says: str
) -> None:
    with pytest.raises(AgentError, match=says) as caught:
        check(options(**changes), parse_version(version), gpu)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("version", "changes", "gpu"),
    [
        ("10.3.0", {"precision": "fp16", **DLA}, ORIN),
        ("10.7.0.23", {"precision": "fp16", **DLA}, ORIN),
        ("11.4.1", {"precision": "int8-fp16", **DLA}, ORIN),
        ("10.9.0", {"hardware_compatibility": "same-compute-capability"}, Gpu(75)),
        ("10.3.0", {"hardware_compatibility": "ampere-plus", "sparse_weights": True}, Gpu(80)),
        ("11.0.0", {"shapes": SHAPES, "version_compatible": True}, Gpu()),
    ],
)
def test_what_can_be_is_not_refused(version: str, changes: dict[str, Any], gpu: Gpu) -> None:
    check(options(**changes), parse_version(version), gpu)


@pytest.mark.parametrize("text", ["8.5.2", "12.0.0", "", "ten", "10", "v10.3"])
def test_versions_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(AgentError, match=r"10\.0 is the first"):
        parse_version(text)


@given(st.text(max_size=30))
def test_any_text_is_a_version_or_refused(text: str) -> None:
    try:
        version = parse_version(text)
    except AgentError as error:
        assert error.kind == "not-possible-here"  # noqa: PT017 - either end is right
    else:
        assert version[0] in (10, 11)


# --- from a request -----------------------------------------------------------------------------


def test_a_request_says_what_it_wants() -> None:
    fields = {"precision": "fp16", "dla_core": 1, "gpu_fallback": True, "workspace_bytes": None}
    assert read_options(fields) == BuildOptions("fp16", dla_core=1, gpu_fallback=True)
    assert read_options(None) is None


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {},
        {"precision": "int4"},
        {"precision": "fp16", "dla_core": True},
        {"precision": "fp16", "dla_core": 1.0},
        {"precision": "fp16", "workspace_bytes": 0},
        {"precision": "fp16", "sparse_weights": 1},
        {"precision": "fp16", "shapes": [[1]]},
        {"precision": "fp16", "hardware_compatibility": ["none"]},
    ],
)
def test_a_request_for_anything_else_is_refused(fields: object) -> None:
    with pytest.raises(AgentError, match="request: tensorrt"):
        read_options(fields)
