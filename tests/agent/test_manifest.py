"""An engine is opened only where its manifest fits: the file, the version, the machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgexception.agent import manifest
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import ENGINE_FILES, Options
from edgexception.agent.tensorrt_options import BuildOptions
from edgexception.device import local_device
from edgexception.errors import BadArtifact, EdgexError, NotPossibleHere

RUNTIMES = ("onnxruntime", "openvino", "tensorrt-rtx")
GPU = {"name": "NVIDIA Fake", "sm": 89, "memory_bytes": 1, "driver": "13.0"}
VERSION = "10.13.3.9"
RTX = {"version": "1.7.1.116", "devices": [GPU["name"]], "gpus": [GPU]}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module", params=RUNTIMES)
def built(
    request: pytest.FixtureRequest, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The folder of a runtime's engine, as a build leaves it."""
    if request.param == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx_bindings")
    folder = tmp_path_factory.mktemp("built") / "engine"
    asked = {"runtime": request.param, "model": "m.onnx", "batch": 1, "threads": 1}
    asked["sm"] = 89 if request.param == "tensorrt-rtx" else None
    local_device().call("build", asked, {"m.onnx": tiny_onnx}, folder)
    return request.param, folder


def run(runtime: str, folder: Path) -> None:
    engine = ENGINE_FILES[runtime]
    asked = {
        "runtime": runtime, "engine": engine, "manifest": "engine.json", "batch": 1, "threads": 1,
        "images": None, "timing": {"warmup_ms": 1, "duration_ms": 1, "min_iterations": 1},
    }  # fmt: skip
    files = {name: folder / name for name in (engine, "engine.json")}
    local_device().call("run", asked, files, folder / "out")


def changed(built: tuple[str, Path], tmp_path: Path, change: Change) -> Path:
    folder = Path(shutil.copytree(built[1], tmp_path / "copy"))
    path = folder / "engine.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def test_it_says_what_the_engine_was_built_from_and_with(
    built: tuple[str, Path], tiny_onnx: Path
) -> None:
    runtime, folder = built
    content = json.loads((folder / "engine.json").read_bytes())
    for name, path in (("onnx", tiny_onnx), ("engine", folder / ENGINE_FILES[runtime])):
        assert content[f"{name}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content["runtime"] == runtime
    sm = 89 if runtime == "tensorrt-rtx" else None
    assert content["options"] == {
        "batch": 1, "batches": None, "threads": 1, "sm": sm, "tensorrt": None,
    }  # fmt: skip
    assert content["needs"]["version"] == content["versions"][runtime]
    assert set(content["needs"]) == (
        {"version", "sm"} if runtime == "tensorrt-rtx" else {"version", "arch", "flags"}
    )
    assert content["built_on"]["arch"]
    assert content["settings"]


def version(content: dict[str, Any]) -> None:
    content["needs"]["version"] = "0.1"


def processor(content: dict[str, Any]) -> None:
    content["needs"] |= {"arch": "z80", "flags": ["avx9"], "sm": 30}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (version, NotPossibleHere, "built for version 0.1, here is .*edgex build-engine"),
        (processor, NotPossibleHere, "z80.*differs in .*avx9|sm 30|no NVIDIA GPU here"),
        (lambda c: c["needs"].clear(), NotPossibleHere, "built for version None"),
        (lambda c: c.update(engine_sha256="0" * 64), BadArtifact, "not the engine that engine.jso"),
        (lambda c: c.update(engine_sha256=None), BadArtifact, "changed, cut or mixed up"),
        (lambda c: c.update(runtime="tflite"), BadArtifact, "is an engine of tflite, not of"),
        (lambda c: c.update(needs=[]), BadArtifact, "is no manifest"),
        (lambda c: c.update(allows=None), BadArtifact, "is no manifest"),
        (lambda c: c["options"].pop("batches"), BadArtifact, "is no manifest"),
        (lambda c: c["options"].update(batches=[8, 8, 1]), BadArtifact, "is no manifest"),
        (lambda c: c.update(format=2), BadArtifact, "is no manifest"),
        (lambda c: c.pop("layers"), BadArtifact, "is no manifest"),
        (lambda c: c.clear(), BadArtifact, "is no manifest"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_engine_is_opened(
    built: tuple[str, Path],
    tmp_path: Path,
    change: Change,
    error: type[EdgexError],
    says: str,
) -> None:
    folder = changed(built, tmp_path, change)
    with pytest.raises(error, match=says) as caught:
        run(built[0], folder)
    assert caught.value.exit_code == (3 if error is NotPossibleHere else 4)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("how", ["truncated", "one bit", "longer", "another"])
def test_another_file_than_was_built_is_refused(
    built: tuple[str, Path], tmp_path: Path, how: str
) -> None:
    runtime, folder = built[0], changed(built, tmp_path, lambda _: None)
    path = folder / ENGINE_FILES[runtime]
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:-1],
            "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "longer": content + b"\0",
            "another": b"an engine",
        }[how]
    )
    with pytest.raises(BadArtifact, match="build it again"):
        run(runtime, folder)


