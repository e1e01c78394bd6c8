"""Listing folders and manifests: order, faults with their lines, and nothing outside the folder."""

from __future__ import annotations

import gzip
import json
import os
import sys

import numpy as np
import pytest
from hostile_data import encoded, hostile_manifests, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_idx_file import idx

from edgexception.errors import BadArtifact, EdgexError, NotPossibleHere, UsageError
from edgexception.recipe_data import (
    DigitsSource,
    FolderSource,
    IdxSource,
    ManifestSource,
    PhotosSource,
)
from edgexception.sources import list_source, relative_name


def photos(path):
    return PhotosSource(kind="photos", path=path)


def folder(path):
    return FolderSource(kind="folder", path=path)


def manifest(path):
    return ManifestSource(kind="manifest", path=path)


def fill(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number), "PNG"))


def test_names_are_sorted_whatever_the_file_system_says(tmp_path):
    fill(tmp_path, "b.png", "a/z.png", "a.png", "B.png", "a/b/c.png", "é.png")
    names = [entry.name for entry in list_source(photos(tmp_path)).entries]
    assert names == ["B.png", "a.png", "a/b/c.png", "a/z.png", "b.png", "é.png"]


def test_hidden_files_are_no_photos_but_others_are_counted(tmp_path):
    fill(tmp_path, "a.png", ".DS_Store", ".git/config", "Thumbs.db", "notes.txt")
    assert [e.name for e in list_source(photos(tmp_path)).entries] == ["a.png", "notes.txt"]


def test_labelled_folder(tmp_path):
    fill(tmp_path, "spoon/1.png", "cup/deep/2.png", "cup/1.png")
    (tmp_path / "plate").mkdir()
    listing = list_source(folder(tmp_path))
    assert listing.classes == ("cup", "plate", "spoon")
    assert [(e.name, e.label) for e in listing.entries] == [
        ("cup/1.png", "cup"),
        ("cup/deep/2.png", "cup"),
        ("spoon/1.png", "spoon"),
    ]


def test_labelled_folder_without_classes_or_with_stray_files(tmp_path):
    fill(tmp_path, "1.png")
    with pytest.raises(UsageError, match="one sub-folder a class"):
        list_source(folder(tmp_path))
    fill(tmp_path, "cup/1.png")
    with pytest.raises(BadArtifact, match=r"1\.png lies beside the class folders"):
        list_source(folder(tmp_path))


def test_missing_and_empty_sources(tmp_path):
    for kind in (photos, folder):
        with pytest.raises(UsageError, match="no such folder"):
            list_source(kind(tmp_path / "missing"))
    with pytest.raises(UsageError, match="no such file"):
        list_source(manifest(tmp_path / "missing.csv"))
    with pytest.raises(UsageError, match="no photo in it"):
        list_source(photos(tmp_path))


@pytest.mark.parametrize("target", ["file outside", "folder outside", "folder inside", "nowhere"])
def test_links_out_of_the_folder_are_refused(tmp_path, target):
    root = tmp_path / "photos"
    fill(root, "a.png", "inside/b.png")
    fill(tmp_path, "secret/c.png")
    where = {
        "file outside": tmp_path / "secret" / "c.png",
        "folder outside": tmp_path / "secret",
        "folder inside": root / "inside",
        "nowhere": tmp_path / "missing.png",
    }[target]
    (root / "link.png").symlink_to(where)
    with pytest.raises(BadArtifact, match=r"link\.png is a link"):
        list_source(photos(root))


def test_a_loop_of_links_ends(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(BadArtifact, match="leads nowhere"):
        list_source(photos(tmp_path))


def test_a_link_within_the_folder_is_followed(tmp_path):
    fill(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert len(list_source(photos(tmp_path)).entries) == 2


@pytest.mark.parametrize(
    "name", [b"\xff.png", b"line\nbreak.png", b"esc\x1b[0m.png", b"back\\.png"]
)
def test_names_that_cannot_be_shown_are_refused(tmp_path, name):
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
        pass
    with pytest.raises(BadArtifact, match="Rename the file") as refusal:
        list_source(photos(tmp_path))
    assert str(refusal.value).isprintable()


def test_csv_and_jsonl_say_the_same(tmp_path):
    fill(tmp_path, "b.png", "x, y.png", "sub/ü.png")
    rows = [("x, y.png", "cup"), ("sub/ü.png", "tea spoon"), ("b.png", "cup")]
    text = "\ufefflabel,path\r\n" + "".join(f'{label},"{path}"\r\n\r\n' for path, label in rows)
    (tmp_path / "m.csv").write_bytes(text.encode())
    lines = [json.dumps({"path": f"./{path}", "label": label}) for path, label in rows]
    (tmp_path / "m.jsonl").write_text("\n\n".join(lines))
    from_csv, from_jsonl = (list_source(manifest(tmp_path / f"m.{s}")) for s in ("csv", "jsonl"))
    for listing in (from_csv, from_jsonl):
        assert [(e.name, e.label) for e in listing.entries] == sorted(
            ((path, label) for path, label in rows)
        )
    assert from_csv.entries[0].where.endswith("m.csv:6")
    assert from_jsonl.entries[0].where.endswith("m.jsonl:5")


def test_every_fault_has_its_line(tmp_path):
    fill(tmp_path, "a.png")
    (tmp_path / "m.csv").write_text("path,label\na.png,cup\n/b.png,cup\nc.png,cup\na.png\n,x\n")
    with pytest.raises(BadArtifact) as refusal:
        list_source(manifest(tmp_path / "m.csv"))
    message = str(refusal.value)
    for words in ("m.csv:3: the path '/b.png' is absolute", "m.csv:4: c.png is not there"):
        assert words in message
    assert "m.csv:5: has 1 fields" in message
    assert "m.csv:6: the path is empty" in message


def test_a_missing_label_among_labels_is_a_fault(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "label": "cup"}\n{"path": "b.png"}\n')
    with pytest.raises(BadArtifact, match=r"m\.jsonl:2: has no label"):
        list_source(manifest(tmp_path / "m.jsonl"))


def refusal(path):
    """Return the error that refuses a manifest, or None."""
    try:
        list_source(manifest(path))
    except EdgexError as error:
        return error
    return None


def test_hostile_manifests_are_refused_in_one_paragraph(tmp_path):
    for seed in range(3):
        for what, path in hostile_manifests(tmp_path, seed):
            error = refusal(path)
            assert error is not None, f"{what}: {path.read_bytes()[:80]!r} was accepted"
            assert error.exit_code in (2, 4), what
            assert path.name in str(error), what
            assert "\n" not in str(error), what
            assert len(str(error)) < 2000, what


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text("./\\ab:c")))
def test_a_relative_name_stays_below_its_folder(text):
    try:
        name = relative_name(text)
    except ValueError:
        return
    assert relative_name(name) == name
    assert not name.startswith("/")
    assert ".." not in name.split("/")
    assert os.path.normpath(os.path.join("/root", name)).startswith("/root/")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl"]))
