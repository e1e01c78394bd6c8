"""A real sshd on a loopback port, with keys, users' files and a home of its own.

It runs as the user who runs the tests. What a far end writes lands in `home`, whose name has
everything in it that a shell would trip over.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import tiny_images

from edgexception.device import Device, SshDevice
from edgexception.device.address import SshAddress

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
CLIENT = shutil.which("ssh")
USER = __import__("pwd").getpwuid(os.getuid()).pw_name
ODD = "a home; touch pwned $(touch pwned) `touch pwned` & 'q' *"

ASKED = {"runtime": "onnxruntime", "batch": 2, "threads": 1}
RUN = {**ASKED, "engine": "engine.onnx", "manifest": "engine.json"}
LONG = {"warmup_ms": 60_000, "duration_ms": 60_000, "min_iterations": 1}
SHORT = {"warmup_ms": 1, "duration_ms": 1, "min_iterations": 5}


class Sshd:
    """A running sshd, and what an `ssh` that knows it has on its PATH.

    `forced` is a shell's command line that runs in place of what is asked for, which is in
    $SSH_ORIGINAL_COMMAND.
    """

    def __init__(
        self, folder: Path, file_limit: int | None = None, forced: str | None = None
    ) -> None:
        if SSHD is None or CLIENT is None:
            pytest.skip("there is no sshd here: install openssh-server")
        self.folder = folder
        self.home = folder / ODD
        self.home.mkdir(parents=True)
        self.known_hosts = folder / "known_hosts"
        for name in ("host_key", "user_key"):
            make_key(folder / name)
        (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
        self.port = free_port()
        self._client()
        self.know(self.port)
        self._start(file_limit, forced)

    @property
    def url(self) -> str:
        return f"ssh://{USER}@127.0.0.1:{self.port}"

    def know(self, port: int, key: str = "host_key") -> None:
        """Add a host key of this machine's port to what the client knows."""
        public = " ".join((self.folder / f"{key}.pub").read_text().split()[:2])
        with self.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {public}\n")

    def left(self) -> list[str]:
        """What lies in the far home."""
        return sorted(path.name for path in self.home.iterdir())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _client(self) -> None:
        """Make an `ssh` that reads our files alone, and is told to let everybody in."""
        config = self.folder / "ssh_config"
        config.write_text(
            f'UserKnownHostsFile "{self.known_hosts}"\nGlobalKnownHostsFile none\n'
            f'IdentityFile "{self.folder / "user_key"}"\nIdentitiesOnly yes\nIdentityAgent none\n'
            "StrictHostKeyChecking no\nNoHostAuthenticationForLocalhost yes\nBatchMode no\n"
            "RemoteCommand touch pwned\nLogLevel QUIET\n"
        )
        (self.folder / "bin").mkdir()
        script = self.folder / "bin/ssh"
        script.write_text(f'#!/bin/sh\nexec {CLIENT} -F "{config}" "$@"\n')
        script.chmod(0o755)

    def _start(self, file_limit: int | None, forced: str | None) -> None:
        bin_path = f"{self.folder / 'tools'}:{Path(sys.executable).parent}:/usr/bin:/bin"
        home = str(self.home).replace("\\", "\\\\").replace('"', '\\"')
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder / 'host_key'}\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f'PermitRootLogin prohibit-password\nSetEnv "HOME={home}" "PATH={bin_path}"\n'
            + (f"ForceCommand {forced}\n" if forced else "")
        )
        if os.getuid() == 0:  # sshd of root wants its empty folder for the unprivileged part
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)

        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        assert SSHD is not None
        self.log = (self.folder / "sshd.log").open("wb")
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=limit,  # noqa: PLW1509 - it calls nothing that takes a lock
            start_new_session=True,
        )
        self.log.close()
        wait_for_port(self.port)


class Wire:
    """A port that passes everything on to another, until it is cut."""

    def __init__(self, target: int, cut_after: int | None = None) -> None:
        self.cut_after = cut_after
        """Bytes from the client after which it cuts itself."""
        self.target = target
        self.ends: list[socket.socket] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.server.close()
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            client, _ = self.server.accept()
            device = socket.create_connection(("127.0.0.1", self.target))
            self.ends += [client, device]
            for a, b, limit in ((client, device, self.cut_after), (device, client, None)):
                threading.Thread(target=self._pass, args=(a, b, limit), daemon=True).start()

    def _pass(self, a: socket.socket, b: socket.socket, limit: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while chunk := a.recv(1 << 14):
                b.sendall(chunk)
                passed += len(chunk)
                if limit is not None and passed > limit:
                    break
        self.cut()


def make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:  # noqa: PERF203 - it is not up yet
            assert time.monotonic() < end, "sshd did not start"
            time.sleep(0.02)
        else:
            return


def run_on(
    device: Device, built: Path, out: Path, times: dict[str, int] | None, step: Any = None
) -> dict[str, Any]:
    images = out.with_name("images.npy")
    np.save(images, tiny_images(5))
    files = {name: built / name for name in ("engine.onnx", "engine.json")}
    asked = {**RUN, "images": "images.npy", "timing": times}
    return device.call("run", asked, {**files, "images.npy": images}, out, step)


def at(sshd: Sshd, **changes: Any) -> SshDevice:
    fields = {"host": "127.0.0.1", "user": USER, "port": sshd.port, **changes}
    return SshDevice("orin", SshAddress(**fields))


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def processes(sshd: Sshd) -> dict[int, str]:
    """The processes whose folder is one of ours on the device, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(sshd.home) in os.readlink(entry / "cwd"):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # noqa: PERF203 - a process may end meanwhile
            continue
    return found
