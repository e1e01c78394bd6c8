"""`trtexec` as the agent's runtime, the zipapp in Pythons without numpy: see fake_trtexec.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bare_python import VERSIONS, bare_python
from fake_trtexec import install, install_driver
from onnx import helper
from tiny_engine import tiny_images, tiny_logits, tiny_model

from edgexception.agent.placement import METADATA
from edgexception.device import BuildRecord, LocalDevice, ProbeRecord, Progress, RunRecord
from edgexception.device.archive import agent_archive
from edgexception.errors import (
    BadArtifact,
    EdgexError,
    MeasurementInvalid,
    NotPossibleHere,
    OutOfResources,
    UsageError,
)

ASKED = {"runtime": "tensorrt", "batch": 4, "threads": 1}
RUN = {**ASKED, "engine": "engine.plan", "manifest": "engine.json"}
TIMING = {"warmup_ms": 20, "duration_ms": 1, "min_iterations": 7}
Place = Callable[..., LocalDevice]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def place(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Makes this machine one with `trtexec` of a version, an Orin, and a Python without numpy."""

    def make(version: str = "10.3.0", *faults: str, python: str = VERSIONS[0]) -> LocalDevice:
        archive = tmp_path / "agent.pyz"
        archive.write_bytes(agent_archive())
        install(tmp_path / "bin", version, *faults)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
        return LocalDevice(command=(bare_python(python), "-I", "-S", str(archive)))

    return make


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny network with an open batch, and a plan of its one layer."""
    written = tiny_model()
    written.graph.node[2].name = "conv"
    helper.set_model_props(
        written, {METADATA: json.dumps({"conv": {"precision": "fp32", "macs": 10}})}
    )
    onnx.save(written, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def build(device: LocalDevice, model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    steps: list[Progress] = changes.pop("steps", [])
    request = {**ASKED, "model": "m", **changes}
    return device.call("build", request, {"m": model}, out, steps.append)


def run(device: LocalDevice, built: Path, out: Path, **changes: Any) -> dict[str, Any]:
    files = {name: built / name for name in ("engine.plan", "engine.json")}
    images = changes.pop("images", None)
    if images is not None:
        files["images.npy"] = built.parent / "images.npy"
        np.save(files["images.npy"], images)
    request = {**RUN, "images": None if images is None else "images.npy", "timing": None, **changes}
    return device.call("run", request, files, out)


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "bin/calls").read_text().splitlines()]


# --- what works -----------------------------------------------------------------------------------


def test_a_timing_cache_is_read_and_extended(place: Place, model: Path, tmp_path: Path) -> None:
    device, earlier = place(), tmp_path / "earlier"
    earlier.write_bytes(b"timed;")
    request = {**ASKED, "model": "m", "timing_cache": "c"}
    device.call("build", request, {"m": model, "c": earlier}, tmp_path / "built")
    assert (tmp_path / "built/timing.cache").read_bytes() == b"timed;timed;"
    assert "--timingCacheFile=cache" in calls(tmp_path)[-1]


def test_a_dynamic_engine_answers_every_batch(place: Place, model: Path, tmp_path: Path) -> None:
    device, pixels = place(), tiny_images(5)
    record = build(device, model, tmp_path / "built", batches=[1, 4, 8])
    shapes = ("minShapes=images:1x", "optShapes=images:4x", "maxShapes=images:8x")
    assert {f"--{shape}12x12x3" for shape in shapes} <= set(record["settings"]["arguments"])
    for batch in (1, 8):
        out = tmp_path / f"run-{batch}"
        run(device, tmp_path / "built", out, images=pixels, batch=batch)
        logits = np.load(out / "logits.npy", allow_pickle=False)
        np.testing.assert_allclose(logits, tiny_logits(pixels), rtol=1e-4, atol=1e-3)
    with pytest.raises(UsageError, match="takes batches of 1 to 8, the request says 9"):
        run(device, tmp_path / "built", tmp_path / "run-9", images=pixels, batch=9)


def test_sparse_kernels_are_for_sparse_weights(place: Place, model: Path, tmp_path: Path) -> None:
    told = {"precision": "fp32", "sparse_weights": True}
    with pytest.raises(UsageError, match="has 2 zeros in every 4 weights"):
        build(place(), model, tmp_path / "built", tensorrt=told)


@pytest.mark.parametrize(("version", "python"), [("10.3.0", VERSIONS[0]), ("11.4.1", VERSIONS[1])])
def test_probe_build_and_run_without_numpy(
    version: str, python: str, place: Place, model: Path, tmp_path: Path
) -> None:
    device = place(version, python=python)
    machine = ProbeRecord.model_validate(device.call("probe", {}, {}, tmp_path / "probe"))
    found = machine.runtimes["tensorrt"]
    assert machine.python.startswith(f"{python}.")
    assert (machine.numpy, found.missing) == (None, None)
    assert found.version is not None
    assert found.version.startswith(version)
    assert found.program == str(tmp_path / "bin/trtexec")
    assert [(gpu.name, gpu.sm) for gpu in found.gpus] == [("Orin", 87)]
    assert all(facts.missing for name, facts in machine.runtimes.items() if name != "tensorrt")

    record = BuildRecord.model_validate(build(device, model, tmp_path / "built"))
    assert record.versions == {"tensorrt": found.version}
    assert record.settings["program"] == found.program
    assert "--minShapes=images:4x12x12x3" in record.settings["arguments"]
    assert ("--stronglyTyped" in record.settings["arguments"]) == version.startswith("10")
    assert [(layer.name, layer.executed) for layer in record.placement] == [("conv", "fp32")]
    assert any("trtexec takes its place" in line for line in record.log)
    needs = json.loads((tmp_path / "built/engine.json").read_bytes())["needs"]
    assert needs == {"version": found.version, "sm": 87, "gpu": "Orin"}

    pixels = tiny_images(10)
    answer = run(
        device, tmp_path / "built", tmp_path / "run", images=pixels, timing=TIMING, profile=5
    )
    ran = RunRecord.model_validate(answer)
    logits = np.load(tmp_path / "run/logits.npy", allow_pickle=False)
    assert (logits.dtype, logits.shape) == (np.float32, (10, 7))
    np.testing.assert_allclose(logits, tiny_logits(pixels), rtol=1e-4, atol=1e-3)
    times = np.load(tmp_path / "run/times_ns.npy", allow_pickle=False)
    assert times.dtype == np.int64
    assert len(times) >= 7
    assert times.min() >= 25_000, "0.0125 ms each way are in it"
    assert ran.warmup_iterations > 0
    assert ran.open_s is None
    assert str(ran.timing) == (
        "timed by trtexec: cuda graph off, spin wait off, transfers on, overlap off"
    )
    assert ran.profile is not None
    assert [(kernel.name, kernel.does, kernel.ns) for kernel in ran.profile.kernels] == [
        ("conv", "fp32", 1000)
    ]
    phases = {
        sample["phase"] for sample in json.loads((tmp_path / "run/telemetry.json").read_text())
    }
    assert {"open", "timing", "images"} <= phases
    assert not list((tmp_path / "run").glob(".trtexec*"))


@pytest.mark.parametrize("version", ["10.3.0", "10.7.0", "10.16.2", "11.4.1"])
def test_every_way_of_timing_is_named_whatever_the_version_does_by_itself(
    version: str, place: Place, model: Path, tmp_path: Path
) -> None:
    device = place(version)
    build(device, model, tmp_path / "built")
    run(device, tmp_path / "built", tmp_path / "run", timing=TIMING, images=tiny_images(5))
    timed, *answers = [call for call in calls(tmp_path) if any("--loadEngine" in a for a in call)]
    assert len(answers) == 2, "one start a batch: 4 images and 1"
    old = version.startswith("10")
    for call in (timed, *answers):
        names = {argument.partition("=")[0] for argument in call}
        assert "--exposeDMA" in names
        assert ("--includeDataTransfers" in names) != old
        assert {"--noCudaGraph", "--noSpinWait"} <= names if not old else True
        assert not names & {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"}
        assert "--shapes=images:4x12x12x3" in call
    assert {"--warmUp=20", "--duration=0.001", "--iterations=7"} <= set(timed)
    assert {"--warmUp=0", "--duration=0", "--iterations=1"} <= set(answers[0])


def test_a_graph_of_a_fixed_batch_is_told_no_shapes(place: Place, tmp_path: Path) -> None:
    """trtexec refuses them: "Static model does not take explicit shapes"."""
    onnx.save(tiny_model(batch=4), tmp_path / "fixed.onnx")
    device = place()
    record = build(device, tmp_path / "fixed.onnx", tmp_path / "built")
    assert not any("Shapes" in argument for argument in record["settings"]["arguments"])
    run(device, tmp_path / "built", tmp_path / "run", images=tiny_images(3))
    with pytest.raises(UsageError, match="built for batch 4, the request says 2"):
        build(device, tmp_path / "fixed.onnx", tmp_path / "other", batch=2)


def test_what_runs_on_the_gpu_in_place_of_the_dla_is_told(
    place: Place, model: Path, tmp_path: Path
) -> None:
    told = {"precision": "fp16", "dla_core": 0, "gpu_fallback": True, "version_compatible": True}
    device = place("10.3.0")
    record = build(device, model, tmp_path / "built", tensorrt=told)
    assert record["settings"]["not_on_dla"] == ["images_nchw"]
    assert any("Unsupported on DLA" in line for line in record["log"])
    run(device, tmp_path / "built", tmp_path / "run", images=tiny_images(1), tensorrt=told)
    ran = calls(tmp_path)[-1]
    assert {"--useDLACore=0", "--versionCompatible"} <= set(ran)


# --- what does not --------------------------------------------------------------------------------

BUILDS: list[tuple[str, str, type[EdgexError], str]] = [
    ("10.3.0", "broken graph", BadArtifact, "cannot build m: .*types.*could not be created"),
    ("10.3.0", "memory", OutOfResources, "cannot build m: .*OutOfMemory"),
    ("10.3.0", "killed", OutOfResources, "code -9, most likely by the kernel"),
    ("10.3.0", "no engine", BadArtifact, "all went well and left no engine"),
    ("10.3.0", "no end", BadArtifact, "ended with code 0"),
    ("10.3.0", "endless", BadArtifact, "prints without an end"),
    ("10.3.0", "one line", BadArtifact, "prints without an end"),
    ("10.3.0", "no banner", NotPossibleHere, "tells no version of 10 or 11: .*libcudart"),
    ("8.6.2", "", NotPossibleHere, r"tells no version of 10 or 11: .*\[TensorRT v8602\]"),
]


@pytest.mark.parametrize(("version", "fault", "error", "says"), BUILDS)
def test_a_build_that_fails_says_why(
    version: str,
    fault: str,
    error: type[EdgexError],
    says: str,
    place: Place,
    model: Path,
    tmp_path: Path,
) -> None:
    device = place(version, fault)
    with pytest.raises(error, match=says):
        build(device, model, tmp_path / "built")
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("garbage", BadArtifact, "for --exportTimes cannot be read"),
        ("few times", MeasurementInvalid, "timed 1 inferences; 7 were asked for"),
        ("no end", BadArtifact, "cannot time engine.plan"),
        ("memory", OutOfResources, "OutOfMemory"),
    ],
)
def test_a_run_that_fails_says_why(
    fault: str, error: type[EdgexError], says: str, place: Place, model: Path, tmp_path: Path
) -> None:
    build(place(), model, tmp_path / "built")
    device = place("10.3.0", fault)
    with pytest.raises(error, match=says):
        run(device, tmp_path / "built", tmp_path / "run", timing=TIMING, images=tiny_images(4))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_the_engine_is_refused(place: Place, model: Path, tmp_path: Path) -> None:
    device = place()
    build(device, model, tmp_path / "built")
    with pytest.raises(BadArtifact, match=r"holds uint8 \(2, 4, 4, 3\); the engine takes"):
        run(device, tmp_path / "built", tmp_path / "run", images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(BadArtifact, match="out of the profile's range"):
        run(device, tmp_path / "built", tmp_path / "run", timing=TIMING, batch=3)
    with pytest.raises(NotPossibleHere, match=r"built for version 10\.3\.0, here is 11\.4\.1"):
        run(place("11.4.1"), tmp_path / "built", tmp_path / "run", timing=TIMING)
    manifest = tmp_path / "built/engine.json"
    for images in ("", [4, 12, 12], [4, 12, 1.5, 3], [1, 1, 1, 1 << 40]):
        content = json.loads(manifest.read_bytes())
        content["settings"]["images"] = images
        manifest.write_text(json.dumps(content))
        with pytest.raises(BadArtifact, match="does not tell the size of its images"):
            run(place(), tmp_path / "built", tmp_path / "run", timing=TIMING)


def test_a_device_without_trtexec_and_package_is_told_both(
    place: Place, model: Path, tmp_path: Path
) -> None:
    device = place()
    (tmp_path / "bin/trtexec").unlink()
    with pytest.raises(NotPossibleHere, match="No module named 'numpy', and there is no trtexec"):
        build(device, model, tmp_path / "built")


def test_a_device_without_gpu_is_refused(
    place: Place, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = place()
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with pytest.raises(NotPossibleHere, match="no NVIDIA GPU here"):
        build(device, model, tmp_path / "built")


def test_other_runtimes_still_say_what_they_lack(place: Place, model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotPossibleHere, match=r"onnxruntime cannot be used .*pip install"):
        build(place(), model, tmp_path / "built", runtime="onnxruntime")


def test_no_trtexec_outlives_the_host(place: Place, model: Path, tmp_path: Path) -> None:
    device = place("10.3.0", "hang")
    asked, answered = tmp_path / "request", tmp_path / "response"
    for folder in (asked, answered):
        folder.mkdir()
    (asked / "model.onnx").write_bytes(model.read_bytes())
    (asked / "request.json").write_text(json.dumps({**ASKED, "model": "model.onnx", "protocol": 1}))
    host = subprocess.Popen(
        [*device.command, "build", str(asked), str(answered)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert host.stdin is not None
    try:
        until(lambda: len(list(running(tmp_path))) > 0)
        host.stdin.close()
        until(lambda: not list(running(tmp_path)))
    finally:
        if host.poll() is None:
            os.killpg(host.pid, signal.SIGKILL)
        host.wait(timeout=30)


def running(tmp_path: Path) -> Iterator[str]:
    """Yield the command lines of what runs as this test's trtexec."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if "fake_trtexec.py" in command and str(tmp_path) in command and "--onnx" in command:
            yield command


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
