"""Reading one photo from disk: bounded, checked, and named when it cannot be used.

Accepted: JPEG (with its MPO extension, of which the first picture is taken), PNG, WebP, BMP and
single-frame GIF, each under its own suffix, up to 64 MiB and 2**26 pixels.
Converted, as Pillow's `convert("RGB")` and with it Keras and timm do: gray, bilevel, palette, CMYK
and YCbCr become RGB; alpha is dropped, not blended; 16-bit colour keeps its high byte.
Refused: animations, 16- and 32-bit gray (Pillow would clip it to white), any other mode.
libjpeg conceals errors inside the scan data of a complete file; those cannot be seen from here.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path, PurePath

from PIL import Image, UnidentifiedImageError

from edgexception.errors import OutOfResources

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


class PhotoError(ValueError):
    """A photo that cannot be used; the text is the reason, the caller adds the name."""


def read_photo(path: Path) -> bytes:
    """Return the bytes of a photo file. Raises PhotoError; never blocks on a pipe or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PhotoError("is not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise PhotoError(
                    f"has {status.st_size:,} bytes, and a photo may have {MAX_FILE_BYTES:,}"
                )
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PhotoError(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise PhotoError("is empty")
    return data


def decode_photo(data: bytes, name: str) -> Image.Image:
    """Return the photo as RGB. `name` gives the suffix, which the content must match.

    The declared size is checked before a pixel is decoded. Raises PhotoError.
    """
    suffix = PurePath(name).suffix.lower()
    expected = FORMATS.get(suffix)
    if expected is None:
        raise PhotoError(
            f"does not end with one of {', '.join(FORMATS)}" if suffix else "has no suffix"
        )
    try:
        return _decode(data, suffix, expected)
    except PhotoError:
        raise
    except MemoryError as error:
        raise OutOfResources(f"{name}: not enough memory to decode this photo") from error
    except Exception as error:
        # Pillow's decoders leak whatever hostile bytes provoke: struct.error, SyntaxError, KeyError
        raise PhotoError(f"is truncated or broken ({_brief(error)})") from error


def _decode(data: bytes, suffix: str, expected: str) -> Image.Image:
    try:
        photo = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
    except UnidentifiedImageError:
        raise PhotoError("is not an image that can be read") from None
    except Image.DecompressionBombError:
        raise PhotoError(f"declares more pixels than the {MAX_PIXELS:,} a photo may have") from None
    with photo:
        # A phone's JPEG with a second picture behind the first is opened as MPO.
        actual = "JPEG" if photo.format == "MPO" else photo.format
        if actual != expected:
            raise PhotoError(f"contains {actual}, not what {suffix} says")
        if photo.width * photo.height > MAX_PIXELS:
            raise PhotoError(
                f"declares {photo.width}x{photo.height} pixels, and a photo may have {MAX_PIXELS:,}"
            )
        if photo.format != "MPO" and getattr(photo, "is_animated", False):
            raise PhotoError("is an animation")
        if photo.mode not in _MODES:
            raise PhotoError(f"has pixels of mode {photo.mode}, not 8 bits per channel")
        if expected == "PNG":
            _check_png(data)
        return photo.convert("RGB")


def _check_png(data: bytes) -> None:
    """Check the CRC of every chunk: Pillow's decoder skips those of the pixels."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as photo:
        photo.verify()


def _brief(error: Exception) -> str:
    """Return an error of Pillow's on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
