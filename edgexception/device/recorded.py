"""A kit's results as a device: it answers what was asked of the real one, and nothing else.

The folder comes from elsewhere, so nothing in it is believed: what is not a plain file of a plain
name is refused, every file is compared with the sha256 of `results.json` while it is copied, and
every answer is then read as the answer of a stranger, as those over SSH are. Hashes are no
signature: they show what was cut or mixed up, not who wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from edgexception.agent.kit import FORMAT, RESULTS
from edgexception.agent.protocol import is_plain_name
from edgexception.agent.remote import LOG_LINES, sha256_of
from edgexception.device.answers import MAX_RESPONSE_BYTES, printable, read_answer
from edgexception.device.contract import Facts, Progress
from edgexception.device.local import check_files, full_disk_named
from edgexception.errors import BadArtifact, EdgexError

MAX_FILE_BYTES = 2 << 30
MAX_CALLS = 10_000

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Files = Annotated[dict[str, Digest], Field(max_length=20)]


class _Recorded(Facts):
    """One call of `agent/kit.py`."""

    folder: str
    verb: Literal["probe", "build", "run"]
    request: dict[str, Any]
    inputs: Files
    code: Annotated[int, Field(ge=-64, le=255)]
    log: Annotated[list[str], Field(max_length=LOG_LINES)]
    files: Files


class Results(Facts):
    """`results.json`."""

    format: Literal[1]
    name: str
    """The recipe's."""
    kit: Digest
    """Of the `kit.json` that they are the results of."""
    calls: Annotated[list[_Recorded], Field(max_length=MAX_CALLS)]


class RecordedDevice:
    """The device that a kit was run on; calls are answered in the order in which they were done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = _read_results(folder / RESULTS)
        self.results = _checked(folder / RESULTS, data)
        # Other results of the same kit are other measurements.
        self.name = f"kit-{hashlib.sha256(data).hexdigest()[:12]}"
        self._answers: dict[str, list[_Recorded]] = {}
        for call in self.results.calls:
            self._answers.setdefault(_key(call.verb, call.request, call.inputs), []).append(call)
        self._given: Counter[str] = Counter()

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, Any]:
        """See `Device.call`."""
        check_files(files)
        key = _key(verb, request, {name: sha256_of(path) for name, path in files.items()})
        answers = self._answers.get(key, [])
        if self._given[key] >= len(answers):
            raise BadArtifact(
                f"{self.folder}: has no answer to {verb} {request.get('runtime', '')}: it is not "
                "whole, or belongs to another run; run the kit to its end and import it again"
            )
        found = answers[self._given[key]]
        self._given[key] += 1
        try:
            return self._answer(found, out)
        except EdgexError:
            # Rounds of timing are begun anew without the engine that failed.
            self._given.clear()
            raise

    def _answer(self, found: _Recorded, out: Path) -> dict[str, Any]:
        with full_disk_named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
                answered = Path(work)
                for name, digest in found.files.items():
                    _copy(self.folder / found.folder, name, digest, answered)
                log = [printable(line) for line in found.log]
                record, names = read_answer(found.verb, self.name, answered, found.code, log)
                out.mkdir(exist_ok=True)
                for name in names:
                    os.replace(answered / name, out / name)
        return {**record, "log": log}


def _read_results(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > MAX_RESPONSE_BYTES:
            raise BadArtifact(f"{path}: is not a file of at most {MAX_RESPONSE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadArtifact(
            f"{path}: cannot be read ({error.strerror}): name the folder `results` of a kit that "
            "was run to its end"
        ) from error


def _checked(path: Path, data: bytes) -> Results:
    try:
        results = Results.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = printable(".".join(map(str, first["loc"])))
        raise BadArtifact(
            f"{path}: field {place}: {first['msg']}; import what `run-kit` wrote, of "
            f"format {FORMAT}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadArtifact(f"{path}: is not JSON ({printable(str(error))})") from error
    names = [results.name, *(name for c in results.calls for name in (c.folder, *c.files))]
    odd = next((name for name in names if not is_plain_name(name)), None)
    if odd is not None:
        raise BadArtifact(f"{path}: {printable(odd)[:100]!r} is not a plain name")
    return results


def _key(verb: str, request: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return what a question is known by: there is one probe, whatever it is asked with."""
    if verb == "probe":
        return verb
    return json.dumps([verb, request, inputs], sort_keys=True)


def _copy(folder: Path, name: str, digest: str, to: Path) -> None:
    """Copy one file and compare what was copied; nothing that is not a plain file is opened."""
    path, found = folder / name, hashlib.sha256()
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode) or not stat.S_ISREG(path.lstat().st_mode):
            raise BadArtifact(f"{path}: is not a plain file in a plain folder")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadArtifact(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read: {error.strerror}") from error
    with open(source, "rb") as file, (to / name).open("wb") as copy:
        while chunk := file.read(1 << 20):
            found.update(chunk)
            copy.write(chunk)
    if found.hexdigest() != digest:
        raise BadArtifact(
            f"{path}: is not what results.json says (sha256): it was cut or changed; copy the "
            "results again"
        )
