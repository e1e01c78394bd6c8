"""The whole way on a small recipe: each stage once, then nothing, then what a change asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, digits_sections, edgex, edgex_argv, write_recipe
from fakes import TroubledDevice, agent_that

from edgexception import pipeline
from edgexception.artifacts import Store
from edgexception.device import ProbeRecord
from edgexception.errors import (
    BadArtifact,
    EdgexError,
    MeasurementInvalid,
    NotPossibleHere,
    OutOfResources,
    UsageError,
)
from edgexception.pipeline import Outcome, run
from edgexception.recipe import PtqSpec, Recipe
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report

STAGES = ["train", "quantize", "export", "reference", "verify", "build", "evaluate", "bench"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml, and with out/ where it has been run by the command."""
    folder = tmp_path_factory.mktemp("home")
    recipe = write_recipe(folder / "recipe.yaml", digits_sections())
    done = edgex("run", recipe, "-o", folder / "out", "--json")
    assert done.code == 0, done.err
    assert done.out == (folder / "out/report.json").read_text()
    return folder


def report_in(out: Path) -> Report:
    return Report.model_validate_json((out / "report.json").read_bytes())


def without_stages(report: Report) -> dict[str, Any]:
    return report.model_dump(exclude={"stages"})


def changed(tmp_path: Path, **changes: Any) -> Any:
    return load_recipe(write_recipe(tmp_path / "changed.yaml", digits_sections(**changes)))


def redone(outcome: Outcome) -> set[str]:
    """Return "stage" or "stage what" of everything that was not there already."""
    lines = [line for line in outcome.report.stages if not line.reused]
    named = {"export", "verify"}
    return {f"{x.stage} {x.what}" if x.stage in named else x.stage for x in lines}


def test_every_stage_runs_once_and_all_of_it_is_in_the_report(home: Path) -> None:
    report = report_in(home / "out")
    assert list(dict.fromkeys(line.stage for line in report.stages)) == STAGES
    assert not any(line.reused for line in report.stages)
    assert [(r.runtime, r.precision, r.status) for r in report.rows] == [
        ("onnxruntime", "fp32", "measured"), ("onnxruntime", "int8", "measured"),
        ("openvino", "fp32", "measured"), ("openvino", "int8", "measured"),
    ]  # fmt: skip
    for row in report.rows:
        assert row.latency is not None
        assert row.latency.iterations >= 10
        assert row.top1 is not None
        assert row.top1.trials == 600
        assert (row.paired is None) == (row.precision == "fp32")
        if row.paired is not None:
            assert row.fidelity is not None
            assert row.fidelity.agreement is not None
            assert row.paired.changed == 600 - row.fidelity.agreement.successes
        assert (row.speedup is None) == (row.precision == "fp32")
        assert row.fidelity is not None
        floor = 60 if row.precision == "fp32" else 12
        assert row.fidelity.sqnr_db is None or row.fidelity.sqnr_db > floor
    for parity in report.parity:
        assert parity.executed_vs_torch is not None
        decibels = parity.executed_vs_torch.sqnr_db
        assert decibels is None or decibels >= 40
    assert all(gate.passed for gate in report.gates)
    assert len(report.gates) == 6
    assert load_recipe(home / "out/recipe.yaml") == load_recipe(home / "recipe.yaml")


