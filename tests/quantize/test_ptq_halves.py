"""The two halves of the calibration photos, of which one judges what the other proposes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from narrow import random_images, small_graph

from edgexception.errors import UsageError
from edgexception.imageset import ImageSet, Photo, Sample
from edgexception.model.graph import to_graph_input
from edgexception.preprocess import Preprocess
from edgexception.quantize.choice import Choice, choose
from edgexception.quantize.equalize import Profile, propose
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


def inputs(pixels: np.ndarray) -> torch.Tensor:
    return to_graph_input(torch.from_numpy(pixels))


@pytest.mark.parametrize("asked", [{}, {"ranges": "minmax"}, {"equalization": False}])
def test_one_photo_cannot_be_judged_by_another(asked: dict[str, object]) -> None:
    spec = PtqSpec.model_validate({"method": "ptq", "ranges": "auto", "equalization": True} | asked)
    twice = np.concatenate((PIXELS[:1], PIXELS[:1]))  # one photo under two names
    with pytest.raises(UsageError, match=r"1 photo.*Give more photos, or set `ranges: minmax`"):
        quantize_ptq(small_graph(), spec, image_set(twice), 8)


def test_each_half_proposes_without_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, images = small_graph(), image_set(PIXELS)
    seen: list[list[list[str]]] = []

    def spy(graph: Any, moves: Any, trials: Any, *rest: Any) -> Choice:
        seen.append([[move.how for move in proposed] for proposed in (moves, *trials)])
        return choose(graph, moves, trials, *rest)

    monkeypatch.setattr("edgexception.quantize.ptq.choose", spy)
    quantize_ptq(graph, PtqSpec(method="ptq"), images, 8)
    sets = [[PIXELS[0::2], PIXELS[1::2]], [PIXELS[0::2]], [PIXELS[1::2]]]
    expected = [
        propose(graph, Profile.merged([Profile.of(graph, [inputs(half)]) for half in halves]))
        for halves in sets
    ]
    assert seen == [[[move.how for move in moves] for moves in expected]]


def test_halves_share_no_photo() -> None:
    whole = image_set(np.concatenate((PIXELS, PIXELS[:5])))
    halves = _halves(whole)
    first, second = ({s.photo.sha256 for s in half.samples} for half in halves)
    assert not first & second
    assert sum(len(half) for half in halves) == len(whole)
    assert len(first) == len(second) == len(PIXELS) // 2
