"""A real sshd for the tests of this folder that ask for it, and an engine to run on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import ASKED, Sshd, wait_until

from edgexception.device import local_device


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    device = Sshd(tmp_path_factory.mktemp("sshd"))
    yield device
    device.stop()


@pytest.fixture
def sshd(machine: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """The device, with its client first on the PATH; after every test nothing is left on it."""
    monkeypatch.setenv("PATH", f"{machine.folder / 'bin'}:{os.environ['PATH']}")
    known = machine.known_hosts.read_text()
    yield machine
    machine.known_hosts.write_text(known)
    wait_until(lambda: not machine.left())
    assert not list(machine.folder.parent.rglob("pwned"))
    assert not Path.home().joinpath("pwned").exists()


@pytest.fixture(scope="module")
def built(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine as this machine builds it by itself."""
    out = tmp_path_factory.mktemp("built") / "out"
    local_device().call("build", {**ASKED, "model": "m"}, {"m": tiny_onnx}, out)
    return out
