"""Calibration manifests: which photos a quantization may look at, checked by their sha256."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgexception.errors import BadArtifact, UsageError
from edgexception.sources import relative_name

MAX_MANIFEST_BYTES = 64 * 2**20


class NamedPhoto(BaseModel):
    """One photo of a calibration set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=4096)]
    """Its name in the source: a posix path relative to the source's folder."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file; of shape and pixels for a source that has no files."""


class CalibrationManifest(BaseModel):
    """What is written under `calibration/`, so that a calibration set can be had again exactly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    chosen: Annotated[str, Field(min_length=1, max_length=2000)]
    """How and from what the photos were chosen, for a reader."""
    seed: Annotated[int, Field(strict=True)]
    """Of the selection and of the random crops; the recipe must say the same."""
    crops_per_photo: Annotated[int, Field(ge=1, le=1024, strict=True)]
    photos: Annotated[tuple[NamedPhoto, ...], Field(min_length=1)]
    """Sorted by name."""


def write_calibration_manifest(
    path: Path, photos: Iterable[tuple[str, str]], *, chosen: str, seed: int, crops_per_photo: int
) -> CalibrationManifest:
    """Write the manifest of photos given as (name, sha256), replacing the file in one step.

    Raises UsageError for photos that no manifest may name.
    """
    try:
        manifest = CalibrationManifest(
            chosen=chosen,
            seed=seed,
            crops_per_photo=crops_per_photo,
            photos=tuple(NamedPhoto(name=name, sha256=sha) for name, sha in sorted(photos)),
        )
        _check_names(manifest)
    except ValueError as error:
        raise UsageError(f"{path}: cannot be a calibration manifest: {_brief(error)}") from error
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def load_calibration_manifest(path: Path) -> CalibrationManifest:
    """Read and check a manifest. Raises UsageError if it is not there, BadArtifact if malformed."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such calibration manifest")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BadArtifact(f"{path}: has more than {MAX_MANIFEST_BYTES:,} bytes")
        document = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once)
        manifest = CalibrationManifest.model_validate(document)
        _check_names(manifest)
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise BadArtifact(f"{path}:{error.lineno}: is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise BadArtifact(
            f"{path}: is not a calibration manifest of schema version 1: {_brief(error)}. "
            "Write it again from the photos"
        ) from error
    return manifest


def _check_names(manifest: CalibrationManifest) -> None:
    """Raise ValueError unless names are relative, canonical and, like the photos, distinct."""
    for photo in manifest.photos:
        if relative_name(photo.name) != photo.name:
            raise ValueError(f"the name {photo.name[:200]!a} is not in its shortest form")
    for field in ("name", "sha256"):
        seen: set[str] = set()
        for photo in manifest.photos:
            value = getattr(photo, field)
            if value in seen:
                raise ValueError(f"{photo.name}: its {field} stands twice")
            seen.add(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return dict(pairs)


def _brief(error: Exception) -> str:
    """Return the first faults of a validation in one line."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:300]
    faults = [
        f"{'.'.join(str(part)[:60] for part in fault['loc']) or 'the document'}: {fault['msg']}"
        for fault in error.errors(include_input=False, include_url=False)
    ]
    more = f"; and {len(faults) - 5} more faults" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more
