"""Image sets in memory for tests of training."""

from __future__ import annotations

import hashlib

import numpy as np

from edgexception.imageset import ImageSet, Photo, Sample
from edgexception.preprocess import Preprocess


def image_set(pixels: np.ndarray, labels: np.ndarray | None = None) -> ImageSet:
    """Photos (n, H, W, 3) as the pipeline would hand them over."""
    size = (pixels.shape[1], pixels.shape[2])
    samples = []
    for number, image in enumerate(pixels):
        digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
        label = None if labels is None else int(labels[number])
        photo = Photo(str(number), image, label, digest, digest, size[::-1], (0, 255))
        samples.append(Sample(str(number), photo))
    classes = None if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
    return ImageSet(tuple(samples), classes, Preprocess(input_size=size))
