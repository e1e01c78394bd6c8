"""Zip archives from strangers: members are named, counted and bounded before any is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgexception.model.tensors import printable, refuse

MOST_MEMBERS = 20_000
MOST_EXPANSION = 100


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open a zip file and yield it with its members by name, all checked.

    Raises `BadArtifact` for a damaged archive, names that leave the archive, duplicate or
    encrypted members, and sizes that no honest archive of this size declares.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, _members(path, archive)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise refuse(
            path,
            f"its zip archive is damaged ({printable(error, 160)}); the file is truncated or "
            "changed, copy or download it again",
        ) from None


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise refuse(path, f"its zip archive has {len(infos)} members; no checkpoint has")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = printable(info.filename)
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise refuse(path, f"its member '{name}' would be unpacked outside the archive")
        if info.filename in members:
            raise refuse(path, f"its member '{name}' is there twice")
        if info.flag_bits & 1:
            raise refuse(path, f"its member '{name}' is encrypted; save the model without password")
        if info.file_size > MOST_EXPANSION * info.compress_size + 4096:
            raise refuse(
                path,
                f"its member '{name}' claims to unpack from {info.compress_size} to "
                f"{info.file_size} bytes, which no checkpoint does",
            )
        members[info.filename] = info
    if sum(info.compress_size for info in infos) > path.stat().st_size:
        raise refuse(path, "its members overlap: together they are larger than the file")
    return members


def read_member(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int
) -> bytes:
    """Return the bytes of one member, its CRC checked; refuse more than `most_bytes`."""
    if info.file_size > most_bytes:
        raise refuse(
            path,
            f"its member '{printable(info.filename)}' has {info.file_size} bytes; "
            f"the limit is {most_bytes}",
        )
    with archive.open(info) as member:
        return member.read(info.file_size + 1)
