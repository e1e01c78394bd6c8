"""From a checkpoint to engines for NVIDIA GPUs, on a machine that has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Result, edgex, write_recipe
from fakes import TroubledDevice
from onnx import numpy_helper

from edgexception import engine_stages
from edgexception.ability import why_not_built, why_not_measured, why_not_run
from edgexception.device import GpuFacts, ProbeRecord
from edgexception.doctor import probe
from edgexception.export import onnx_graph
from edgexception.report.record import Report, Row
from edgexception.targets import find_runtime, find_target

pytest.importorskip("tensorrt_rtx_bindings")

NOT_RUN = "no NVIDIA GPU here: built, not run on hardware"


@pytest.fixture(scope="module")
def machine() -> ProbeRecord:
    return probe()


def with_gpu(machine: ProbeRecord, sm: int) -> ProbeRecord:
    gpu = GpuFacts(name="NVIDIA Fake", sm=sm, memory_bytes=1, driver="13.0")
    facts = machine.runtimes["tensorrt-rtx"].model_copy(update={"gpus": [gpu]})
    return machine.model_copy(update={"runtimes": {**machine.runtimes, "tensorrt-rtx": facts}})


def without_gpu(monkeypatch: pytest.MonkeyPatch, machine: ProbeRecord) -> None:
    """Also where the tests run beside a GPU."""
    facts = machine.runtimes["tensorrt-rtx"].model_copy(update={"gpus": [], "devices": []})
    runtimes = {**machine.runtimes, "tensorrt-rtx": facts}
    plain = {name: facts.model_dump() for name, facts in runtimes.items()}
    device = TroubledDevice(facts={"runtimes": plain})
    monkeypatch.setattr("edgexception.pipeline.local_device", lambda: device)


def run(command: str, world: Path, out: Path, **changes: Any) -> tuple[Result, Report | None]:
    sections: dict[str, Any] = {
        "name": "rtx",
        "model": {"kind": "checkpoint", "path": str(world / "net.safetensors")},
        "calibration": {"source": {"kind": "photos", "path": str(world / "photos")}, "images": 12},
        "evaluation": {"source": {"kind": "folder", "path": str(world / "test")}},
        "quantize": {
            "method": "ptq",
            "activations": "symmetric",
            "ranges": "minmax",
            "equalization": False,
            "bias_correction": False,
            "rounding": "nearest",
        },
        "bench": {"warmup_ms": 1, "duration_ms": 10, "min_iterations": 2, "rounds": 2},
    }
    recipe = write_recipe(out.with_suffix(".yaml"), {**sections, **changes})
    done = edgex(command, recipe, "-o", out)
    path = out / "report.json"
    return done, Report.model_validate_json(path.read_bytes()) if path.exists() else None


def rtx(name: str = "rtx-4090", *precisions: str) -> dict[str, Any]:
    return {"target": name, "runtimes": ["auto"], "precisions": list(precisions or ("int8-fp16",))}


def test_what_can_be_done_here_and_why_not(machine: ProbeRecord) -> None:
    gpu = with_gpu(machine, 89)
    assert why_not_built("rtx-4090", "tensorrt-rtx", gpu) is None
    assert why_not_run("rtx-4090", "tensorrt-rtx", gpu) is None
    assert why_not_measured("rtx-40", "tensorrt-rtx", gpu) is None
    assert "(SM89), the target SM120: built, not run on hardware" in str(
        why_not_measured("rtx-5090", "tensorrt-rtx", gpu)
    )
    assert why_not_built("dgx-spark", "tensorrt-rtx", gpu) is None
    other = f"the target is aarch64, this machine {machine.arch}"
    assert why_not_run("dgx-spark", "tensorrt-rtx", with_gpu(machine, 121)) == other
    spark = with_gpu(machine, 121).model_copy(update={"arch": "aarch64"})
    assert why_not_run("dgx-spark", "tensorrt-rtx", spark) is None
    assert why_not_built("rtx-4090", "tensorrt-rtx", spark) == (
        "the target is x86_64, this machine aarch64"
    )
    assert why_not_run("cpu-x86", "onnxruntime", machine) is None


def test_build_engine_builds_every_precision(
    world: Path, tmp_path: Path, machine: ProbeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gpu(monkeypatch, machine)
    names = ("fp32", "fp16", "int8", "int8-fp16")
    targets = [rtx("dgx-spark"), rtx("rtx-4090", *names), rtx("rtx-20", "fp16")]
    done, report = run("build-engine", world, tmp_path / "out", targets=targets)
    assert done.code == 0, done.err
    assert report is not None
    assert [(row.target, row.precision) for row in report.rows] == [
        ("dgx-spark", "int8-fp16"),
        *(("rtx-4090", name) for name in names), ("rtx-20", "fp16"),
    ]  # fmt: skip
    for row in report.rows:
        assert row.status == "built"
        assert row.executed is not None
        assert row.executed.shares == {row.precision.removesuffix("-fp16"): 1.0}
        assert row.latency is row.top1 is row.fidelity is None
        name = f"{row.target}-tensorrt-rtx-{row.precision}-b1"
        assert (tmp_path / f"out/engines/{name}.rtx").stat().st_size == row.engine_bytes
        record = json.loads((tmp_path / f"out/engines/{name}.build.json").read_bytes())
        assert record["settings"]["sm"] == find_target(row.target).sm
        engine = (tmp_path / f"out/engines/{name}.rtx").read_bytes()
        assert b"\x7fELF" not in engine, "no code for a processor: any machine builds it"
    parity = {(row.form, row.runtime): row for row in report.parity}
    assert parity["fp32", "onnxruntime"].executed_vs_torch is not None, "the graph itself is right"
    skipped = [row for row in report.parity if row.runtime == "tensorrt-rtx"]
    assert len(skipped) == 4
    assert {row.skipped for row in skipped} == {NOT_RUN}


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {"macs": 0.7, "align": 4}},
        {"quantize": {"method": "qat", "activations": "symmetric", "steps": 2, "batch_size": 4}},
        {
            "quantize": {
                "method": "ptq",
                "activations": "symmetric",
                "precision": {"fp16": ["*_depthwise"]},
            }
        },
    ],
    ids=["pruned", "trained", "mixed"],
)
def test_the_parser_takes_what_any_way_to_int8_writes(
    world: Path,
    tmp_path: Path,
    machine: ProbeRecord,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    without_gpu(monkeypatch, machine)
    done, report = run("build-engine", world, tmp_path / "out", targets=[rtx()], **changes)
    assert done.code == 0, done.err
    assert report is not None
    assert [row.status for row in report.rows] == ["built"]


def test_what_was_not_run_is_skipped_and_the_command_fails(
    world: Path, tmp_path: Path, machine: ProbeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a target that runs here, whose rows are measured."""
    without_gpu(monkeypatch, machine)
    cpu = {"target": "cpu-x86", "runtimes": ["onnxruntime"], "precisions": ["fp32", "int8"]}
    done, report = run(
        "run", world, tmp_path / "out", targets=[rtx(), cpu], gates={"agreement_min": 0.0}
    )
    assert done.code == 3
    assert done.err.splitlines()[-1] == f"edgex: rtx-4090-tensorrt-rtx-int8-fp16-b1: {NOT_RUN}"
    assert report is not None
    gpu, *measured = report.rows
    assert (gpu.status, gpu.reason) == ("skipped", NOT_RUN)
    assert gpu.engine_bytes
    assert gpu.latency is gpu.top1 is gpu.fidelity is gpu.speedup is None
    assert [row.status for row in measured] == ["measured", "measured"]
    assert [gate.passed for gate in report.gates] == [False, True]
    assert f"skipped: {NOT_RUN}" == report.gates[0].reason
    page = (tmp_path / "out/report.md").read_text().replace("\\", "")
    assert f"**skipped**: rtx-4090 tensorrt-rtx int8-fp16 b1: {NOT_RUN}" in page


