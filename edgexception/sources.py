"""What a source of photos holds: each kind becomes a sorted list of entries, nothing decoded yet.

Names are relative posix paths. Their order is that of the names, never that of the file system.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgexception.errors import BadArtifact, NotPossibleHere, UsageError
from edgexception.idx_file import read_idx
from edgexception.recipe_data import (
    DigitsSource,
    FolderSource,
    IdxSource,
    ManifestSource,
    PhotosSource,
    Source,
)

MAX_MANIFEST_BYTES = 64 * 2**20
MAX_PHOTOS = 1_000_000
DIGITS_SEED = 0
DIGITS_SPLIT = {"train": (0, 1000), "calibration": (1000, 1197), "test": (1197, 1797)}
"""Ranges of the digits in the order of sha256("seed:index"): 1000, 197 and 600 images."""
_IGNORED_NAMES = {"thumbs.db", "desktop.ini"}


class Entry(NamedTuple):
    """One photo that a source names."""

    name: str
    """Relative posix path; it identifies the photo within its source."""
    photo: Path | npt.NDArray[np.uint8]
    """The file, or uint8 gray or RGB pixels."""
    label: str | None
    where: str
    """Where the label stands, for messages: `labels.csv:12`, `the folder cups`."""


class Listing(NamedTuple):
    """All photos of a source in order, and the classes if the source itself orders them."""

    what: str
    """The source in words, for messages."""
    entries: tuple[Entry, ...]
    classes: tuple[str, ...] | None


def list_source(source: Source) -> Listing:
    """List what a source names, sorted by name.

    Raises UsageError if it is not there or names no photo, BadArtifact if it is malformed or leaves
    its folder, NotPossibleHere without scikit-learn.
    """
    if isinstance(source, FolderSource):
        listing = _list_folder(source.path)
    elif isinstance(source, ManifestSource):
        listing = _list_manifest(source.path)
    elif isinstance(source, PhotosSource):
        listing = _list_photos(source.path)
    elif isinstance(source, IdxSource):
        listing = _list_idx(source)
    else:
        listing = _list_digits(source)
    if not listing.entries:
        raise UsageError(f"{listing.what}: there is no photo in it. Name another source")
    return listing


# --- folders ------------------------------------------------------------------------------------


def _list_photos(root: Path) -> Listing:
    entries = (Entry(name, path, None, name) for name, path in _walk(root))
    return Listing(str(root), tuple(entries), None)


def _list_folder(root: Path) -> Listing:
    files = _walk(root)
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "."))
    if not classes:
        raise UsageError(
            f"{root}: a labelled folder has one sub-folder a class, and this one has none. "
            "Sort the photos into sub-folders, or use a source of kind 'manifest' or 'photos'"
        )
    entries = []
    for name, path in files:
        folder, _, rest = name.partition("/")
        if not rest:
            raise BadArtifact(
                f"{root}: {name} lies beside the class folders, so it has no label. "
                "Move it into the folder of its class, or out of here"
            )
        entries.append(Entry(name, path, folder, f"the folder {folder}"))
    return Listing(str(root), tuple(entries), classes)


def _walk(root: Path) -> list[tuple[str, Path]]:
    """Return (name, path) of every file below a folder, sorted by name.

    Names that start with a dot and the thumbnail files of desktops are no photos and are left out;
    every other file counts as one. A link is followed to a file below the same folder only.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: there is no such folder. Name the folder that holds the photos")
    inside = root.resolve()
    found: list[tuple[str, Path]] = []
    pending: list[tuple[str, Path]] = [("", root)]
    while pending:
        prefix, folder = pending.pop()
        try:
            children = list(os.scandir(folder))
        except OSError as error:
            raise BadArtifact(
                f"{folder}: cannot be listed ({error.strerror}). Make it readable or move it away"
            ) from error
        for child in children:
            if child.name.startswith(".") or child.name.lower() in _IGNORED_NAMES:
                continue
            name = prefix + child.name
            _check_name(name, str(root))
            if child.is_symlink():
                _check_link(root / name, inside, name, str(root))
            if child.is_dir(follow_symlinks=False):
                pending.append((f"{name}/", folder / child.name))
            else:
                found.append((name, folder / child.name))
        if len(found) > MAX_PHOTOS:
            raise BadArtifact(
                f"{root}: holds more than {MAX_PHOTOS:,} files. Name a smaller folder"
            )
    return sorted(found)


