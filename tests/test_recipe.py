"""Recipe files: what loads, what is refused, where and in which words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_texts import GOOD, edited, faults, write

from edgexception.errors import UsageError
from edgexception.recipe import CheckpointModel, Gates
from edgexception.recipe_data import CalibrationSpec, PhotosSource
from edgexception.recipe_file import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

# --- what loads


def test_a_recipe_loads_with_paths_relative_to_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = load_recipe(write(folder, GOOD))
    assert isinstance(recipe.model, CheckpointModel)
    assert recipe.model.path == tmp_path / "models" / "xception.keras"
    assert recipe.model.classes == ("boot", "no", "sandal")
    assert recipe.calibration == CalibrationSpec(
        source=PhotosSource(kind="photos", path=folder / "photos/calibration"), images=64
    )
    assert recipe.targets[0].precisions == ("fp32", "int8")
    assert recipe.gates == Gates(top1_drop_max=0.01, speedup_min=1.0)


def test_the_working_folder_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD)
    absolute = load_recipe(path)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipe.yaml")) == absolute


def test_a_linked_checkpoint_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "net.keras").symlink_to(tmp_path / "blob")
    path = write(tmp_path, "name: a\nmodel: {kind: checkpoint, path: net.keras}\n")
    assert load_recipe(path).model.path.name == "net.keras"  # type: ignore[union-attr]


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem


# --- the reader's own rules


def test_every_fault_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
name: Shoes
modle: 3
model:
  kind: chekpoint
calibration:
  source: {kind: folder}
  images: 0
  images: 3
  seed: no
quantize:
  method: qat
  percentile: 30
  bias_correction: "true"
targets:
  - {target: cpu-x86, runtimes: []}
bench: {batch_sizes: [1, 1.5, 010], warmup_ms: &a 3, rounds: *a}
gates:
  top1_drp_max: 0.1
"""
    assert faults(tmp_path, text) == [
        "1: name: is 'Shoes'; write text that matches ^[a-z0-9][a-z0-9-]{0,62}$",
        "2: modle: is not a known field; did you mean model? (known: name, model, calibration, "
        "evaluation, prune, quantize, export, targets, bench, gates)",
        "4: model.kind: is 'chekpoint', which is not known; did you mean checkpoint? "
        "(known: checkpoint, fine-tune, train)",
        "6: calibration.source.path: is missing; add `path:` here",
        "7: calibration.images: is 0; write a number at least 1",
        "8: calibration.images: is already set at line 7; keep one of the two",
        "9: calibration.seed: is 'no', which YAML readers disagree on; write true or false, or "
        "quote the text",
        "12: quantize.percentile: is 30; write a number above 50.0",
        "13: quantize.bias_correction: is the text 'true'; write true or false",
        "15: targets[0].runtimes: has 0 entries; write at least 1",
        "16: bench.batch_sizes[1]: is 1.5; write a whole number",
        "16: bench.batch_sizes[2]: is '010', which YAML readers disagree on; write a plain, finite "
        "decimal number, or quote the text",
        "16: bench.rounds: the alias *a is not read; write the value itself",
        "16: bench.warmup_ms: the anchor &a is not read; remove it",
        "18: gates.top1_drp_max: is not a known field; did you mean top1_drop_max? (known: "
        "top1_min, top1_drop_max, agreement_min, sqnr_db_min, executed_int8_share_min, "
        "speedup_min, pruned_top1_drop_max, pruned_agreement_min)",
    ]


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("", 1, "is empty"),
        ("# only a comment\n", 2, "is empty"),
        ("- 1\n", 1, "write a mapping"),
        ("shoes\n", 1, "write a mapping"),
        ("name: a\n  b: c\n", 2, "is not YAML"),
        ("name: [a\nmodel: b\n", 2, "is not YAML"),
        ("name: 'a\n", 2, "is not YAML"),
        ("name: a\n\tmodel: b\n", 2, "is not YAML"),
        (GOOD + "---\nname: b\n", 17, "a second document"),
        (edited("name: shoes", "name: !!python/name:os.system shoes"), 1, "the tag"),
        (edited("name: shoes", "name: !!str shoes"), 1, "the tag"),
        (edited("name: shoes", "<<: {name: shoes}"), 1, "merge keys"),
        (edited("name: shoes", "name: sho\\\x07es"), 1, "U+0007"),
        (edited("name: shoes", 'name: "sho\\0es"'), 1, "control character"),
        (edited("name: shoes", 'name: "sho\\ud800es"'), 1, "control character"),
        (edited("name: shoes", 'name: "\\UFFFFFFFFes"'), 1, "impossible number"),
        (edited("name: shoes", "name: |\n  shoes"), 1, "line break"),
        (edited("name: shoes", "name:"), 1, "has no value"),
        (edited("name: shoes", "name: ''"), 1, "is an empty text"),
        (edited('"no"', "''"), 5, "is an empty text"),
        (edited('"no"', "n" * 1001), 5, "has 1001 characters; write at most 1000"),
        (edited("name: shoes", "name: 2026-01-31"), 1, "quote the text"),
        (edited("name: shoes", "name: 3"), 1, "write text"),
        (edited("name: shoes", "name: shoes\n1: 2"), 2, "this key is not text"),
        (edited("name: shoes", "name: shoes\non: 2"), 2, "this key is 'on'"),
        (edited("name: shoes", "name: shoes\n? [a]\n: 2"), 2, "a key must be text"),
        (edited("images: 64", "images: 64.0"), 8, "write a whole number"),
        (edited("images: 64", "images: '64'"), 8, "the text '64'; write a whole number"),
        (edited("images: 64", "images: true"), 8, "write a whole number"),
        (edited("images: 64", "images: 0x40"), 8, "decimal"),
        (edited("images: 64", "images: 0o100"), 8, "decimal"),
        (edited("images: 64", "images: 1_000"), 8, "decimal"),
        (edited("images: 64", "images: 1:30"), 8, "decimal"),
        (edited("images: 64", f"images: {'9' * 5000}"), 8, "digits"),
        (edited("images: 64", "images: null"), 8, "write a whole number"),
        (edited("99.9}", ".nan}"), 11, "finite"),
        (edited("99.9}", ".inf}"), 11, "finite"),
        (edited("99.9}", "1e999}"), 11, "too large"),
        (edited("99.9}", "nan}"), 11, "write a number"),
        (edited("photos/test", "[photos]"), 10, "write text"),
        (edited("kind: photos, ", ""), 7, "calibration.source.kind: is missing; add `kind:`"),
        (edited("bench: {batch_sizes: [1, 8]}", "bench:"), 15, "{} for defaults"),
        (edited("- target: cpu-x86\n    ", "- "), 13, "targets[0].target: is missing"),
        ("name: " + "[" * 5000, 1, "nested deeper"),
        ("name: a\n" + "".join(f"x{i}: no\n" for i in range(500)), 2, "is 'no'"),
    ],
)
def test_the_reader_refuses(tmp_path: Path, text: str, line: int, word: str) -> None:
    lines = faults(tmp_path, text)
    assert any(row.startswith(f"{line}: ") and word in row for row in lines), lines
    assert len(lines) <= 51


