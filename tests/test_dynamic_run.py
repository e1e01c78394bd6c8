"""Dynamic engines, from the recipe or the flag to the rows of a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import edgex
from test_placement_run import recipe

from edgexception.report.record import Report


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_one_engine_is_measured_at_each_batch(world: Path, tmp_path: Path) -> None:
    target = {"target": "cpu-x86", "runtimes": ["onnxruntime"], "dynamic_batch": True}
    bench = {"batch_sizes": [1, 4], "warmup_ms": 1, "duration_ms": 1, "min_iterations": 2}
    path = recipe(world, tmp_path / "r.yaml", "", targets=[target], bench={**bench, "rounds": 1})
    done = edgex("run", path, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = Report.model_validate_json(done.out)
    assert [(row.precision, row.batch) for row in report.rows] == [
        ("fp32", 1), ("fp32", 4), ("int8", 1), ("int8", 4),
    ]  # fmt: skip
    for row in report.rows:
        assert (row.status, row.batches) == ("measured", (1, 1, 4))
        assert row.latency is not None
        assert row.images_per_second == pytest.approx(1e3 * row.batch / row.latency.median_ms)
        assert row.fidelity is not None
        assert (row.speedup is not None) == (row.precision == "int8")
    assert len([line for line in report.stages if line.stage == "build"]) == 2
    assert {path.name for path in (tmp_path / "out/engines").glob("*.onnx")} == {
        f"cpu-x86-onnxruntime-{precision}-b1-4.onnx" for precision in ("fp32", "int8")
    }
    page = (tmp_path / "out/report.md").read_text()
    assert "| cpu-x86 | onnxruntime | int8 | 4 of 1-4 | measured" in page
    again = edgex("run", path, "-o", tmp_path / "out")
    assert "nothing to do" in again.err


def test_the_flag_builds_one_for_a_gpu_that_is_not_here(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    done = edgex(
        "build-engine", world / "net.safetensors", "--target", "rtx-4090", "--dynamic",
        "--calibration", world / "photos", "--images", 12, "--precision", "int8-fp16",
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = Report.model_validate_json(done.out)
    assert [(row.batch, row.batches, row.status) for row in report.rows] == [
        (1, (1, 1, 8), "built"),
        (8, (1, 1, 8), "built"),
    ]
    engines = list((tmp_path / "out/engines").glob("*.rtx"))
    assert [path.name for path in engines] == ["rtx-4090-tensorrt-rtx-int8-fp16-b1-8.rtx"]
    best, other = report.rows
    assert best.engine_bytes == other.engine_bytes == engines[0].stat().st_size
    assert best.executed is not None
    assert best.executed.shares == {"int8": 1.0}
    assert best.listing is not None, "of the batch that it is best for"
    assert other.listing is None
