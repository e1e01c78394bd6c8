"""Read and write `.npy` files with the standard library alone.

Format: "A simple file format for NumPy arrays" (numpy.lib.format), version 1.0, with the header as
`numpy.save` writes it; any other is refused. Nothing of a header is evaluated.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from edgexception.agent.protocol import AgentError

_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_HEADER = 1 << 12
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,12}, ?)*(?:\d{1,12})?)\), \} *\n"
)
_KINDS = {"|u1": ("uint8", 1), "<f4": ("float32", 4), "<i8": ("int64", 8)}


def read_header(path: Path) -> tuple[str, tuple[int, ...], int]:
    """Return type ("uint8", "float32", "int64"), shape, and where the data begins in the file.

    Raises a bad-artifact AgentError for any other type or order, and for a file that is cut.
    """
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 2)
        header = file.read(min(int.from_bytes(start[-2:], "little"), _MAX_HEADER))
        found = _HEADER.fullmatch(header) if start.startswith(_MAGIC) else None
        offset, total = file.tell(), os.fstat(file.fileno()).st_size
    known = _KINDS.get(found[1].decode()) if found else None
    if found is None or known is None:
        raise _broken(path, "its header is not one of plain numbers in C order")
    shape = tuple(int(size) for size in found[2].split(b",") if size.strip())
    wanted = math.prod(shape) * known[1]
    if total - offset != wanted:
        raise _broken(path, f"its header tells of {wanted} bytes, {total - offset} follow")
    return known[0], shape, offset


def read_images(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return count and offset of uint8 images, each of `shape` (height, width, 3), at least one.

    Raises a bad-artifact AgentError for anything else.
    """
    kind, found, offset = read_header(path)
    if kind != "uint8" or found[1:] != shape:
        raise AgentError(
            "bad-artifact",
            f"{path.name} holds {kind} {found}; the engine takes uint8 (N, "
            f"{', '.join(map(str, shape))}) in C order",
        )
    if not found[0]:
        raise AgentError("bad-artifact", f"{path.name} holds no images: it is {found}")
    return found[0], offset


def write(path: Path, kind: str, shape: tuple[int, ...], data: bytes) -> None:
    """Write an array that `data` holds in C order, little-endian."""
    (written,) = (mark for mark, (name, _) in _KINDS.items() if name == kind)
    text = f"{{'descr': '{written}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    # The data begins at a multiple of 64 bytes.
    header = text + b" " * (-(len(_MAGIC) + 2 + len(text) + 1) % 64) + b"\n"
    path.write_bytes(_MAGIC + len(header).to_bytes(2, "little") + header + data)


def _broken(path: Path, why: str) -> AgentError:
    return AgentError("bad-artifact", f"{path.name} is not a readable .npy file: {why}")