def test_every_link_leads_to_its_file_and_nothing_else_is_left(home: Path) -> None:
    out = home / "out"
    winners = [row for row in report_in(out).rows if row.fastest]
    assert sorted(row.precision for row in winners) == ["fp32", "int8"]
    links = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_symlink()}
    key = "cpu-x86-{}-{}-b1".format
    engines = [("onnxruntime", "onnx"), ("openvino", "blob")]
    assert links == {
        "model.safetensors", "plan.json", "calibration.json",
        "onnx/fp32.onnx", "onnx/int8-onnxruntime.onnx", "onnx/int8-openvino.onnx",
        *(f"onnx/{form}.on-{runtime}.parity.json"
          for runtime, _ in engines for form in ("fp32", f"int8-{runtime}")),
        *(f"engines/{key(runtime, precision)}.{suffix}"
          for runtime, kind in engines for precision in ("fp32", "int8")
          for suffix in (kind, "json", "build.json")),
        *(f"engines/{key('fastest', row.precision)}.{suffix}"
          for row in winners for suffix in (dict(engines)[row.runtime], "json", "build.json")),
    }  # fmt: skip
    for name in links:
        assert (out / name).resolve(strict=True).is_relative_to(out / "store")
        assert not Path((out / name).readlink()).is_absolute(), "a folder may be moved as a whole"
    files = {p.name for p in out.iterdir() if not p.is_symlink()}
    assert files == {"recipe.yaml", "report.json", "report.md", "store", "onnx", "engines"}
    assert list((out / "store/.partial").iterdir()) == []


def test_a_second_run_does_nothing_says_so_and_needs_no_torch(home: Path, tmp_path: Path) -> None:
    before = report_in(home / "out")
    argv = edgex_argv("run", home / "recipe.yaml", "-o", home / "out")
    argv[2] = argv[2].replace(
        "main()\n", "try:\n    main()\nfinally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "torch was imported"
    assert done.stderr.splitlines()[-1] == "nothing to do: all 20 stages were done before"
    after = report_in(home / "out")
    assert all(line.reused for line in after.stages)
    assert without_stages(after) == without_stages(before)
    assert [x.key for x in after.stages] == [x.key for x in before.stages]


INT8 = {
    "quantize", "export int8-onnxruntime", "verify int8-onnxruntime on onnxruntime", "build",
    "evaluate", "bench",
}  # fmt: skip
ENGINES = {"build", "evaluate", "bench"}
EXPORTS = {
    "export fp32", "export int8-onnxruntime", "verify fp32 on onnxruntime",
    "verify int8-onnxruntime on onnxruntime",
}  # fmt: skip
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "its name and gates": ({"name": "other", "gates": {"sqnr_db_min": 2.0}}, set()),
    "how long is measured": ({"bench": {"duration_ms": 2}}, {"bench"}),
    "batch sizes": ({"bench": {"batch_sizes": [3]}}, ENGINES),
    "threads": ({"targets": [{"threads": 1}]}, ENGINES),
    "what is evaluated": ({"evaluation": {"crops_per_photo": 1}}, {"reference", "evaluate"}),
    "how it is quantized": ({"quantize": {"ranges": "minmax"}}, INT8),
    "what calibrates": ({"calibration": {"seed": 5}}, INT8),
    "a dialect that was written before": ({"export": {"dialects": ["openvino"]}}, set()),
    "a fixed batch": ({"export": {"batch": 1}}, EXPORTS | ENGINES),
    "the training": ({"model": {"seed": 1}}, {"train", "reference"} | INT8 | EXPORTS),
}


