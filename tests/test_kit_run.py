"""From a checkpoint to a kit, from the kit to its results in another process, and back."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command import Result, edgex, write_recipe
from fakes import TroubledDevice

from edgexception.kit import COMMAND_VERSIONS
from edgexception.report.record import Report

pytest.importorskip("torch")

QUICK = {"ranges": "minmax", "equalization": False, "bias_correction": False, "rounding": "nearest"}


def sections(world: Path, target: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "away",
        "model": {"kind": "checkpoint", "path": str(world / "net.safetensors")},
        "calibration": {"source": {"kind": "photos", "path": str(world / "photos")}, "images": 12},
        "evaluation": {"source": {"kind": "folder", "path": str(world / "test")}},
        "quantize": {"method": "ptq", "weight_bits": 8, **QUICK},
        "bench": {"warmup_ms": 1, "duration_ms": 10, "min_iterations": 2, "rounds": 2},
        "targets": [target],
        **changes,
    }


CPU = {"target": "cpu-x86", "runtimes": ["onnxruntime"], "threads": 1}


def report_in(out: Path) -> Report:
    return Report.model_validate_json((out / "report.json").read_bytes())


def run_kit(kit: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a kit as a person on the device does; nothing of this package is on the path there."""
    return subprocess.run(
        command or (sys.executable, "agent.pyz", "run-kit", "."),
        cwd=kit,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


# --- the round trip: this machine takes itself for another one ------------------------------------


@pytest.fixture(scope="module")
def monkey() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory, monkey: Any) -> Path:
    """The output folder of a run whose target is another architecture than "this machine"."""
    device = TroubledDevice(facts={"arch": "aarch64"})
    monkey.setattr("edgexception.pipeline.local_device", lambda: device)
    folder = tmp_path_factory.mktemp("a kit's folder")
    recipe = write_recipe(folder / "away.yaml", sections(world, CPU))
    done = edgex("build-engine", recipe, "-o", folder / "out")
    assert done.code == 0, done.err
    assert "no engine exists yet for cpu-x86: it is built on the device" in done.err
    return folder / "out"


@pytest.fixture(scope="module")
def results(made: Path) -> Path:
    kit = made / "away-cpu-x86-kit"
    done = run_kit(kit)
    assert done.returncode == 0, done.stderr
    assert "[1/9] probe: " in done.stderr
    assert "[9/9] timing cpu-x86-onnxruntime-fp32-b1: " in done.stderr
    return kit / "results"


def test_a_kit_says_that_no_engine_exists(made: Path) -> None:
    kit = made / "away-cpu-x86-kit"
    assert "**No engine exists yet**" in (kit / "README.md").read_text()
    names = {p.relative_to(kit).as_posix() for p in kit.rglob("*") if p.is_file()}
    names = {name for name in names if not name.startswith("results")}
    assert names == {
        "README.md",
        "SHA256SUMS",
        "agent.pyz",
        "images.npy",
        "kit.json",
        "models/fp32.onnx",
        "models/int8-onnxruntime.onnx",
        "run.sh",
    }
    assert not any(p.is_symlink() for p in kit.rglob("*"))
    check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=kit, check=False)
    assert check.returncode == 0
    assert (kit / "agent.pyz").stat().st_size < 1 << 20


def test_the_rows_of_a_kit_wait(world: Path, made: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made / "store", out / "store", symlinks=True)
    recipe = write_recipe(tmp_path / "away.yaml", sections(world, CPU))
    done = edgex("run", recipe, "-o", out)
    assert done.code == 3, "measurements were asked for, and none was made"
    assert "no engine exists yet" in done.err
    for row in report_in(out).rows:
        assert (row.status, row.latency, row.engine_bytes) == ("skipped", None, None)
        assert "no engine exists yet" in str(row.reason)


