"""A latency budget in a recipe: steps are timed, a plan is made, measured and corrected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import digits_sections, edgex, write_recipe
from fakes import ClockDevice

from edgexception import pipeline
from edgexception.prune.latency import LatencyTable
from edgexception.report.record import Report

pytest.importorskip("sklearn")
NARROW = {"stem": [8, 16], "entry": [[16, 16]], "middle": [], "exit": [16, 24], "tail": [32]}
PLAIN = ("--importance", "magnitude")


def pruned(
    folder: Path, device: ClockDevice, monkeypatch: pytest.MonkeyPatch, **spec: Any
) -> tuple[Report, list[str], str]:
    """Prune with a device; return the report, the stages that were not there, and stderr."""
    absent = dict.fromkeys(("targets", "bench", "gates", "evaluation", "quantize"))
    asked = {"target": "cpu-x86", "runtime": "onnxruntime", "align": 1, **spec}
    sections = digits_sections(**{**absent, "prune": asked})
    sections["model"] |= {"architecture": {**NARROW, "head": [10]}, "epochs": 0.2}
    recipe = write_recipe(folder / "recipe.yaml", sections)
    monkeypatch.setattr(pipeline, "local_device", lambda: device)
    done = edgex("prune", recipe, "-o", folder / "out", "--json")
    assert done.code == 0, done.err
    report = Report.model_validate(json.loads(done.out))
    return report, [line.stage for line in report.stages if not line.reused], done.err


def test_a_budget_is_met_where_step_times_do_not_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The floor is a tenth of the network, and would be most of a step, of which there are many.
    device = ClockDevice(floor_ns=30_000, macs_per_ns=5.0)
    report, new, _ = pruned(tmp_path, device, monkeypatch, latency=0.6)
    assert new[:6] == [
        "train", "importance", "latency-steps", "latency-table", "prune-plan", "latency-check"
    ]  # fmt: skip
    found = report.pruning
    assert found is not None
    assert found.latency is not None
    assert found.latency.met
    assert found.latency.plans >= 2, "the first plan believed the sum"
    assert found.latency.gain > 1.0
    whole, left = found.macs
    expected = (30_000 + left / 5) / (30_000 + whole / 5)
    assert found.latency.check.share.value == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(0.6, rel=0.05)
    assert found.latency.engine == "cpu-x86-onnxruntime-fp32-b1"
    assert found.budgets == {"latency": 0.6}
    page = (tmp_path / "out/report.md").read_text()
    assert "latency budget 0.6, met: measured 0." in page
    table = LatencyTable.model_validate_json((tmp_path / "out/latency.json").read_bytes())
    assert table.engine == found.latency.engine

    built = len(device.built)  # type: ignore[attr-defined]
    report, new, _ = pruned(tmp_path, device, monkeypatch, latency=0.6)
    assert new == []
    report, new, _ = pruned(tmp_path, device, monkeypatch, latency=0.75)
    assert "latency-table" not in new, "one table serves every budget"
    assert set(new) == {"prune-plan", "latency-check", "prune"}
    assert len(device.built) - built <= 2 * 4  # type: ignore[attr-defined]
    assert report.pruning is not None
    assert report.pruning.latency is not None
    assert report.pruning.latency.met


def test_int8_is_timed_without_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = ClockDevice(floor_ns=1, macs_per_ns=5.0)
    changes = {"latency": 0.7, "precision": "int8", "runtime": "openvino"}
    report, _, _ = pruned(tmp_path, device, monkeypatch, **changes)
    assert report.pruning is not None
    assert report.pruning.latency is not None
    assert report.pruning.latency.engine == "cpu-x86-openvino-int8-b1"
    assert report.pruning.latency.met


def test_a_budget_that_widths_cannot_meet_closely_is_said_to_be_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = ClockDevice(floor_ns=1, macs_per_ns=5.0)
    report, _, err = pruned(tmp_path, device, monkeypatch, latency=0.9, align=8, ranking="local")
    assert report.pruning is not None
    assert report.pruning.latency is not None
    assert not report.pruning.latency.met
    assert "prune.latency: 0.9 was asked for, and the nearest of" in err
    assert "MISSED" in (tmp_path / "out/report.md").read_text()


def test_widths_follow_the_target_where_the_recipe_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = ClockDevice(floor_ns=1, macs_per_ns=5.0)
    absent = dict.fromkeys(("bench", "gates", "evaluation", "quantize"))
    sections = digits_sections(**absent, prune={"macs": 0.7})
    sections["model"] |= {"epochs": 0.1}
    for runtimes, align in ((["onnxruntime"], 16), (["onnxruntime", "openvino"], 32)):
        sections["targets"] = [{"target": "cpu-x86", "runtimes": runtimes, "precisions": ["fp32"]}]
        sections["model"]["architecture"] |= {"stem": [32, 64], "entry": [[64, 64]]}
        sections["model"]["architecture"] |= {"middle": [], "exit": [64, 64], "tail": [64, 64]}
        recipe = write_recipe(tmp_path / "recipe.yaml", sections)
        monkeypatch.setattr(pipeline, "local_device", lambda: device)
        done = edgex("prune", recipe, "--plan-only", "-o", tmp_path / "out", "--json")
        assert done.code == 0, done.err
        found = Report.model_validate(json.loads(done.out)).pruning
        assert found is not None
        assert found.align == align


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"latency": 0.5}, "prune.latency: needs a device to measure on; add `target: cpu-x86`"),
        ({"macs": 0.5, "runtime": "openvino"}, "prune.runtime: has no effect without `latency`"),
        ({"latency": 0.5, "target": "cpu"}, "prune.target: there is no target"),
        ({"latency": 0.5, "target": "cpu-x86", "runtime": "x"}, "prune.runtime: the target cpu"),
        (
            {"latency": 0.5, "target": "cpu-x86", "precision": "fp16"},
            "prune.precision: fp16 is not built there; built are: fp32, int8",
        ),
    ],
)
def test_what_has_no_engine_is_refused(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", digits_sections(prune=spec))
    done = edgex("check", recipe)
    assert done.code == 2
    assert message in done.err


def test_a_latency_that_no_widths_reach_is_refused_with_the_nearest(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "local_device", lambda: ClockDevice(100_000, 5.0))
    flags = ("--latency", 0.01, "--target", "cpu-x86", "--align", 1, *PLAIN)
    done = edgex("prune", world / "net.safetensors", "-o", tmp_path, *flags)
    assert done.code == 2
    assert "prune.latency: 0.01 of the network's latency cannot be reached" in done.err
    assert "the nearest possible value is" in done.err


def test_what_cannot_be_measured_here_is_refused(world: Path, tmp_path: Path) -> None:
    flags = ("--latency", 0.5, "--target", "rtx-4090")
    done = edgex("prune", world / "net.safetensors", "-o", tmp_path, *flags, *PLAIN)
    assert done.code == 3
    assert "tensorrt-rtx" in done.err
    flags = ("--latency", 0.5, "--target", "cpu-x86", "--runtime", "openvino")
    done = edgex("prune", world / "net.safetensors", "-o", tmp_path, *flags, "--runtime", "x")
    assert done.code == 2
    assert "--runtime: a network is pruned for one engine" in done.err
