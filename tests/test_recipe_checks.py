"""Rules between the sections of a recipe, and between a recipe and the targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_texts import GOOD, edited, faults, write

from edgexception import recipe_checks, targets
from edgexception.errors import UsageError
from edgexception.recipe import (
    BenchSpec,
    CheckpointModel,
    PtqSpec,
    QatSpec,
    Recipe,
    TargetSpec,
    TensorRtSpec,
)
from edgexception.recipe_checks import check_recipe, dialects_of
from edgexception.recipe_data import CalibrationSpec, DigitsSource
from edgexception.recipe_file import load_recipe


@pytest.mark.parametrize(
    ("old", "new", "line", "name", "word"),
    [
        ("calibration:\n  source: {kind: photos, path: photos/calibration}\n  images: 64\n", "", 8,
         "quantize", "add a `calibration:` section"),
        ("ranges: percentile", "ranges: mse", 11, "quantize.percentile", "has no effect"),
        ("quantize: {method: ptq, ranges: percentile, percentile: 99.9}\n", "", 12,
         "targets[0].precisions", "nothing is quantized"),
        ('"no"', "boot", 5, "model.classes[1]", "listed twice"),
        ("    runtimes: [onnxruntime, openvino]", "    runtimes: [openvino, openvino]", 14,
         "targets[0].runtimes[1]", "listed twice"),
        ("    runtimes: [onnxruntime, openvino]", "    runtimes: [onnx-runtime]", 14,
         "targets[0].runtimes[0]", "did you mean onnxruntime?"),
        ("    runtimes: [onnxruntime, openvino]",
         "    runtimes: [openvino]\n    precisions: [fp32, fp32, int8]", 15,
         "targets[0].precisions[1]", "listed twice"),
        ("    runtimes: [onnxruntime, openvino]", "    runtimes: [openvino, auto]", 14,
         "targets[0].runtimes[1]", "auto is every runtime"),
        ("  - target: cpu-x86\n    runtimes: [onnxruntime, openvino]",
         "  - target: cpux86\n    runtimes: [auto]", 13, "targets[0].target", "did you mean"),
        ("    runtimes: [onnxruntime, openvino]",
         "    runtimes: [openvino]\n    tensorrt: {dla_core: 0}", 15,
         "targets[0].tensorrt", "no effect without the runtime tensorrt"),
        ("target: cpu-x86", "target: cpux86", 13, "targets[0].target", "did you mean cpu-x86?"),
        ("bench:", "  - {target: cpu-x86, runtimes: [openvino]}\nbench:", 15,
         "targets[1].target", "already targets[0]"),
        ("[1, 8]", "[1, 8, 1]", 15, "bench.batch_sizes[2]", "listed twice"),
        ("targets:\n  - target: cpu-x86\n    runtimes: [onnxruntime, openvino]\n", "", 12,
         "bench", "nothing to measure"),
        ("bench: {batch_sizes: [1, 8]}\n", "", 15, "gates.speedup_min", "add a `bench:` section"),
        ("evaluation:\n  source: {kind: folder, path: photos/test}\n", "", 14,
         "gates.top1_drop_max", "add an `evaluation:` section"),
        ("{kind: folder, path: photos/test}", "{kind: photos, path: photos/test}", 16,
         "gates.top1_drop_max", "photos have no labels"),
        ("    runtimes: [onnxruntime, openvino]",
         "    runtimes: [onnxruntime]\n    precisions: [fp32]", 17,
         "gates.speedup_min", "no target builds one"),
        ("    runtimes: [onnxruntime, openvino]",
         "    runtimes: [onnxruntime]\n    precisions: [int8]", 17,
         "gates.speedup_min", "add fp32"),
        ("{kind: folder, path: photos/test}", "{kind: photos, path: photos/calibration}", 7,
         "calibration.source", "would flatter"),
        ("  classes:", "  preprocess: {resize: stretch, crop_fraction: 0.9}\n  classes:", 5,
         "model.preprocess.crop_fraction", "has no effect"),
        ("bench:", "export: {batch: 4}\nbench:", 15, "export.batch", "`bench.batch_sizes: [4]`"),
        ("    runtimes: [onnxruntime, openvino]\nbench: {batch_sizes: [1, 8]}",
         "    runtimes: [openvino]\n    dynamic_batch: true\nbench: {batch_sizes: [1]}", 15,
         "targets[0].dynamic_batch", "none is above 1; write `bench: {batch_sizes: [1, 8]}`"),
        ("    runtimes: [onnxruntime, openvino]\nbench: {batch_sizes: [1, 8]}",
         "    runtimes: [openvino]\n    dynamic_batch: true\nexport: {batch: 8}\n"
         "bench: {batch_sizes: [8]}", 15,
         "targets[0].dynamic_batch", "remove `export.batch`, which fixes it"),
        ("bench:", "export: {dialects: [tensorrt]}\nbench:", 15,
         "export.dialects[0]", "`quantize.activations: symmetric`"),
        ("bench:", "export: {dialects: [openvino, openvino]}\nbench:", 15,
         "export.dialects[1]", "listed twice"),
        ("quantize: {method: ptq, ranges: percentile, percentile: 99.9}\n",
         "export: {dialects: [openvino]}\n", 11, "export.dialects", "nothing is quantized"),
        ("bench:", "export: {dialects: [openvino], precisions: [fp16]}\nbench:", 15,
         "export.precisions", "which openvino does not have"),
        ("bench:", "export: {precisions: [int8-fp16]}\nbench:", 15,
         "export.precisions", "`export.dialects` is empty"),
        ("bench:", "export: {dialects: [openvino], precisions: [int8, int8]}\nbench:", 15,
         "export.precisions[1]", "listed twice"),
        ("bench:", "export: {dialects: [tensorrt], precisions: [int8-fp16]}\nbench:", 15,
         "export.dialects[0]", "`quantize.activations: symmetric`"),
        ("    runtimes: [onnxruntime, openvino]",
         "    runtimes: [openvino]\n    precisions: [fp32, int8, fp16]", 15,
         "targets[0].precisions", "does not build fp16"),
        ("{method: ptq, ranges: percentile, percentile: 99.9}", "{method: qat, distillation: 0.5}",
         11, "quantize.distillation", "add a labelled `source:`"),
        ("{method: ptq, ranges: percentile, percentile: 99.9}",
         "{method: qat, distillation: 0.5, source: {kind: photos, path: p}}",
         11, "quantize.source.kind", "distillation below 1 needs"),
        ("{method: ptq, ranges: percentile, percentile: 99.9}",
         "{method: qat, source: {kind: folder, path: photos/test}}",
         11, "quantize.source", "the evaluation's source"),
        ("{method: ptq, ranges: percentile, percentile: 99.9}", "{method: qat, percentile: 99.9}",
         11, "quantize.percentile", "no effect with ranges: auto"),
    ],
)  # fmt: skip
def test_sections_must_fit_together(
    tmp_path: Path, old: str, new: str, line: int, name: str, word: str
) -> None:
    lines = faults(tmp_path, edited(old, new))
    assert any(row.startswith(f"{line}: {name}: ") and word in row for row in lines), lines


def test_float16_needs_calibration_images_but_no_quantization(tmp_path: Path) -> None:
    sections = "export: {dialects: [tensorrt], precisions: [fp16]}\n"
    text = "name: a\nmodel: {kind: checkpoint, path: a.keras}\n"
    (line,) = faults(tmp_path, text + sections)
    assert line.startswith("3: export.precisions: asks for float16, which needs images")
    assert "add a `calibration:` section" in line
    calibration = "calibration: {source: {kind: photos, path: photos}}\n"
    recipe = load_recipe(write(tmp_path, text + calibration + sections))
    assert recipe.quantize is None
    assert dialects_of(recipe) == ()
    int8 = sections.replace("[fp16]", "[fp16, int8-fp16]")
    (line,) = faults(tmp_path, text + calibration + int8)
    assert "nothing is quantized" in line


def test_photos_alone_are_enough_for_distillation(tmp_path: Path) -> None:
    section = "{method: qat, source: {kind: photos, path: p}, steps: 10, ema: 0.99}"
    text = edited("{method: ptq, ranges: percentile, percentile: 99.9}", section)
    spec = load_recipe(write(tmp_path, text)).quantize
    assert isinstance(spec, QatSpec)
    assert spec.ptq == PtqSpec(method="ptq")
    assert type(spec.ptq) is PtqSpec


def test_fine_tuning_needs_labels_and_unseen_images(tmp_path: Path) -> None:
    model = "model: {kind: fine-tune, path: a.keras, head: [3], source: "
    text = "name: a\n" + model + "{kind: photos, path: p}}\n"
    (first,) = faults(tmp_path, text)
    assert first.startswith("2: model.source.kind: photos have no labels")
    source = "{kind: folder, path: p}"
    text = f"name: a\n{model}{source}}}\nevaluation: {{source: {source}}}\n"
    (first,) = faults(tmp_path, text)
    assert first.startswith("2: model.source: is the evaluation's source, too")
    (first,) = faults(tmp_path, f"name: a\n{model.replace('[3]', '[]')}{source}}}\n")
    assert first.startswith("2: model.head: has 0 entries")


def test_training_needs_labels_and_classes(tmp_path: Path) -> None:
    text = """\
