"""Generators of broken and hostile images and manifests, for the tests of data and of commands."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Return a random RGB photo: smooth color fields with some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = generator.integers(-20, 21, smooth.shape)
    return Image.fromarray(np.clip(smooth.astype(int) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as the bytes of a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hostile_images(folder: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Write files that must not be taken as photos into a folder, and yield (what it is, file)."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, name, data in _hostile_bytes(random.Random(seed), seed):
        path = folder / name
        path.write_bytes(data)
        yield what, path
    huge = folder / "huge.jpg"
    with open(huge, "wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: it takes no room
    yield "file of more bytes than allowed", huge
    pipe = folder / "pipe.png"
    os.mkfifo(pipe)
    yield "named pipe", pipe


def _hostile_bytes(chance: random.Random, seed: int) -> Iterator[tuple[str, str, bytes]]:
    image = picture(seed)
    files = {kind: encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF")}
    suffixes = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
    for kind, data in files.items():
        for share in ("header", "half"):
            kept = (
                chance.randrange(1, 24)
                if share == "header"
                else chance.randrange(24, len(data) - 300)
            )
            name = f"{share}.{suffixes[kind]}"
            yield f"{kind} cut to {kept} of {len(data)} bytes", name, data[:kept]
        wrong = chance.choice([other for other in suffixes if other != kind])
        yield f"{kind} called {wrong}", f"is-{kind}.{suffixes[wrong]}", data
    flipped = bytearray(files["PNG"])
    flipped[chance.randrange(50, len(flipped) - 20)] ^= 1 << chance.randrange(8)
    yield "PNG with one flipped bit", "flipped.png", bytes(flipped)
    for suffix in suffixes.values():
        yield "random bytes", f"noise.{suffix}", chance.randbytes(chance.randrange(1, 3000))
    yield "empty file", "empty.jpg", b""
    yield "web page", "page.jpg", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "pickle", "code.png", pickle.dumps({"run": print})
    yield "drawing", "drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../escape.txt", "out")
    yield "archive", "archive.jpg", buffer.getvalue()
    yield "suffix that is no photo's", "photo.heic", files["JPEG"]
    yield "no suffix", "photo", files["JPEG"]
    yield from _bombs(files["JPEG"])
    yield from _other_pixels(image)


def _bombs(jpeg: bytes) -> Iterator[tuple[str, str, bytes]]:
    for side in (8193, 13_000, 60_000, 2**31 - 1):
        yield f"PNG that declares {side}x{side}", f"bomb{side}.png", png(side, side, 8, 2, b"")
    yield (
        "PNG whose text inflates",
        "text.png",
        png(
            8, 8, 8, 2, bytes(8 * 25), (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000)))
        ),
    )
    frame = jpeg.index(b"\xff\xc0")
    yield (
        "JPEG that declares 65500x65500",
        "bomb.jpg",
        (jpeg[: frame + 5] + struct.pack(">HH", 65_500, 65_500) + jpeg[frame + 9 :]),
    )
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield "BMP that declares 50000x50000", "bomb.bmp", header
    yield (
        "GIF that declares 65535x65535",
        "bomb.gif",
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535),
    )


def _other_pixels(image: Image.Image) -> Iterator[tuple[str, str, bytes]]:
    second = image.transpose(Image.Transpose.ROTATE_180)
    for kind, suffix in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp")):
        moving = encoded(image, kind, save_all=True, append_images=[second])
        yield f"animated {kind}", f"moving.{suffix}", moving
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    yield "16-bit gray PNG", "deep.png", encoded(Image.fromarray(deep), "PNG")


def png(
    width: int, height: int, depth: int, color: int, pixels: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Return a PNG written by hand: raw scan lines (with filter bytes), extra chunks first."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in body
    )


def hostile_manifests(folder: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Write broken .csv and .jsonl manifests beside one good photo, and yield (what, file)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.png").write_bytes(encoded(picture(seed), "PNG"))
    (folder / "outside.png").unlink(missing_ok=True)
    (folder / "outside.png").symlink_to("/etc/hostname")
    chance = random.Random(seed)
    for number, (what, suffix, data) in enumerate(_manifest_bytes(chance)):
        path = folder / f"manifest{number}.{suffix}"
        path.write_bytes(data)
        yield what, path


def _manifest_bytes(chance: random.Random) -> Iterator[tuple[str, str, bytes]]:
    paths = {
        "absolute path": "/etc/passwd",
        "climbing path": "../good.png",
        "climbing in the middle": "a/../../good.png",
        "Windows drive": "C:\\photo.png",
        "Windows share": "\\\\server\\photo.png",
        "empty path": "",
        "the folder itself": ".",
        "missing file": "missing.png",
        "link out of the folder": "outside.png",
        "path with a null byte": "good.png\0.jpg",
        "path with a line break": "good\n.png",
        "endless path": "a" * 5000,
        "a very long name": "b" * 300 + ".png",
    }
    for what, path in paths.items():
        quoted = path.replace('"', '""')
        yield what, "csv", f'path,label\n"{quoted}",cup\n'.encode()
        yield what, "jsonl", (json.dumps({"path": path, "label": "cup"}) + "\n").encode()
    for what, text in {
        "no header": "good.png,cup\n",
        "unknown column": "path,label,weight\ngood.png,cup,1\n",
        "header twice": "path,path\ngood.png,good.png\n",
        "too few fields": "path,label\ngood.png\n",
        "too many fields": "path,label\ngood.png,cup,fork\n",
        "empty label": "path,label\ngood.png,\n",
        "label with control characters": "path,label\ngood.png,\x1b[31mcup\n",
        "the same file twice": "path,label\ngood.png,cup\n./good.png,cup\n",
        "open quote": 'path,label\n"good.png,cup\n',
        "stray quote": 'path,label\n"good.png"x,cup\n',
        "only a header": "path,label\n",
        "nothing": "",
    }.items():
        yield what, "csv", text.encode()
    for what, text in {
        "not JSON": "{path: good.png}\n",
        "not an object": '["good.png"]\n',
        "a number": "1e999\n",
        "unknown key": '{"path": "good.png", "weight": 1}\n',
        "a path that is no text": '{"path": 7}\n',
        "a label that is no text": '{"path": "good.png", "label": 3}\n',
        "a label of null": '{"path": "good.png", "label": null}\n',
        "a key twice": '{"path": "good.png", "path": "good.png"}\n',
        "deep nesting": "[" * 100_000 + "\n",
        "endless number": '{"path": ' + "9" * 100_000 + "}\n",
        "lone surrogate": '{"path": "\\ud800.png"}\n',
        "the same file twice": '{"path": "good.png"}\n{"path": "good.png"}\n',
    }.items():
        yield what, "jsonl", text.encode()
    yield "not UTF-8", "csv", b"path,label\ngood.png,tass\xe9\n"
    yield "UTF-16", "csv", "path,label\ngood.png,cup\n".encode("utf-16")
    for suffix in ("csv", "jsonl"):
        yield "random bytes", suffix, chance.randbytes(chance.randrange(1, 2000))
    yield "another kind of file", "txt", b"good.png\n"


def hostile_calibration_manifests(folder: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Write broken calibration manifests and yield (what, file)."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = {"name": "good.png", "sha256": "0" * 64}
    good = {"schema_version": 1, "chosen": "x", "seed": 0, "crops_per_photo": 1, "photos": [photo]}
    whole = json.dumps(good)
    chance = random.Random(seed)
    documents: dict[str, object] = {
        "another schema version": good | {"schema_version": 2},
        "no photos": good | {"photos": []},
        "no seed": {key: value for key, value in good.items() if key != "seed"},
        "a seed that is no number": good | {"seed": "0"},
        "unknown field": good | {"images": 3},
        "no crops": good | {"crops_per_photo": 0},
        "climbing name": good | {"photos": [photo | {"name": "../good.png"}]},
        "absolute name": good | {"photos": [photo | {"name": "/etc/passwd"}]},
        "name not in its shortest form": good | {"photos": [photo | {"name": "./good.png"}]},
        "short checksum": good | {"photos": [photo | {"sha256": "0" * 63}]},
        "checksum with a line break": good | {"photos": [photo | {"sha256": "0" * 64 + "\n"}]},
        "photo twice": good | {"photos": [photo, photo]},
        "photos that are a text": good | {"photos": "good.png"},
        "a list": [good],
        "null": None,
    }
    texts = {what: json.dumps(document).encode() for what, document in documents.items()}
    texts["cut"] = whole[: chance.randrange(1, len(whole) - 1)].encode()
    texts["random bytes"] = chance.randbytes(500)
    texts["deep nesting"] = b"[" * 100_000
    texts["a key twice"] = whole.replace('"seed": 0', '"seed": 0, "seed": 0').encode()
    texts["empty"] = b""
    for number, (what, data) in enumerate(texts.items()):
        path = folder / f"calibration{number}.json"
        path.write_bytes(data)
        yield what, path
