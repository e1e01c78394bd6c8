"""`--device`: what names a device, and what is refused before anything is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgexception.device.address import SshAddress, find_address
from edgexception.device.ssh import FAR_COMMAND, ssh_command
from edgexception.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://orin", SshAddress(host="orin")),
        ("ssh://me@10.0.0.7/", SshAddress(host="10.0.0.7", user="me")),
        ("ssh://me@a-b.local:2222", SshAddress(host="a-b.local", user="me", port=2222)),
        ("ssh://[fe80::1%eth0]:22", SshAddress(host="fe80::1%eth0", port=22)),
    ],
)
def test_a_url_names_a_device(text: str, address: SshAddress) -> None:
    assert find_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "ssh://", "ssh://me@", "ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://a b", "ssh://a;b",
        "ssh://$(id)", "ssh://`id`", "ssh://a@b@c", "ssh://me:word@host", "ssh://host:0",
        "ssh://host:65536", "ssh://host:22x", "ssh://host/path", "ssh://ho\nst", "http://host",
        "ssh://[::1", "ssh://[::1;x]", "SSH://host", "ssh://h%h",
    ],
)  # fmt: skip
def test_a_url_with_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"write ssh://user@host"):
        find_address(text)


@given(st.text(max_size=40))
def test_whatever_is_given_only_plain_words_reach_ssh(text: str) -> None:
    try:
        address = find_address(f"ssh://{text}")
    except UsageError:
        return
    *command, separator, host, far = ssh_command(address)
    assert (separator, far) == ("--", FAR_COMMAND)
    assert all(re.fullmatch(r"[A-Za-z0-9_.:%=-]+", part) for part in (*command, host))
    assert not host.startswith("-")


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("devices:\n  orin: {host: 'a b'}", r"devices.yaml:2: devices.orin.host: .*'a b'"),
        ("devices:\n  orin: {host: a, port: 0}", "devices.orin.port: is 0; write a number at"),
        ("devices:\n  orin: {host: a, prot: 1}", "prot: is not a known field; did you mean port"),
        ("devices:\n  orin: {user: a}", "host: is missing"),
        ("devices:\n  orni: {host: a}", "has no device 'orin'; did you mean orni"),
        ("devices:\n  orin: {host: a, user: '-l'}", "devices.orin.user"),
        ("[", "is not YAML"),
    ],
)
def test_faults_of_the_devices_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, says: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "edgex").mkdir()
    (tmp_path / "edgex/devices.yaml").write_text(yaml)
    with pytest.raises(UsageError, match=says):
        find_address("orin")


def test_a_name_without_a_devices_file_says_where_it_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=rf"name the device in {tmp_path}/edgex/devices.yaml"):
        find_address("orin")
