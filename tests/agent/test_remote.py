"""The far end of an SSH connection as a process of its own, spoken to as ssh would."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgexception.agent import remote
from edgexception.agent.remote import GREETING, Gone, Pipe

SOURCE = inspect.getsource(remote)


@contextmanager
def far_end(
    place: Path, source: str = SOURCE, keep: bool = False
) -> Iterator[tuple[Pipe, subprocess.Popen[bytes]]]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pipe = Pipe(process.stdout.fileno(), process.stdin.fileno())
    try:
        assert pipe.line(100) == b""
        assert pipe.line(100) == GREETING.strip()
        pipe.send({"op": "open", "place": str(place), "python": None, "keep": keep})
        assert pipe.receive() == {"op": "opened"}
        yield pipe, process
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
        assert not [path for path in place.iterdir() if path.name != remote.KEPT]


def put(pipe: Pipe, data: bytes, said: bytes | None = None) -> dict[str, Any]:
    digest = hashlib.sha256(data if said is None else said).hexdigest()
    pipe.send({"op": "put", "sha256": digest}, data)
    return {**pipe.receive(), "sha256": digest}


def fault(pipe: Pipe) -> tuple[str, str]:
    answer = pipe.receive()
    assert answer["op"] == "fault"
    return answer["kind"], answer["message"]


def test_it_runs_on_the_python_of_older_devices() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))


def test_a_file_that_arrives_changed_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    with far_end(tmp_path) as (pipe, _):
        answer = put(pipe, b"abd", said=b"abc")
        assert (answer["op"], answer["kind"]) == ("fault", "bad-artifact")
        stored = put(pipe, b"abc")
        assert stored["op"] == "stored"
        absent = "0" * 64
        pipe.send({"op": "have", "files": {stored["sha256"]: 3, absent: 1}})
        assert pipe.receive()["files"] == [absent]
        pipe.send({"op": "get", "sha256": stored["sha256"]})
        assert pipe.receive() == {"op": "file", "bytes": 3}
        assert b"".join(pipe.data(3)) == b"abc"


def test_more_than_the_disk_holds_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with far_end(tmp_path) as (pipe, _):
        pipe.send({"op": "have", "files": {"0" * 64: 1 << 60}})
        kind, message = fault(pipe)
    assert kind == "out-of-resources"
    assert "free some space" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: that takes root's rights")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way_is_named_and_the_connection_stays(
    small_disk: Path,
) -> None:
    with far_end(small_disk) as (pipe, _):
        answer = put(pipe, os.urandom(4 << 20))
        assert (answer["op"], answer["kind"]) == ("fault", "out-of-resources")
        assert "No space left on device; free some space there" in answer["message"]
        assert put(pipe, os.urandom(1 << 20))["op"] == "stored"


@pytest.mark.parametrize(
    "message", [{"op": "get", "sha256": "0" * 64}, {"op": "have"}, {"op": "put", "bytes": 0}, {}]
)
def test_a_message_that_makes_no_sense_is_a_fault(tmp_path: Path, message: dict[str, Any]) -> None:
    with far_end(tmp_path) as (pipe, process):
        pipe.send(message)
        assert fault(pipe)[0] in ("bug", "not-possible-here")
        assert process.poll() is None


AGENT = b"""
import os, sys, time
print('{"pid": %d}' % os.getpid(), flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("alive", [True, False])
def test_an_agent_ends_when_its_host_falls_silent_and_not_before(
    tmp_path: Path, alive: bool
) -> None:
    impatient = SOURCE.replace("SILENCE_S = 60.0", "SILENCE_S = 2.0")
    assert impatient != SOURCE
    with far_end(tmp_path, impatient) as (pipe, process):
        digest = put(pipe, AGENT)["sha256"]
        pipe.send({"op": "run", "agent": digest, "verb": "x", "request": {}, "files": {}})
        told = pipe.receive()
        agent = json.loads(b"".join(pipe.data(told["bytes"])))["pid"]
        end = time.monotonic() + 4
        while alive and time.monotonic() < end:
            pipe.send({"op": "still"})
            time.sleep(0.2)
        if alive:
            assert process.poll() is None
            os.kill(agent, 0)
        else:
            process.wait(30)
            with pytest.raises(ProcessLookupError):
                os.kill(agent, 0)
            with pytest.raises(Gone):
                pipe.receive()


def test_a_host_says_that_it_is_there_while_progress_keeps_coming(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "STILL_S", 0.05)
    reads, writes = os.pipe()
    said: list[float] = []
    pipe = Pipe(reads, writes)

    def waiting() -> None:
        said.append(time.monotonic())
        pipe.sent = time.monotonic()

    def feed() -> None:
        for _ in range(50):
            os.write(writes, b"{}\n")
            time.sleep(0.01)
        os.close(writes)

    pipe.waiting = waiting
    thread = threading.Thread(target=feed)
    thread.start()
    assert [pipe.receive() for _ in range(50)] == [{}] * 50
    thread.join()
    os.close(reads)
    assert len(said) >= 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=50), st.binary(max_size=300)), max_size=9))
def test_messages_and_data_arrive_as_they_were_sent(messages: list[tuple[str, bytes]]) -> None:
    reads, writes = os.pipe()
    try:
        here, there = Pipe(reads, writes), Pipe(reads, writes)
        for text, data in messages:
            here.send({"op": "x", "text": text}, data)
        for text, data in messages:
            got = there.receive()
            assert got["text"] == text
            assert b"".join(there.data(got.get("bytes", 0))) == data
    finally:
        os.close(reads)
        os.close(writes)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_value_error_or_the_end(data: bytes) -> None:
    reads, writes = os.pipe()
    os.write(writes, data)
    os.close(writes)
    try:
        pipe = Pipe(reads, reads)
        with pytest.raises((ValueError, Gone)):
            [pipe.receive() for _ in range(len(data) + 1)]
    finally:
        os.close(reads)
