"""Engines of an open batch, really built; those of processors also run, beside fixed ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow import minmax_plan, preprocess_of, random_images, small_graph
from tiny_engine import tiny_model

from edgexception.agent.runtimes import MAX_BATCH, Options, is_batches, load
from edgexception.device import BuildRecord, RunRecord, local_device
from edgexception.errors import BadArtifact, UsageError
from edgexception.export.onnx_graph import to_onnx
from edgexception.quantize.dialects import DIALECTS

SIZE = (40, 40)
BOUNDS = (1, 1, 8)
IMAGES = random_images(8, SIZE)
GRAPH = small_graph()

torch.set_num_threads(1)


def written(folder: Path, dialect: str, *, int8: bool) -> Path:
    plan = minmax_plan(GRAPH, IMAGES, symmetric=dialect == "tensorrt") if int8 else None
    rules = DIALECTS[dialect] if int8 else None
    model = to_onnx(GRAPH, preprocess_of(SIZE), None, plan=plan, dialect=rules)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def build(runtime: str, model: Path, out: Path, **changes: Any) -> BuildRecord:
    asked = {"runtime": runtime, "model": "m.onnx", "batch": 1, "batches": BOUNDS, "threads": 1}
    record = local_device().call("build", {**asked, **changes}, {"m.onnx": model}, out)
    return BuildRecord.model_validate(record)


def run(runtime: str, engine: Path, out: Path, batch: int) -> RunRecord:
    asked = {
        "runtime": runtime, "engine": engine.name, "manifest": "engine.json", "batch": batch,
        "threads": 1, "timing": {"warmup_ms": 1, "duration_ms": 1, "min_iterations": 2},
    }  # fmt: skip
    files = {name: engine.with_name(name) for name in (engine.name, "engine.json")}
    return RunRecord.model_validate(local_device().call("run", asked, files, out))


# --- processors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_logits_are_those_of_fixed_engines_to_the_last_bit(
    runtime: str, int8: bool, tmp_path: Path
) -> None:
    adapter, model = load(runtime), written(tmp_path, runtime, int8=int8)
    record = adapter.build(model, Options(1, 1, batches=BOUNDS), tmp_path / "dynamic")
    planned = {layer["planned"] for layer in record["placement"]}
    assert planned == {"int8"} if int8 else {"fp32"}
    assert all(layer["executed"] == layer["planned"] for layer in record["placement"])
    for batch in (1, 3, 8):
        adapter.build(model, Options(batch, 1), tmp_path / "fixed")
        fixed = adapter.open(tmp_path / "fixed", Options(batch, 1))
        dynamic = adapter.open(tmp_path / "dynamic", Options(batch, 1, batches=BOUNDS))
        assert dynamic.shape == fixed.shape == (batch, *SIZE, 3)
        logits = np.array(fixed.call(IMAGES[:batch]))
        np.testing.assert_array_equal(dynamic.call(IMAGES[:batch]), logits)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(
    request: pytest.FixtureRequest, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("dynamic") / "built"
    record = build(request.param, tiny_onnx, out, batch=2, batches=(2, 2, 4))
    assert record.batches == [2, 2, 4]
    return request.param, out / record.engine


def test_its_manifest_says_which_batches_it_takes(engine: tuple[str, Path], tmp_path: Path) -> None:
    runtime, path = engine
    content = json.loads(path.with_name("engine.json").read_bytes())
    assert content["options"]["batches"] == [2, 2, 4]
    for batch in (2, 4):
        record = run(runtime, path, tmp_path / f"b{batch}", batch)
        assert (record.batch, record.batches) == (batch, [2, 2, 4])
        assert len(np.load(tmp_path / f"b{batch}/times_ns.npy")) >= 2


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_outside_is_refused_by_name(
    engine: tuple[str, Path], tmp_path: Path, batch: int
) -> None:
    runtime, path = engine
    says = f"{path.name} takes batches of 2 to 4, the request says {batch}: build an engine"
    with pytest.raises(UsageError, match=says) as caught:
        run(runtime, path, tmp_path / "out", batch)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_fixed_engine_that_is_said_to_be_dynamic_is_refused(
    runtime: str, tiny_onnx: Path, tmp_path: Path
) -> None:
    record = build(runtime, tiny_onnx, tmp_path / "built", batches=None)
    path = tmp_path / "built" / record.engine
    manifest = path.with_name("engine.json")
    content = json.loads(manifest.read_bytes())
    content["options"]["batches"] = BOUNDS
    manifest.write_text(json.dumps(content))
    with pytest.raises(BadArtifact, match="was to be of an open batch and is not"):
        run(runtime, path, tmp_path / "out", 1)


# --- TensorRT-RTX -------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [89, 120])
def test_tensorrt_rtx_builds_for_a_range_of_batches(sm: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    model = written(tmp_path, "tensorrt", int8=True)
    found = {}
    for name, changes in (
        ("fixed", {"batches": None}),
        ("one", {}),
        ("four", {"batch": 4, "batches": (1, 4, 8)}),
    ):
        record = build("tensorrt-rtx", model, tmp_path / name, sm=sm, **changes)
        planned = {layer.name: layer.planned for layer in record.placement}
        # The dense layer has no kernel of its own in the listing.
        told = {layer.name: layer.executed for layer in record.placement if layer.executed}
        assert len(told) >= len(planned) - 1
        assert set(told.values()) == {"int8"}
        assert record.inspection is not None, "its listing is understood"
        found[name] = record.inspection
    assert found["one"].kernels[0].read[0].bytes == 40 * 40 * 3
    assert found["four"].kernels[0].read[0].bytes == 4 * 40 * 40 * 3
    engines = [(tmp_path / name / "engine.rtx").read_bytes() for name in found]
    assert len({hashlib.sha256(each).digest() for each in engines}) == 3


def test_a_graph_without_one_open_size_is_not_dynamic(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    scalar, open_width = tiny_model(), tiny_model()
    del scalar.graph.input[0].type.tensor_type.shape.dim[:]
    open_width.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "width"
    for model, says in (
        (tiny_model(batch=4), r"\(4, 12, 12, 3\)"),
        (open_width, r"\(-1, 12, -1, 3\)"),
        (scalar, r"\(\)"),
    ):
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(BadArtifact, match=rf"m\.onnx reads images of {says}"):
            build("tensorrt-rtx", tmp_path / "m.onnx", tmp_path / "out", sm=89)
        assert not (tmp_path / "out").exists()


# --- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches", [[1, 8], [2, 2, 4], [1, 1, 5000], [0, 1, 8], "1,8", [1, 1, 8.0]]
)
def test_a_request_for_anything_else_is_refused(
    batches: object, tiny_onnx: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"batches is .*\[least, 1, greatest\]"):
        build("onnxruntime", tiny_onnx, tmp_path / "out", batches=batches)


@given(
    st.lists(st.integers(-1, MAX_BATCH + 1) | st.floats() | st.text(max_size=2), max_size=4)
    | st.none()
    | st.dictionaries(st.text(), st.integers(), max_size=3)
)
def test_bounds_are_three_numbers_in_order(value: object) -> None:
    right = value is None
    if isinstance(value, list) and [type(each) for each in value] == [int] * 3:
        right = 1 <= value[0] <= value[1] <= value[2] <= MAX_BATCH
    assert is_batches(value) is right
