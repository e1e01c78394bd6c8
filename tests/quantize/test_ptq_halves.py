"""The two halves of the calibration photos, of which one judges what the other proposes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from narrow import random_images, small_graph

from edgexception.errors import UsageError
from edgexception.imageset import ImageSet, Photo, Sample
from edgexception.preprocess import Preprocess
from edgexception.quantize.ptq import _halves, quantize_ptq
from edgexception.recipe import PtqSpec

PIXELS = random_images(16, (40, 40), seed=7)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def image_set(pixels: np.ndarray) -> ImageSet:
    samples = []
    for number, image in enumerate(pixels):
        digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
        photo = Photo(str(number), image, None, digest, digest, (40, 40), 255)
        samples.append(Sample(str(number), photo))
    return ImageSet(tuple(samples), None, Preprocess(input_size=(40, 40)))


@pytest.mark.parametrize("asked", [{}, {"ranges": "minmax"}, {"equalization": False}])
def test_one_photo_cannot_be_judged_by_another(asked: dict[str, object]) -> None:
    spec = PtqSpec.model_validate({"method": "ptq", "ranges": "auto", "equalization": True} | asked)
    twice = np.concatenate((PIXELS[:1], PIXELS[:1]))  # one photo under two names
    with pytest.raises(UsageError, match=r"1 photo.*Give more photos, or set `ranges: minmax`"):
        quantize_ptq(small_graph(), spec, image_set(twice), 8)


def test_halves_share_no_photo() -> None:
    whole = image_set(np.concatenate((PIXELS, PIXELS[:5])))
    halves = _halves(whole)
    first, second = ({s.photo.sha256 for s in half.samples} for half in halves)
    assert not first & second
    assert sum(len(half) for half in halves) == len(whole)
    assert len(first) == len(second) == len(PIXELS) // 2