def test_what_the_kit_made_comes_back_as_measured_there(made: Path, results: Path) -> None:
    done = edgex("import-results", results, "-o", made)
    assert done.code == 0, done.err
    report = report_in(made)
    assert {row.status for row in report.rows} == {"measured"}
    for row in report.rows:
        assert row.machine is not None
        assert row.machine.device.startswith("kit-")
        assert row.machine.arch == "x86_64"
        assert row.latency is not None
        assert row.top1 is not None
        assert row.engine_bytes
    fp32, int8 = report.rows
    assert int8.speedup is not None
    assert int8.paired is not None
    assert fp32.fidelity is not None
    assert fp32.fidelity.agreement is not None
    assert fp32.fidelity.agreement.value == 1.0
    assert "measured with a kit on" in (made / "report.md").read_text()
    for line in report.stages:
        if line.stage in ("import", "quantize", "export", "reference"):
            assert line.reused, line.stage
    assert (made / "engines/cpu-x86-onnxruntime-int8-b1.onnx").is_file()
    again = edgex("import-results", results, "-o", made)
    assert "nothing to do" in again.err


def test_a_finished_kit_is_not_done_again_and_an_interrupted_one_goes_on(
    results: Path, tmp_path: Path
) -> None:
    kit = tmp_path / "kit with spaces; $(touch x)"
    shutil.copytree(results.parent, kit)
    (kit / "results/results.json").unlink()
    (kit / "results/003-run/call.json").unlink()
    (kit / "results/005-run/times_ns.npy").write_bytes(b"cut")
    done = run_kit(kit, "sh", "run.sh")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == 7
    assert (kit / "results/results.json").is_file()
    assert not (kit / "x").exists()


