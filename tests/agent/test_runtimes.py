"""The runtimes of processors, really built and run, through the device as every stage uses them."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_engine import CLASSES, SIDE, tiny_images, tiny_logits, tiny_model

from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import blaming
from edgexception.device import BuildRecord, RunRecord, local_device
from edgexception.errors import BadArtifact, OutOfResources, UsageError

RUNTIMES = ("onnxruntime", "openvino")
SHORT = {"warmup_ms": 5, "duration_ms": 20, "min_iterations": 12}


def build(model: Path, runtime: str, out: Path, **more_files: Path) -> BuildRecord:
    request = {"runtime": runtime, "model": "model.onnx", "batch": 4, "threads": 1}
    record = local_device().call("build", request, {"model.onnx": model, **more_files}, out)
    return BuildRecord.model_validate(record)


def run(runtime: str, engine: Path, out: Path, **changes: Any) -> RunRecord:
    images = changes.pop("images", None)
    files = {engine.name: engine, "engine.json": engine.with_name("engine.json")}
    files |= {} if images is None else {"images.npy": images}
    request: dict[str, Any] = {"runtime": runtime, "engine": engine.name, "batch": 4, "threads": 1}
    request["manifest"] = "engine.json"
    request |= {"images": None if images is None else "images.npy", "timing": None, **changes}
    return RunRecord.model_validate(local_device().call("run", request, files, out))


@pytest.fixture(scope="module", params=RUNTIMES)
def built(
    request: pytest.FixtureRequest, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("built") / "engine"
    record = build(tiny_onnx, request.param, out)
    return request.param, out / record.engine


@pytest.fixture(scope="module")
def other(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An engine of each runtime, to be given to the other one."""
    out = tmp_path_factory.mktemp("other")
    return {name: out / name / build(tiny_onnx, name, out / name).engine for name in RUNTIMES}


def saved(path: Path, images: np.ndarray[Any, Any]) -> Path:
    np.save(path, images)
    return path


def test_the_build_record_says_what_was_built(built: tuple[str, Path], tiny_onnx: Path) -> None:
    runtime, engine = built
    record = build(tiny_onnx, runtime, engine.parent.parent / "again")
    assert record.runtime == runtime
    assert (record.batch, record.threads) == (4, 1)
    assert record.engine_bytes == engine.stat().st_size > 100
    assert set(record.versions) == {runtime, "numpy"}
    if runtime == "openvino":
        assert record.settings["INFERENCE_PRECISION_HINT"] == "f32", "never bfloat16 in silence"
        assert any(layer.startswith("Convolution") for layer in record.layers)
        assert not any(layer.endswith("bf16") for layer in record.layers)
    else:
        assert any(layer.endswith("Conv") for layer in record.layers)


def test_a_build_is_repeatable(built: tuple[str, Path], tiny_onnx: Path, tmp_path: Path) -> None:
    runtime, engine = built
    build(tiny_onnx, runtime, tmp_path / "again")
    again = (tmp_path / "again" / engine.name).read_bytes()
    assert hashlib.sha256(again).digest() == hashlib.sha256(engine.read_bytes()).digest()