name: a
model:
  kind: train
  source: {kind: photos, path: p}
  preprocess: {input_size: [32, 32]}
  architecture: {head: []}
"""
    first, second = faults(tmp_path, text)
    assert first.startswith("4: model.source.kind: photos have no labels")
    assert second.startswith("6: model.architecture.head: is empty")
    digits = text.replace("photos, path: p", "digits, split: test").replace(
        "head: []", "head: [10]"
    )
    (leak,) = faults(tmp_path, digits + "evaluation: {source: {kind: digits, split: test}}\n")
    assert leak.startswith("4: model.source: is the evaluation's source")


def test_idx_labels_come_with_names(tmp_path: Path) -> None:
    def idx(fields: str) -> str:
        return edited("{kind: folder, path: photos/test}", f"{{kind: idx, images: i, {fields}}}")

    (line,) = faults(tmp_path, idx("labels: l"))
    assert line.startswith("10: evaluation.source: has `labels` without `classes`")
    lines = faults(tmp_path, idx("classes: [a, a]"))
    assert lines[0].startswith("10: evaluation.source: has `classes` without `labels`")
    assert lines[1].startswith("10: evaluation.source.classes[1]: the class a is listed twice")
    (line,) = faults(tmp_path, idx("first: 1"))
    assert "gates.top1_drop_max: photos have no labels" in line
    load_recipe(write(tmp_path, idx("labels: l, classes: [a, b]")))
    text = """\
