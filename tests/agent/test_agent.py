"""The agent as a program of its own, started as a person or a transport would start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipapp
from pathlib import Path
from typing import Any

import pytest

import edgexception
from edgexception.agent.runtimes import MODULES

PACKAGE = Path(edgexception.__file__).parent


def ask(
    tmp_path: Path,
    verb: str,
    request: object,
    files: dict[str, bytes] | None = None,
    command: tuple[str, ...] = ("-m", "edgexception.agent"),
) -> tuple[int, dict[str, Any], str]:
    asked, answered = tmp_path / "request", tmp_path / "response"
    asked.mkdir()
    answered.mkdir()
    text = request if isinstance(request, str) else json.dumps(request)
    (asked / "request.json").write_text(text)
    for name, content in (files or {}).items():
        (asked / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, *command, verb, str(asked), str(answered)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=PACKAGE.parent,
    )
    path = answered / "response.json"
    return done.returncode, json.loads(path.read_text()) if path.exists() else {}, done.stderr


def test_probe_tells_machine_and_runtimes(tmp_path: Path) -> None:
    code, response, _ = ask(tmp_path, "probe", {"protocol": 1})
    assert (code, response["ok"], response["protocol"]) == (0, True, 1)
    record = response["record"]
    assert record["arch"] == os.uname().machine
    assert set(record["runtimes"]) == set(MODULES)
    for facts in record["runtimes"].values():
        assert set(facts) - {"gpus"} in ({"version", "devices"}, {"missing"})


def test_a_runtime_that_cannot_be_imported_is_missing_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "onnxruntime.py").write_text("raise OSError('libgomp.so.1: cannot open')\n")
    (broken / "openvino.py").write_text("import os; os.abort()\n")
    start = f"import sys, runpy; sys.path.insert(0, {str(broken)!r}); runpy.run_module("
    start += "'edgexception.agent', run_name='__main__', alter_sys=True)"
    code, response, _ = ask(tmp_path, "probe", {"protocol": 1}, command=("-c", start))
    assert code == 0
    found = response["record"]["runtimes"]
    assert "libgomp.so.1: cannot open" in found["onnxruntime"]["missing"]
    assert "pip install onnxruntime" in found["onnxruntime"]["missing"]
    assert "ended the process with code -6" in found["openvino"]["missing"]


def test_the_agent_works_alone_in_a_zipapp(tmp_path: Path) -> None:
    """Only edgexception/agent travels: nothing else of the package may be needed."""
    source = tmp_path / "source"
    for path in PACKAGE.glob("agent/**/*.py"):
        target = source / "edgexception" / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (source / "edgexception/__init__.py").touch()
    start = "import runpy\nrunpy.run_module('edgexception.agent', run_name='__main__')\n"
    (source / "__main__.py").write_text(start)
    zipapp.create_archive(source, tmp_path / "agent.pyz")
    command = ("-I", str(tmp_path / "agent.pyz"))
    code, response, errors = ask(tmp_path, "probe", {"protocol": 1}, command=command)
    assert code == 0, errors
    assert "version" in response["record"]["runtimes"]["onnxruntime"]


BUILD = {"protocol": 1, "runtime": "onnxruntime", "model": "model.onnx", "batch": 1, "threads": 1}
RUN = {
    **{name: value for name, value in BUILD.items() if name != "model"},
    "engine": "engine.onnx", "manifest": "engine.json", "images": None, "timing": None,
}  # fmt: skip
JUNK = {**RUN, "engine": "junk.onnx", "manifest": "junk.onnx"}


@pytest.mark.parametrize(
    ("verb", "request_", "kind", "says"),
    [
        ("probe", "{", "usage", "not JSON"),
        ("probe", "[]", "usage", "one object"),
        ("probe", "[" * 100_000, "usage", "not JSON"),
        ("probe", {}, "usage", "protocol 1"),
        ("probe", {"protocol": 2}, "usage", "protocol 1"),
        ("probe", {"protocol": 1, "fast": True}, "usage", r"unknown fields \['fast'\]"),
        ("build", {**BUILD, "runtime": "tflite"}, "usage", "'tflite'"),
        ("build", {**BUILD, "runtime": ["onnxruntime"]}, "usage", "must be one of"),
        ("build", {**BUILD, "batch": 0}, "usage", "batch is 0"),
        ("build", {**BUILD, "batch": True}, "usage", "batch is True"),
        ("build", {**BUILD, "threads": "2"}, "usage", "threads is '2'"),
        ("build", BUILD, "usage", "not in the request"),
        ("build", {**BUILD, "model": "../model.onnx"}, "usage", "plain file name"),
        ("build", {**BUILD, "model": "/etc/passwd"}, "usage", "plain file name"),
        ("build", {**BUILD, "model": ".."}, "usage", "plain file name"),
        ("build", {**BUILD, "model": "empty.onnx"}, "bad-artifact", "empty.onnx is empty"),
        ("build", {**BUILD, "model": "junk.onnx"}, "bad-artifact", "not an ONNX file"),
        ("run", JUNK, "usage", "images, timing or both"),
        ("run", {**JUNK, "timing": {}}, "usage", "exactly"),
        ("run", {**JUNK, "images": "no.npy"}, "usage", "not in the request"),
        ("run", {**JUNK, "manifest": "no.json"}, "usage", "'no.json' that manifest names is not"),
        ("run", {**JUNK, "images": "junk.onnx"}, "bad-artifact", "is no manifest of an engine"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(
    tmp_path: Path, verb: str, request_: object, kind: str, says: str
) -> None:
    files = {"junk.onnx": b"not a model at all", "empty.onnx": b""}
    code, response, errors = ask(tmp_path, verb, request_, files)
    assert response["ok"] is False
    assert response["error"]["kind"] == kind
    assert code == {"usage": 2, "bad-artifact": 4}[kind]
    assert re.search(says, response["error"]["message"])
    assert "Traceback" not in errors


def test_a_link_in_a_request_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    asked, answered = tmp_path / "request", tmp_path / "response"
    asked.mkdir()
    answered.mkdir()
    (asked / "model.onnx").symlink_to(tmp_path / "secret")
    (asked / "request.json").write_text(json.dumps(BUILD))
    command = [sys.executable, "-m", "edgexception.agent", "build", str(asked), str(answered)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd=PACKAGE.parent
    )
    assert done.returncode == 2
    assert "not a regular file" in (answered / "response.json").read_text()


def test_arguments_that_are_no_verb_give_the_usage_line(tmp_path: Path) -> None:
    code, response, errors = ask(tmp_path, "destroy", {"protocol": 1})
    assert (code, response) == (2, {})
    assert errors.startswith("usage: python -m edgexception.agent")


def test_the_agent_ends_when_the_host_is_gone(tmp_path: Path, tiny_onnx: Path) -> None:
    asked, answered = tmp_path / "request", tmp_path / "response"
    asked.mkdir()
    answered.mkdir()
    timing = {"warmup_ms": 60_000, "duration_ms": 60_000, "min_iterations": 1}
    from edgexception.device import local_device  # noqa: PLC0415

    request = {name: value for name, value in BUILD.items() if name != "protocol"}
    local_device().call("build", request, {"model.onnx": tiny_onnx}, asked)
    (asked / "request.json").write_text(json.dumps({**RUN, "batch": 1, "timing": timing}))
    child = subprocess.Popen(
        [sys.executable, "-m", "edgexception.agent", "run", str(asked), str(answered)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=PACKAGE.parent,
    )
    assert child.stderr is not None
    assert child.stdin is not None
    assert b'"timing"' in child.stderr.readline(), "it measures"
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=5) == 130
    child.stderr.close()
    assert not list(answered.iterdir())