@pytest.mark.parametrize(
    ("target", "precision", "code", "says"),
    [
        ("rtx-20", "fp32", 2, "tensorrt-rtx on rtx-20 does not build fp32; it builds: fp16"),
        ("rtx-4091", "fp16", 2, "did you mean rtx-4090"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_starts(
    world: Path, tmp_path: Path, target: str, precision: str, code: int, says: str
) -> None:
    targets = [rtx(target, precision)]
    done, report = run("build-engine", world, tmp_path / "out", targets=targets)
    assert done.code == code
    assert says in done.err
    assert report is None


def test_what_turing_lacks_is_named_by_layer(
    world: Path, tmp_path: Path, machine: ProbeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were these precisions in its row: the linter sees one fault, the kernels tell the other."""
    without_gpu(monkeypatch, machine)
    row = find_runtime("rtx-20", "tensorrt-rtx")
    object.__setattr__(row, "precisions", ("fp32", "int8-fp16"))
    try:
        done, report = run(
            "build-engine", world, tmp_path / "out", targets=[rtx("rtx-20", "fp32", "int8-fp16")]
        )
    finally:
        object.__setattr__(row, "precisions", ("fp16",))
    assert done.code == 4
    assert report is not None
    assert [row.status for row in report.rows] == ["failed", "failed"]
    single, int8 = (row.reason or "" for row in report.rows)
    assert "layer predictions (Gemm): is a float32 matrix product, which SM75 does not" in single
    assert "is not what its name says" in int8
    assert "(planned int8, runs in fp16, correlation Half to Half)" in int8


def int32_bias(model: onnx.ModelProto) -> str:
    """Write a layer's bias as ONNX Runtime reads it."""
    name = "block2_sepconv1_pointwise"
    nodes = model.graph.node
    layer = next(node for node in nodes if node.name == name)
    bias = next(i for i in model.graph.initializer if i.name == layer.input[2])
    zeros = np.zeros(bias.dims, np.int32)
    model.graph.initializer.append(numpy_helper.from_array(zeros, "integers"))
    read = onnx.helper.make_node(
        "DequantizeLinear", ["integers", f"{name}_weight_scale"], ["bias"], f"{name}_bias", axis=0
    )
    nodes.insert(list(nodes).index(layer), read)
    layer.input[2] = "bias"
    return f"layer {name}_bias (DequantizeLinear): dequantizes int32"


def zero_point(model: onnx.ModelProto) -> str:
    """Make the range of one activation asymmetric."""
    read = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    zero = next(i for i in model.graph.initializer if i.name == read.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.int8(-5), zero.name))
    return f"layer {read.name} (QuantizeLinear): has the zero point -5"


@pytest.mark.parametrize("spoil", [int32_bias, zero_point])
def test_a_wrong_graph_never_reaches_the_builder(
    world: Path,
    tmp_path: Path,
    machine: ProbeRecord,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[onnx.ModelProto], str],
) -> None:
    without_gpu(monkeypatch, machine)
    whole, told, asked = onnx_graph.to_onnx, list[str](), list[object]()

    def spoiled(*arguments: Any, **options: Any) -> Any:
        model = whole(*arguments, **options)
        if options["plan"] is not None:
            told.append(spoil(model))
        return model

    monkeypatch.setattr(onnx_graph, "to_onnx", spoiled)
    monkeypatch.setattr(engine_stages, "ask_build", lambda *told: asked.append(told))
    done, report = run("build-engine", world, tmp_path / "out", targets=[rtx()])
    assert done.code == 4
    assert report is not None
    (row,) = report.rows
    assert row.status == "failed"
    assert told[0] in str(row.reason)
    assert not asked


def test_the_short_form_needs_no_word_of_activations(world: Path, tmp_path: Path) -> None:
    done = edgex(
        "build-engine", world / "net.safetensors", "--target", "rtx-4090", "--calibration",
        world / "photos", "--images", 12, "--precision", "int8-fp16", "-o", tmp_path / "out",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = Report.model_validate_json(done.out)
    assert report.calibration is not None
    assert report.calibration.activations == "symmetric"
    assert [(Row.model_validate(row).status) for row in report.rows] == ["built"]


def test_targets_say_what_they_can_do_here() -> None:
    rows = {row["target"]: row for row in json.loads(edgex("targets", "--json").out)}
    facts = rows["rtx-4090"]["runtimes"]["tensorrt-rtx"]
    assert facts["here"] is True
    assert facts["runs"] is not bool(facts["not_run"])
    spark = rows["dgx-spark"]["runtimes"]["tensorrt-rtx"]
    assert (spark["here"], spark["runs"]) == (True, False)
    assert rows["cpu-x86"]["runtimes"]["onnxruntime"]["runs"] is True
