"""The transform against Keras's own loader, and against what timm and torchvision did."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from hostile_data import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgexception.errors import BadArtifact
from edgexception.photos import decode_photo
from edgexception.preprocess import Preprocess, PreprocessChanges, to_input

os.environ.setdefault("KERAS_BACKEND", "torch")

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
sizes = st.tuples(st.integers(32, 120), st.integers(32, 120))
photo_sizes = st.tuples(st.integers(1, 200), st.integers(1, 200))
filters = st.sampled_from(sorted(FILTERS))


@pytest.fixture(scope="module")
def load_img():
    return pytest.importorskip("keras").utils.load_img


def test_stretch_is_keras_load_img(load_img):
    @settings(max_examples=60, deadline=None)
    @given(photo_sizes, sizes, filters, st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "1"]))
    def check(size, target, interpolation, mode):
        data = encoded(picture(1, *size).convert(mode), "PNG")
        keras = load_img(io.BytesIO(data), target_size=target, interpolation=interpolation)
        spec = Preprocess(input_size=target, interpolation=interpolation)
        ours = to_input(decode_photo(data, "x.png"), spec)
        np.testing.assert_array_equal(ours, np.asarray(keras))

    check()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_stretch_is_keras_load_img_on_jpeg(load_img, mode):
    data = encoded(picture(2, 123, 77).convert(mode), "JPEG")
    keras = load_img(io.BytesIO(data), target_size=(50, 60), interpolation="bilinear")
    ours = to_input(decode_photo(data, "x.jpeg"), Preprocess(input_size=(50, 60)))
    np.testing.assert_array_equal(ours, np.asarray(keras))


@pytest.mark.parametrize("resize", ["stretch", "shortest-side"])
@pytest.mark.parametrize("interpolation", sorted(FILTERS))
def test_gray_pixels_become_what_their_rgb_becomes(resize, interpolation):
    gray = picture(5, 33, 41).convert("L")
    spec = Preprocess(input_size=(64, 70), resize=resize, interpolation=interpolation)
    np.testing.assert_array_equal(to_input(gray, spec), to_input(gray.convert("RGB"), spec))


def test_keras_and_we_ignore_the_orientation(load_img):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    data = encoded(picture(3, 64, 48), "JPEG", exif=exif)
    keras = np.asarray(load_img(io.BytesIO(data)))
    assert keras.shape == (48, 64, 3)
    ours = to_input(decode_photo(data, "x.jpg"), Preprocess(input_size=(48, 64)))
    np.testing.assert_array_equal(ours, keras)


# Recorded from timm 1.0.31's transforms_imagenet_eval with torchvision 0.28.0:
# photo (width, height), input (height, width), crop_pct, resized (width, height), crop (left, top).
TIMM = [
    ((750, 1000), (299, 299), 0.8975, (333, 444), (17, 72)),
    ((1000, 750), (299, 299), 0.8975, (444, 333), (72, 17)),
    ((449, 1000), (150, 150), 0.875, (171, 380), (10, 115)),
    ((333, 500), (224, 224), 0.875, (256, 384), (16, 80)),
    ((500, 375), (299, 299), 1.0, (398, 299), (50, 0)),
    ((31, 97), (71, 71), 0.95, (74, 231), (2, 80)),
    ((97, 31), (71, 71), 0.95, (231, 74), (80, 2)),
    ((640, 480), (96, 128), 0.875, (146, 110), (9, 7)),
    ((480, 640), (96, 128), 0.9, (142, 189), (7, 46)),
    ((101, 103), (150, 97), 0.875, (168, 171), (36, 10)),
    ((299, 299), (299, 299), 1.0, (299, 299), (0, 0)),
    ((7, 5), (33, 64), 0.5, (128, 91), (32, 29)),
]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("photo", "target", "fraction", "resized", "corner"), TIMM)
def test_shortest_side_is_timm(photo, target, fraction, resized, corner, interpolation):
    image = picture(4, *photo)
    full = np.asarray(image.resize(resized, FILTERS[interpolation]))
    (left, top), (height, width) = corner, target
    spec = Preprocess(
        input_size=target,
        resize="shortest-side",
        crop_fraction=fraction,
        interpolation=interpolation,
    )
    expected = full[top : top + height, left : left + width]
    np.testing.assert_array_equal(to_input(image, spec), expected)


@settings(max_examples=100, deadline=None)
@given(photo_sizes, sizes, st.sampled_from([0.3, 0.5, 0.875, 0.8975, 1.0]), st.booleans())
def test_every_photo_becomes_one_input(size, target, fraction, square):
    target = (target[0], target[0]) if square else target
    spec = Preprocess(input_size=target, resize="shortest-side", crop_fraction=fraction)
    # White stays white up to the border, so a crop never reaches beyond the resized photo.
    pixels = to_input(Image.new("L", size, 255), spec)
    assert pixels.shape == (*target, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() == 255


def test_the_right_size_is_left_alone():
    image = picture(5, 64, 40)
    for resize in ("stretch", "shortest-side"):
        spec = Preprocess(input_size=(40, 64), resize=resize, interpolation="lanczos")
        np.testing.assert_array_equal(to_input(image, spec), np.asarray(image))


def test_a_sliver_is_refused_before_it_takes_gigabytes():
    spec = Preprocess(input_size=(299, 299), resize="shortest-side")
    with pytest.raises(BadArtifact, match="1x10000 pixels is too elongated"):
        to_input(Image.new("RGB", (1, 10_000)), spec)


def test_importing_it_needs_no_heavy_package():
    code = (
        "import sys, edgexception.preprocess, edgexception.recipe;"
        "sys.exit(bool({'PIL', 'torch', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@settings(deadline=None)
@given(sizes, filters, st.data())
def test_changes_are_those_fields_and_no_others(size, interpolation, data):
    """And each field of the transform can be changed."""
    own = Preprocess(input_size=(299, 299))
    wanted = {
        "input_size": size,
        "resize": "shortest-side",
        "interpolation": interpolation,
        "crop_fraction": 0.5,
        "mean": (1.0, 2.0, 3.0),
        "std": (4.0, 5.0, 6.0),
    }
    assert set(wanted) == set(Preprocess.model_fields) == set(PreprocessChanges.model_fields)
    assert PreprocessChanges(**wanted).applied_to(own) == Preprocess(**wanted)
    given_fields = data.draw(st.sets(st.sampled_from(sorted(set(wanted) - {"crop_fraction"}))))
    changes = {name: wanted[name] for name in given_fields}
    changed = PreprocessChanges(**changes).applied_to(own)
    assert changed == Preprocess(**{"input_size": (299, 299), **changes})
