"""An engine whose layers do not run as planned, from the recipe to the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from broken_placement import broken
from command import edgex, write_recipe

from edgexception.export import onnx_graph
from edgexception.report.record import Report

SHARES = ("fp32", "int8")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe(world: Path, path: Path, runtime: str, **changes: Any) -> Path:
    sections = {
        "name": "placed",
        "model": {"kind": "checkpoint", "path": str(world / "net.safetensors")},
        "calibration": {"source": {"kind": "photos", "path": str(world / "photos")}, "images": 12},
        "evaluation": {"source": {"kind": "folder", "path": str(world / "test")}},
        "quantize": {
            "method": "ptq",
            "ranges": "minmax",
            "equalization": False,
            "bias_correction": False,
            "rounding": "nearest",
        },
        "targets": [{"target": "cpu-x86", "runtimes": [runtime]}],
        "bench": {"warmup_ms": 1, "duration_ms": 1, "min_iterations": 2, "rounds": 2},
        "gates": {"executed_int8_share_min": 1.0},
    }
    return write_recipe(path, {**sections, **changes})


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_broken_placement_fails_its_row_and_no_other(
    runtime: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, names = onnx_graph.to_onnx, []

    def break_int8(*arguments: Any, **options: Any) -> Any:
        model = whole(*arguments, **options)
        if options["plan"] is not None:
            model, name = broken(model, runtime)
            names.append(name)
        return model

    monkeypatch.setattr(onnx_graph, "to_onnx", break_int8)
    out = tmp_path / "out"
    done = edgex("run", recipe(world, tmp_path / "r.yaml", runtime), "-o", out, "--json")
    assert done.code == 4, done.err
    floats, integers = Report.model_validate_json(done.out).rows
    (name,) = names
    last = done.err.splitlines()[-1]
    assert f"cpu-x86-{runtime}-int8-b1 is not what its name says: 1 of " in last
    assert f"{name} (planned int8, runs in fp32, " in last
    assert floats.status == "measured"
    assert floats.executed is not None
    assert floats.executed.shares == {"fp32": 1.0}
    assert (integers.status, integers.latency, integers.top1) == ("failed", None, None)
    assert integers.executed is not None
    assert [layer.name for layer in integers.executed.misplaced] == [name]
    assert 0 < integers.executed.shares["fp32"] < 0.2
    assert {path.name for path in (out / "engines").iterdir()} == {
        f"cpu-x86-{runtime}-fp32-b1.{kind}"
        for kind in ("build.json", "json", "onnx" if runtime == "onnxruntime" else "blob")
    }
    # The numbers are right: without looking at the kernels nobody would know.
    parity = {row.form: row for row in Report.model_validate_json(done.out).parity}
    assert not parity[f"int8-{runtime}"].differs


def test_the_gate_counts_what_is_planned_in_float_against_int8(world: Path, tmp_path: Path) -> None:
    quantize = {
        "method": "ptq",
        "ranges": "minmax",
        "equalization": False,
        "bias_correction": False,
        "rounding": "nearest",
        "precision": {"fp32": ["block3_sepconv1"]},
    }
    path = recipe(world, tmp_path / "r.yaml", "openvino", quantize=quantize)
    done = edgex("run", path, "-o", tmp_path / "out", "--json")
    assert done.code == 1, done.err
    report = Report.model_validate_json(done.out)
    (gate,) = report.gates
    (_, row) = report.rows
    assert row.executed is not None
    assert gate.value == row.executed.shares["int8"] < 1
    assert row.executed.misplaced == ()
    page = (tmp_path / "out/report.md").read_text().replace("\\", "")
    shares = [f"{100 * row.executed.shares[kind]:.1f}% in {kind.upper()}" for kind in SHARES]
    assert f"cpu-x86 openvino int8 b1 runs {', '.join(shares)} (multiply-accumulates" in page
    assert "cpu-x86 openvino fp32 b1 runs 100% in FP32 (multiply-accumulates" in page
    assert "**MISSED**: executed_int8_share_min 1.0" in page
