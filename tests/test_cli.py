"""The command line: what it prints where, what it refuses, and every exit code."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, digits_sections, edgex, edgex_argv, edgex_process, write_recipe
from fakes import TroubledDevice
from kill_runs import orphans

from edgexception import __version__
from edgexception.calibration_size import too_few
from edgexception.cli import app
from edgexception.errors import UsageError
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report
from edgexception.short_form import Flags, recipe_of


def one_paragraph(err: str) -> str:
    """The last line of stderr, which must be the message and the only one of its kind."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if not line.startswith("edgex: warning: ")]
    messages = [line for line in lines if line.startswith("edgex: ")]
    assert len(messages) == 1, err
    assert err.endswith(f"{messages[0]}\n")
    return messages[0]


# --- the boundary, in real processes --------------------------------------------------------------


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom edgexception.cli import main\nsys.argv = ['edgex', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = (
        "run",
        "import",
        "prune",
        "quantize",
        "export",
        "build-engine",
        "bench",
        "check",
        "targets",
    )
    for command in (*commands, "doctor", "schema"):
        assert f"\n  {command} " in done.stdout
    loaded = set(done.stderr.split())
    heavy = {"numpy", "torch", "pydantic", "yaml", "jinja2", "PIL", "rich", "onnx", "onnxruntime"}
    assert "typer" in loaded
    assert not heavy & loaded


def test_the_version_and_what_click_refuses() -> None:
    assert edgex_process("--version").out == f"edgex {__version__}\n"
    unknown = edgex_process("quantise")
    assert (unknown.code, unknown.out) == (2, "")
    assert "quantise" in unknown.err
    assert "edgex --help" in unknown.err


@pytest.mark.parametrize(("word", "found"), [("qu", "quantize"), ("bui", "build-engine")])
def test_shells_complete_commands(word: str, found: str) -> None:
    done = edgex_process(
        _EDGEX_COMPLETE="complete_bash", COMP_WORDS=f"edgex {word}", COMP_CWORD="1"
    )
    assert done.out.split() == [found]


def test_shells_complete_flags_and_get_their_script() -> None:
    done = edgex_process(
        _EDGEX_COMPLETE="complete_bash", COMP_WORDS="edgex quantize --cal", COMP_CWORD="2"
    )
    assert done.out.split() == ["--calibration"]
    script = edgex_process(_EDGEX_COMPLETE="source_bash")
    assert "_EDGEX_COMPLETE=complete_bash" in script.out


def test_quantize_needs_no_recipe_and_prints_one_that_loads_back(
    world: Path, tmp_path: Path
) -> None:
    command = ("quantize", "net.safetensors", "--calibration", "photos/", "--images", 12, "-o")
    done = edgex_process(*command, tmp_path / "out", cwd=world)
    assert done.code == 0, done.err
    # NNCF draws its progress bars on stdout, where they would stand before the recipe.
    assert done.out.startswith("# the recipe that was used\nname: net\n")
    text, _, summary = done.out.partition("\n\n")
    printed = load_recipe(write_text(tmp_path / "printed.yaml", text))
    flags = Flags(calibration=world / "photos", images=12)
    assert printed == recipe_of(world / "net.safetensors", flags)
    assert printed == load_recipe(tmp_path / "out/recipe.yaml")
    assert "quantized: asymmetric activations" in summary
    # On a slow machine indented lines of progress stand between the stages.
    lines = [line for line in done.err.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == ["import", "edgex:", "quantize"]
    assert lines[1].startswith("edgex: warning: 12 different calibration photos may be too few")

    again = edgex_process(*command, tmp_path / "out", "--json", "--quiet", cwd=world)
    assert (again.code, again.err) == (0, f"{lines[1]}\n"), "a warning is no progress"
    report = Report.model_validate_json(again.out)
    assert report.calibration is not None
    assert report.calibration.warning == too_few("auto", 12)
    assert lines[1] == f"edgex: warning: {report.calibration.warning}"
    assert report == Report.model_validate_json((tmp_path / "out/report.json").read_bytes())
    assert all(line.reused for line in report.stages)
    for name in ("plan.json", "calibration.json", "model.safetensors"):
        assert (tmp_path / "out" / name).resolve(strict=True).is_file()


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- an interrupt ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("import", ["quantize", "--calibration", "photos", "--images", "12"]),
        ("build", ["bench", "--target", "cpu-x86", "--runtime", "onnxruntime"]),
    ],
)
def test_an_interrupt_ends_everything_at_once(
    world: Path, tmp_path: Path, stage: str, command: list[str]
) -> None:
    """Ctrl-C while this process quantizes, and while an agent measures."""
    (marker := tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        edgex_argv(command[0], "net.safetensors", *command[1:], "-o", tmp_path / "out"),
        cwd=world,
        env={**os.environ, "TMPDIR": str(marker), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert one_paragraph(err).startswith("edgex: interrupted; run the same command again")
    assert orphans(marker, patience=0) == []
    # .ses: a name that NNCF's telemetry client keeps there; what it would send is switched off.
    assert {path.name for path in marker.iterdir()} <= {".ses"}
    assert list((tmp_path / "out/store/.partial").iterdir()) == []
    assert not (tmp_path / "out/report.json").exists()


# --- flags ----------------------------------------------------------------------------------------


def test_every_flag_reaches_the_recipe(tmp_path: Path) -> None:
    flags = Flags(
        classes="cup, fork",
        input_size=64,
        resize="shortest-side",
        interpolation="nearest",
        calibration=Path("photos"),
        images=7,
        crops=3,
        evaluation=Path("labels.csv"),
        activations="symmetric",
        ranges="minmax",
        weight_bits="7",
        dialect=("tensorrt",),
        target="cpu-x86",
        runtime=("openvino",),
        precision=("int8",),
        batch="1,4",
        threads=2,
    )
    recipe = recipe_of(tmp_path / "My Net v2.keras", flags, "bench")
    sections = recipe.model_dump(mode="json", exclude_unset=True)
    here = str(Path.cwd())
    assert sections == {
        "name": "my-net-v2",
        "model": {
            "kind": "checkpoint",
            "path": str(tmp_path / "My Net v2.keras"),
            "classes": ["cup", "fork"],
            "preprocess": {
                "input_size": [64, 64],
                "resize": "shortest-side",
                "interpolation": "nearest",
            },
        },
        "calibration": {
            "source": {"kind": "photos", "path": f"{here}/photos"},
            "images": 7,
            "crops_per_photo": 3,
        },
        "evaluation": {"source": {"kind": "manifest", "path": f"{here}/labels.csv"}},
        "quantize": {
            "method": "ptq",
            "activations": "symmetric",
            "ranges": "minmax",
            "weight_bits": 7,
        },
        "export": {"dialects": ["tensorrt"], "precisions": ["int8"]},
        "targets": [
            {"target": "cpu-x86", "runtimes": ["openvino"], "precisions": ["int8"], "threads": 2}
        ],
        "bench": {"batch_sizes": [1, 4]},
    }


REFUSED: dict[str, tuple[list[str], str]] = {
    "no such checkpoint": (["import", "nope.keras"], "there is no such checkpoint"),
    "a folder": (["import", "photos"], "is not a file"),
    "a recipe that is not there": (["run", "nope.yaml"], "nope.yaml: cannot be read"),
    "a checkpoint to run": (["run", "net.safetensors"], "is not UTF-8 text"),
    "nothing to quantize on": (["quantize", "net.safetensors"], "needs --calibration"),
    "no target": (["build-engine", "net.safetensors"], "needs --target"),
    "no target to measure": (["bench", "net.safetensors"], "`edgex targets` lists them"),
    "an unknown target": (["bench", "net.safetensors", "--target", "cpu-x68"], "cpu-x86"),
    "images without calibration": (
        ["export", "net.safetensors", "--images", "3"],
        "--images has no effect without --calibration",
    ),
    "an INT8 dialect without INT8": (
        ["export", "net.safetensors", "--dialect", "openvino"],
        "--dialect has no effect without --calibration",
    ),
    "int8 without calibration": (
        ["bench", "net.safetensors", "--target", "cpu-x86", "--precision", "int8"],
        "targets[0].precisions: asks for int8, but nothing is quantized",
    ),
    "asymmetric for TensorRT": (
        [
            "export",
            "net.safetensors",
            "--calibration",
            "photos",
            "--dialect",
            "tensorrt",
            "--activations",
            "asymmetric",
        ],
        "export.dialects[0]: tensorrt cannot express asymmetric activations",
    ),
    "batches that are none": (
        ["bench", "net.safetensors", "--target", "cpu-x86", "--batch", "1-8"],
        "give batch sizes separated by commas",
    ),
    "two faults at once": (
        [
            "quantize",
            "net.safetensors",
            "--calibration",
            "photos",
            "--images",
            "0",
            "--ranges",
            "x",
        ],
        "calibration.images: Input should be greater than or equal to 1; quantize.ranges:",
    ),
    "more images than photos": (
        ["quantize", "net.safetensors", "--calibration", "photos"],
        "12 usable photos (0 bad) x 1 crops make 12. Set images to 12",
    ),
    "photos that are not there": (
        ["quantize", "net.safetensors", "--calibration", "nope"],
        "nope: there is no such folder",
    ),
    "classes of another network": (
        ["import", "net.safetensors", "--classes", "cup,fork"],
        "2 class names for a network with 5 outputs",
    ),
    "a class twice": (
        ["import", "net.safetensors", "--classes", "a,a,b,c,d"],
        "model.classes[1]: the class a is listed twice",
    ),
    "an output folder that cannot be": (
        ["import", "net.safetensors", "-o", "/proc/x"],
        "/proc/x: cannot be the output folder",
    ),
    "an output folder that is a file": (
        ["import", "net.safetensors", "-o", "photos/0.png"],
        "photos/0.png: cannot be the output folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_in_a_paragraph(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(world)
    arguments, reason = REFUSED[name]
    if "-o" not in arguments:
        arguments = [*arguments, "-o", str(tmp_path / "out")]
    done = edgex(*arguments)
    assert (done.code, done.out) == (2, "")
    assert reason in one_paragraph(done.err)
    published = [path.parent.name for path in tmp_path.glob("out/store/*/*")]
    assert set(published) <= {"import"}
    assert not list(tmp_path.glob("out/report*"))


def test_a_recipe_takes_no_flag_but_its_target(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", digits_sections())
    with pytest.raises(UsageError, match="is a recipe, so --images has no place"):
        recipe_of(path, Flags(images=3))
    with pytest.raises(UsageError, match="has no target cpu-arm; it has: cpu-x86"):
        recipe_of(path, Flags(target="cpu-arm"))
    assert recipe_of(path, Flags(target="cpu-x86"), "bench") == load_recipe(path)


@pytest.mark.parametrize(
    ("command", "section"),
    [("quantize", "quantize"), ("build-engine", "targets"), ("bench", "targets")],
)
def test_a_recipe_must_get_as_far_as_the_command(
    tmp_path: Path, command: str, section: str
) -> None:
    bare = dict.fromkeys(("calibration", "quantize", "targets", "bench", "gates"))
    path = write_recipe(tmp_path / "r.yaml", digits_sections(**bare))
    done = edgex(command, path, "-o", tmp_path / "out")
    assert done.code == 2
    assert f"has no `{section}:` section" in one_paragraph(done.err)
    assert not (tmp_path / "out").exists()


# --- every other exit code ------------------------------------------------------------------------


def test_another_machine_gets_a_kit_and_nothing_is_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = TroubledDevice({"arch": "aarch64"})
    monkeypatch.setattr("edgexception.pipeline.local_device", lambda: device)
    done = edgex("bench", world / "net.safetensors", "--target", "cpu-x86", "-o", tmp_path)
    assert done.code == 3
    assert "cpu-x86-onnxruntime-fp32-b1: no engine exists yet" in done.err
    assert (tmp_path / "net-cpu-x86-kit/run.sh").is_file()


def test_a_missing_runtime_is_not_possible_here(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = {"openvino": {"missing": "no module named openvino"}}
    monkeypatch.setattr(
        "edgexception.pipeline.local_device", lambda: TroubledDevice({"runtimes": runtimes})
    )
    flags = ("--target", "cpu-x86", "--runtime", "openvino")
    done = edgex("build-engine", world / "net.safetensors", *flags, "-o", tmp_path)
    assert done.code == 3
    assert "pip install 'edgexception[openvino]'" in one_paragraph(done.err)


def test_a_missing_package_is_not_possible_here(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("edgexception.workshop.version", missing)
    done = edgex("import", world / "net.safetensors", "-o", tmp_path)
    assert done.code == 3
    assert "pip install 'edgexception[workstation]'" in one_paragraph(done.err)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 6, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 6, "smaller"),
        (OSError(28, "No space left on device", "/x/model.onnx"), 6, "/x/model.onnx: No space"),
        (ModuleNotFoundError("no", name="nncf"), 3, "nncf is not installed"),
        (ModuleNotFoundError("no", name="edgexception.x"), 70, "this is a bug in edgex"),
        (KeyError("x"), 70, "this is a bug in edgex: KeyError: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("\x1b[31mred\x07"), 2, "\N{REPLACEMENT CHARACTER}[31mred"),
    ],
)
def test_whatever_happens_ends_in_a_paragraph_and_its_exit_code(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    says: str,
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("edgexception.pipeline.import_model", fails)
    done = edgex("import", world / "net.safetensors", "-o", tmp_path)
    assert (done.code, done.out) == (code, "")
    assert says in one_paragraph(done.err)


def test_a_full_disk_is_named_and_leaves_nothing_behind(world: Path, tmp_path: Path) -> None:
    """A real one, as far as a process can have it: no file may grow beyond 8 KiB."""
    done = subprocess.run(
        edgex_argv("import", world / "net.safetensors", "-o", tmp_path / "out"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 6, done.stderr
    assert "File too large" in one_paragraph(done.stderr)
    assert not list(tmp_path.glob("out/store/import/*"))
    assert not list(tmp_path.glob("out/store/.partial/*"))


def test_a_reader_that_goes_away_is_no_fault() -> None:
    shell = f"'{sys.executable}' -m edgexception schema | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{0\n"
    assert done.stderr == ""


# --- the small commands ---------------------------------------------------------------------------


def test_check_names_every_fault_of_every_recipe(tmp_path: Path) -> None:
    good = ROOT / "recipes/digits.yaml"
    bad = write_recipe(tmp_path / "bad.yaml", digits_sections(name="Bad Name", colour="red"))
    done = edgex("check", good, bad, tmp_path / "nope.yaml")
    assert done.code == 2
    assert done.out == f"{good}: ok\n"
    lines = done.err.removeprefix("edgex: ").splitlines()
    assert [line.split(":")[0] for line in lines] == [str(bad)] * 2 + [str(tmp_path / "nope.yaml")]
    assert edgex("check", good).code == 0


def test_every_recipe_of_the_project_is_valid() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) >= 2
    assert edgex("check", *recipes).code == 0


def test_targets_say_what_can_be_done_here_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(edgex("targets", "--json").out)
    assert rows[0]["target"] == "cpu-x86"
    assert rows[0]["runtimes"]["onnxruntime"]["here"] is True
    assert "onnxruntime (fp32, int8): 1" in edgex("targets").out
    device = TroubledDevice({"arch": "riscv64"})
    monkeypatch.setattr("edgexception.doctor.local_device", lambda: device)
    assert "no: the target is x86_64, this machine riscv64" in edgex("targets").out


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = json.loads(edgex("doctor", "--json").out)
    assert "version" in findings["packages"]["torch"]

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    runtimes = {"openvino": {"missing": "no module named openvino"}}
    monkeypatch.setattr("edgexception.doctor.version", missing)
    monkeypatch.setattr(
        "edgexception.doctor.local_device", lambda: TroubledDevice({"runtimes": runtimes})
    )
    text = edgex("doctor").out
    assert "missing  torch: not installed; pip install 'edgexception[workstation]'" in text
    assert (
        "missing  openvino: no module named openvino; pip install 'edgexception[openvino]'" in text
    )


def test_schema_is_the_recipes() -> None:
    schema = json.loads(edgex("schema").out)
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["required"]) == {"name", "model"}


def test_no_command_is_without_help() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
        assert edgex(command.name or command.callback.__name__, "--help").code == 0
