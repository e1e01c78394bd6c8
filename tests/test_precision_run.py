"""Exceptions, sensitivity and bad calibration sets through the command, from recipe to report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import edgex, write_recipe
from PIL import Image
from processor import EXACT_BITS
from recipe_texts import edited, faults

from edgexception.report.record import Report


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)


def recipe_with(world: Path, path: Path, precision: Any, **changes: Any) -> Path:
    sections = {
        "name": "mixed",
        "model": {"kind": "checkpoint", "path": str(world / "net.safetensors")},
        "calibration": {
            "source": {"kind": "photos", "path": str(world / "photos")},
            "images": 12,
        },
        "quantize": {
            "method": "ptq",
            "weight_bits": EXACT_BITS,
            "bias_correction": False,
            "precision": precision,
        },
        "export": {"dialects": ["onnxruntime", "openvino"]},
    }
    return write_recipe(path, {**sections, **changes})


def test_named_layers_are_float_from_the_recipe_to_the_report(world: Path, tmp_path: Path) -> None:
    recipe = recipe_with(world, tmp_path / "r.yaml", {"fp32": ["block3_sepconv*", "predictions"]})
    done = edgex("export", recipe, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = Report.model_validate_json(done.out)
    assert report.calibration is not None
    assert report.calibration.exceptions is not None
    names = set(report.calibration.exceptions.layers)
    assert names == {"predictions"} | {
        f"block3_sepconv{n}_{step}" for n in (1, 2) for step in ("depthwise", "pointwise")
    }
    compared = {p.form: p for p in report.parity}
    for form in ("int8-onnxruntime", "int8-openvino"):
        assert compared[form].executed_vs_torch is not None
        assert not compared[form].differs
    assert (
        "not INT8: block3\\_sepconv1\\_depthwise fp32" in (tmp_path / "out/report.md").read_text()
    )


def test_auto_says_what_it_chose_and_why(world: Path, tmp_path: Path) -> None:
    auto = {"auto": {"sqnr_db_min": 42.0, "exceptions_max": 19}}
    recipe = recipe_with(world, tmp_path / "r.yaml", auto)
    done = edgex("export", recipe, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    report = Report.model_validate_json((tmp_path / "out/report.json").read_bytes())
    assert report.calibration is not None
    found = report.calibration.exceptions
    assert found is not None
    assert found.chosen is not None
    assert found.layers
    assert found.chosen["before"]["sqnr_db"] < 42 <= found.chosen["after"]["sqnr_db"]
    assert found.chosen["dialects"] == ["onnxruntime", "openvino"]
    assert "chosen for sqnr_db_min 42 on 12 calibration images: " in done.out
    for parity in report.parity:  # they are compared on the calibration images: no others are here
        if parity.form != "fp32":
            assert parity.executed_vs_float is not None
            assert parity.executed_vs_float.sqnr_db > 41.9  # type: ignore[operator]

    out_of_reach = recipe_with(
        world, tmp_path / "far.yaml", {"auto": {"sqnr_db_min": 90.0, "exceptions_max": 1}}
    )
    refused = edgex("quantize", out_of_reach, "-o", tmp_path / "far")
    assert refused.code == 1
    assert "cannot be reached with 1 exceptions; the best is" in refused.err


def test_unknown_names_and_missing_times_end_with_what_to_write(
    world: Path, tmp_path: Path
) -> None:
    recipe = recipe_with(world, tmp_path / "r.yaml", {"fp32": ["block3_sepcov1"]})
    done = edgex("quantize", recipe, "-o", tmp_path / "out")
    assert done.code == 2
    assert "quantize.precision.fp32: 'block3_sepcov1' is no layer" in done.err
    assert "block3_sepconv1" in done.err
    auto = {"auto": {"sqnr_db_min": 90.0, "times": "nowhere.json"}}
    done = edgex("quantize", recipe_with(world, tmp_path / "t.yaml", auto), "-o", tmp_path / "out")
    assert done.code == 2
    assert "nowhere.json cannot be read" in done.err


@pytest.mark.parametrize(
    ("precision", "fault"),
    [
        ("{}", "names no layer; write `fp32:`, `fp16:` or `auto:`"),
        ("{auto: {}}", "needs a bound; write `sqnr_db_min:` or `agreement_min:`"),
        ("{auto: {agreement_min: 0.9}, fp32: [x]}", "chooses the layers itself"),
        ("{fp32: [a, a]}", "the name a is listed twice"),
        ("{fp16: [a]}", "onnxruntime has no kernels for float16 layers"),
        ("{fp32: a}", "write a list"),
        ("{auto: {sqnr_db_min: 9, times: t.json, weigh: macs}}", "has no effect beside `times`"),
    ],
)
def test_faults_of_the_section_are_named_with_their_line(
    tmp_path: Path, precision: str, fault: str
) -> None:
    old = "quantize: {method: ptq, ranges: percentile, percentile: 99.9}"
    text = edited(old, f"quantize:\n  method: ptq\n  precision: {precision}\n")
    lines = faults(tmp_path, text)
    assert any(
        line.split(": ")[1].startswith("quantize.precision") and fault in line for line in lines
    ), lines


def test_sensitivity_is_a_stage_of_its_own(world: Path, tmp_path: Path) -> None:
    command = ("sensitivity", world / "net.safetensors", "--calibration", world / "photos")
    flags = ("--images", 12, "--dialect", "onnxruntime", "-o", tmp_path / "out")
    done = edgex(*command, *flags)
    assert done.code == 0, done.err
    table = json.loads((tmp_path / "out/sensitivity.json").read_text())
    assert (table["dialect"], table["images"], table["threads"]) == ("onnxruntime", 12, 1)
    worst = max(table["units"], key=lambda row: row["exception"]["noise"])
    lines = done.out.partition("share of the noise\n")[2].splitlines()
    assert lines[0].startswith(worst["unit"])
    assert len(table["units"]) == 20
    again = edgex(*command, *flags, "--json")
    report = Report.model_validate_json(again.out)
    assert [(x.stage, x.reused) for x in report.stages][-1] == ("sensitivity", True)
    assert report.sensitivity is not None
    assert report.sensitivity.everything.sqnr_db == table["everything"]["sqnr_db"]
    assert f"| {worst['unit']} |" in (tmp_path / "out/report.md").read_text()


# --- calibration sets that cannot be used ---------------------------------------------------------


def refusal(world: Path, photos: Path, out: Path, *flags: object) -> str:
    command = ("quantize", world / "net.safetensors", "--calibration", photos, "-o", out)
    done = edgex(*command, *flags)
    assert done.code in (2, 4), done
    assert done.err.count("\n") <= 3, done.err
    return done.err


def test_a_missing_or_small_set_is_refused(world: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(world, tmp_path / "none", tmp_path / "out")
    assert "asks for 128 images, and 12 usable photos" in refusal(
        world, world / "photos", tmp_path / "out"
    )


def test_a_set_of_one_colour_each_is_refused_with_a_name(world: Path, tmp_path: Path) -> None:
    for number in range(3):
        colour = (10 * number, 20, 30)
        Image.new("RGB", (80, 80), colour).save(tmp_path / f"{number}.png")
    error = refusal(world, tmp_path, tmp_path.parent / "out-one-colour", "--images", 3)
    assert "is of one colour, as 0.png is" in error


def test_a_leak_into_the_evaluation_is_refused_with_both_names(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "photos", tmp_path / "photos")
    shutil.copy(world / "test/cup/1.png", tmp_path / "photos/leak.png")
    flags = ("--images", 13, "--evaluation", world / "test")
    error = refusal(world, tmp_path / "photos", tmp_path / "out", *flags)
    assert "photos/leak.png is " in error
    assert "test/cup/1.png" in error


def test_a_photo_that_overflows_is_named_with_the_tensor(world: Path, tmp_path: Path) -> None:
    """Weights that are finite and too large: gray photos get through, white ones do not."""
    from edgexception.model.checkpoint import load_checkpoint, save_checkpoint  # noqa: PLC0415

    model = load_checkpoint(world / "net.safetensors")
    conv = model.network.block1_conv1.weight  # type: ignore[union-attr]
    conv.data.fill_(1e38)  # type: ignore[operator]
    (tmp_path / "photos").mkdir()
    save_checkpoint(model, tmp_path / "net.safetensors")
    pixels = np.full((71, 71, 3), 128, np.uint8)
    pixels[:3] = 127
    for number in range(3):
        pixels[0, 0] = number
        Image.fromarray(pixels).save(tmp_path / f"photos/dull{number}.png")
    pixels[:] = 255
    pixels[0] = 0
    Image.fromarray(pixels).save(tmp_path / "photos/glaring.png")
    done = edgex(
        "quantize", tmp_path / "net.safetensors", "--calibration", tmp_path / "photos",
        "--images", 4, "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 4, done
    assert "calibration image glaring.png: tensor block1_conv1 is not finite" in done.err