def test_an_engine_without_its_manifest_is_not_opened(
    built: tuple[str, Path], tmp_path: Path
) -> None:
    folder = changed(built, tmp_path, lambda _: None)
    (folder / "engine.json").unlink()
    with pytest.raises(BadArtifact, match=r"engine\.json is not there"):
        run(built[0], folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ).map(lambda value: json.dumps(value).encode())
)
def test_anything_else_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "engine.json").write_bytes(content)
    (tmp_path / "engine.rtx").write_bytes(b"x")
    with pytest.raises(AgentError, match=r"engine\.json is no manifest") as caught:
        manifest.check(tmp_path / "engine.json", tmp_path / "engine.rtx", "tensorrt-rtx", RTX)
    assert caught.value.kind == "bad-artifact"


def written(folder: Path, runtime: str, gpus: list[dict[str, Any]], **told: Any) -> Path:
    """The folder of an engine that was built with these GPUs at hand, for SM89."""
    (folder / "model.onnx").write_bytes(b"a model")
    (folder / "engine").write_bytes(b"an engine")
    options = Options(1, 1, 89, BuildOptions(precision="fp16", **told) if told else None)
    record = {"runtime": runtime, "engine": "engine", "settings": {}, "versions": {}}
    facts = {"version": VERSION, "devices": [], "gpus": gpus}
    manifest.write(folder, folder / "model.onnx", options, record, facts)
    return folder


def opened(folder: Path, runtime: str, version: str = VERSION, **gpu: Any) -> str:
    """What is wrong with opening it on another GPU; "" for nothing."""
    facts = {"version": version, "gpus": [{**GPU, **gpu}] if gpu != {"none": True} else []}
    try:
        manifest.check(folder / "engine.json", folder / "engine", runtime, facts)
    except AgentError as error:
        return f"{error.kind}: {error}"
    return ""


def test_an_engine_of_a_gpu_fits_its_compute_capability(tmp_path: Path) -> None:
    """The driver and the memory may differ; the version and the capability may not."""
    folder = written(tmp_path, "tensorrt-rtx", [])
    assert opened(folder, "tensorrt-rtx") == ""
    assert opened(folder, "tensorrt-rtx", name="another", driver="14.0") == ""
    refused = opened(folder, "tensorrt-rtx", sm=120)
    assert refused.startswith("not-possible-here: ")
    assert "built for sm 89, here is 120. Build it here with `edgex build-engine`" in refused
    assert "no NVIDIA GPU here" in opened(folder, "tensorrt-rtx", none=True)
    assert f"version {VERSION}, here is 10.14.0" in opened(folder, "tensorrt-rtx", "10.14.0")


def test_an_engine_of_tensorrt_fits_its_model_of_gpu(tmp_path: Path) -> None:
    folder = written(tmp_path, "tensorrt", [GPU])
    assert opened(folder, "tensorrt") == ""
    assert "built for gpu NVIDIA Fake, here is another" in opened(
        folder, "tensorrt", name="another"
    )
    assert "no NVIDIA GPU here" in opened(folder, "tensorrt", none=True)


@pytest.mark.parametrize(
    ("told", "version", "gpu", "fits"),
    [
        ({"hardware_compatibility": "same-compute-capability"}, VERSION, {"name": "b"}, True),
        ({"hardware_compatibility": "same-compute-capability"}, VERSION, {"sm": 86}, False),
        ({"hardware_compatibility": "ampere-plus"}, VERSION, {"name": "b", "sm": 80}, True),
        ({"hardware_compatibility": "ampere-plus"}, VERSION, {"name": "b", "sm": 75}, False),
        ({"hardware_compatibility": "ampere-plus"}, "10.14.0", {}, False),
        ({"version_compatible": True}, "10.14.0", {}, True),
        ({"version_compatible": True}, "10.9.0", {}, False),
        ({"version_compatible": True}, "11.0.0", {}, False),
        ({"version_compatible": True}, "10.14.0", {"name": "b"}, False),
    ],
)
def test_what_an_engine_of_tensorrt_was_built_to_allow(
    tmp_path: Path, told: dict[str, Any], version: str, gpu: dict[str, Any], *, fits: bool
) -> None:
    folder = written(tmp_path, "tensorrt", [GPU], **told)
    assert (opened(folder, "tensorrt", version, **gpu) == "") == fits