def test_a_billion_laughs_is_refused_quickly(tmp_path: Path) -> None:
    rows = ["a: &a [x, x]"] + [
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(f'*{chr(97 + i)}' for _ in range(9))}]"
        for i in range(20)
    ]
    lines = faults(tmp_path, "\n".join(rows))
    assert "1: a: the anchor &a is not read; remove it" in lines


def test_other_encodings_are_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    assert faults(tmp_path, GOOD.encode("utf-16")) == [
        "1: is not UTF-8 text; save the file as UTF-8"
    ]
    latin = GOOD.replace("boot", "böot").encode("latin-1")
    assert faults(tmp_path, latin) == ["5: is not UTF-8 text; save the file as UTF-8"]
    load_recipe(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()))


def test_what_is_no_recipe_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, b"#" * (1 << 20) + b"\n" + GOOD.encode(), "large")
    for name, word in (
        ("absent.yaml", "No such file"),
        (".", "is not a file"),
        ("pipe", "is not a file"),
        ("large", "1 MiB"),
        ("nul\0", "null byte"),
    ):
        with pytest.raises(UsageError, match=word):
            load_recipe(tmp_path / name)


def test_architecture_faults_name_the_layer(tmp_path: Path) -> None:
    text = """\
name: a
model:
  kind: train
  source: {kind: digits, split: train}
  preprocess: {input_size: [32, 32]}
  architecture:
    stem: [8, 8, 8]
    middle: [[8, 0]]
"""
    assert faults(tmp_path, text) == [
        "7: model.architecture.stem: has 3 entries; write at most 2",
        "8: model.architecture.middle[0][1]: is 0; write a number at least 1",
    ]
    text = text.replace("[8, 8, 8]", "[8, 8]").replace("[8, 0]", "[8, 8]")
    assert faults(tmp_path, text) == [
        "6: model.architecture: block5 ends with 8 channels but its shortcut carries 728: "
        "a middle block must keep the residual width"
    ]


def test_reading_a_recipe_needs_no_workstation_package(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import edgexception.artifacts; "
        "from edgexception.recipe_file import load_recipe; load_recipe(Path(sys.argv[1])); "
        "print({'torch', 'nncf', 'onnx', 'onnxruntime', 'openvino', 'h5py'} & {*sys.modules})"
    )
    path = write(tmp_path, GOOD)
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
