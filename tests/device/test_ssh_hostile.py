"""A far end that lies: what a device sends is checked as if a stranger had written it.

A script in the place of `ssh` stands for it: over a real connection no honest device can be made
to send such answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgexception.device import SshDevice
from edgexception.device.address import SshAddress
from edgexception.errors import BadArtifact, DeviceLost, EdgexError, NotPossibleHere

_PRELUDE = """
import hashlib, json, os, sys
sys.stdin.buffer.readline()
def say(data=b"", **message):
    os.write(1, json.dumps(message).encode() + b"\\n" + data)
def hear():
    message = json.loads(sys.stdin.buffer.readline())
    return message if message["op"] != "still" else hear()
def greet():
    os.write(1, b"\\nedgexception far end 1\\n")
    hear()
    say(op="opened")
def until_run():
    greet()
    hear()
    say(op="missing", files=[])
    hear()
"""


@pytest.mark.parametrize(
    ("behaves", "error", "says"),
    [
        ("while True: os.write(1, b'hello\\n' * 1000)", NotPossibleHere, "prints and prints"),
        ("while True: os.write(1, b'x' * 100_000)", NotPossibleHere, "longer than"),
        ("sys.exit(1)", NotPossibleHere, "python3 does not start there"),
        ("sys.exit(255)", NotPossibleHere, "cannot be reached"),
        ("greet(); sys.exit()", DeviceLost, "connection ended"),
        ("greet(); hear(); os.write(1, b'{{{\\n')", BadArtifact, "protocol"),
        ("greet(); hear(); os.write(1, b'[' * 100_000 + b'\\n')", BadArtifact, "protocol"),
        ("greet(); hear(); os.write(1, b'x' * (9 << 20))", BadArtifact, "longer than"),
        ("greet(); hear(); say(op='opened')", BadArtifact, "not asked for"),
        ("greet(); hear(); say(op='missing', files=['../x'])", BadArtifact, "protocol"),
        ("greet(); hear(); say(op='fault', kind='x', message='')", BadArtifact, "protocol"),
        ("until_run(); say(op='line', bytes=-1)", BadArtifact, "-1 bytes"),
        ("until_run(); say(op='line', bytes='1')", BadArtifact, "protocol"),
        ("until_run(); say(op='ended', code=0, log=[], files=5)", BadArtifact, "protocol"),
        ("until_run(); say(op='ended', code=0, log=[], files={'../escaped': [1, 'x']})",
         BadArtifact, "answer is broken"),
        ("until_run(); say(op='ended', code=0, log=[], files={'x': [1, 'x']}); hear();"
         "say(b'y', op='file', bytes=1)", BadArtifact, "came from liar otherwise"),
        ("until_run(); say(op='ended', code=0, log=[], files={'x': [9, 'x']}); hear();"
         "say(b'y', op='file', bytes=9)", DeviceLost, "connection ended"),
        ("until_run(); say(op='fault', kind='bug', message='of\\u001b[31m it')", EdgexError,
         r"liar: of \[31m it"),
    ],
)  # fmt: skip
def test_a_lying_far_end_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaves: str,
    error: type[EdgexError],
    says: str,
) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/ssh"
    script.write_text(f"#!{sys.executable} -I\n{_PRELUDE}\n{behaves}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("edgexception.device.ssh.CLOSING_S", 0.5)
    work = tmp_path / "work"
    with (
        pytest.raises(error, match=says) as caught,
        SshDevice("liar", SshAddress(host="liar")) as device,
    ):
        device.call("probe", {}, {}, work / "out")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert list(work.iterdir()) == []
