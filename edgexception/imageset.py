"""Ordered sets of network inputs: photos and deterministic crops of them, decoded when asked for.

Each photo was read, hashed and decoded once when its set was opened (see `data`). Its pixels are
decoded again when a batch is asked for, and a file that changed in between is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgexception.errors import BadArtifact, OutOfResources, UsageError
from edgexception.photos import PhotoError, decode_photo, read_photo
from edgexception.preprocess import Preprocess, to_input

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
_T = TypeVar("_T")
_R = TypeVar("_R")

WORKERS = min(4, os.cpu_count() or 1)
"""Threads that decode (Pillow releases the GIL); each may hold one photo of 2**26 pixels."""


class Photo(NamedTuple):
    """A photo that has been decoded once."""

    name: str
    source: Path | Pixels
    label: int | None
    sha256: str
    """Of the file; of shape and pixels where the source has no files."""
    input_sha256: str
    """Of the network input made from the whole photo."""
    size: tuple[int, int]
    """Width and height in pixels."""
    contrast: int
    """Greatest difference between two pixels of the network input, in one channel."""


class Sample(NamedTuple):
    """One network input: a whole photo, or a crop of it."""

    name: str
    photo: Photo
    crop: Box | None = None
    """Left, top, right, bottom in pixels of the photo; None is the whole photo."""

    @property
    def label(self) -> int | None:
        """Index of the class, or None."""
        return self.photo.label


class BadImage(NamedTuple):
    """A photo that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An ordered set of network inputs, decoded when they are asked for."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...] | None
    preprocess: Preprocess
    bad: tuple[BadImage, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def photo_count(self) -> int:
        """How many different photos the images are made from."""
        return len({sample.photo.sha256 for sample in self.samples})

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class indices (N,), or None for a set without labels."""
        labels = [sample.label for sample in self.samples]
        if any(label is None for label in labels):
            return None
        return np.array(labels, dtype=np.int64)

    @property
    def digest(self) -> str:
        """sha256 of all that the pixels and labels follow from: a content key, without decoding.

        The inputs as they were decoded are in it, since another version of Pillow or libjpeg makes
        other pixels of the same file.
        """
        key = hashlib.sha256(b"edgexception image set 2\n")
        key.update(f"{self.preprocess.model_dump_json()}\n{json.dumps(self.classes)}\n".encode())
        for sample in self.samples:
            photo = sample.photo
            row = (sample.name, photo.sha256, photo.input_sha256, sample.crop, sample.label)
            key.update(f"{json.dumps(row)}\n".encode())
        return key.hexdigest()

    def image(self, index: int) -> Pixels:
        """Return one input, uint8 (H, W, 3). Raises BadArtifact if its file has changed."""
        sample = self.samples[index]
        photo, spec = sample.photo, self.preprocess
        try:
            picture, sha256 = decode(photo.name, photo.source)
        except PhotoError as error:
            raise _changed(photo) from error
        if sha256 != photo.sha256:
            raise _changed(photo)
        if sample.crop is not None:
            picture = picture.crop(sample.crop)
            spec = spec.model_copy(update={"resize": "stretch"})
        return to_input(picture, spec)

    def batches(self, size: int) -> Iterator[Pixels]:
        """Yield all inputs in order as uint8 (n, H, W, 3), n = size except in the last batch."""
        if size < 1:
            raise UsageError(f"a batch of {size} images is not possible: ask for 1 or more")
        for start in range(0, len(self), size):
            yield np.stack(in_parallel(self.image, range(start, min(start + size, len(self)))))

    def write_npy(self, path: Path) -> None:
        """Write all inputs as one .npy, uint8 (N, H, W, 3), published when it is complete.

        Raises OutOfResources when the disk is full, UsageError when the place cannot be written to.
        """
        shape = (len(self), *self.preprocess.input_size, 3)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(partial, "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in self.batches(64):
                    file.write(batch.tobytes())
            os.replace(partial, path)
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
            raise (OutOfResources if full else UsageError)(
                f"{path}: {math.prod(shape):,} bytes of images cannot be written "
                f"({error.strerror}). Make room, or choose another folder"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def first_images(images: ImageSet, count: int) -> ImageSet:
    """Return the first `count` images of a set, without labels."""
    return ImageSet(images.samples[:count], None, images.preprocess, ())


def crop_sample(photo: Photo, number: int, seed: int) -> Sample:
    """Return the random crop with that number of a photo."""
    crop = random_crop(photo.size, f"{seed}:{photo.sha256}:{number}")
    return Sample(f"{photo.name}#{number}", photo, crop)


def random_crop(size: tuple[int, int], key: str) -> Box:
    """Return the random crop (left, top, right, bottom) of a photo of (width, height) for a key.

    Like torchvision's RandomResizedCrop: area 0.35 to 1 of the photo, aspect ratio 3/4 to 4/3 (log-
    uniform), ten attempts. A photo too elongated for all of them gets the last one shrunk to fit.
    The numbers are the four 64-bit words of sha256("key:attempt"): nothing else has a say.
    """
    width, height = size
    for attempt in range(10):
        words = hashlib.sha256(f"{key}:{attempt}".encode()).digest()
        # 53 bits of each word: a quotient of more could round to 1.0, outside of the photo.
        share, tilt, x, y = (
            (int.from_bytes(words[i : i + 8], "big") >> 11) / 2**53 for i in range(0, 32, 8)
        )
        area = width * height * (0.35 + 0.65 * share)
        aspect = (3 / 4) * (16 / 9) ** tilt
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if round(across) <= width and round(down) <= height:
            break
    shrink = min(1.0, width / across, height / down)
    w, h = min(width, max(1, round(across * shrink))), min(height, max(1, round(down * shrink)))
    left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
    return left, top, left + w, top + h


def decode(name: str, source: Path | Pixels) -> tuple[Image.Image, str]:
    """Return a photo as it is stored and its sha256. Raises PhotoError."""
    if isinstance(source, Path):
        data = read_photo(source)
        return decode_photo(data, name), hashlib.sha256(data).hexdigest()
    key = hashlib.sha256(f"{source.shape}".encode() + source.tobytes())
    return Image.fromarray(source), key.hexdigest()


def _changed(photo: Photo) -> BadArtifact:
    return BadArtifact(
        f"{photo.source}: has changed or gone since the set was opened. "
        "Leave the photos alone during a run"
    )


def in_parallel(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Apply a function that decodes photos to all items, in order, with a few threads."""
    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
        # Pillow warns of odd metadata and of palettes with alpha; `photos` says what is done.
        warnings.simplefilter("ignore")
        return list(pool.map(function, items))
