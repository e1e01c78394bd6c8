"""Pruning in a recipe and from the command line: plan, smaller network, what it did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command import digits_sections, edgex, write_recipe

from edgexception.agent.placement import sparse_layers
from edgexception.device import ProbeRecord, local_device
from edgexception.engine_stages import places_of
from edgexception.model.checkpoint import load_checkpoint
from edgexception.prune.plan import load_prune_plan
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report

pytest.importorskip("sklearn")
PLAIN = ("--importance", "magnitude")
NARROW = {"stem": [8, 16], "entry": [[16, 16]], "middle": [], "exit": [16, 24], "tail": [32]}


def ran(folder: Path, command: str, *flags: str, **changes: Any) -> tuple[list[str], Report]:
    """Run a command on a recipe, and return what was not there already, and the report."""
    sections = digits_sections(**{"targets": None, "bench": None, "gates": None, **changes})
    sections["model"] |= {"architecture": {**NARROW, "head": [10]}, "epochs": 0.2}
    recipe = write_recipe(folder / "recipe.yaml", sections)
    done = edgex(command, recipe, "-o", folder / "out", "--json", *flags)
    assert done.code == 0, done.err
    report = Report.model_validate(json.loads(done.out))
    return [line.stage for line in report.stages if not line.reused], report


def test_pruning_and_int8_in_one_recipe(tmp_path: Path) -> None:
    pruning = {"macs": 0.6, "align": 4}
    runtimes = ["onnxruntime", "openvino"]
    target = {"target": "cpu-x86", "runtimes": runtimes, "precisions": ["fp32", "int8"]}
    new, report = ran(
        tmp_path,
        "run",
        prune=pruning,
        gates={"pruned_top1_drop_max": 1.0, "pruned_agreement_min": 0.0},
        targets=[target],
        bench={"batch_sizes": [1], "duration_ms": 1, "warmup_ms": 1, "rounds": 2},
        quantize={"rounding": "nearest"},
    )
    stages = ["train", "importance", "prune-plan", "prune", "reference", "quantize", "export"]
    assert list(dict.fromkeys(new))[:7] == stages
    assert [(row.runtime, row.precision, row.status) for row in report.rows] == [
        (runtime, precision, "measured") for runtime in runtimes for precision in ("fp32", "int8")
    ]
    found = report.pruning
    assert found is not None
    assert found.macs[1] <= 0.6 * found.macs[0]
    assert (found.macs[1], found.parameters[1]) == (report.network.macs, report.network.parameters)
    assert "of 0.0" in report.network.source["pruned"]
    assert found.images == 24
    effect = found.effect
    assert effect is not None
    assert effect.top1 is not None
    assert effect.top1[0].trials == 600
    gates = {gate.gate: gate.value for gate in report.gates if gate.row == "pruned network"}
    lost = effect.top1[0].successes - effect.top1[1].successes
    assert effect.fidelity.agreement is not None
    assert gates == {
        "pruned_top1_drop_max": lost / 600,
        "pruned_agreement_min": effect.fidelity.agreement.value,
    }
    for fp32 in (report.rows[0].top1, report.rows[2].top1):
        assert fp32 is not None
        # Logits of the smaller network: the runtimes' differ from torch's by roundings.
        assert abs(fp32.successes - effect.top1[1].successes) <= 1
    page = (tmp_path / "out/report.md").read_text()
    assert "## Pruning" in page
    assert "pruned to 0.6 of the macs" in page

    smaller = load_checkpoint(tmp_path / "out/model.safetensors").network.architecture
    assert smaller.parameters == found.parameters[1]
    plan = load_prune_plan(tmp_path / "out/prune.json")
    assert plan.layers == found.layers
    assert all(len(kept) % 4 == 0 for kept in plan.kept.values())


def test_a_plan_alone_cuts_nothing_and_is_used_later(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"prune": {"parameters": 0.7}, "quantize": None}
    new, report = ran(tmp_path, "prune", "--plan-only", evaluation=None, **changes)
    assert new == ["train", "importance", "prune-plan"]
    assert report.pruning is not None
    whole = report.pruning.parameters[0]
    assert report.network.parameters == whole
    assert report.pruning.parameters[1] <= 0.7 * whole
    new, report = ran(tmp_path, "prune", evaluation=None, **changes)
    assert new == ["prune"]
    assert report.network.parameters == report.pruning.parameters[1] < whole
    assert ran(tmp_path, "prune", evaluation=None, **changes)[0] == []
    assert report.pruning.effect is None, "there are no images to measure it on"


def test_a_pruned_network_recovers_before_anything_else(tmp_path: Path) -> None:
    recovery: dict[str, Any] = {"steps": 2, "batch_size": 8}
    changes: dict[str, Any] = {"quantize": None, "evaluation": None}
    new, report = ran(tmp_path, "prune", prune={"macs": 0.7, "recovery": recovery}, **changes)
    assert new == ["train", "importance", "prune-plan", "prune", "recover"]
    assert report.network.source["recovered"] == "2 steps on 24 images"
    recovery |= {"source": {"kind": "digits", "split": "train"}, "distillation": 0.5}
    new, report = ran(tmp_path, "prune", prune={"macs": 0.7, "recovery": recovery}, **changes)
    assert new == ["recover"], "labels are used"
    assert report.network.source["recovered"] == "2 steps on 1000 images"


def test_channels_go_in_rounds_with_training_between(tmp_path: Path) -> None:
    recovery = {"steps": 5, "batch_size": 8, "rounds": 2}
    pruning = {"macs": 0.5, "recovery": recovery, "align": 2}
    new, report = ran(tmp_path, "prune", prune=pruning, quantize=None)
    once = ["importance", "prune-plan", "prune", "recover"]
    # The whole budget is planned first, so that one that cannot be met costs no training.
    assert new[:6] == ["train", *once[:2], *once[1:]]
    assert new[6:] == [
        "importance",
        "prune-plan",
        "prune-plan",
        "prune",
        "recover",
        *2 * ["reference"],
    ]
    found = report.pruning
    assert found is not None
    assert found.rounds == 2
    assert found.budgets["macs"] == pytest.approx(0.5)
    assert found.macs[1] <= 0.5 * found.macs[0]
    assert (found.macs[1], found.parameters[1]) == (report.network.macs, report.network.parameters)
    source = report.network.source
    assert source["recovered"] == "2 steps on 24 images, then 3 steps on 24 images"
    assert f"{found.macs[1] / found.macs[0]:.1%} of 0.0" in source["pruned"]
    assert ", in 2 rounds" in (tmp_path / "out/report.md").read_text()
    assert load_prune_plan(tmp_path / "out/prune.json").layers == found.layers
    assert ran(tmp_path, "prune", prune=pruning, quantize=None)[0] == []


def test_sparse_weights_alone_reach_the_onnx_file_of_tensorrt(tmp_path: Path) -> None:
    sparsity = {"sparsity": "2:4", "recovery": {"steps": 1, "batch_size": 8}}
    new, report = ran(
        tmp_path,
        "export",
        prune=sparsity,
        quantize={"activations": "symmetric", "rounding": "learned"},
        export={"dialects": ["tensorrt"], "precisions": ["int8-fp16"]},
        evaluation=None,
    )
    assert new[:4] == ["train", "prune-plan", "prune", "recover"]
    assert report.pruning is not None
    assert report.pruning.macs[0] == report.pruning.macs[1]
    for form in ("fp32", "int8-fp16-tensorrt"):
        path = (tmp_path / f"out/onnx/{form}.onnx").resolve()
        assert tuple(sparse_layers(path)) == report.pruning.sparse
    assert len(report.pruning.sparse) == 7
    page = (tmp_path / "out/report.md").read_text()
    assert "2:4 sparse weights in 7 1x1 convolutions" in page
    assert report.network.source["sparsity"] == "2:4 in 7 layers"


@pytest.mark.parametrize(
    ("target", "runtime", "reason"),
    [
        ("cpu-x86", "openvino", "openvino on cpu-x86 gains nothing by 2:4 weights: it has no"),
        ("rtx-4090", "tensorrt-rtx", "1.7.1 builds the same engine, byte for byte"),
        ("rtx-20", "tensorrt-rtx", "its GPU is SM75, and sparse tensor cores begin with SM80"),
        ("nvidia-gpu", "onnxruntime-tensorrt", "its TensorRT is not told"),
        ("jetson-orin-nx-16gb", "tensorrt", None),
    ],
)
def test_sparse_weights_need_kernels_and_recovery(
    tmp_path: Path, target: str, runtime: str, reason: str | None
) -> None:
    asked = [{"target": target, "runtimes": [runtime], "precisions": ["fp32"]}]
    changes: dict[str, Any] = {"targets": asked, "bench": None, "gates": None, "quantize": None}
    sections = digits_sections(prune={"sparsity": "2:4", "recovery": {}}, **changes)
    done = edgex("check", write_recipe(tmp_path / "r.yaml", sections))
    assert (done.code == 2) == (reason is not None), done.err
    assert reason is None or reason in done.err
    sections = digits_sections(prune={"sparsity": "2:4"}, **changes)
    done = edgex("check", write_recipe(tmp_path / "r.yaml", sections))
    assert "prune.sparsity: is chosen by the fit of `recovery:`; add that section" in done.err


def test_tensorrt_is_told_of_sparse_weights(tmp_path: Path) -> None:
    machine = ProbeRecord.model_validate(local_device().call("probe", {}, {}, tmp_path / "probe"))
    spec = {"sparsity": "2:4", "recovery": {}}
    target = {"target": "jetson-orin-nx-16gb", "runtimes": ["tensorrt"], "precisions": ["fp32"]}
    absent = {"bench": None, "gates": None, "quantize": None}
    for prune, told in ((spec, True), (None, None)):
        sections = digits_sections(prune=prune, targets=[target], **absent)
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", sections))
        (place,) = places_of(recipe, machine, kits=True)
        options = place.tensorrt_options
        assert (options and options["sparse_weights"]) == told


def test_flags_prune_a_checkpoint(world: Path, tmp_path: Path) -> None:
    arguments = ("prune", world / "net.safetensors", "-o", tmp_path, "--align", 1)
    evaluation = ("--evaluation", world / "test")
    done = edgex(*arguments, "--macs", 0.5, *PLAIN, *evaluation)
    assert done.code == 0, done.err
    assert "prune: {macs: 0.5, " in done.out
    assert "against the unpruned network in torch: SQNR" in done.out
    assert "top-1" in done.out
    done = edgex(*arguments, "--macs", 0.5, "--importance", "activation", "--images", 12)
    assert done.code == 2
    assert "--images has no effect without --calibration" in done.err
    photos = ("--calibration", world / "photos", "--images", 12)
    done = edgex(*arguments, "--parameters", 0.5, *photos)
    assert done.code == 0, done.err
    assert "quantize:" not in done.out
    assert "by taylor on 12 images" in done.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "needs --macs or --parameters or --size or --latency with a checkpoint"),
        (("--macs", "1.5"), "prune.macs: Input should be less than 1"),
        (("--macs", "0.5", "--align", "512", *PLAIN), "the nearest possible value is"),
        (("--macs", "0.000001", "--align", "1", *PLAIN), "prune.macs: 1e-06 .* possible value is"),
        (("--macs", "0.5"), "prune.importance: taylor is measured on images; add a `calibration:`"),
        (("--macs", "0.5", *PLAIN, "--calibration", "x"), "--calibration has no effect with"),
    ],
)
def test_what_cannot_be_is_refused(
    world: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = edgex("prune", world / "net.safetensors", "-o", tmp_path / "out", *flags)
    assert done.code == 2
    assert re.search(message, done.err), done.err


def test_a_recipe_without_a_budget_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(prune={"align": 16}))
    done = edgex("check", recipe)
    assert done.code == 2
    assert "prune: has no budget" in done.err
    spec = {"macs": 0.5, "recovery": {"distillation": 0.5}}
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(prune=spec))
    assert "prune.recovery.distillation: is 0.5, so labels are needed" in edgex("check", recipe).err
    spec["recovery"] = {"source": {"kind": "digits", "split": "test"}}
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(prune=spec))
    assert "prune.recovery.source: is the evaluation's source, too" in edgex("check", recipe).err
    for pruning, reason in (
        ({"macs": 0.5, "recovery": {"rounds": 4, "steps": 3}}, "3 steps are too few for 4 rounds"),
        ({"sparsity": "2:4", "recovery": {"rounds": 2}}, "no channels go without a budget"),
        (
            {"latency": 0.5, "target": "cpu-x86", "recovery": {"rounds": 2}},
            "a latency budget is met in one round",
        ),
    ):
        recipe = write_recipe(tmp_path / "r.yaml", digits_sections(prune=pruning))
        assert f"prune.recovery.rounds: {reason}" in edgex("check", recipe).err
    bare = write_recipe(tmp_path / "b.yaml", digits_sections())
    done = edgex("prune", bare, "-o", tmp_path / "out")
    assert done.code == 2
    assert "has no `prune:` section" in done.err