def test_random_manifests_are_read_or_refused(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"random.{suffix}"
    path.write_bytes((b"path,label\n" if suffix == "csv" else b"") + data)
    with pytest.raises(EdgexError):
        list_source(manifest(path))


def test_the_digits_are_split_without_overlap():
    parts = {
        split: list_source(DigitsSource(kind="digits", split=split))
        for split in ("train", "calibration", "test")
    }
    assert {split: len(part.entries) for split, part in parts.items()} == {
        "train": 1000,
        "calibration": 197,
        "test": 600,
    }
    entries = [entry for part in parts.values() for entry in part.entries]
    assert len({entry.name for entry in entries}) == 1797
    assert len({entry.photo.tobytes() for entry in entries}) == 1797  # no image is there twice
    assert all(part.classes == tuple("0123456789") for part in parts.values())
    assert {entry.label for entry in parts["test"].entries} == set("0123456789")
    # The split is part of published figures: it must not move.
    assert [e.name for e in parts["test"].entries[:3]] == FIRST_TEST_DIGITS


FIRST_TEST_DIGITS = ["digits/0000", "digits/0001", "digits/0005"]


def test_the_digits_are_those_of_scikit_learn():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for entry in list_source(DigitsSource(kind="digits", split="calibration")).entries:
        index = int(entry.name.removeprefix("digits/"))
        assert entry.label == str(digits.target[index])
        np.testing.assert_allclose(entry.photo / 255, digits.images[index] / 16, atol=0.5 / 255)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(NotPossibleHere, match="pip install scikit-learn"):
        list_source(DigitsSource(kind="digits", split="test"))


# --- IDX files


CLASSES = ("a", "b", "c")


def idx_files(folder, count=12, labels=None):
    """Write images whose every pixel tells their number, and labels that cycle."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 6).reshape(count, 2, 3)
    labels = np.arange(count) % 3 if labels is None else np.array(labels)
    (folder / "i.gz").write_bytes(gzip.compress(idx(images)))
    (folder / "l").write_bytes(idx(labels))
    return {"images": folder / "i.gz", "labels": folder / "l", "classes": CLASSES}


def of_idx(**fields):
    return list_source(IdxSource(kind="idx", **fields))


def test_idx_images_are_named_by_their_number_in_the_file(tmp_path):
    listing = of_idx(**idx_files(tmp_path), first=9, count=2)
    assert listing.classes == CLASSES
    assert [(e.name, e.label) for e in listing.entries] == [("i.gz/09", "a"), ("i.gz/10", "b")]
    assert [int(e.photo[0, 0]) for e in listing.entries] == [9, 10]
    assert listing.entries[0].photo.shape == (2, 3)
    assert listing.entries[1].where == f"{tmp_path / 'l'}: label 10"


def test_idx_images_without_labels_have_none(tmp_path):
    listing = of_idx(images=idx_files(tmp_path)["images"])
    assert listing.classes is None
    assert {e.label for e in listing.entries} == {None}
    assert len(listing.entries) == 12


def test_idx_files_that_do_not_belong_together(tmp_path):
    files = idx_files(tmp_path, labels=range(11))
    with pytest.raises(BadArtifact, match=r"11 labels, and .*i\.gz 12 images"):
        of_idx(**files)
    files = idx_files(tmp_path, labels=[0, 1, 2, 3] * 3)
    with pytest.raises(BadArtifact, match=r"label 3 is 3 \(and 2 more\), and the 3 classes"):
        of_idx(**files)


@pytest.mark.parametrize("wanted", [{"first": 12}, {"count": 13}, {"first": 10, "count": 3}])
def test_an_idx_range_outside_of_the_file_is_refused(tmp_path, wanted):
    with pytest.raises(UsageError, match="has 12 images, and the recipe takes"):
        of_idx(**idx_files(tmp_path), **wanted)
