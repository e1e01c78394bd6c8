"""Content-addressed results on disk: whole and verified, or not there at all.

    <root>/.lock                        held by the one process that uses the folder
    <root>/.partial/<random>/           what is being written; cleaned when the store is opened
    <root>/.unfinished/<stage>/<key>/   what a long stage goes on from when it was interrupted
    <root>/.timing/<name>.cache         what TensorRT timed, for later builds (`engine_stages`)
    <root>/<stage>/<key>/manifest.json  written last, names every file with its size and sha256
    <root>/<stage>/<key>/...            the files, read-only

A result becomes visible by one rename of its folder, after everything in it has been synced, so a
process that is killed at any moment leaves either the whole result or none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgexception.errors import BadArtifact, EdgexError, OutOfResources, UsageError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 24
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its sha256 in hexadecimal and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Artifact:
    """A published result; every file of it was verified when it was opened."""

    stage: str
    key: str
    folder: Path
    files: Mapping[str, FileRecord]
    """By name relative to the folder, with forward slashes."""
    digest: str
    """sha256 of the names, sizes and hashes of the files: what a later stage depends on."""

    def file(self, name: str) -> Path:
        """Return the path of one file; raises BadArtifact when the artifact has no such file."""
        if name not in self.files:
            raise BadArtifact(
                f"{self.folder}: has no file {name!r}, only {', '.join(sorted(self.files))}; "
                "remove this folder to rebuild"
            )
        return self.folder / name


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII.

    Equal values give equal texts: 1.0 is written as 1, and a tuple as a list. Takes what JSON has;
    anything else raises EdgexError: a Path (where a file lies is not what it is: put its sha256),
    a number that is not finite, a key that is not text.
    """
    plain = _canonical(value, "value")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(value: object, where: str) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise EdgexError(f"{where}: {value} is not finite and has no JSON form")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise EdgexError(f"{where}: the key {key!r} is not text")
        return {key: _canonical(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise EdgexError(f"{where}: {type(value).__name__} {str(value)!r} has no place in a key")


def stage_key(stage: str, inputs: Mapping[str, object], code: str) -> str:
    """Return the key of a stage's result: sha256 over its name, its inputs and its code.

    Inputs are plain data: the stage's section of the recipe, and the digests of what it reads. For
    a pydantic model take `model_dump()`, which keeps a Path a Path, so that it is refused here.
    `code` stands for the sources that the stage can run (see `stage_code`).
    """
    text = canonical_json({"stage": stage, "code": code, "inputs": inputs})
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all, whatever interrupts it; an old one stays until then.

    Raises OutOfResources when the disk is full, UsageError when the place cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with _disk_faults(path):
        try:
            with partial.open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfResources(
                f"{path}: cannot be written: {error.strerror}; free some space or choose "
                "another folder, then run again"
            ) from error
        raise UsageError(
            f"{path}: cannot be used: {error.strerror or error}; check that it is a folder that "
            "you may write to, or choose another one"
        ) from error


class Store:
    """One folder of results, used by one process at a time.

    A context manager; outside of a `with` block the lock is held until `close` or the end of the
    process. Raises UsageError when another process uses the folder, or it cannot be written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._partial = root / ".partial"
        with _disk_faults(root):
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self._take_lock()
                # Only the holder of the lock writes, so whatever is here was left by the dead.
                if self._partial.exists():
                    shutil.rmtree(self._partial)
            except BaseException:
                os.close(self._lock)
                raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            raise UsageError(
                f"{self.root}: is in use by another edgex (process {owner or 'unknown'}); "
                "wait for it to end, or choose another output folder"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Release the folder to other processes."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _folder(self, stage: str, key: str) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", stage) or not re.fullmatch("[0-9a-f]{64}", key):
            raise EdgexError(f"{stage!r}/{key!r} is not a stage name and a sha256")
        return self.root / stage / key

    def get(self, stage: str, key: str) -> Artifact | None:
        """Return a published result after verifying every file of it, or None if there is none.

        Raises BadArtifact when anything in its folder is not exactly what was published.
        """
        folder = self._folder(stage, key)
        if not os.path.lexists(folder):
            return None
        with _read_faults(folder):
            manifest = _read_manifest(folder, stage, key)
            found = _records(folder)
            _compare(folder, manifest["files"], found)
        files = {name: FileRecord(**record) for name, record in found.items()}
        return Artifact(stage, key, folder, files, manifest["digest"])

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder on the store's disk for work that nobody is to find afterwards.

        What a killed process leaves of it is removed when the store is opened again.
        """
        work = self._partial / secrets.token_hex(8)
        with _disk_faults(work):
            work.mkdir(parents=True)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def unfinished(self, stage: str, key: str) -> Path:
        """Return where a long stage keeps what it can go on from; the folder may not be there.

        It outlives the process, and goes when the result is published. Of each stage one is kept,
        so that changing a recipe again and again does not fill the disk.
        """
        folder = self.root / ".unfinished" / self._folder(stage, key).relative_to(self.root)
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def publish(
        self,
        stage: str,
        key: str,
        inputs: Mapping[str, object],
        code: str,
        write: Callable[[Path], None],
    ) -> Artifact:
        """Let `write` fill an empty folder, then make it the result of this stage and key.

        A result that is there already is verified and returned, and `write` is not called. When
        `write` raises, nothing is published and the exception passes; a full disk is
        OutOfResources.
        """
        if key != stage_key(stage, inputs, code):
            raise EdgexError(f"{stage}: the key is not that of what it is published with")
        if self._lock < 0:
            raise EdgexError(f"{self.root}: the store is closed")
        if existing := self.get(stage, key):
            return existing
        final = self._folder(stage, key)
        with self.scratch() as work:
            _run(write, work)
            with _disk_faults(final):
                _seal(work, stage, key, inputs, code)
                final.parent.mkdir(exist_ok=True)
                work.rename(final)
                _sync(final.parent)
                _sync(self.root)
        unfinished = self.unfinished(stage, key)
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or there are those of other stages
            unfinished.parent.parent.rmdir()
        artifact = self.get(stage, key)
        if artifact is None:
            raise BadArtifact(f"{final}: disappeared while it was published; run again")
        return artifact


def _run(write: Callable[[Path], None], work: Path) -> None:
    try:
        write(work)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with _disk_faults(work):
            raise


def _seal(work: Path, stage: str, key: str, inputs: Mapping[str, object], code: str) -> None:
    """Make the files of a finished folder read-only and durable, then write its manifest."""
    if (work / MANIFEST).exists():
        raise EdgexError(f"{stage}: wrote {MANIFEST}, which is the store's own file")
    folders = {work}
    for path in _walk(work):
        path.chmod(0o444)
        _sync(path)
        folders.update(parent for parent in path.parents if work in parent.parents)
    files = _records(work)
    manifest = _manifest(stage, key, code, inputs, files)
    atomic_write(work / MANIFEST, manifest)
    (work / MANIFEST).chmod(0o444)
    for folder in folders:
        _sync(folder)


def _manifest(stage: str, key: str, code: str, inputs: object, files: object) -> str:
    """Return the text of a manifest. A pure function, so that a reader can demand every byte."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "key": key,
        "code": code,
        "inputs": inputs,
        "files": files,
        "digest": hashlib.sha256(canonical_json(files).encode()).hexdigest(),
    }
    return json.dumps(_canonical(manifest, "manifest"), indent=1, sort_keys=True) + "\n"


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order; links and devices are refused."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(Path(entry.path))
        elif stat.S_ISREG(mode):
            yield Path(entry.path)
        else:
            raise _damaged(Path(entry.path), "is a link or device, not a file")


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
        }
        for path in _walk(folder)
        if path != folder / MANIFEST
    }


def _damaged(path: Path, reason: str, folder: Path | None = None) -> BadArtifact:
    return BadArtifact(f"{path}: {reason}; remove the folder {folder or path.parent} to rebuild it")


@contextlib.contextmanager
def _read_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = Path(error.filename) if isinstance(error.filename, str) else folder
        raise _damaged(name, f"cannot be read ({error.strerror})", folder) from error


def _read_manifest(folder: Path, stage: str, key: str) -> dict[str, Any]:
    """Return a manifest that is, byte by byte, what publishing writes for its own content."""
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise _damaged(path, "is missing, or is not a file")
    with path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(data)
        code, inputs, files = manifest["code"], manifest["inputs"], dict(manifest["files"])
        whole = key == stage_key(stage, inputs, code)
        whole = whole and data == _manifest(stage, key, code, inputs, files).encode()
    except (ValueError, KeyError, TypeError, RecursionError, EdgexError) as error:
        raise _damaged(path, "is not a manifest") from error
    if not whole:
        raise _damaged(path, "is not what was published")
    return dict(manifest)


def _compare(
    folder: Path, wanted: Mapping[str, object], found: Mapping[str, Mapping[str, Any]]
) -> None:
    for name in sorted({*wanted, *found}):
        if name not in found:
            raise _damaged(folder / name, "is missing", folder)
        if name not in wanted:
            raise _damaged(folder / name, "was not published here", folder)
        if found[name] != wanted[name]:
            raise _damaged(folder / name, "is not what was published", folder)