def _is_plain(text: str) -> bool:
    """Say whether text has no control characters, line breaks or undecodable bytes."""
    return not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text)


def _check_name(name: str, where: str) -> None:
    """Refuse names that no message, manifest or other machine could carry."""
    if not _is_plain(name) or "\\" in name:
        raise BadArtifact(
            f"{where}: the file name {name!a} has control characters, backslashes or bytes that "
            "are not UTF-8. Rename the file"
        )


def _check_link(path: Path, inside: Path, name: str, where: str) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise BadArtifact(f"{where}: {name} is a link that leads nowhere. Remove it") from error
    if not target.is_relative_to(inside) or target.is_dir():
        raise BadArtifact(
            f"{where}: {name} is a link to a folder or out of {inside.name}. Only links to photos "
            "within the same folder are followed: replace it with a copy"
        )


# --- manifests ----------------------------------------------------------------------------------


class _Faults:
    """Faults of one file, gathered so that all of them are reported at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, line: int, reason: str) -> None:
        self.found.append(f"{self.path}:{line}: {reason}")

    def raise_any(self) -> None:
        if self.found:
            more = len(self.found) - 5
            raise BadArtifact(
                "; ".join(self.found[:5])
                + (f"; and {more} more faults" if more > 0 else "")
                + ". Correct the manifest"
            )


def _list_manifest(path: Path) -> Listing:
    readers: dict[str, Callable[[str, _Faults], Iterator[tuple[int, dict[str, str]]]]]
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: a manifest of photos is a .csv or a .jsonl file. Rename or convert"
        )
    faults = _Faults(path)
    lines: dict[str, int] = {}
    entries = []
    for line, row in reader(_manifest_text(path), faults):
        try:
            name, file = _named_file(row["path"], path.parent)
            label = None if "label" not in row else _checked_label(row["label"])
        except (ValueError, OSError, RuntimeError) as error:
            faults.add(line, _reason(error))
            continue
        if name in lines:
            faults.add(line, f"{name} is named in line {lines[name]} already")
        lines.setdefault(name, line)
        entries.append(Entry(name, file, label, f"{path}:{line}"))
    if {entry.label is None for entry in entries} == {True, False}:
        bare = next(entry for entry in entries if entry.label is None)
        faults.add(lines[bare.name], "has no label while other rows have one")
    faults.raise_any()
    return Listing(str(path), tuple(sorted(entries, key=lambda entry: entry.name)), None)


def _named_file(text: str, root: Path) -> tuple[str, Path]:
    """Return (name, file) of a path in a manifest. Raises ValueError or OSError."""
    name = relative_name(text)
    file = root / name
    if not file.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name} is a link out of the manifest's folder")
    if not file.is_file():
        raise ValueError(f"{name} is not there, or not a file")
    return name, file


def _checked_label(text: str) -> str:
    if not text.strip() or len(text) > 200 or not _is_plain(text):
        raise ValueError("the label is empty, longer than 200 characters or has control characters")
    return text


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def relative_name(text: str) -> str:
    """Return a relative posix path in its shortest form.

    Raises ValueError for what is absolute, climbs with `..` or cannot be a portable file name.
    """
    path = PurePosixPath(text)
    windows = PureWindowsPath(path.as_posix())  # after "." parts are gone: "./C:" is a drive, too
    if path.is_absolute() or windows.drive or windows.root:
        raise ValueError(f"the path {text[:200]!a} is absolute: write it relative to the manifest")
    if ".." in path.parts:
        raise ValueError(
            f"the path {text[:200]!a} climbs with '..': keep photos below the manifest"
        )
    if not path.parts or len(text) > 4096:
        raise ValueError("the path is empty or longer than 4096 characters")
    if not _is_plain(text) or "\\" in text:
        raise ValueError(
            f"the path {text[:200]!a} has control characters, backslashes or is not UTF-8"
        )
    return path.as_posix()


def _manifest_text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file. Name a .csv or .jsonl manifest of photos")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BadArtifact(f"{path}: has more than {MAX_MANIFEST_BYTES:,} bytes. Split it")
        data = path.read_bytes()
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadArtifact(
            f"{path}:{line}: is not UTF-8 text. Save the manifest as UTF-8"
        ) from error


def _csv_rows(text: str, faults: _Faults) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, {path, label}) of a CSV file with that header."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if sorted(header) not in (["path"], ["label", "path"]):
            faults.add(1, f"the header is {','.join(header)[:200]!a}, not 'path,label' or 'path'")
            return
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                faults.add(reader.line_num, f"has {len(row)} fields, the header {len(header)}")
                continue
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        faults.add(reader.line_num, f"is not CSV ({error})")


def _jsonl_rows(text: str, faults: _Faults) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, {path, label}) of a file with one JSON object a line."""
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            row = json.loads(written, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            faults.add(line, f"is not JSON ({str(error)[:120]})")
            continue
        if not isinstance(row, dict) or not {"path"} <= row.keys() <= {"path", "label"}:
            faults.add(line, "is not an object with 'path' and, for evaluation, 'label'")
        elif not all(isinstance(value, str) and value for value in row.values()):
            faults.add(line, "'path' and 'label' are texts that are not empty")
        else:
            yield line, row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


# --- digits -------------------------------------------------------------------------------------


def _list_digits(source: DigitsSource) -> Listing:
    """List one part of scikit-learn's digits: 8x8 gray, 0...16 scaled to 0...255.

    The parts are ranges of one fixed order, so none shares an image with another; that no
    two of the 1,797 images are equal is a fact of this data set, checked by the tests.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  optional, and slow to import
    except ImportError as error:
        raise NotPossibleHere(
            "the digits source needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    order = sorted(
        range(len(digits.images)),
        key=lambda index: hashlib.sha256(f"{DIGITS_SEED}:{index}".encode()).digest(),
    )
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    entries = []
    for index in sorted(order[slice(*DIGITS_SPLIT[source.split])]):
        name = f"digits/{index:04d}"
        entries.append(Entry(name, pixels[index], str(digits.target[index]), name))
    return Listing(f"digits ({source.split})", tuple(entries), tuple("0123456789"))


# --- IDX files ----------------------------------------------------------------------------------


def _list_idx(source: IdxSource) -> Listing:
    """List a range of an IDX file; an image is named by its number in the file, from 0."""
    images = read_idx(source.images, 3)
    labels, classes = None, source.classes or ()
    if source.labels is not None:
        labels = read_idx(source.labels, 1)
        if len(labels) != len(images):
            raise BadArtifact(
                f"{source.labels}: has {len(labels)} labels, and {source.images} {len(images)} "
                "images. Name two files that belong together"
            )
        wrong = np.flatnonzero(labels >= len(classes))
        if len(wrong):
            raise BadArtifact(
                f"{source.labels}: label {wrong[0]} is {labels[wrong[0]]} (and {len(wrong) - 1} "
                f"more), and the {len(classes)} classes count from 0. Correct `classes`"
            )
    last = len(images) if source.count is None else source.first + source.count
    if source.first >= len(images) or last > len(images):
        raise UsageError(
            f"{source.images}: has {len(images)} images, and the recipe takes {source.first} to "
            f"{max(last - 1, source.first)}, counted from 0. Correct `first` and `count`"
        )
    digits = len(str(len(images) - 1))
    entries = []
    for index in range(source.first, last):
        name = f"{source.images.name}/{index:0{digits}d}"
        label = None if labels is None else classes[labels[index]]
        where = name if labels is None else f"{source.labels}: label {index}"
        entries.append(Entry(name, images[index], label, where))
    return Listing(
        f"{source.images}, {source.first} to {last - 1}",
        tuple(entries),
        None if labels is None else classes,
    )
