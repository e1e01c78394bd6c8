"""Decoding: what is accepted, converted and refused, on real files."""

from __future__ import annotations

import numpy as np
import pytest
from hostile_data import encoded, hostile_images, picture, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgexception.photos import MAX_PIXELS, PhotoError, decode_photo, read_photo


def reason(path):
    """Return why a file is refused, or None."""
    try:
        decode_photo(read_photo(path), path.name)
    except PhotoError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore:Image size")
def test_every_hostile_file_is_refused(tmp_path):
    for seed in range(3):
        for what, path in hostile_images(tmp_path / str(seed), seed):
            refusal = reason(path)
            assert refusal is not None, f"{what} ({path.name}, seed {seed}) was accepted"
            assert "\n" not in refusal


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bomb8193.png", "8193x8193 pixels, and a photo may have 67,108,864"),
        ("bomb60000.png", "more pixels than"),
        ("bomb.jpg", "more pixels than"),
        ("bomb.bmp", "more pixels than"),
        ("text.png", "truncated or broken"),
        ("moving.gif", "animation"),
        ("moving.png", "animation"),
        ("moving.webp", "animation"),
        ("deep.png", "mode I;16"),
        ("is-PNG.", "contains PNG"),
        ("photo.heic", "does not end with"),
        ("pipe.png", "not a regular file"),
        ("huge.jpg", "67,108,865 bytes"),
        ("empty.jpg", "is empty"),
        ("half.jpg", "truncated"),
        ("flipped.png", "truncated or broken"),
    ],
)
def test_the_reason_is_named(tmp_path, name, words):
    files = {path.name: path for _, path in hostile_images(tmp_path, 1)}
    path = next(files[file] for file in files if file.startswith(name))
    assert words in (reason(path) or "accepted")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("BMP", ".bmp")]),
    st.integers(0, 2**31),
    st.data(),
)
def test_a_photo_cut_short_is_refused(kind, seed, data):
    whole = encoded(picture(seed % 7), kind[0])
    # The last 12 bytes of a PNG are its end mark; Pillow does not insist on the CRC there.
    cut = data.draw(st.integers(0, len(whole) - 13))
    with pytest.raises(PhotoError):
        decode_photo(whole[:cut], f"x{kind[1]}")


def test_a_flipped_bit_anywhere_in_a_png_is_noticed():
    whole = encoded(picture(6, 24, 20), "PNG")
    for position in range(len(whole) - 12):  # behind that is only the end mark
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(PhotoError):
            decode_photo(bytes(damaged), "x.png")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Image size")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF"]), st.data())
def test_damaged_bytes_give_a_photo_or_a_refusal(kind, data):
    whole = bytearray(encoded(picture(3), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    name = "x." + kind.lower()
    try:
        photo = decode_photo(bytes(whole), name)
    except PhotoError:
        return
    assert photo.mode == "RGB"
    assert photo.width * photo.height <= MAX_PIXELS


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"])
)
def test_garbage_is_refused(tail, head):
    for suffix in (".jpg", ".png", ".bmp"):
        with pytest.raises(PhotoError):
            decode_photo(head + tail, "x" + suffix)


def test_what_is_converted():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200
    transparent = decode_photo(encoded(Image.fromarray(rgba), "PNG"), "a.png")
    assert np.asarray(transparent)[0, 0].tolist() == [200, 0, 0]  # alpha is dropped, not blended
    deep = png(1, 1, 16, 2, b"\0" + bytes([10, 99, 20, 99, 30, 99]))
    assert np.asarray(decode_photo(deep, "b.png")).tolist() == [[[10, 20, 30]]]  # the high bytes
    gray = decode_photo(encoded(picture(1).convert("L"), "PNG"), "c.PNG")
    assert (np.ptp(np.asarray(gray), axis=2) == 0).all()
    for mode in ("1", "P", "LA", "RGBA"):
        assert decode_photo(encoded(picture(1).convert(mode), "PNG"), "d.png").mode == "RGB"
    assert decode_photo(encoded(picture(1).convert("CMYK"), "JPEG"), "e.jpg").mode == "RGB"
    assert decode_photo(encoded(picture(1), "GIF"), "f.gif").size == (40, 30)


def test_of_a_phones_double_jpeg_the_first_picture_is_taken():
    first, second = picture(1), picture(2)
    double = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    single = encoded(first, "JPEG", quality=95)
    np.testing.assert_array_equal(
        np.asarray(decode_photo(double, "x.jpg")), np.asarray(decode_photo(single, "x.jpg"))
    )