@pytest.fixture(scope="module")
def one_runtime(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The target that the changes below start from: run once, in the same store."""
    target = {"target": "cpu-x86", "runtimes": ["onnxruntime"], "precisions": ["fp32", "int8"]}
    recipe = changed(tmp_path_factory.mktemp("base"), targets=[target])
    assert redone(run(recipe, home / "out")) == {"bench"}, "the engines were there"
    return target


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_redoes_exactly_what_depends_on_it(
    home: Path, one_runtime: dict[str, Any], tmp_path: Path, what: str
) -> None:
    changes, expected = CHANGES[what]
    targets = [one_runtime | more for more in changes.get("targets", [{}])]
    recipe = changed(tmp_path, **changes | {"targets": targets})
    outcome = run(recipe, home / "out")
    assert outcome.fault is None
    assert redone(outcome) == expected
    left = {path.name for path in (home / "out/engines").iterdir()}
    assert not any("openvino" in name for name in left), "links of an earlier recipe"


def test_a_missed_gate_is_exit_code_1_and_everything_is_still_there(
    home: Path, tmp_path: Path
) -> None:
    sections = digits_sections(gates={"agreement_min": None, "sqnr_db_min": 150.0})
    recipe = write_recipe(tmp_path / "r.yaml", sections)
    for command in ("run", "bench"):
        done = edgex(command, recipe, "-o", home / "out", "--json")
        assert done.code == 1
        report = Report.model_validate_json(done.out)
        assert [gate.passed for gate in report.gates] == [True, False] * 2
        message = done.err.splitlines()[-1]
        assert message.startswith(
            "edgex: gate sqnr_db_min 150.0 missed by cpu-x86 onnxruntime int8 b1: "
        )
    assert "**MISSED**: sqnr_db_min" in (home / "out/report.md").read_text()
    built = edgex("build-engine", recipe, "-o", home / "out")
    assert built.code == 0, "only a measurement can miss a gate"
    assert "the run ended before anything was measured" in (home / "out/report.md").read_text()


def test_a_recipe_without_targets_is_exported_and_says_what_was_not_run(
    home: Path, tmp_path: Path
) -> None:
    bare = dict.fromkeys(("targets", "bench", "gates"))
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(**bare))
    assert edgex("run", recipe, "-o", home / "out").code == 0
    page = (home / "out/report.md").read_text()
    assert "Engines: none, the recipe has no `targets` section" in page
    parity = json.loads((home / "out/report.json").read_text())["parity"]
    assert {row["form"]: row["runtime"] for row in parity} == {"fp32": "onnxruntime"}


def test_what_no_runtime_here_reads_is_compared_in_simulation_only(
    home: Path, tmp_path: Path
) -> None:
    bare: dict[str, Any] = dict.fromkeys(("targets", "bench", "gates"))
    sections = digits_sections(
        **bare,
        quantize={"method": "ptq", "activations": "symmetric"},
        export={"dialects": ["tensorrt", "openvino"]},
    )
    recipe = write_recipe(tmp_path / "r.yaml", sections)
    assert edgex("export", recipe, "-o", home / "out").code == 0
    parity = json.loads((home / "out/report.json").read_text())["parity"]
    rows = {row["form"]: row for row in parity}
    assert rows["int8-openvino"]["runtime"] == "openvino"
    assert rows["int8-openvino"]["executed_vs_torch"] is not None
    assert rows["int8-tensorrt"]["skipped"] == "no runtime on this machine reads it"
    assert rows["int8-tensorrt"]["simulated_vs_float"]["sqnr_db"] > 10
    assert rows["int8-tensorrt"]["executed_vs_torch"] is None


def test_quantized_for_nobody_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    bare: dict[str, Any] = dict.fromkeys(("targets", "bench", "gates"))
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(**bare))
    done = edgex("export", recipe, "-o", tmp_path / "out")
    assert done.code == 2
    assert "--dialect" in done.err
    assert not (tmp_path / "out").exists()


# --- the output folder ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "recipe.yaml", "report.md", "onnx", "engines/own.onnx", "plan.json"],
)
def test_files_of_the_user_are_never_replaced(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    done = edgex("run", write_recipe(tmp_path / "r.yaml", digits_sections()), "-o", out)
    assert done.code == 2
    assert f"{out / name}: is there already" in done.err
    assert (out / name).read_text() == "mine"
    assert not (out / "store").exists()


def test_links_of_the_user_stay(home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "photos").symlink_to(tmp_path)
    (out / "store").symlink_to(tmp_path / "disk")
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections())
    for _ in range(2):
        assert edgex("import", recipe, "-o", out).code == 0
    assert (out / "photos").is_symlink()
    assert (out / "store").is_symlink()
    assert (out / "model.safetensors").resolve().is_file()


def test_a_failed_run_leaves_no_report_that_looks_like_its_own(home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections())
    assert edgex("import", recipe, "-o", home / "out").code == 0
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no such thing")
    sections = {"name": "broken", "model": {"kind": "checkpoint", "path": str(broken)}}
    done = edgex("import", write_recipe(tmp_path / "b.yaml", sections), "-o", home / "out")
    assert done.code == 4
    assert not (home / "out/report.json").exists()
    assert not (home / "out/report.md").exists()


def test_results_do_not_go_among_the_photos(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    sections = digits_sections(calibration={"source": {"kind": "photos", "path": str(photos)}})
    done = edgex("run", write_recipe(tmp_path / "r.yaml", sections), "-o", photos / "out")
    assert done.code == 2
    assert "lies among the photos" in done.err
    assert not (photos / "out").exists()


def test_a_reader_who_leaves_changes_no_exit_code(home: Path, tmp_path: Path) -> None:
    sections = digits_sections(gates={"sqnr_db_min": 150.0})
    recipe = write_recipe(tmp_path / "r.yaml", sections)
    edgex("run", recipe, "-o", home / "out")
    child = subprocess.Popen(
        edgex_argv("run", recipe, "-o", home / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait(timeout=120) == 1


def test_seven_bits_are_for_a_runtime_that_saturates_without_vnni_alone(tmp_path: Path) -> None:
    spec = PtqSpec(method="ptq")
    facts = agent_that("well()").call("probe", {}, {}, tmp_path / "answer")
    machine = ProbeRecord.model_validate(facts)
    assert not machine.cpu.vnni
    model = {"kind": "checkpoint", "path": "x.keras"}
    bare = Recipe.model_validate({"name": "x", "model": model})
    target = {"target": "cpu-x86", "runtimes": ["onnxruntime"]}
    exact = Recipe.model_validate({"name": "x", "model": model, "targets": [target]})
    target = {"target": "cpu-x86", "runtimes": ["onnxruntime", "openvino"]}
    x86 = Recipe.model_validate({"name": "x", "model": model, "targets": [target]})
    assert pipeline._weight_bits(spec, bare, machine) == 8
    assert pipeline._weight_bits(spec, exact, machine) == 8
    assert pipeline._weight_bits(spec, x86, machine) == 7
    assert pipeline._weight_bits(PtqSpec(method="ptq", weight_bits=8), x86, machine) == 8


# --- trouble --------------------------------------------------------------------------------------


def fault(kind: type[EdgexError], **where: Any) -> Callable[[str, Mapping[str, Any]], Any]:
    """Return trouble for every call whose verb and request have these values."""

    def trouble(verb: str, request: Mapping[str, Any]) -> EdgexError | None:
        asked = {"verb": verb, **request}
        asked["timed"] = request.get("timing") is not None
        hit = all(asked.get(key) == value for key, value in where.items())
        return kind("the engine broke, scripted") if hit else None

    return trouble


TROUBLE: dict[str, tuple[type[EdgexError], dict[str, Any], int, int]] = {
    # error, where; exit code, and failed parity rows
    "a build": (BadArtifact, {"verb": "build", "runtime": "openvino", "batch": 2}, 4, 0),
    "a parity check": (BadArtifact, {"runtime": "openvino", "batch": 1}, 4, 2),
    "an evaluation": (
        MeasurementInvalid,
        {"verb": "run", "runtime": "openvino", "batch": 2, "timed": False},
        5,
        0,
    ),
    "a measurement": (
        NotPossibleHere,
        {"verb": "run", "runtime": "openvino", "batch": 2, "timed": True},
        3,
        0,
    ),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_an_engine_that_fails_costs_its_rows_and_no_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kind, where, code, failed_parity = TROUBLE[what]
    out = tmp_path / "out"
    shutil.copytree(home / "out", out, symlinks=True)
    for stage in ("verify", "bench"):
        shutil.rmtree(out / "store" / stage)
    monkeypatch.setattr(
        "edgexception.pipeline.local_device", lambda: TroubledDevice(trouble=fault(kind, **where))
    )
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(bench={"batch_sizes": [2]}))
    done = edgex("run", recipe, "-o", out, "--json")
    assert done.code == code, done.err
    assert done.err.splitlines()[-1] == "edgex: the engine broke, scripted"
    assert "nothing to do" not in done.err
    report = Report.model_validate_json(done.out)
    assert report == report_in(out)
    assert [(r.runtime, r.status) for r in report.rows] == [
        ("onnxruntime", "measured"), ("onnxruntime", "measured"),
        ("openvino", "failed"), ("openvino", "failed"),
    ]  # fmt: skip
    for row in report.rows:
        assert row.reason == ("the engine broke, scripted" if row.status == "failed" else None)
        assert (row.latency is None) == (row.top1 is None) == (row.status == "failed")
    assert sum(parity.failed is not None for parity in report.parity) == failed_parity
    assert [gate.passed for gate in report.gates] == [True] * 3 + [False] * 3

    monkeypatch.undo()
    again = edgex("run", recipe, "-o", out, "--json")
    assert again.code == 0, again.err
    assert {row.status for row in Report.model_validate_json(again.out).rows} == {"measured"}


def test_a_full_disk_or_memory_ends_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = TroubledDevice(trouble=fault(OutOfResources, verb="build"))
    monkeypatch.setattr("edgexception.pipeline.local_device", lambda: device)
    recipe = changed(tmp_path, bench={"batch_sizes": [5]})
    with pytest.raises(OutOfResources, match="scripted"):
        run(recipe, home / "out")


def test_a_damaged_result_is_named_and_not_used(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(home / "out", out, symlinks=True)
    (plan,) = [
        p for p in out.glob("store/quantize/*/plan.json") if p.samefile(home_plan(out, home))
    ]
    plan.chmod(0o644)
    plan.write_text(plan.read_text().replace("0", "1", 1))
    done = edgex("run", home / "recipe.yaml", "-o", out)
    assert done.code == 4
    message = done.err.splitlines()[-1]
    assert f"{plan}: is not what was published; remove the folder {plan.parent}" in message
    shutil.rmtree(plan.parent)
    assert edgex("quantize", home / "recipe.yaml", "-o", out).code == 0


def home_plan(out: Path, home: Path) -> Path:
    """The plan of the recipe itself; the changes above left others in the store."""
    run(load_recipe(home / "recipe.yaml"), out, "quantize")
    return (out / "plan.json").resolve()


def test_a_second_run_at_the_same_time_is_refused(home: Path) -> None:
    with Store(home / "out/store"):
        done = edgex("run", home / "recipe.yaml", "-o", home / "out")
    assert done.code == 2
    assert "is in use by another edgex (process" in done.err.splitlines()[-1]


def test_classes_of_an_evaluation_must_fit_the_networks(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without names in the network, folders name the outputs, and their number must be right."""
    pytest.importorskip("torch")
    from edgexception.model.checkpoint import load_checkpoint, save_checkpoint  # noqa: PLC0415

    model = load_checkpoint(world / "net.safetensors")
    object.__setattr__(model, "classes", None)
    save_checkpoint(model, tmp_path / "nameless.safetensors")
    shutil.copytree(world / "test", tmp_path / "test")
    shutil.rmtree(tmp_path / "test/cup")
    arguments = ("quantize", tmp_path / "nameless.safetensors", "--evaluation", tmp_path / "test")
    calibration = ("--calibration", world / "photos", "--images", 12, "-o", tmp_path / "out")
    done = edgex(*arguments, *calibration)
    assert done.code == 2
    assert "the evaluation has 4 classes and the network 5 outputs: list the class" in done.err
    done = edgex(*arguments, "--classes", "cup,fork,glass,knife,plate", *calibration)
    assert done.code == 0, done.err


def test_a_typo_in_a_path_is_found_before_training(tmp_path: Path) -> None:
    source = {"kind": "folder", "path": "nowhere"}
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(evaluation={"source": source}))
    with pytest.raises(UsageError, match="nowhere: there is no such folder"):
        run(load_recipe(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the real one ---------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_the_digits_recipe_runs_and_keeps_its_promises(tmp_path: Path) -> None:
    """recipes/digits.yaml as a user runs it, with its own gates."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "edgexception", "run", "recipes/digits.yaml", "-o", out, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = Report.model_validate(json.loads(done.stdout))
    assert len(report.gates) >= 12
    assert report.failed_gates == ()
    assert len(report.rows) == 8
    assert {row.status for row in report.rows} == {"measured"}
    assert (out / "report.md").read_text().count("| measured") == 8
