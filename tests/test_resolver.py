"""What a Jetson can do, from the table and from what a device says of itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgexception.agent.tensorrt_options import BuildOptions
from edgexception.device import GpuFacts, ProbeRecord, RuntimeFacts
from edgexception.device.contract import CpuFacts, MemoryFacts
from edgexception.errors import EdgexError, NotPossibleHere, UsageError
from edgexception.quantize.dialects import DIALECTS
from edgexception.recipe import Recipe
from edgexception.resolver import (
    differences,
    fact_lines,
    find_module,
    name_jetson,
    releases_of,
    resolve,
    resolve_somewhere,
    settle,
    version_for,
)
from edgexception.targets import load_targets

MODULES = [name for name, row in load_targets().items() if row.module is not None]
KIT = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
GIB = 1 << 30


def machine(
    board: str | None = None,
    memory: float = 7.4,
    tensorrt: str | None = None,
    sm: int = 87,
    mode: str | None = None,
) -> ProbeRecord:
    gpu = GpuFacts(name="Orin", sm=sm, memory_bytes=int(memory * GIB), driver="12.6")
    facts = (
        RuntimeFacts(missing="not here")
        if tensorrt is None
        else RuntimeFacts(version=tensorrt, gpus=[gpu])
    )
    cpu = CpuFacts(
        model=None,
        logical_cpus=6,
        physical_cores=6,
        quota_cpus=None,
        usable_cores=6,
        flags=[],
        vnni=False,
    )
    return ProbeRecord(
        arch="aarch64" if board else "x86_64",
        system="Linux",
        python="3.10.12",
        board=board,
        cpu=cpu,
        memory=MemoryFacts(total_bytes=int(memory * GIB), available_bytes=None),
        power_mode=mode,
        numpy="1",
        runtimes={"tensorrt": facts},
    )


def recipe(target: str, **told: Any) -> Recipe:
    spec = {"target": target, "runtimes": ("tensorrt",), "precisions": ("fp16",)}
    model = {"kind": "checkpoint", "path": "net.keras"}
    sections = {"name": "x", "model": model, "targets": [{**spec, "tensorrt": told or None}]}
    return Recipe.model_validate(sections)


# --- the module -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "memory", "name"),
    [  # models of the device tree, as recorded by others; memory in GiB as Linux tells it
        (KIT, 7.4, "jetson-orin-nano-8gb"),
        (KIT, 3.4, "jetson-orin-nano-4gb"),
        (f"{KIT} Super", 7.4, "jetson-orin-nano-8gb-super"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, "jetson-orin-nx-16gb"),
        (
            "NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super",
            7.4,
            "jetson-orin-nx-8gb-super",
        ),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 29.8, "jetson-agx-orin-32gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "jetson-agx-thor"),
        ("Raspberry Pi 5 Model B", 7.8, None),
        (None, 62.0, None),
    ],
)
def test_a_module_is_known_by_its_board_and_memory(
    board: str | None, memory: float, name: str | None
) -> None:
    assert find_module(machine(board, memory)) == name


def test_the_alias_is_the_device_else_one_that_is_named_aloud() -> None:
    name, said = name_jetson("jetson", machine(KIT))
    assert (name, said) == ("jetson-orin-nano-8gb", f"target jetson is {name}: the device is {KIT}")
    name, said = name_jetson("jetson", machine())
    assert name == "jetson-orin-nano-8gb"
    assert "is taken to be jetson-orin-nano-8gb: no Jetson is here" in str(said)
    assert name_jetson("jetson-agx-thor", machine()) == ("jetson-agx-thor", None)
    with pytest.raises(UsageError, match="the device is NVIDIA Jetson Nano 2GB, and its module"):
        name_jetson("jetson", machine("NVIDIA Jetson Nano 2GB", 1.9))


# --- what can be built ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", MODULES)
def test_every_release_of_every_module_is_answered(target: str) -> None:
    written = DIALECTS["tensorrt"].opset
    for release in releases_of(target):
        if release.tensorrt.startswith("8."):
            with pytest.raises(NotPossibleHere, match=r"nearest possible: TensorRT 10\.3\.0"):
                resolve(target, BuildOptions("int8"), release.tensorrt)
            continue
        found = resolve(target, BuildOptions("int8"), release.tensorrt)
        assert found.dialect == "tensorrt"
        assert found.opset is not None
        assert found.opset >= written, "it reads what is exported"
        assert found.jetpack is not None
        assert ("--stronglyTyped" in found.trtexec) == release.tensorrt.startswith("10.")


@pytest.mark.parametrize(
    ("target", "version", "dla"),
    [
        ("jetson-orin-nano-8gb", "10.3.0", ()),
        ("jetson-orin-nx-16gb", "10.3.0", ("fp16",)),
        ("jetson-orin-nx-16gb", "10.7.0", ("fp16",)),
        ("jetson-orin-nx-16gb", "10.16.2", ()),
        ("jetson-orin-nx-16gb", "11.4.1", ()),
        ("jetson-agx-orin-64gb", "11.4.1", ("fp16", "int8")),
        ("jetson-agx-orin-64gb", "11.3.0", ()),
        ("jetson-agx-thor", "11.4.1", ()),
    ],
)
def test_what_the_dla_can_compute_in(target: str, version: str, dla: tuple[str, ...]) -> None:
    assert resolve(target, BuildOptions("int8"), version).dla == dla


@pytest.mark.parametrize(
    ("target", "version", "wanted", "nearest"),
    [
        ("jetson-orin-nano-8gb", "10.3.0", {"dla_core": 0}, "dla_core left out"),
        ("jetson-orin-nx-8gb", "10.3.0", {"dla_core": 1}, "dla_core 0"),
        ("jetson-orin-nx-16gb", "10.3.0", {"precision": "int8", "dla_core": 0}, "precision fp16"),
        ("jetson-orin-nx-16gb", "10.16.2", {"dla_core": 0}, "TensorRT 10.3.0"),
        ("jetson-agx-orin-64gb", "10.3.0", {"precision": "int8", "dla_core": 0}, "TensorRT 11.4.1"),
        (
            "jetson-orin-nx-16gb",
            "10.3.0",
            {"hardware_compatibility": "same-compute-capability"},
            "TensorRT 10.16.2",
        ),
    ],
)
def test_the_impossible_is_refused_with_the_nearest_possible(
    target: str, version: str, wanted: dict[str, Any], nearest: str
) -> None:
    on_dla = {"gpu_fallback": True} if "dla_core" in wanted else {}
    options = BuildOptions(**{"precision": "fp16", **on_dla, **wanted})
    with pytest.raises(EdgexError, match=f"nearest possible: {nearest}"):
        resolve(target, options, version)


@settings(deadline=None)
@given(
    target=st.sampled_from(MODULES),
    version=st.sampled_from(("8.6.2", "10.3.0", "10.7.0", "10.13.3", "10.16.2", "11.4.1")),
    options=st.builds(
        BuildOptions,
        precision=st.sampled_from(("fp32", "fp16", "int8", "int8-fp16")),
        hardware_compatibility=st.sampled_from(("none", "ampere-plus", "same-compute-capability")),
        dla_core=st.none() | st.integers(0, 2),
        gpu_fallback=st.booleans(),
    ),
)
def test_there_is_always_an_answer_or_a_remedy(
    target: str, version: str, options: BuildOptions
) -> None:
    fault: EdgexError | None = None
    try:
        resolve(target, options, version)
    except (NotPossibleHere, UsageError) as error:
        fault = error
    assert fault is None or "nearest possible: " in str(fault)


def test_without_a_device_one_version_that_can_is_enough() -> None:
    found = resolve_somewhere("jetson-orin-nx-16gb", BuildOptions("fp16"))
    assert [f.tensorrt for f in found] == ["10.16.2", "10.3.0"], "newest first"
    options = BuildOptions("fp16", dla_core=0, gpu_fallback=True)
    assert [f.tensorrt for f in resolve_somewhere("jetson-orin-nx-16gb", options)] == ["10.3.0"]
    with pytest.raises(NotPossibleHere, match="there is no DLA core 0"):
        resolve_somewhere("jetson-orin-nano-8gb", options)


# --- a recipe -------------------------------------------------------------------------------------


def test_a_recipe_is_settled_before_any_work() -> None:
    found, said = settle(recipe("jetson"), machine())
    assert [spec.target for spec in found.targets] == ["jetson-orin-nano-8gb"]
    assert len(said) == 1
    told = {"dla_core": 0, "gpu_fallback": True}
    with pytest.raises(NotPossibleHere, match="no DLA core"):
        settle(recipe("jetson", **told), machine())
    nx = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    found, _ = settle(recipe("jetson", **told), machine(nx, 15.3, "10.3.0.30"))
    assert found.targets[0].target == "jetson-orin-nx-16gb"
    with pytest.raises(NotPossibleHere, match=r"TensorRT 10\.16\.2 cannot do DLA"):
        settle(recipe("jetson", **told), machine(nx, 15.3, "10.16.2"))


def test_what_the_device_says_wins_and_the_difference_is_told() -> None:
    same = machine(KIT, 7.4, "10.3.0.30", mode="15W")
    assert differences("jetson-orin-nano-8gb", same) == []
    other = machine(f"{KIT} Super", 7.4, "10.9.0", sm=110, mode="MAXN_SUPER")
    said = "\n".join(differences("jetson-orin-nano-8gb", other))
    for part in (
        "(jetson-orin-nano-8gb-super); what the device says counts",
        "power mode MAXN_SUPER is not one of 7W, 15W",
        "its GPU is SM110, not SM87",
        "it has TensorRT 10.9.0; JetPack brings 8.6.2 (6.0), 10.3.0 (6.1)",
    ):
        assert part in said
    assert differences("cpu-x86", other) == []
    assert differences("jetson-orin-nano-8gb", machine()) == [], "nothing was probed"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("jetson-orin-nano-8gb", {}),
        ("jetson-agx-thor", {}),
        (
            "jetson-orin-nx-16gb",
            {"6.1": "fp16", "6.2": "fp16", "6.2.1": "fp16", "6.2.2": "fp16",
             "7.2": "none"},
        ),
        (
            "jetson-agx-orin-64gb",
            {"6.1": "fp16", "6.2": "fp16", "6.2.1": "fp16", "6.2.2": "fp16",
             "7.2": "none", "7.2.2": "fp16 and int8"},
        ),
    ],
)  # fmt: skip
def test_every_release_tells_what_a_dla_computes_in(target: str, told: dict[str, str]) -> None:
    """A module without one says so once, and its releases say nothing of it."""
    assert any("tensorrt graphs to ONNX opset" in line for line in fact_lines(target))
    found = {}
    for line in fact_lines(target):
        if line.startswith("JetPack ") and ", DLA " in line:
            found[line.split()[1].rstrip(":")] = line.split(", DLA ")[1].partition(" (")[0]
    assert found == told


def test_the_version_is_the_device_s_or_the_newest_that_can() -> None:
    on_dla = BuildOptions("fp16", dla_core=0, gpu_fallback=True)
    there = machine(KIT, 7.4, "10.3.0.30")
    assert version_for("jetson-agx-orin-64gb", on_dla, there) == "10.3.0.30"
    assert version_for("jetson-agx-orin-64gb", on_dla, machine()) == "11.4.1"
    assert version_for("jetson-orin-nx-16gb", on_dla, machine()) == "10.3.0"


def test_the_unknown_is_shown_as_unknown() -> None:
    lines = list(fact_lines("jetson-agx-thor"))
    assert "power mode 70W: dense TOPS INT8 unknown, FP16 unknown (probe)" in lines
    assert any(
        line.startswith("JetPack 7.2.2 can take: TensorRT 11.4.1, L4T unkn") for line in lines
    )