@pytest.mark.parametrize("count", [1, 4, 9])
def test_logits_are_those_of_numpy_for_any_number_of_images(
    built: tuple[str, Path], tmp_path: Path, count: int
) -> None:
    """The last batch is filled up and cut: 1 and 9 images are no multiple of 4."""
    runtime, engine = built
    images = tiny_images(count)
    run(runtime, engine, tmp_path / "out", images=saved(tmp_path / "i.npy", images))
    logits = np.load(tmp_path / "out/logits.npy")
    assert logits.dtype == np.float32
    assert logits.shape == (count, CLASSES)
    np.testing.assert_allclose(logits, tiny_logits(images), atol=2e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_without_a_head_runs(runtime: str, tmp_path: Path) -> None:
    """Its output is the pooled features through an Identity, which gives one value two names."""
    model = tiny_model()
    model.graph.node[-1].output[0] = "avg_pool"
    model.graph.node.append(onnx.helper.make_node("Identity", ["avg_pool"], ["logits"]))
    onnx.save(model, tmp_path / "m.onnx")
    record = build(tmp_path / "m.onnx", runtime, tmp_path / "built")
    images = tiny_images(4)
    engine = tmp_path / "built" / record.engine
    run(runtime, engine, tmp_path / "out", images=saved(tmp_path / "i.npy", images))
    logits = np.load(tmp_path / "out/logits.npy")
    np.testing.assert_allclose(logits, tiny_logits(images), atol=2e-4)


def test_onnxruntime_opens_its_engine_to_the_bits_of_the_model(
    tiny_onnx: Path, other: dict[str, Path], tmp_path: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    images = tiny_images(4)
    path = saved(tmp_path / "i.npy", images)
    run("onnxruntime", other["onnxruntime"], tmp_path / "out", images=path)
    session = ort.InferenceSession(str(tiny_onnx), providers=["CPUExecutionProvider"])
    direct = session.run(["logits"], {"images": images})[0]
    np.testing.assert_array_equal(np.load(tmp_path / "out/logits.npy"), direct)


def test_a_run_leaves_every_raw_time_and_telemetry(built: tuple[str, Path], tmp_path: Path) -> None:
    runtime, engine = built
    record = run(runtime, engine, tmp_path / "out", timing=SHORT)
    times = np.load(tmp_path / "out/times_ns.npy")
    assert times.dtype == np.int64
    assert len(times) >= 12
    assert (times > 0).all()
    samples = json.loads((tmp_path / "out/telemetry.json").read_text())
    assert len(samples) >= 2
    assert samples[-1]["t_ns"] - samples[0]["t_ns"] >= 20_000_000
    assert record.warmup_iterations >= 1
    assert not (tmp_path / "out/logits.npy").exists()


def test_the_peak_memory_is_the_engines_not_the_hosts(
    built: tuple[str, Path], tmp_path: Path
) -> None:
    """Linux counts the parent's size into the child's ru_maxrss; a host with torch is large."""
    runtime, engine = built
    ballast = np.ones(600 << 20, np.uint8)
    record = run(runtime, engine, tmp_path / "out", timing=SHORT)
    assert record.peak_rss_bytes is not None
    assert 20 << 20 < record.peak_rss_bytes < 300 << 20 < ballast.nbytes


def damaged(path: Path, content: bytes, how: str) -> Path:
    half = len(content) // 2
    kinds = {
        "cut in half": content[:half],
        "cut at its end": content[:-3],
        "cut to its start": content[:40],
        "garbage": np.random.default_rng(0).bytes(5000),
        "zeros": bytes(5000),
        "text": b"<html>404 not found</html>",
    }
    path.write_bytes(kinds[how])
    return path


@pytest.mark.parametrize(
    "how", ["cut in half", "cut at its end", "cut to its start", "garbage", "zeros", "text"]
)
def test_a_damaged_engine_is_refused(built: tuple[str, Path], tmp_path: Path, how: str) -> None:
    """By its manifest; and where that was made to agree, by the runtime."""
    runtime, engine = built
    bad = damaged(tmp_path / engine.name, engine.read_bytes(), how)
    shutil.copy(engine.with_name("engine.json"), tmp_path / "engine.json")
    with pytest.raises(BadArtifact, match=f"{engine.name} is not the engine that engine.json"):
        run(runtime, bad, tmp_path / "out", timing=SHORT)
    forge(bad)
    with pytest.raises(BadArtifact, match=engine.name) as caught:
        run(runtime, bad, tmp_path / "out", timing=SHORT)
    assert "\n" not in str(caught.value)
    assert "is not the engine" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def forge(engine: Path, **changes: Any) -> None:
    """Make the manifest beside an engine agree with it, as one who can write both files may."""
    path = engine.with_name("engine.json")
    content = json.loads(path.read_bytes())
    content["engine_sha256"] = hashlib.sha256(engine.read_bytes()).hexdigest()
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_engine_of_another_runtime_is_refused(
    runtime: str, other: dict[str, Path], tmp_path: Path
) -> None:
    true = "openvino" if runtime == "onnxruntime" else "onnxruntime"
    stranger = Path(shutil.copytree(other[true].parent, tmp_path / "copy")) / other[true].name
    with pytest.raises(BadArtifact, match=f"{stranger.name} is an engine of {true}, not of"):
        run(runtime, stranger, tmp_path / "out", timing=SHORT)
    needs = json.loads(other[runtime].with_name("engine.json").read_bytes())["needs"]
    forge(stranger, runtime=runtime, needs=needs)
    with pytest.raises(BadArtifact, match=stranger.name):
        run(runtime, stranger, tmp_path / "out", timing=SHORT)


def test_another_batch_than_the_engines_is_refused(built: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="built for batch 4, the request says 2"):
        run(*built, tmp_path / "out", timing=SHORT, batch=2)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((2, SIDE, SIDE, 3), np.float32), "float32"),
        (np.zeros((2, 3, SIDE, SIDE), np.uint8), r"\(2, 3, 12, 12\)"),
        (np.zeros((SIDE, SIDE, 3), np.uint8), "takes uint8"),
        (np.zeros((0, SIDE, SIDE, 3), np.uint8), "holds no images|not a readable"),
        (np.asfortranarray(np.zeros((2, SIDE, SIDE, 3), np.uint8)), "C order"),
        (np.array([{"a": 1}, None], dtype=object), "not a readable .npy"),
    ],
)
def test_images_the_engine_cannot_take_are_refused(
    other: dict[str, Path], tmp_path: Path, images: np.ndarray[Any, Any], says: str
) -> None:
    path = saved(tmp_path / "i.npy", images)
    with pytest.raises(BadArtifact, match=says):
        run("onnxruntime", other["onnxruntime"], tmp_path / "out", images=path)


