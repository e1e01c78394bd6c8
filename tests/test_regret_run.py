"""An INT8 network that is really slower, measured: the report says so, and which block it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import edgex
from onnx import helper
from test_placement_run import recipe

from edgexception.export import onnx_graph
from edgexception.report.record import Report

BURDENED = "block3"
STEPS = 40


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def burdened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put steps before the pool of a block that no runtime leaves out or fuses with a layer."""
    nodes = model.graph.node
    pool = next(node for node in nodes if node.name == f"{BURDENED}_pool")
    place = list(nodes).index(pool)
    for step in range(STEPS):
        name = f"{BURDENED}_wait{step}"
        wait = helper.make_node(
            "AveragePool", [pool.input[0]], [name], name, kernel_shape=[3, 3], pads=[1] * 4
        )
        nodes.insert(place + step, wait)
        pool.input[0] = name
    return model


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_that_is_slower_is_not_worth_it_and_its_block_is_named(
    runtime: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = onnx_graph.to_onnx

    def burden_int8(*arguments: Any, **options: Any) -> Any:
        model = whole(*arguments, **options)
        return burdened(model) if options["plan"] is not None else model

    monkeypatch.setattr(onnx_graph, "to_onnx", burden_int8)
    spec = {"warmup_ms": 20, "duration_ms": 100, "min_iterations": 30, "rounds": 3}
    path = recipe(world, tmp_path / "r.yaml", runtime, bench=spec, gates={"agreement_min": 0.0})
    out = tmp_path / "out"
    done = edgex("run", path, "-o", out, "--json")
    assert done.code == 0, done.err
    floats, integers = Report.model_validate_json(done.out).rows
    assert floats.spent is not None
    assert integers.spent is not None
    assert floats.spent.calls == integers.spent.calls == 30
    assert sum(integers.spent.shares.values()) == pytest.approx(1)
    assert "int8" in integers.spent.shares
    assert "int8" not in floats.spent.shares
    gain = integers.gain
    assert gain is not None
    assert not gain.sure
    assert gain.slower is not None
    # Not always the first: beside other work OpenVINO's means have outliers.
    assert BURDENED in [each.block for each in gain.slower[:3]]
    page = (out / "report.md").read_text().replace("\\", "")
    assert f"**INT8 is not worth it on cpu-x86 {runtime} int8 b1: " in page
    (line,) = [line for line in page.splitlines() if "slower in INT8 by their kernels'" in line]
    assert f"{BURDENED} " in line
    assert "by its kernels' times" in page