def test_a_kit_that_was_cut_is_refused(made: Path, results: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(made / "away-cpu-x86-kit", kit)
    model = kit / "models/fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    done = run_kit(kit)
    assert done.returncode == 4
    assert "models/fp32.onnx is not what the kit says (sha256)" in done.stderr
    (kit / "kit.json").write_text("[")
    assert run_kit(kit).returncode == 4
    assert run_kit(tmp_path / "kit", sys.executable, "agent.pyz", "run-kit").returncode == 2


def test_an_engine_that_fails_there_fails_here(
    world: Path, made: Path, results: Path, tmp_path: Path
) -> None:
    """Its answer in round 2 is one of a crash: its row is failed, the other is measured."""
    broken = tmp_path / "results"
    shutil.copytree(results, broken)
    content = json.loads((broken / "results.json").read_bytes())
    last = [c for c in content["calls"] if "timing" in c["request"] and c["request"]["timing"]][-1]
    last |= {"code": -11, "files": {}}
    (broken / "results.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    shutil.copytree(made, out, symlinks=True)
    done = edgex("import-results", broken, "-o", out)
    assert done.code == 4
    rows = {row.precision: row for row in report_in(out).rows}
    statuses = sorted(row.status for row in rows.values())
    assert statuses == ["failed", "measured"]
    (measured,) = [row for row in rows.values() if row.status == "measured"]
    assert measured.latency is not None
    assert len(measured.latency.round_medians_ms) == 2


# --- results from elsewhere -----------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def breaks(results: Path) -> None:
        content = json.loads((results / "results.json").read_bytes())
        change(content)
        (results / "results.json").write_text(json.dumps(content))

    return breaks


def _link(results: Path) -> None:
    path = results / "001-build/engine.onnx"
    path.rename(results / "elsewhere")
    path.symlink_to(results / "elsewhere")


def _pipe(results: Path) -> None:
    import os  # noqa: PLC0415

    (results / "001-build/engine.onnx").unlink()
    os.mkfifo(results / "001-build/engine.onnx")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda r: (r / "001-build/engine.onnx").write_bytes(b"x"), "is not what results.json"),
    "missing": (lambda r: (r / "001-build/engine.onnx").unlink(), "cannot be read"),
    "link": (_link, "is not a plain file"),
    "pipe": (_pipe, "is not a plain file"),
    "no results": (lambda r: (r / "results.json").unlink(), "run to its end"),
    "no json": (lambda r: (r / "results.json").write_text("{"), "is not JSON"),
    "deep json": (lambda r: (r / "results.json").write_text("[" * 100_000), "is not JSON"),
    "other schema": (_edit(lambda c: c.update(format=2)), "field format"),
    "more fields": (_edit(lambda c: c.update(more=1)), "field more"),
    "another kit": (_edit(lambda c: c.update(kit="0" * 64)), "results of another kit"),
    "folder above": (_edit(lambda c: c["calls"][1].update(folder="../..")), "not a plain name"),
    "file above": (
        _edit(lambda c: c["calls"][1]["files"].update({"../x": "0" * 64})),
        "not a plain name",
    ),
    "calls left out": (_edit(lambda c: c["calls"].pop(1)), "has no answer to build onnxruntime"),
    "other request": (_edit(lambda c: c["calls"][1]["request"].update(threads=9)), "has no answer"),
    "other model": (
        _edit(lambda c: c["calls"][1]["inputs"].update({"model.onnx": "0" * 64})),
        "has no answer",
    ),
    "other record": (_edit(lambda c: c["calls"][1]["files"].pop("engine.onnx")), "engine.onnx"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_results_are_refused(case: str, made: Path, results: Path, tmp_path: Path) -> None:
    breaks, word = HOSTILE[case]
    copied, out = tmp_path / "results", tmp_path / "out"
    shutil.copytree(results, copied)
    shutil.copytree(made, out, symlinks=True, ignore=shutil.ignore_patterns("build", "*-kit"))
    shutil.rmtree(out / "store/build", ignore_errors=True)
    breaks(copied)
    done = edgex("import-results", copied, "-o", out)
    assert done.code == 4, (done.code, done.err)
    assert word in done.err
    assert "Traceback" not in done.err


def test_results_of_another_architecture_are_refused(
    world: Path, made: Path, results: Path, tmp_path: Path
) -> None:
    forged = tmp_path / "results"
    shutil.copytree(results, forged)
    answer = forged / "000-probe/response.json"
    text = answer.read_text().replace('"arch": "x86_64"', '"arch": "riscv64"')
    answer.write_text(text)
    import hashlib  # noqa: PLC0415

    digest = hashlib.sha256(text.encode()).hexdigest()
    _edit(lambda c: c["calls"][0]["files"].update({"response.json": digest}))(forged)
    done = edgex("import-results", forged, "-o", made)
    assert done.code == 4
    assert "cpu-x86 is x86_64, and the kit was run on riscv64" in done.err


# --- a Jetson, from a machine that has none -------------------------------------------------------


def known_flags(version: str) -> set[str]:
    """Flags that trtexec reads, from the vendor's sources: the nearest tag at hand."""
    vendor = json.loads((Path(__file__).parent / "agent/tensorrt_vendor.json").read_text())
    tag = {"10.3.0": "10.3.0", "10.7.0": "10.7.0", "10.16.2": "10.16", "11.4.1": "11.1"}[version]
    flags: set[str] = set()
    for name, changes in vendor["trtexec"].items():
        flags = (flags | set(changes["added"].split())) - set(changes["removed"].split())
        if name == tag:
            return flags
    raise KeyError(tag)


def jetson(
    world: Path,
    tmp_path: Path,
    name: str = "jetson",
    arch: str = "x86_64",
    precisions: Sequence[str] = ("fp32", "fp16", "int8-fp16"),
    **told: Any,
) -> tuple[Result, Path]:
    target: dict[str, Any] = {
        "target": name, "runtimes": ["auto"], "precisions": list(precisions),
    }  # fmt: skip
    target |= {"tensorrt": told} if told else {}
    quantize = {"method": "ptq", "activations": "symmetric", **QUICK}
    recipe = sections(world, target, quantize=quantize)
    del recipe["bench"]
    path = write_recipe(tmp_path / "away.yaml", recipe)
    device = TroubledDevice(facts={"board": None, "arch": arch})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgexception.pipeline.local_device", lambda: device)
        return edgex("build-engine", path, "-o", tmp_path / "out"), tmp_path / "out"


def test_a_kit_for_a_jetson_has_command_lines_that_every_version_reads(
    world: Path, tmp_path: Path
) -> None:
    done, out = jetson(world, tmp_path)
    assert done.code == 0, done.err
    assert "target jetson is taken to be jetson-orin-nano-8gb: no Jetson is here" in done.err
    assert "no engine exists yet for jetson-orin-nano-8gb" in done.err
    kit = out / "away-jetson-orin-nano-8gb-kit"
    content = json.loads((kit / "kit.json").read_bytes())
    builds = [call["request"] for call in content["calls"] if call["verb"] == "build"]
    assert [request["threads"] for request in builds] == [6, 6, 6]
    timed = [call for call in content["calls"] if call["label"].startswith("timing ")]
    assert len(timed) == 3 * 3, "a kit measures what it builds"
    lines = 0
    for version in COMMAND_VERSIONS:
        text = (kit / f"commands/tensorrt-{version}.sh").read_text()
        for line in text.splitlines():
            if line.startswith("#") or not line:
                continue
            program, *arguments = shlex.split(line)
            names = [argument.partition("=")[0] for argument in arguments]
            assert program == "trtexec"
            assert set(names) <= known_flags(version), version
            assert len(set(names)) == len(names)
            for argument in arguments:
                name, _, value = argument.partition("=")
                if name == "--onnx":
                    assert (kit / value).is_file()
                if name.endswith("Shapes"):
                    assert value == "images:1x71x71x3"
            lines += 1
        subprocess.run(["sh", "-n", str(kit / f"commands/tensorrt-{version}.sh")], check=True)
    assert lines == len(COMMAND_VERSIONS) * 3 * 2
    again, _ = jetson(world, tmp_path)
    assert again.code == 0, "a kit that is there already is left as it is"


def test_a_kit_says_which_version_cannot(world: Path, tmp_path: Path) -> None:
    options = {"hardware_compatibility": "same-compute-capability"}
    done, out = jetson(world, tmp_path, "jetson-agx-orin-64gb", **options)
    assert done.code == 0, done.err
    kit = out / "away-jetson-agx-orin-64gb-kit"
    old = (kit / "commands/tensorrt-10.3.0.sh").read_text()
    assert "# not possible: target jetson-agx-orin-64gb: TensorRT 10.3.0 cannot do hardware" in old
    assert "\ntrtexec" not in old
    assert "\ntrtexec" in (kit / "commands/tensorrt-10.16.2.sh").read_text()


def test_a_kit_for_a_dla_says_which_layers_run_on_it(world: Path, tmp_path: Path) -> None:
    told = {"precisions": ["fp16", "int8-fp16"], "dla_core": 1, "gpu_fallback": True}
    done, out = jetson(world, tmp_path, "jetson-agx-orin-64gb", **told)
    assert done.code == 0, done.err
    half, int8 = (row.dla for row in report_in(out).rows)
    assert half is not None
    assert int8 is not None
    assert set(half.precisions) == {"fp16"}
    assert set(int8.precisions) == {"fp16", "int8"}
    assert half.gpu["avg_pool_mean"].startswith("it is a mean over all pixels")
    assert (half.fell_back, half.taken) == (None, None), "nothing is built yet"
    line = f"planned for the DLA: {half.on_dla} of {half.layers} layers ({half.on_dla} in fp16), "
    assert line in done.out
    for page in (out / "report.md", out / "away-jetson-agx-orin-64gb-kit/README.md"):
        assert line in page.read_text().replace("\\", "")
    commands = out / "away-jetson-agx-orin-64gb-kit/commands"
    assert "--useDLACore=1" in (commands / "tensorrt-10.3.0.sh").read_text()
    assert "cannot do DLA" in (commands / "tensorrt-10.16.2.sh").read_text()


def test_an_arm_machine_that_is_no_jetson_makes_a_kit(world: Path, tmp_path: Path) -> None:
    done, out = jetson(world, tmp_path, arch="aarch64")
    assert done.code == 0, done.err
    assert (out / "away-jetson-orin-nano-8gb-kit/run.sh").is_file()


def test_what_no_version_can_is_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    done, out = jetson(world, tmp_path, "jetson", dla_core=0, gpu_fallback=True)
    assert done.code == 3
    assert "there is no DLA core 0" in done.err
    assert "nearest possible: dla_core left out" in done.err
    assert not (out / "store/import").exists()


def test_what_is_in_the_way_of_a_kit_stays(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kit = out / "away-jetson-orin-nano-8gb-kit"
    kit.mkdir(parents=True)
    (kit / "mine").write_text("precious")
    done, _ = jetson(world, tmp_path)
    assert done.code == 2
    assert "is there already and is no kit" in done.err
    assert (kit / "mine").read_text() == "precious"
    (kit / "kit.json").write_text("{}")
    (kit / "results").mkdir()
    done, _ = jetson(world, tmp_path)
    assert done.code == 2
    assert "has results of another kit in it" in done.err
    (kit / "results").rmdir()
    done, _ = jetson(world, tmp_path)
    assert done.code == 0
    assert not (kit / "mine").exists()
