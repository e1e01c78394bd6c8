"""The agent's zipapp on an emulated aarch64 machine, and in Pythons of other versions.

Run with `pytest -m emulated` (some minutes). Not part of the default run: it downloads 60 MB once
for the machine, and 50 MB for each Python, into .data. Debian has no Python 3.10 or 3.12 for
aarch64, so these two are native ones of x86-64, as far as they are installed; the emulated one is
3.11.

Tolerance, from what was measured with ONNX Runtime 1.32.0 on both sides (Cortex-A76 against x86-64
with VNNI): the INT8 logits of the full network at 150x150 are equal to the last bit for 16 of 16
photos; those of the narrow one for 596 of 600 digits, the other 4 are off by up to 0.009 (logits
have a deviation of 3.4), together 80.7 dB, and no decision differs. Sums of integers are exact in
any order; between the integer layers stand float ones, whose last bit may differ, and where a value
is halfway between two levels that bit decides. 60 dB leaves room for more such images, and would
see one wrong layer: a saturating kernel is at 10 dB. Float networks are 127 dB apart.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command import ROOT, Result, edgex, write_recipe
from emulated import CPUS, PYTHON, emulated_device, find_python, native_device, set_up
from numpy.typing import NDArray
from sshd import Sshd

from edgexception.bench.statistics import agreement, sqnr_db
from edgexception.data import open_evaluation
from edgexception.device import Device, ProbeRecord, local_device
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report

MACHINE = ROOT / ".data/aarch64"
CPU = "cortex-a76"
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
    assert (facts.arch, facts.python[:4]) == ("aarch64", PYTHON)
    assert {"asimd", "asimddp"} <= set(facts.cpu.flags)
    assert "CPUExecutionProvider" in facts.runtimes["onnxruntime"].devices


@pytest.mark.parametrize("cpu", CPUS)
def test_logits_are_those_of_x86_within_the_tolerance(
    exported: Path, tmp_path: Path, cpu: str
) -> None:
    _compare(emulated_device(MACHINE, tmp_path, cpu), exported, tmp_path)


@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_logits_of_another_python_are_those_of_this_one_within_the_tolerance(
    exported: Path, tmp_path: Path, version: str
) -> None:
    """Native: the agent runs in that Python, with the newest ONNX Runtime that there is for it."""
    try:
        find_python(version)
    except LookupError as error:
        pytest.skip(str(error))
    device = native_device(ROOT / f".data/python-{version}", tmp_path, version)
    answer = device.call("probe", {}, {}, tmp_path / "probe")
    assert ProbeRecord.model_validate(answer).python.startswith(f"{version}.")
    _compare(device, exported, tmp_path)


def _compare(there: Device, exported: Path, tmp_path: Path) -> None:
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


# --- the whole command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits recipe, made quick, for ONNX Runtime on x86-64 and on aarch64."""
    folder = tmp_path_factory.mktemp("recipes")
    sections = yaml.safe_load((ROOT / "recipes/digits.yaml").read_text())
    sections["bench"] = {"warmup_ms": 1, "duration_ms": 50, "min_iterations": 5, "rounds": 2}
    sections["quantize"] = {
        "method": "ptq", "weight_bits": 8, "ranges": "minmax", "rounding": "nearest",
        "equalization": False, "bias_correction": False,
    }  # fmt: skip
    sections["model"]["epochs"] = 2
    del sections["gates"]
    found = {}
    for name in ("cpu-x86", "cpu-aarch64"):
        target = {"target": name, "runtimes": ["onnxruntime"], "threads": 1}
        path = folder / f"{name}.yaml"
        found[name] = write_recipe(path, {**sections, "targets": [target]})
    return found


@pytest.fixture(scope="module")
def local(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `edgex bench` says of this machine."""
    out = tmp_path_factory.mktemp("local")
    return _report(edgex("bench", recipes["cpu-x86"], "--out", out, "--json"))


@pytest.fixture
def emulated_sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """A real sshd that lets everybody into the emulated machine, with their home in it."""
    into = f'{shlex.quote(str(set_up(MACHINE)))} {CPU} "$HOME" sh -c "$SSH_ORIGINAL_COMMAND"'
    sshd = Sshd(tmp_path / "sshd", forced=into)
    monkeypatch.setenv("PATH", f"{sshd.folder / 'bin'}:{os.environ['PATH']}")
    yield sshd
    sshd.stop()


def test_bench_on_the_machine_over_ssh_reports_what_a_local_bench_does(
    recipes: dict[str, Path], local: Any, emulated_sshd: Sshd, tmp_path: Path
) -> None:
    arguments = ("--device", emulated_sshd.url, "--out", tmp_path / "out", "--json")
    remote = _report(edgex("bench", recipes["cpu-aarch64"], *arguments))
    assert emulated_sshd.left() == []
    assert remote["machine"]["arch"] == "aarch64"
    assert remote["machine"]["python"].startswith(PYTHON)
    assert [row["status"] for row in remote["rows"]] == ["measured", "measured"]
    assert _shape(remote) == _shape(local)
    for theirs, mine in zip(remote["rows"], local["rows"], strict=True):
        assert theirs["precision"] == mine["precision"]
        assert theirs["top1"] == mine["top1"]
        assert theirs["fidelity"]["agreement"] == mine["fidelity"]["agreement"]


def test_a_kit_written_here_is_run_there_and_comes_back(
    recipes: dict[str, Path], local: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = edgex("build-engine", recipes["cpu-aarch64"], "--out", out)
    assert done.code == 0, done.err
    assert "no engine exists yet for cpu-aarch64" in done.err
    kit = out / "digits-cpu-aarch64-kit"
    agent = ("python3", "-E", str(kit / "agent.pyz"), "run-kit", str(kit))
    ran = subprocess.run(
        [set_up(MACHINE), CPU, kit, *agent], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    report = _report(edgex("import-results", kit / "results", "--out", out, "--json"))
    for row, mine in zip(report["rows"], local["rows"], strict=True):
        assert (row["status"], row["machine"]["arch"]) == ("measured", "aarch64")
        assert row["top1"] == mine["top1"]
        assert row["latency"]["round_medians_ms"][1] > 0


def _report(done: Result) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


def _shape(value: object) -> object:
    """The fields, but for what is named after a machine's operators and packages, or sensors."""
    if isinstance(value, dict):
        free = ("layers", "versions", "recipe", "shares", "conversions", "blocks")
        free += ("hottest", "clock_mhz")
        return {key: None if key in free else _shape(inner) for key, inner in value.items()}
    return [_shape(value[0])] if isinstance(value, list) and value else None
