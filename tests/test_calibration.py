"""Calibration manifests: written, read again, and refused when photos or recipe disagree."""

from __future__ import annotations

import json

import pytest
from hostile_data import encoded, hostile_calibration_manifests, picture

from edgexception.calibration import load_calibration_manifest, write_calibration_manifest
from edgexception.data import open_calibration
from edgexception.errors import BadArtifact, EdgexError, UsageError
from edgexception.preprocess import Preprocess
from edgexception.recipe_data import CalibrationSpec, PhotosSource

SPEC = Preprocess(input_size=(32, 32))


@pytest.fixture
def source(tmp_path):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.png", "sub/c.png", "other.png")):
        (tmp_path / "photos" / name).write_bytes(encoded(picture(number), "PNG"))
    return PhotosSource(kind="photos", path=tmp_path / "photos")


def calibrate(source, **options):
    return open_calibration(CalibrationSpec(source=source, **options), SPEC, evaluation=None)


@pytest.fixture
def path(tmp_path, source):
    images = calibrate(source, images=4)
    photos = [(s.name, s.photo.sha256) for s in images.samples if s.name != "other.png"]
    path = tmp_path / "manifest.json"
    write_calibration_manifest(
        path, reversed(photos), chosen="three of four", seed=3, crops_per_photo=2
    )
    return path


def test_only_the_named_photos_are_used(tmp_path, source, path):
    (tmp_path / "photos" / "other.png").write_bytes(b"not even looked at")
    images = calibrate(source, images=6, seed=3, crops_per_photo=2, manifest=path)
    assert [s.name for s in images.samples] == [
        f"{name}#{number}" for number in (1, 2) for name in ("a.png", "b.png", "sub/c.png")
    ]
    assert len(calibrate(source, images=4, seed=3, crops_per_photo=2, manifest=path)) == 4
    assert [photo.name for photo in load_calibration_manifest(path).photos] == [
        "a.png",
        "b.png",
        "sub/c.png",
    ]


def test_the_recipe_must_agree(source, path):
    with pytest.raises(UsageError, match=r"manifest\.json: was written for seed 3.*recipe says 4"):
        calibrate(source, images=4, seed=4, crops_per_photo=2, manifest=path)
    with pytest.raises(UsageError, match="crops_per_photo 2"):
        calibrate(source, images=3, seed=3, manifest=path)
    with pytest.raises(UsageError, match="3 usable photos"):
        calibrate(source, images=7, seed=3, crops_per_photo=2, manifest=path)


def test_another_missing_or_broken_photo_is_refused(tmp_path, source, path):
    options = {"images": 6, "seed": 3, "crops_per_photo": 2, "manifest": path}
    photo = tmp_path / "photos" / "b.png"
    photo.write_bytes(encoded(picture(50), "PNG"))
    with pytest.raises(BadArtifact, match=r"1 photos of .* are not the ones it names: b\.png has"):
        calibrate(source, **options)
    photo.write_bytes(b"broken")
    with pytest.raises(BadArtifact, match=r"b\.png is not an image"):
        calibrate(source, max_bad_images=5, **options)
    photo.unlink()
    with pytest.raises(BadArtifact, match=r"1 of its 3 photos are not in .*: b\.png"):
        calibrate(source, **options)


def test_hostile_manifests_are_refused_in_one_paragraph(tmp_path, source):
    for seed in range(5):
        for what, path in hostile_calibration_manifests(tmp_path / "manifests", seed):
            error = refusal(source, path)
            assert error is not None, f"{what}: {path.read_bytes()[:80]!r} was accepted"
            assert error.exit_code == 4, what
            assert path.name in str(error), what
            assert "\n" not in str(error), what
            assert len(str(error)) < 2000, what


def refusal(source, path):
    """Return the error that refuses a manifest, or None."""
    try:
        calibrate(source, images=1, manifest=path)
    except EdgexError as error:
        return error
    return None


def test_a_missing_manifest(source, tmp_path):
    with pytest.raises(UsageError, match="no such calibration manifest"):
        calibrate(source, images=1, manifest=tmp_path / "missing.json")


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "m.json"
    for photos in ([], [("../a.png", "0" * 64)], [("a.png", "0")], [("a.png", "0" * 64)] * 2):
        with pytest.raises(UsageError, match=r"m\.json"):
            write_calibration_manifest(path, photos, chosen="x", seed=0, crops_per_photo=1)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_stable(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert list(document) == ["schema_version", "chosen", "seed", "crops_per_photo", "photos"]
    before = path.read_bytes()
    manifest = load_calibration_manifest(path)
    photos = [(photo.name, photo.sha256) for photo in manifest.photos]
    write_calibration_manifest(path, photos, chosen="three of four", seed=3, crops_per_photo=2)
    assert path.read_bytes() == before
