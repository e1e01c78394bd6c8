"""`.npy` files without numpy: what numpy writes is read, what is written numpy reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgexception.agent import npy
from edgexception.agent.protocol import AgentError

ARRAYS = hnp.arrays(
    st.sampled_from((np.uint8, np.float32, np.int64)),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
)


@settings(deadline=None)
@given(ARRAYS)
def test_numpy_and_we_read_each_other(array: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder, "theirs.npy"), Path(folder, "ours.npy")
        np.save(theirs, array)
        kind, shape, offset = npy.read_header(theirs)
        assert (kind, shape) == (array.dtype.name, array.shape)
        assert theirs.read_bytes()[offset:] == array.tobytes()
        npy.write(ours, kind, shape, array.tobytes())
        assert ours.read_bytes() == theirs.read_bytes()


GOOD = b"\x93NUMPY\x01\x00\x76\x00"


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.binary(max_size=150).map(GOOD.__add__)
    | st.text("{}'descr:|u1<f48(), shapefortanFlse\n", max_size=160).map(
        lambda text: GOOD + text.encode().ljust(118) + bytes(40)
    )
)
def test_garbage_is_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.npy")
        path.write_bytes(content)
        with pytest.raises(AgentError, match=r"x\.npy is not a readable \.npy file") as caught:
            npy.read_header(path)
        assert caught.value.kind == "bad-artifact"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(2, 4, 4, 3)", b"(9, 4, 4, 3)"),
        (b"(2, 4, 4, 3)", b"(-2,4, 4, 3)"),
        (b"(2, 4, 4, 3)", b"(10**9999,3)"),
        (b"'|u1'", b"'|O8'"),
        (b"'|u1'", b"'>f4'"),
        (b"False", b"True "),
        (b"{'descr'", b"{ 'desc'"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((2, 4, 4, 3), np.uint8))
    assert npy.read_images(path, (4, 4, 3)) == (2, 128)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(AgentError, match=r"not a readable \.npy"):
        npy.read_images(path, (4, 4, 3))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 4, 5, 3), np.uint8), r"holds uint8 \(2, 4, 5, 3\); the engine takes uint8"),
        (np.zeros((2, 4, 4, 3), np.float32), "holds float32"),
        (np.zeros((0, 4, 4, 3), np.uint8), "holds no images"),
        (np.zeros((), np.uint8), r"holds uint8 \(\)"),
    ],
)
def test_what_is_no_images_is_refused(tmp_path: Path, array: np.ndarray, says: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(AgentError, match=says):
        npy.read_images(tmp_path / "x.npy", (4, 4, 3))
