"""Reading IDX files, the format of MNIST and its relatives, plain or compressed with gzip.

Big-endian: two zero bytes, the type of the elements (8: uint8), the number of dimensions, one
32-bit size for each, then the elements (http://yann.lecun.com/exdb/mnist, "FILE FORMATS").
"""

from __future__ import annotations

import gzip
import math
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from edgexception.errors import BadArtifact, OutOfResources, UsageError

MAX_BYTES = 2**30
"""Most elements of a file, and most bytes of it: EMNIST, the largest in use, has 0.6 billion."""
MAX_ITEMS = 1_000_000
MAX_SIDE = 4096
_PORTION = 1 << 20
_GZIP = b"\x1f\x8b"
_MOST_DEFLATED = 1032
"""Bytes that one compressed byte can stand for (zlib's technical notes, "Maximum Compression")."""


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Return the elements of a file with so many dimensions, read-only.

    Memory grows with what the file really holds, not with what it declares. Raises UsageError if it
    is not there, BadArtifact if it is not exactly what its header says, or larger than MAX_BYTES.
    """
    try:
        # Not blocking: a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            size = _checked_size(path, os.fstat(descriptor))
            compressed = file.read(2) == _GZIP
            file.seek(0)
            if not compressed:
                return _elements(path, file, dimensions, size)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _elements(path, cast(BinaryIO, unpacked), dimensions, size * _MOST_DEFLATED)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file. Name an IDX file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken(path, f"is truncated or broken ({str(error)[:120]})") from error
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read ({error.strerror}). Check the rights") from error
    except MemoryError as error:
        raise OutOfResources(f"{path}: not enough memory to read it") from error


def _checked_size(path: Path, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise BadArtifact(f"{path}: is not a regular file. Name an IDX file")
    if status.st_size > MAX_BYTES:
        raise BadArtifact(f"{path}: has more than {MAX_BYTES:,} bytes. Split it")
    return status.st_size


def _elements(path: Path, file: BinaryIO, dimensions: int, most: int) -> npt.NDArray[np.uint8]:
    """Read header and elements of a file that can hold at most `most` bytes."""
    length = 4 + 4 * dimensions
    header = file.read(length)
    magic = struct.pack(">HBB", 0, 8, dimensions)
    if header[:4] != magic:
        raise _broken(
            path,
            f"starts with {header[:4].hex() or 'nothing'}, and {dimensions}-dimensional uint8 data "
            f"with {magic.hex()}",
        )
    if len(header) < length:
        raise _broken(path, "ends within its header")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    count = math.prod(shape)
    items, *sides = shape
    if not 0 < count <= MAX_BYTES or items > MAX_ITEMS or max(sides, default=1) > MAX_SIDE:
        sizes = "x".join(map(str, shape))
        raise _broken(path, f"declares {sizes} elements, which is none or more than allowed")
    if length + count > most:
        raise _broken(path, f"declares {count:,} elements, and is too short for them")
    data = bytearray()
    while portion := file.read(min(_PORTION, count + 1 - len(data))):
        data += portion
    if len(data) != count:
        have = "more" if len(data) > count else f"{len(data):,}"
        raise _broken(path, f"declares {count:,} elements and has {have}")
    found = np.frombuffer(data, np.uint8).reshape(shape)
    found.flags.writeable = False
    return found


def _broken(path: Path, reason: str) -> BadArtifact:
    return BadArtifact(f"{path}: is not a whole IDX file of uint8: {reason}. Get it again")