name: a
model:
  kind: train
  source: {kind: idx, images: i}
  preprocess: {input_size: [32, 32]}
  architecture: {head: [2]}
"""
    (line,) = faults(tmp_path, text)
    assert line.startswith("4: model.source: has no labels, which training needs")


def test_gates_of_pruning_need_pruning_and_images_but_no_engine(tmp_path: Path) -> None:
    text = edited(
        "gates: {top1_drop_max: 1e-2, speedup_min: 1}", "gates: {pruned_top1_drop_max: 0}"
    )
    (line,) = faults(tmp_path, text)
    assert "gates.pruned_top1_drop_max: nothing is pruned; add a `prune:` section" in line
    pruned = f"{text}prune: {{macs: 0.5}}\n"
    load_recipe(write(tmp_path, pruned.replace("bench: {batch_sizes: [1, 8]}\n", "")))
    (line,) = faults(tmp_path, pruned.replace("{kind: folder", "{kind: photos"))
    assert "gates.pruned_top1_drop_max: photos have no labels" in line


def test_rules_between_valid_sections_are_checked_beside_a_broken_one(tmp_path: Path) -> None:
    text = edited("name: shoes", "name: Shoes").replace('"no"', "3").replace("[1, 8]", "[1, 1]")
    text = text.replace("[onnxruntime, openvino]", "[onnxruntim]")
    assert [row.split(": ")[1] for row in faults(tmp_path, text)] == [
        "name", "model.classes[1]", "targets[0].runtimes[0]", "bench.batch_sizes[1]",
    ]  # fmt: skip


def test_a_misspelt_section_is_not_also_reported_as_absent(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, edited("calibration:\n", "calibraton:\n"))
    assert "did you mean calibration?" in line


def test_an_asymmetric_plan_needs_a_dialect_that_can_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    symmetric_only = targets.load_dialects()["tensorrt"]
    assert symmetric_only.activations == ("symmetric",)
    monkeypatch.setattr(recipe_checks, "find_dialect", lambda *_: symmetric_only)
    lines = faults(tmp_path, GOOD)
    assert lines[0].startswith("14: targets[0].runtimes[0]: onnxruntime cannot express asymmetric")
    load_recipe(write(tmp_path, edited("method: ptq", "method: ptq, activations: symmetric")))


def test_auto_is_every_runtime_of_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = edited("[onnxruntime, openvino]", "[auto]")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.targets[0].runtime_names == tuple(targets.find_target("cpu-x86").runtimes)
    assert len(recipe.targets[0].runtime_names) > 1
    symmetric_only = targets.load_dialects()["tensorrt"]
    monkeypatch.setattr(recipe_checks, "find_dialect", lambda *_: symmetric_only)
    lines = faults(tmp_path, text)
    assert lines[0].startswith("14: targets[0].runtimes[0]: onnxruntime cannot express asymmetric")


def test_a_recipe_of_a_command_line_is_checked_too() -> None:
    recipe = Recipe(
        name="a",
        model=CheckpointModel(kind="checkpoint", path=Path("a.keras")),
        quantize=PtqSpec(method="ptq"),
        bench=BenchSpec(batch_sizes=(2, 2)),
    )
    with pytest.raises(UsageError) as error:
        check_recipe(recipe)
    assert [line.split(": ")[0] for line in str(error.value).split("\n")] == [
        "quantize", "bench.batch_sizes[1]", "bench",
    ]  # fmt: skip


def test_a_dla_takes_one_batch() -> None:
    dla = TensorRtSpec(dla_core=0, gpu_fallback=True)
    target = TargetSpec(
        target="jetson-agx-orin-64gb",
        runtimes=("tensorrt",),
        precisions=("fp16",),
        dynamic_batch=True,
        tensorrt=dla,
    )
    recipe = Recipe(
        name="dla",
        model=CheckpointModel(kind="checkpoint", path=Path("net.keras")),
        calibration=CalibrationSpec(source=DigitsSource(kind="digits", split="train")),
        targets=(target,),
        bench=BenchSpec(batch_sizes=(1, 8)),
    )
    with pytest.raises(UsageError, match=r"targets\[0\]\.dynamic_batch: is not for a DLA"):
        check_recipe(recipe)
    check_recipe(
        recipe.model_copy(
            update={"bench": None, "targets": (target.model_copy(update={"dynamic_batch": False}),)}
        )
    )
