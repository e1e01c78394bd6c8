"""What every section of a recipe is made of, and the sections that say where images come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Batch = Annotated[int, Field(ge=1, le=4096)]
Milliseconds = Annotated[int, Field(ge=1, le=3_600_000)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Budget = Annotated[float, Field(gt=0.0, lt=1.0)]
LearningRate = Annotated[float, Field(gt=0.0, le=10.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=65536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ClassName = Annotated[str, Field(min_length=1, max_length=1000)]


class Spec(BaseModel):
    """Base of every section: frozen, and a field that is not known is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FolderSource(Spec):
    """Labelled photos, one sub-folder a class, classes in alphabetical order of the folders."""

    kind: Literal["folder"]
    path: Path


class ManifestSource(Spec):
    """Photos named by a .csv or .jsonl file with `path` and, for evaluation, `label` in each row.

    Paths are relative to the manifest's folder; a label is a class name.
    """

    kind: Literal["manifest"]
    path: Path


class PhotosSource(Spec):
    """Every photo below a folder, without labels."""

    kind: Literal["photos"]
    path: Path


class DigitsSource(Spec):
    """scikit-learn's handwritten digits: 1,797 labelled 8x8 images inside that package."""

    kind: Literal["digits"]
    split: Literal["train", "calibration", "test"]


class IdxSource(Spec):
    """Gray images of one size in an IDX file, as MNIST and Fashion-MNIST come; .gz or plain."""

    kind: Literal["idx"]
    images: Path
    labels: Path | None = None
    """The IDX file of their labels: numbers that count the class names from 0."""
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=256)] | None = None
    """Class names in the order of the label numbers; together with `labels`."""
    first: Annotated[int, Field(ge=0, lt=1_000_000)] = 0
    """The first image to take, counted from 0."""
    count: Count | None = None
    """How many images to take from there; None is all that follow."""


Source = Annotated[
    FolderSource | ManifestSource | PhotosSource | DigitsSource | IdxSource,
    Field(discriminator="kind"),
]


class CalibrationSpec(Spec):
    """Images that quantization may look at; labels are never used."""

    source: Source
    images: Count = 128
    """How many network inputs to take: photos, or crops of them."""
    crops_per_photo: Annotated[int, Field(ge=1, le=1024)] = 1
    """1 takes the whole photo; more takes that many random crops of each (deterministic)."""
    seed: Seed = 0
    manifest: Path | None = None
    """A calibration manifest: only the photos it names are used, and each must match its sha256."""
    max_bad_images: Annotated[int, Field(ge=0)] = 0
    """Unreadable photos allowed before the set is refused; each one is named in the report."""


class EvaluationSpec(Spec):
    """Images that accuracy and agreement are measured on."""

    source: Source
    crops_per_photo: Annotated[int, Field(ge=0, le=1024)] = 0
    """Random crops of each photo on which agreement with the float network is measured, too."""
    seed: Seed = 1
    max_bad_images: Annotated[int, Field(ge=0)] = 0