@pytest.mark.parametrize("how", ["header only", "npz", "text", "huge"])
def test_files_that_are_no_images_are_refused(
    other: dict[str, Path], tmp_path: Path, how: str
) -> None:
    path = saved(tmp_path / "i.npy", tiny_images(2))
    content = path.read_bytes()
    if how == "npz":
        np.savez(tmp_path / "z.npz", tiny_images(2))
        content = (tmp_path / "z.npz").read_bytes()
    changed = {
        "header only": content[:128],
        "npz": content,
        "text": b"hello",
        "huge": content.replace(b"(2, 12,", b"(999999999999, 12,"),
    }[how]
    path.write_bytes(changed)
    with pytest.raises(BadArtifact, match=r"not a readable \.npy file"):
        run("onnxruntime", other["onnxruntime"], tmp_path / "out", images=path)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("fault", ["output name", "input type", "unknown operator", "external"])
def test_a_model_that_breaks_the_contract_is_not_built(
    runtime: str, fault: str, tmp_path: Path
) -> None:
    model = tiny_model()
    if fault == "output name":
        model.graph.node[-1].output[0] = model.graph.output[0].name = "probabilities"
    elif fault == "input type":
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    elif fault == "unknown operator":
        model.graph.node[2].op_type = "Convolve"
    onnx.save_model(
        model,
        str(tmp_path / "m.onnx"),
        save_as_external_data=fault == "external",
        location="weights.bin",
        size_threshold=0,
    )
    # The other file lies where the runtime would find it: it is the agent that refuses.
    more = {"weights.bin": tmp_path / "weights.bin"} if fault == "external" else {}
    with pytest.raises(BadArtifact):
        build(tmp_path / "m.onnx", runtime, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_images_larger_than_any_memory_end_in_an_error(runtime: str, tmp_path: Path) -> None:
    """Of 3 TB each; OpenVINO needs the memory when it builds, ONNX Runtime when it runs."""
    model = tiny_model()
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    sizes[1].dim_value = sizes[2].dim_value = 1_000_000
    onnx.save(model, tmp_path / "m.onnx")

    def build_and_run() -> None:
        record = build(tmp_path / "m.onnx", runtime, tmp_path / "built")
        run(runtime, tmp_path / "built" / record.engine, tmp_path / "out", timing=SHORT)

    with pytest.raises(OutOfResources) as caught:
        build_and_run()
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("Out of memory"), "out-of-resources"),
        (
            RuntimeError("Error Code 2: OutOfMemory (Requested size was 9 bytes.)"),
            "out-of-resources",
        ),
        (RuntimeError("std::bad_alloc"), "out-of-resources"),
        (RuntimeError("Failed to allocate memory for requested buffer"), "out-of-resources"),
        (RuntimeError("the shapes do not fit"), "bad-artifact"),
        (PermissionError(errno.EACCES, "Permission denied"), "bad-artifact"),
    ],
)
def test_what_a_runtime_raises_is_the_files_fault_or_memorys(raised: Exception, kind: str) -> None:
    with (
        pytest.raises(AgentError, match="cannot build it: ") as caught,
        blaming("cannot build it"),
    ):
        raise raised
    assert caught.value.kind == kind


def test_a_full_disk_is_no_fault_of_the_file() -> None:
    with pytest.raises(OSError, match="No space left"), blaming("cannot build m.onnx"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_openvino_keeps_the_weights_it_reads_from_the_file(
    other: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reference the map is gone after `open`, and the first call is a SIGSEGV."""
    from edgexception.agent import runtimes  # noqa: PLC0415

    maps = []

    def mapped(*arguments: Any) -> Any:
        blob = memmap(*arguments)
        maps.append(weakref.ref(blob))
        return blob

    memmap = np.memmap
    module = runtimes.load("openvino")
    monkeypatch.setattr(np, "memmap", mapped)
    session = module.open(other["openvino"], runtimes.Options(batch=4, threads=1))
    gc.collect()
    assert [blob() is not None for blob in maps] == [True]
    np.testing.assert_allclose(session.call(tiny_images(4)), tiny_logits(tiny_images(4)), atol=2e-4)


def test_the_times_of_kernels_are_told_where_they_are_asked_for(
    built: tuple[str, Path], tmp_path: Path
) -> None:
    runtime, engine = built
    assert run(runtime, engine, tmp_path / "unasked", timing=SHORT).profile is None
    profile = run(runtime, engine, tmp_path / "asked", timing=SHORT, profile=20).profile
    assert profile is not None
    assert profile.calls == 20
    (layer,) = [kernel for kernel in profile.kernels if kernel.does == "fp32"]
    assert "Conv" in layer.kind
    assert layer.ns > 0
    with pytest.raises(UsageError, match="profile is 0; it must be an integer"):
        run(runtime, engine, tmp_path / "bad", timing=SHORT, profile=0)
