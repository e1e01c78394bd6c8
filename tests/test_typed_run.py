"""Typed forms from a recipe to the files, the report and the parity of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checkpoints import NARROW, random_network
from command import Result, edgex, write_recipe

from edgexception.model.checkpoint import TrainedModel, save_checkpoint
from edgexception.preprocess import Preprocess
from edgexception.report.record import Report

FORMS = ("fp16-tensorrt", "int8-tensorrt", "int8-fp16-tensorrt")
LOUD = "block2_sepconv1_pointwise"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def export(world: Path, out: Path, **changes: Any) -> Result:
    sections: dict[str, Any] = {
        "name": "typed",
        "model": {"kind": "checkpoint", "path": str(world / "net.safetensors")},
        "calibration": {"source": {"kind": "photos", "path": str(world / "photos")}, "images": 12},
        "quantize": {
            "method": "ptq",
            "activations": "symmetric",
            "ranges": "minmax",
            "equalization": False,
            "bias_correction": False,
        },
        "export": {"dialects": ["tensorrt"], "precisions": ["fp16", "int8", "int8-fp16"]},
    }
    recipe = write_recipe(out.with_suffix(".yaml"), {**sections, **changes})
    return edgex("export", recipe, "-o", out)


def test_all_forms_are_written_and_compared(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export(world, out)
    assert done.code == 0, done.err
    report = Report.model_validate_json((out / "report.json").read_bytes())
    parity = {row.form: row for row in report.parity}
    assert set(parity) == {"fp32", *FORMS}
    quality = {name: parity[name].simulated_vs_float for name in FORMS}
    decibels = {name: found.sqnr_db for name, found in quality.items() if found is not None}
    assert decibels["fp16-tensorrt"] > 45  # type: ignore[operator]
    assert all(found is not None and found > 10 for found in decibels.values())
    assert {types.form for types in report.types} == {"fp16-tensorrt", "int8-fp16-tensorrt"}
    assert all(types.fp32 == {} for types in report.types)
    sizes = {name: (out / f"onnx/{name}.onnx").stat().st_size for name in ("fp32", *FORMS)}
    assert sizes["fp16-tensorrt"] < 0.75 * sizes["fp32"]
    kinds = {
        tensor.data_type
        for tensor in onnx.load(out / "onnx/int8-fp16-tensorrt.onnx").graph.initializer
    }
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8}
    assert "int8-fp16-tensorrt: " in done.out
    again = export(world, out)
    assert again.err.splitlines()[-1].startswith("nothing to do")


def test_what_stays_float32_is_named_everywhere(world: Path, tmp_path: Path) -> None:
    network = random_network(NARROW, 1)
    with torch.no_grad():
        network.block2_sepconv1_bn.weight.mul_(1e4)
        network.block2_sepconv1_bn.bias.mul_(1e4)
        network.block2_sepconv2.depthwise.weight.div_(1e4)
    model = TrainedModel(network, None, Preprocess(input_size=(71, 71)), {"format": "test"})
    save_checkpoint(model, tmp_path / "loud.safetensors")
    loud = {"kind": "checkpoint", "path": str(tmp_path / "loud.safetensors")}
    done = export(world, tmp_path / "out", model=loud)
    assert done.code == 0, done.err
    report = Report.model_validate_json((tmp_path / "out/report.json").read_bytes())
    for types in report.types:
        assert "65,504" in types.fp32[LOUD], types.form
    assert f"{LOUD} stays float32" in done.out
    page = (tmp_path / "out/report.md").read_text().replace("\\", "")
    assert f"- fp16-tensorrt: **{LOUD} stays float32**: tensor {LOUD} reaches" in page
    kept = [json.loads(path.read_bytes()) for path in (tmp_path / "out").rglob("types.json")]
    found = [facts for facts in kept if LOUD in facts["fp32"]]
    assert len(found) == 2
    for facts in found:
        assert facts["peaks"][LOUD] * facts["margin"] > 65504
        assert facts["images"] == 12
    quality = {row.form: row.simulated_vs_float for row in report.parity}["fp16-tensorrt"]
    assert quality is not None
    assert quality.sqnr_db > 45  # type: ignore[operator]


def test_float16_needs_no_plan(world: Path, tmp_path: Path) -> None:
    spec = {"dialects": ["tensorrt"], "precisions": ["fp16"]}
    done = export(world, tmp_path / "out", quantize=None, export=spec)
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out/onnx").glob("*.onnx")} == {
        "fp32.onnx", "fp16-tensorrt.onnx",
    }  # fmt: skip
