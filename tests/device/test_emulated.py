"""The agent's zipapp on an emulated aarch64 machine; run with `pytest -m emulated` (4 minutes).

Not part of the default run: it downloads 60 MB once, into .data/aarch64.

Tolerance, from what was measured with ONNX Runtime 1.32.0 on both sides (Cortex-A76 against x86-64
with VNNI): the INT8 logits of the full network at 150x150 are equal to the last bit for 16 of 16
photos; those of the narrow one for 596 of 600 digits, the other 4 are off by up to 0.009 (logits
have a deviation of 3.4), together 80.7 dB, and no decision differs. Sums of integers are exact in
any order; between the integer layers stand float ones, whose last bit may differ, and where a value
is halfway between two levels that bit decides. 60 dB leaves room for more such images, and would
see one wrong layer: a saturating kernel is at 10 dB. Float networks are 127 dB apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT, edgex
from emulated import CPUS, emulated_device
from numpy.typing import NDArray

from edgexception.bench.statistics import agreement, sqnr_db
from edgexception.data import open_evaluation
from edgexception.device import Device, ProbeRecord, local_device
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report

MACHINE = ROOT / ".data/aarch64"
RECIPES = ("digits", "kitchenware")
PHOTOS = {"digits": 600, "kitchenware": 4}
ASKED = {"runtime": "onnxruntime", "batch": 1, "threads": 1}

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=RECIPES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fp32.onnx, int8-onnxruntime.onnx and images.npy."""
    path = ROOT / f"recipes/{request.param}.yaml"
    if request.param == "kitchenware" and not (ROOT / ".data/kitchenware").exists():
        pytest.skip("python recipes/fetch_kitchenware.py has not been run")
    out = tmp_path_factory.mktemp(request.param)
    done = edgex("export", path, "--out", out, "--json")
    assert done.code == 0, done.err
    network = Report.model_validate_json(done.out).network
    evaluation = load_recipe(path).evaluation
    assert evaluation is not None
    _, images = open_evaluation(evaluation, network.preprocess, network.classes)
    images.write_npy(out / "all.npy")
    np.save(out / "onnx/images.npy", np.load(out / "all.npy")[: PHOTOS[request.param]])
    return out / "onnx"


def test_the_machine_tells_of_itself(tmp_path: Path) -> None:
    answer = emulated_device(MACHINE, tmp_path).call("probe", {}, {}, tmp_path / "out")
    facts = ProbeRecord.model_validate(answer)
    assert (facts.arch, facts.python[:4]) == ("aarch64", "3.11")
    assert {"asimd", "asimddp"} <= set(facts.cpu.flags)
    assert "CPUExecutionProvider" in facts.runtimes["onnxruntime"].devices


@pytest.mark.parametrize("cpu", CPUS)
def test_logits_are_those_of_x86_within_the_tolerance(
    exported: Path, tmp_path: Path, cpu: str
) -> None:
    there = emulated_device(MACHINE, tmp_path, cpu)
    for form, least_db in (("int8-onnxruntime", 60.0), ("fp32", 110.0)):
        count = None if form.startswith("int8") else 4
        theirs, ours = (
            _logits(device, exported, form, tmp_path / f"{form}-{device.name[:8]}", count)
            for device in (there, local_device())
        )
        assert agreement(ours, theirs) == len(ours)
        assert sqnr_db(ours, theirs) >= least_db


def _logits(
    device: Device, exported: Path, form: str, out: Path, count: int | None
) -> NDArray[Any]:
    model, images = exported / f"{form}.onnx", out.with_suffix(".npy")
    np.save(images, np.load(exported / "images.npy")[:count])
    device.call("build", {**ASKED, "model": "m.onnx"}, {"m.onnx": model}, out)
    files = {name: out / name for name in ("engine.onnx", "engine.json")}
    asked = {**ASKED, "engine": "engine.onnx", "manifest": "engine.json", "timing": None}
    files["images.npy"] = images
    device.call("run", {**asked, "images": "images.npy"}, files, out)
    return np.load(out / "logits.npy")
