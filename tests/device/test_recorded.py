"""Results of a kit as a device: what comes from elsewhere is read as if a stranger wrote it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgexception.device import RecordedDevice
from edgexception.errors import BadArtifact, EdgexError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("format", "name", "kit", "calls")
CALL = ("folder", "verb", "request", "inputs", "code", "log", "files")


def call(folder: str = "000-probe", **changes: Any) -> dict[str, Any]:
    asked = {"folder": folder, "verb": "probe", "request": {}, "inputs": {}}
    return {**asked, "code": 0, "log": [], "files": {}, **changes}


def results(**changes: Any) -> dict[str, Any]:
    return {"format": 1, "name": "net", "kit": "0" * 64, "calls": [call()], **changes}


def written(folder: Path, content: Any) -> Path:
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@example(content=results(calls=[{**call(), "inputs": {"\xad\u202e": None}}]))
@given(
    content=JSON
    | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON)).map(
        lambda changes: results(**changes)
    )
    | st.fixed_dictionaries({}, optional=dict.fromkeys(CALL, JSON)).map(
        lambda changes: results(calls=[{**call(), **changes}])
    )
)
def test_no_results_are_a_bug_of_ours(content: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = written(Path(name), content)
        try:
            device = RecordedDevice(folder)
        except BadArtifact as error:
            fault: EdgexError = error
        else:
            with pytest.raises(EdgexError) as raised:  # it has no answer
                device.call("probe", {}, {}, folder / "out")
            fault = raised.value
        assert fault.exit_code == 4
        assert str(fault).isprintable()
        assert not (folder / "out").exists()


def test_an_answer_is_given_once_and_a_failure_begins_the_rounds_anew(tmp_path: Path) -> None:
    def answer(folder: str, error: str | None) -> dict[str, Any]:
        fault = None if error is None else {"kind": "bad-artifact", "message": error}
        record = None if fault else {"runtime": "r", "versions": {}, "batch": 1, "threads": 1}
        record = record and {**record, "settings": {}, "import_s": 0.0, "open_s": 0.0}
        record = record and {**record, "warmup_iterations": 0, "peak_rss_bytes": None}
        text = json.dumps(
            {"protocol": 1, "ok": not fault}
            | ({"error": fault} if fault else {"record": record, "files": {}})
        )
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "response.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        asked = {"verb": "run", "request": {"runtime": folder[4:]}}
        code = 4 if fault else 0
        return call(folder, code=code, files={"response.json": digest}, **asked)

    calls = [answer("000-good", None), answer("001-bad", "it is broken")]
    device = RecordedDevice(written(tmp_path, results(calls=calls)))
    for _ in range(2):
        assert device.call("run", {"runtime": "good"}, {}, tmp_path / "out")["runtime"] == "r"
        with pytest.raises(BadArtifact, match="it is broken"):
            device.call("run", {"runtime": "bad"}, {}, tmp_path / "out")
    device.call("run", {"runtime": "good"}, {}, tmp_path / "out")
    with pytest.raises(BadArtifact, match="has no answer to run good"):
        device.call("run", {"runtime": "good"}, {}, tmp_path / "out")


def test_other_results_of_a_kit_are_another_device(tmp_path: Path) -> None:
    """So that a second import of new measurements is not taken for the first."""
    names = set()
    for digest in ("1" * 64, "2" * 64):
        content = results(calls=[call(files={"response.json": digest})])
        names.add(RecordedDevice(written(tmp_path, content)).name)
    assert len(names) == 2
