"""Opening a source as a set of network inputs, with everything that is wrong known beforehand.

Every photo is read, hashed and decoded once. What cannot be used is named in `ImageSet.bad`, and a
set with more of it than the recipe's `max_bad_images` is refused. The second of two equal files
counts as bad, too: an image that is there twice would weigh twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from edgexception.calibration import load_calibration_manifest
from edgexception.errors import BadArtifact, UsageError
from edgexception.imageset import (
    BadImage,
    ImageSet,
    Photo,
    Sample,
    crop_sample,
    decode,
    in_parallel,
)
from edgexception.photos import PhotoError
from edgexception.preprocess import Preprocess, to_input
from edgexception.recipe_data import CalibrationSpec, EvaluationSpec, Source
from edgexception.sources import Entry, Listing, list_source

__all__ = [
    "BadImage",
    "ImageSet",
    "Photo",
    "Sample",
    "open_calibration",
    "open_evaluation",
    "open_photos",
    "open_training",
    "refuse_leak",
]


def open_training(
    source: Source, preprocess: Preprocess, classes: tuple[str, ...] | None = None
) -> ImageSet:
    """Open labelled photos to learn from.

    `classes` are the network's, in the order of its logits; for None they are the source's, else
    its labels sorted. Raises UsageError, BadArtifact or NotPossibleHere (see `list_source`).
    """
    listing = list_source(source)
    if any(entry.label is None for entry in listing.entries):
        raise UsageError(f"{listing.what}: training needs labels, and these photos have none")
    classes = classes or listing.classes
    classes = classes or tuple(sorted({entry.label or "" for entry in listing.entries}))
    photos, bad = _usable(listing, preprocess, _label_indices(listing, classes), 0)
    return ImageSet(tuple(Sample(p.name, p) for p in photos), classes, preprocess, bad)


def open_photos(source: Source, preprocess: Preprocess) -> ImageSet:
    """Open photos to learn from without labels; those that there are, are not looked at."""
    listing = list_source(source)
    bare = tuple(entry._replace(label=None) for entry in listing.entries)
    photos, bad = _usable(listing._replace(entries=bare), preprocess, {}, 0)
    return ImageSet(tuple(Sample(p.name, p) for p in photos), None, preprocess, bad)


def open_evaluation(
    spec: EvaluationSpec, preprocess: Preprocess, classes: tuple[str, ...] | None
) -> tuple[ImageSet, ImageSet]:
    """Open the photos of an evaluation: (for accuracy, for agreement with the float network).

    The first set is the whole photos with their labels, if the source has any; the second has the
    whole photos, then `crops_per_photo` rounds of random crops, without labels. `classes` are the
    network's, in the order of its logits; for None the sub-folders of a labelled folder count.

    Raises UsageError, BadArtifact or NotPossibleHere (see `list_source`).
    """
    listing = list_source(spec.source)
    classes = classes if classes is not None else listing.classes
    labelled = any(entry.label is not None for entry in listing.entries)
    if labelled and classes is None:
        raise UsageError(
            f"{listing.what}: has labels, but neither it nor the network says which class is which "
            "output. List the class names in the order of the outputs as model.classes"
        )
    labels = _label_indices(listing, classes or ())
    photos, bad = _usable(listing, preprocess, labels, spec.max_bad_images)
    whole = tuple(Sample(photo.name, photo) for photo in photos)
    bare = [photo._replace(label=None) for photo in photos]
    both = [Sample(photo.name, photo) for photo in bare]
    for number in range(1, spec.crops_per_photo + 1):
        both += (crop_sample(photo, number, spec.seed) for photo in bare)
    return (
        ImageSet(whole, classes, preprocess, bad),
        ImageSet(tuple(both), classes, preprocess, bad),
    )


def open_calibration(
    spec: CalibrationSpec, preprocess: Preprocess, *, evaluation: ImageSet | None
) -> ImageSet:
    """Open the images that quantization may look at.

    With more photos than `images`, those with the least sha256("seed:name") are taken; other photos
    of the source are not even read. Crops go round by round over all photos. A manifest must agree
    with the spec, and each photo it names must be there and match its sha256.

    Raises UsageError for too few photos, BadArtifact for a broken manifest, a photo that is in the
    evaluation set, too (same file, or same network input), or a set without any contrast.
    """
    listing = list_source(spec.source)
    listing = listing._replace(
        entries=tuple(entry._replace(label=None) for entry in listing.entries)
    )
    if spec.manifest is None:
        photos, bad = _usable(
            listing, preprocess, {}, spec.max_bad_images, _Choice(spec.images, spec.seed)
        )
    else:
        photos, bad = _photos_of_manifest(spec, spec.manifest, listing, preprocess), ()
    available = len(photos) * spec.crops_per_photo
    if available < spec.images:
        raise UsageError(
            f"{listing.what}: calibration asks for {spec.images} images, and {len(photos)} usable "
            f"photos ({len(bad)} bad) x {spec.crops_per_photo} crops make {available}. Set images "
            f"to {available}, or crops_per_photo to {math.ceil(spec.images / len(photos))}"
        )
    samples = _spread(photos, spec)
    if not any(sample.photo.contrast for sample in samples):
        raise BadArtifact(
            f"{listing.what}: each of the {len(samples)} calibration images is of one colour, as "
            f"{samples[0].photo.name} is, so there are no ranges to find. Name real photos"
        )
    images = ImageSet(samples, None, preprocess, bad)
    if evaluation is not None:
        refuse_leak(images, evaluation, "calibration")
    return images


def _label_indices(listing: Listing, classes: Sequence[str]) -> dict[str, int]:
    """Return the index of every class. Raises if they are not distinct or a label is unknown."""
    indices = {name: index for index, name in enumerate(classes)}
    if len(indices) != len(classes):
        twice = next(name for name in indices if list(classes).count(name) > 1)
        raise UsageError(
            f"the class {twice!r} stands twice in the network's classes: name each once"
        )
    unknown = [e for e in listing.entries if e.label is not None and e.label not in indices]
    if unknown:
        places = dict.fromkeys(f"{e.where}: {e.label!r}" for e in unknown)
        raise BadArtifact(
            f"{'; '.join(list(places)[:5])}: {len(unknown)} photos have a label that is not one of "
            f"the {len(classes)} classes ({', '.join(classes)[:200]}). Correct labels or classes"
        )
    return indices


class _Choice(NamedTuple):
    """Take so many photos of a source, chosen by the seed."""

    photos: int
    seed: int


def _usable(
    listing: Listing,
    preprocess: Preprocess,
    labels: dict[str, int],
    max_bad: int,
    choice: _Choice | None = None,
) -> tuple[list[Photo], tuple[BadImage, ...]]:
    """Decode the photos of a listing, all or so many chosen ones, and return (usable, bad)."""
    entries = list(listing.entries)
    if choice is not None:
        entries.sort(key=lambda entry: _rank(choice.seed, entry.name))
    wanted = len(entries) if choice is None else choice.photos
    photos: list[Photo] = []
    bad: list[BadImage] = []
    names: dict[str, str] = {}
    looked_at = 0
    while looked_at < len(entries) and len(photos) < wanted:
        portion = entries[looked_at : looked_at + wanted - len(photos)]
        looked_at += len(portion)
        for checked in in_parallel(lambda entry: _check(entry, labels, preprocess), portion):
            if isinstance(checked, BadImage):
                bad.append(checked)
            elif checked.sha256 in names:
                bad.append(BadImage(checked.name, f"is the same as {names[checked.sha256]}"))
            else:
                names[checked.sha256] = checked.name
                photos.append(checked)
    if len(bad) > max_bad:
        shown = "; ".join(f"{image.name} {image.reason}" for image in bad[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise BadArtifact(
            f"{listing.what}: {len(bad)} of {looked_at} photos cannot be used, and max_bad_images "
            f"is {max_bad}: {shown}{more}. Replace or remove them, or raise max_bad_images"
        )
    if not photos:
        raise BadArtifact(f"{listing.what}: none of its {looked_at} photos can be used")
    return sorted(photos, key=lambda photo: photo.name), tuple(sorted(bad))


def _check(entry: Entry, labels: dict[str, int], preprocess: Preprocess) -> Photo | BadImage:
    try:
        picture, sha256 = decode(entry.name, entry.photo)
        pixels = to_input(picture, preprocess)
    except (PhotoError, BadArtifact) as error:
        return BadImage(entry.name, str(error))
    return Photo(
        name=entry.name,
        source=entry.photo,
        label=None if entry.label is None else labels[entry.label],
        sha256=sha256,
        input_sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        size=picture.size,
        contrast=int(np.ptp(pixels, axis=(0, 1)).max()),
    )


# --- calibration --------------------------------------------------------------------------------


def _photos_of_manifest(
    spec: CalibrationSpec, path: Path, listing: Listing, preprocess: Preprocess
) -> list[Photo]:
    manifest = load_calibration_manifest(path)
    for field in ("seed", "crops_per_photo"):
        ours, theirs = getattr(spec, field), getattr(manifest, field)
        if ours != theirs:
            raise UsageError(
                f"{path}: was written for {field} {theirs}, but the recipe says {ours}. Use one"
            )
    entries = {entry.name: entry for entry in listing.entries}
    missing = [photo.name for photo in manifest.photos if photo.name not in entries]
    if missing:
        raise BadArtifact(
            f"{path}: {len(missing)} of its {len(manifest.photos)} photos are not in "
            f"{listing.what}: {', '.join(missing[:5])}. Bring them back, or write it again"
        )
    named = Listing(
        f"{path} (photos of a manifest must all be usable)",
        tuple(entries[photo.name] for photo in manifest.photos),
        None,
    )
    photos, _ = _usable(named, preprocess, {}, 0)
    expected = {photo.name: photo.sha256 for photo in manifest.photos}
    wrong = [photo for photo in photos if photo.sha256 != expected[photo.name]]
    if wrong:
        raise BadArtifact(
            f"{path}: {len(wrong)} photos of {listing.what} are not the ones it names: "
            + ", ".join(f"{p.name} has sha256 {p.sha256[:12]}" for p in wrong[:5])
            + ". Bring the right ones back, or write the manifest again"
        )
    return photos


def _spread(photos: Sequence[Photo], spec: CalibrationSpec) -> tuple[Sample, ...]:
    """Return `images` samples, round by round; a round that is not full takes the seed's choice."""
    samples: list[Sample] = []
    for number in range(1, spec.crops_per_photo + 1):
        chosen = sorted(photos, key=lambda photo: _rank(spec.seed, photo.name))
        chosen = chosen[: spec.images - len(samples)]
        for photo in sorted(chosen, key=lambda photo: photo.name):
            if spec.crops_per_photo == 1:
                samples.append(Sample(photo.name, photo))
            else:
                samples.append(crop_sample(photo, number, spec.seed))
    return tuple(samples)


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def refuse_leak(
    images: ImageSet, evaluation: ImageSet, purpose: Literal["calibration", "training"]
) -> None:
    """Raise BadArtifact if a photo of `images` is in `evaluation`, too, as a file or as an input.

    Inputs are comparable where both sets have the same preprocessing; files always are.
    """
    held_out: dict[str, Photo] = {}
    for sample in evaluation.samples:
        held_out.setdefault(sample.photo.sha256, sample.photo)
        held_out.setdefault(sample.photo.input_sha256, sample.photo)
    leaks = {}
    for sample in images.samples:
        photo = sample.photo
        twin = held_out.get(photo.sha256) or held_out.get(photo.input_sha256)
        if twin is not None:
            leaks[photo.name] = f"{_place(photo)} is {_place(twin)}"
    if leaks:
        raise BadArtifact(
            f"{len(leaks)} {purpose} photos are in the evaluation set, too, so its figures would "
            f"flatter: {'; '.join(list(leaks.values())[:5])}. Take them out of one of the sets"
        )


def _place(photo: Photo) -> str:
    return str(photo.source) if isinstance(photo.source, Path) else photo.name
