"""IDX files: what a whole one says, and that anything else is refused before it costs memory."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgexception.errors import BadArtifact, EdgexError, UsageError
from edgexception.idx_file import MAX_BYTES, read_idx

# Without the time, which would be another in every process that collects these tests: workers must
# agree on the parameters.
compress = partial(gzip.compress, mtime=0)

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """Return the bytes of an IDX file of uint8."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def written(folder: Path, data: bytes, name: str = "x-idx3-ubyte") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def declared(*sizes: int) -> bytes:
    """Return a header alone."""
    return struct.pack(">HBB", 0, 8, len(sizes)) + struct.pack(f">{len(sizes)}I", *sizes)


@pytest.mark.parametrize("pack", [bytes, compress])
def test_elements_come_back(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    found = read_idx(written(tmp_path, pack(idx(IMAGES))), 3)
    assert np.array_equal(found, IMAGES)
    assert not found.flags.writeable
    labels = read_idx(written(tmp_path, pack(idx(np.arange(7)))), 1)
    assert labels.tolist() == list(range(7))


def test_the_real_files_are_what_they_are_known_to_be() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    assert labels[:4].tolist() == [9, 2, 1, 1], "ankle boot, pullover, trouser, trouser"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG\r\n\x1a\n", "starts with 89504e47"),
        (idx(IMAGES)[:9], "ends within its header"),
        (idx(np.arange(7)), "starts with 00000801, and 3-dimensional"),
        (b"\0\0\x0d\x03" + idx(IMAGES)[4:], "starts with 00000d03"),  # float32
        (idx(IMAGES)[:-1], "too short"),
        (idx(IMAGES) + b"x", "declares 60 elements and has more"),
        (declared(0, 4, 3), "0x4x3 elements, which is none"),
        (declared(1, 5000, 1), "more than allowed"),
        (declared(2**31, 1, 1), "more than allowed"),
        (declared(2**32 - 1, 2**12, 2**12), "more than allowed"),
        (declared(1_000_001, 1, 1) + bytes(1_000_001), "more than allowed"),
        (compress(idx(IMAGES))[:-9], "truncated or broken"),
        (compress(idx(IMAGES)[:-1]), "declares 60 elements and has 59"),
        (compress(idx(IMAGES) + b"x"), "declares 60 elements and has more"),
        (compress(idx(IMAGES)) + b"rest", "truncated or broken"),
        (compress(b""), "starts with nothing"),
    ],
)
def test_what_is_not_a_whole_file_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(BadArtifact, match=reason) as error:
        read_idx(written(tmp_path, data), 3)
    assert "x-idx3-ubyte: " in str(error.value)


def test_a_wrong_checksum_is_noticed(tmp_path: Path) -> None:
    packed = bytearray(compress(idx(IMAGES)))
    packed[-5] ^= 1  # in the CRC, which stands before the length
    with pytest.raises(BadArtifact, match="CRC"):
        read_idx(written(tmp_path, bytes(packed)), 3)


@pytest.mark.parametrize(
    "data",
    [
        compress(declared(10, 8, 8) + bytes(64 << 20)),  # a bomb behind a small declaration
        compress(declared(1_000_000, 32, 32)),  # a large declaration with nothing behind it
        declared(1_000_000, 32, 32),
    ],
)
def test_memory_is_bounded_by_what_is_there(tmp_path: Path, data: bytes) -> None:
    path = written(tmp_path, data)
    tracemalloc.start()
    try:
        with pytest.raises(BadArtifact):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_idx(tmp_path / "missing", 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadArtifact, match="not a regular file"):
        read_idx(tmp_path / "pipe", 3)
    with pytest.raises(BadArtifact, match="Is a directory"):
        read_idx(tmp_path, 3)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadArtifact, match="more than 1,073,741,824 bytes"):
        read_idx(tmp_path / "huge", 3)


@settings(max_examples=150, deadline=None)
@given(
    cut=st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=4),
    pack=st.sampled_from([bytes, compress]),
)
def test_any_damage_is_an_error_of_ours_or_no_damage(
    tmp_path_factory: pytest.TempPathFactory,
    cut: int,
    flips: list[tuple[int, int]],
    pack: Callable[[bytes], bytes],
) -> None:
    data = bytearray(pack(idx(IMAGES)))
    for place, value in flips:
        data[place % len(data)] = value
    path = written(tmp_path_factory.mktemp("idx"), bytes(data[: len(data) - cut % len(data)]))
    try:
        found = read_idx(path, 3)
    except EdgexError:
        return
    assert found.size > 0
