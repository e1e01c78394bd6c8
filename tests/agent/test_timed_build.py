"""A timing cache goes in as a file of the request and comes out as one of the answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgexception.agent import runtimes, verbs
from edgexception.agent.protocol import AgentError, Request, write_json
from edgexception.device import local_device
from edgexception.device.answers import read_answer
from edgexception.errors import UsageError


def build(folder: Path, known: bytes | None) -> dict[str, Any]:
    """Let a runtime build that adds to what it is given, as TensorRT does; return the record."""
    asked, answered = folder / "asked", folder / "answered"
    for each in (asked, answered):
        each.mkdir()
    (asked / "m.onnx").write_bytes(b"a model")
    fields: dict[str, Any] = {"runtime": "tensorrt", "model": "m.onnx", "batch": 1, "threads": 1}
    if known is not None:
        (asked / "t.cache").write_bytes(known)
        fields["timing_cache"] = "t.cache"
    verbs.build(Request(asked, fields), answered)
    if known is not None:
        assert (asked / "t.cache").read_bytes() == known, "what was sent is left as it is"
    record, names = read_answer("build", "test", answered, 0, [])
    assert set(names) == {"engine.plan", "engine.json", "timing.cache"}
    return record


@pytest.fixture(autouse=True)
def _runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: Path, options: object, out: Path) -> dict[str, Any]:
        cache = out.with_name(runtimes.TIMING_CACHE)
        before = cache.read_bytes() if cache.exists() else b""
        cache.write_bytes(before + b"more")
        out.write_bytes(b"a plan")
        return {"settings": {"gpu": "Orin"}, "layers": {}}

    facts = {"version": "10.3.0", "devices": [], "gpus": []}
    fake = SimpleNamespace(version=lambda: facts, build=compiled)
    monkeypatch.setattr(runtimes, "load", lambda _: fake)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("known", [None, b"times"])
def test_its_digests_are_in_the_record_and_in_the_manifest(
    known: bytes | None, tmp_path: Path
) -> None:
    record = build(tmp_path, known)
    after = (known or b"") + b"more"
    assert (tmp_path / "answered/timing.cache").read_bytes() == after
    settings = {
        "gpu": "Orin",
        "timing_cache": {
            "read_sha256": None if known is None else digest(known),
            "written_sha256": digest(after),
        },
    }
    assert record["settings"] == settings
    assert json.loads((tmp_path / "answered/engine.json").read_bytes())["settings"] == settings


@pytest.mark.parametrize("name", ["../t.cache", "missing.cache", 7])
def test_what_is_no_file_of_the_request_is_refused(name: object, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"a model")
    fields = {"runtime": "tensorrt", "model": "m.onnx", "batch": 1, "threads": 1}
    request = Request(tmp_path, {**fields, "timing_cache": name})
    with pytest.raises(AgentError, match="timing_cache"):
        verbs.build(request, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx"}


def test_a_runtime_that_times_nothing_takes_none(tiny_onnx: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "t.cache", {})
    fields = {
        "runtime": "onnxruntime", "model": "m.onnx", "batch": 1, "threads": 1,
        "timing_cache": "t.cache",
    }  # fmt: skip
    files = {"m.onnx": tiny_onnx, "t.cache": tmp_path / "t.cache"}
    with pytest.raises(UsageError, match="onnxruntime has no timing cache"):
        local_device().call("build", fields, files, tmp_path / "out")
    assert not (tmp_path / "out").exists()
