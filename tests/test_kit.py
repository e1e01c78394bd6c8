"""A kit of one small network: planned, run in another process, and its results asked for."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from bare_python import bare_python
from fake_trtexec import install, install_driver
from tiny_engine import SIDE, tiny_images, tiny_logits, tiny_model

from edgexception.artifacts import Artifact, FileRecord, sha256_file
from edgexception.bench.protocol import measure_latency, run_images
from edgexception.device import RecordedDevice
from edgexception.engine_stages import ask_build, engine_at
from edgexception.errors import UsageError
from edgexception.kit import COMMAND_VERSIONS, Kit, commands, plan_kit, write_kit
from edgexception.recipe import BenchSpec, TensorRtSpec
from edgexception.report.assemble import Place
from edgexception.targets import Form

PLACE = Place("cpu-x86", "onnxruntime", "onnxruntime", "fp32", 1, 1)
BENCH = BenchSpec(warmup_ms=1, duration_ms=2, min_iterations=3, rounds=2)


def artifact(path: Path, name: str) -> Artifact:
    """What a stage published, as far as a kit looks at it."""
    record = FileRecord(sha256_file(path), path.stat().st_size)
    return Artifact("test", "key", path.parent, {name: record}, record.sha256)


def tiny_kit(place: Place, tiny_onnx: Path, folder: Path) -> tuple[Kit, Artifact, Artifact]:
    """Write a kit of the tiny network for one engine; return it, the model, and 5 images."""
    np.save(folder / "images.npy", tiny_images(5))
    model = artifact(tiny_onnx, "model.onnx")
    images = artifact(folder / "images.npy", "images.npy")
    kit = plan_kit("tiny", [place], {Form("fp32"): model}, images, BENCH, (SIDE, SIDE))
    (folder / "work").mkdir()
    write_kit(kit, folder / "kit", folder / "work")
    return kit, model, images


def test_what_a_host_asks_is_answered_by_what_the_kit_did(tiny_onnx: Path, tmp_path: Path) -> None:
    kit, model, images = tiny_kit(PLACE, tiny_onnx, tmp_path)
    done = subprocess.run(
        [sys.executable, "agent.pyz", "run-kit", "."],
        cwd=tmp_path / "kit",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    labels = [line.partition(": ")[0] for line in done.stderr.splitlines()]
    assert labels == [
        "[1/5] probe",
        f"[2/5] build {PLACE.key}",
        f"[3/5] images {PLACE.key}",
        f"[4/5] timing {PLACE.key}",
        f"[5/5] timing {PLACE.key}",
        "results",
    ]

    device = RecordedDevice(tmp_path / "kit/results")
    assert device.results.kit == kit.digest
    assert "onnxruntime" in device.call("probe", {"any": 1}, {}, tmp_path / "probe")["runtimes"]
    record = ask_build(PLACE, model.file("model.onnx"), device, tmp_path / "engine")
    engine = engine_at(PLACE, tmp_path / "engine" / record["engine"])
    logits = run_images(engine, images.file("images.npy"), device, tmp_path / "run")
    np.testing.assert_allclose(logits, tiny_logits(tiny_images(5)), rtol=1e-4, atol=1e-3)
    times = measure_latency([engine], BENCH, device, tmp_path / "rounds")
    assert [len(turn) >= 3 for turn in times[PLACE.key]] == [True, True]


def test_a_kit_is_run_by_trtexec_alone(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has no numpy and no package of TensorRT: see fake_trtexec.py."""
    place = Place("jetson-orin-nano-8gb", "tensorrt", "tensorrt", "fp32", 4, 6)
    _, model, images = tiny_kit(place, tiny_onnx, tmp_path)
    install(tmp_path / "bin", "10.3.0")
    (tmp_path / "bin/python3").symlink_to(bare_python("3.10"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(install_driver(tmp_path / "driver")))
    done = subprocess.run(
        ["sh", "run.sh"],
        cwd=tmp_path / "kit",
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    device = RecordedDevice(tmp_path / "kit/results")
    machine = device.call("probe", {}, {}, tmp_path / "probe")
    assert machine["numpy"] is None
    assert machine["runtimes"]["tensorrt"]["program"] == str(tmp_path / "bin/trtexec")
    record = ask_build(place, model.file("model.onnx"), device, tmp_path / "engine")
    engine = engine_at(place, tmp_path / "engine" / record["engine"])
    logits = run_images(engine, images.file("images.npy"), device, tmp_path / "run")
    np.testing.assert_allclose(logits, tiny_logits(tiny_images(5)), rtol=1e-4, atol=1e-3)
    times = measure_latency([engine], BENCH, device, tmp_path / "rounds")
    assert [len(turn) >= 3 for turn in times[place.key]] == [True, True]
    kept = json.loads((tmp_path / "rounds/round-1-engine-1/record.json").read_text())
    assert kept["timing"]["clock"] == "trtexec"


@pytest.mark.parametrize("batch", ["batch", 4])
def test_command_lines_name_shapes_only_where_the_graph_leaves_them_open(
    batch: str | int, tmp_path: Path
) -> None:
    """trtexec ends with "Static model does not take explicit shapes" otherwise."""
    onnx.save(tiny_model(batch), tmp_path / "model.onnx")
    place = Place("jetson-orin-nano-8gb", "tensorrt", "tensorrt", "fp32", 4, 6)
    exports = {Form("fp32"): artifact(tmp_path / "model.onnx", "model.onnx")}
    kit = plan_kit("tiny", [place], exports, None, BENCH, (SIDE, SIDE))
    for text in kit.commands.values():
        build, measure = (line for line in text.splitlines() if line.startswith("trtexec"))
        assert ("--optShapes=images:4x12x12x3" in build) == (batch == "batch")
        assert ("--shapes=images:4x12x12x3" in measure) == (batch == "batch")
        assert "--exposeDMA" in measure


def test_a_kit_is_for_one_device(tiny_onnx: Path) -> None:
    exports = {Form("fp32"): artifact(tiny_onnx, "model.onnx")}
    places = [PLACE, Place("cpu-aarch64", "onnxruntime", "onnxruntime", "fp32", 1, 1)]
    with pytest.raises(UsageError, match="out of reach: cpu-aarch64, cpu-x86; choose one"):
        plan_kit("tiny", places, exports, None, None, (SIDE, SIDE))


def test_a_dynamic_engine_is_built_once_and_measured_at_each_batch(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    exports = {Form("fp32"): artifact(tiny_onnx, "model.onnx")}
    places = [replace(PLACE, batch=batch, batches=(1, 1, 4)) for batch in (1, 4)]
    kit = plan_kit("tiny", places, exports, None, BENCH, (SIDE, SIDE))
    calls = json.loads(kit.content)["calls"]
    name = "cpu-x86-onnxruntime-fp32"
    assert [call["label"] for call in calls] == [
        "probe",
        f"build {name}-b1-4",
        *(f"timing {name}-b{batch}-of-1-4" for batch in (1, 4, 4, 1)),
    ]
    assert calls[1]["request"]["batches"] == [1, 1, 4]
    assert [call["request"]["batch"] for call in calls[2:]] == [1, 4, 4, 1]
    assert len({json.dumps(call["made"]) for call in calls[2:]}) == 1
    (tmp_path / "work").mkdir()
    write_kit(kit, tmp_path / "kit", tmp_path / "work")
    assert "2 rounds of latency" in (tmp_path / "kit/README.md").read_text()


@pytest.mark.parametrize("version", COMMAND_VERSIONS)
def test_trtexec_builds_a_dynamic_engine_once(version: str) -> None:
    place = Place("jetson-agx-orin-64gb", "tensorrt", "tensorrt", "fp16", 1, 1, TensorRtSpec())
    places = [replace(place, batch=batch, batches=(1, 4, 8)) for batch in (4, 1, 8)]
    lines = [x for x in commands(places, version, (71, 71), BENCH).splitlines() if x[0:1] == "t"]
    build, *measured = map(shlex.split, lines)
    shapes = ("minShapes=images:1x", "optShapes=images:4x", "maxShapes=images:8x")
    assert {f"--{shape}71x71x3" for shape in shapes} <= set(build)
    assert [x for line in measured for x in line if x.startswith("--shapes")] == [
        f"--shapes=images:{batch}x71x71x3" for batch in (4, 1, 8)
    ]
    plan = "jetson-agx-orin-64gb-tensorrt-fp16-b1-8.plan"
    assert f"--saveEngine={plan}" in build
    assert all(f"--loadEngine={plan}" in line for line in measured)
