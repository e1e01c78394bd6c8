"""A recipe with quantization-aware training, from its images to a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import digits_sections, edgex, write_recipe

from edgexception.quantize.plan import load_plan
from edgexception.report.record import Report

pytest.importorskip("sklearn")
NARROW = {"stem": [4, 8], "entry": [[8, 8]], "middle": [], "exit": [8, 16], "tail": [16]}


def quantized(folder: Path, evaluation: Any = None, **changes: Any) -> tuple[list[str], Report]:
    """Run a recipe, and return what was not there already, and the report."""
    sections = digits_sections(
        quantize={"method": "qat", "steps": 3, "batch_size": 8, **changes},
        evaluation=evaluation,
        targets=None,
        bench=None,
        gates=None,
    )
    sections["model"] |= {"architecture": {**NARROW, "head": [10]}, "epochs": 0.2}
    recipe = write_recipe(folder / "recipe.yaml", {k: v for k, v in sections.items() if v})
    done = edgex("quantize", recipe, "-o", folder / "out", "--json")
    assert done.code == 0, done.err
    report = Report.model_validate(json.loads(done.out))
    return [line.stage for line in report.stages if not line.reused], report


def test_a_recipe_learns_on_from_its_calibration(tmp_path: Path) -> None:
    new, report = quantized(tmp_path)
    assert new == ["train", "quantize", "qat"]
    assert report.calibration is not None
    assert report.calibration.method == "qat"
    first = load_plan(tmp_path / "out/plan.json")
    assert quantized(tmp_path)[0] == []
    assert quantized(tmp_path, steps=4)[0] == ["qat"]
    assert load_plan(tmp_path / "out/plan.json") != first
    assert quantized(tmp_path, method="ptq", steps=None, batch_size=None)[0] == []
    assert load_plan(tmp_path / "out/plan.json").provenance.method == "ptq"
    assert (tmp_path / "out/calibration.json").exists()


def test_a_recipe_learns_from_labelled_images(tmp_path: Path) -> None:
    source = {"kind": "digits", "split": "train"}
    new, report = quantized(tmp_path, source=source, distillation=0.5)
    assert new == ["train", "quantize", "qat"]
    assert report.stages[-1].what == "3 steps on 1000 images"
    assert quantized(tmp_path, source=source)[0] == ["qat"], "without labels"


def test_images_to_learn_from_are_not_those_of_the_evaluation(tmp_path: Path) -> None:
    source = {"kind": "digits", "split": "test"}
    photos = {"kind": "photos", "path": str(photo_of_the_evaluation(tmp_path))}
    with pytest.raises(AssertionError, match="training photos are in the evaluation set"):
        quantized(tmp_path, {"source": source, "crops_per_photo": 1}, source=photos)


def photo_of_the_evaluation(folder: Path) -> Path:
    """Write a digit of the test split as a photo of 8x8 pixels, which becomes the same input."""
    from PIL import Image  # noqa: PLC0415

    from edgexception.recipe_data import DigitsSource  # noqa: PLC0415
    from edgexception.sources import list_source  # noqa: PLC0415

    entry = list_source(DigitsSource(kind="digits", split="test")).entries[0]
    (folder / "photos").mkdir()
    Image.fromarray(entry.photo).save(folder / "photos/a.png")
    return folder / "photos"
