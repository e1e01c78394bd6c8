"""Another machine as a device, over the system's OpenSSH: nothing is installed there.

One `ssh` process is one connection, for all calls. What it runs there is a fixed text
(`edgexception/agent/remote.py`); names, paths and requests travel as data through its stdin, and
no shell sees them. The far end removes all it wrote when the connection closes, however it does.

Host keys are strict: what the user's ssh_config says of that does not count.
"""

from __future__ import annotations

import inspect
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from edgexception.agent import remote
from edgexception.agent.protocol import PROTOCOL, is_plain_name
from edgexception.agent.remote import Gone, Pipe, sha256_of
from edgexception.device.address import SshAddress, find_address
from edgexception.device.answers import ERRORS, printable, read_answer, read_progress
from edgexception.device.archive import agent_archive
from edgexception.device.contract import Progress
from edgexception.device.local import check_files, full_disk_named
from edgexception.errors import BadArtifact, DeviceLost, EdgexError, NotPossibleHere

CLOSING_S = 10.0
"""How long the far end is given to clear up before the connection is cut."""
MAX_GREETING_BYTES = 1 << 16

# The first of two values of an option counts, so none of these can be changed in ssh_config.
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "NoHostAuthenticationForLocalhost": "no",
    "VerifyHostKeyDNS": "no",
    "UpdateHostKeys": "no",
    # One process, one connection: no other process can use it, none that is there is used.
    "ControlMaster": "no",
    "ControlPath": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}

# A shell of the device reads this, so it is one text for all. The program is the first line that
# comes; a raw file reads not one byte more than that.
FAR_COMMAND = "exec python3 -I -c 'exec(eval(open(0, \"rb\", 0, closefd=False).readline()))'"


@dataclass
class _Link:
    """A running `ssh` with the far end in it."""

    process: subprocess.Popen[bytes]
    pipe: Pipe
    said: IO[bytes]
    """What ssh and the far end print on stderr."""

    def last_words(self) -> str:
        """Return the end of what ssh printed."""
        self.said.seek(0, os.SEEK_END)
        self.said.seek(max(0, self.said.tell() - 4000))
        return self.said.read().decode("utf-8", "replace")

    def close(self) -> int:
        """Let the far end kill and clear what is there, then cut; return the code of ssh."""
        process, end = self.process, time.monotonic() + CLOSING_S
        assert process.stdin is not None  # noqa: S101 - told to the type checker; it was given PIPE
        assert process.stdout is not None  # noqa: S101
        try:
            with suppress(OSError):
                process.stdin.close()
            # Its end comes after the last byte, which it may still be sending.
            readable = select.poll()
            readable.register(process.stdout, select.POLLIN)
            while (left := end - time.monotonic()) > 0 and readable.poll(left * 1000):
                if not os.read(self.pipe.reads, 1 << 18):
                    process.wait(max(left, 0.1))
                    break
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            code = process.wait()
            process.stdout.close()
            self.said.close()
        return code


class SshDevice:
    """A machine that `ssh` reaches. Connects at the first call; used in a `with`, it leaves.

    A connection that ends while a call is under way raises DeviceLost. The next call connects anew,
    as it does where the connection ended between two calls.
    """

    def __init__(self, name: str, address: SshAddress, keep: bool = False) -> None:
        self.name = name
        self.address = address
        self.keep = keep
        """Whether the files that were sent or made stay there, for the next time."""
        self._link: _Link | None = None

    def __enter__(self) -> SshDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

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
        with full_disk_named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
                answered = Path(work)
                with self._connected(verb) as pipe:
                    code, log = self._converse(pipe, verb, request, files, answered, progress)
                record, names = read_answer(verb, self.name, answered, code, log)
                out.mkdir(exist_ok=True)
                for name in names:
                    os.replace(answered / name, out / name)
        return {**record, "log": log}

    def _converse(
        self,
        pipe: Pipe,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        answered: Path,
        progress: Callable[[Progress], None] | None,
    ) -> tuple[int, list[str]]:
        """Let the agent answer; its files then lie in `answered`. Return exit code and log."""
        archive = answered / ".agent"
        archive.write_bytes(agent_archive())
        agent = sha256_of(archive)
        digests = {name: sha256_of(path) for name, path in files.items()}
        sources = {digests[name]: (name, path) for name, path in files.items()}
        sources[agent] = ("the agent", archive)
        sizes = {digest: path.stat().st_size for digest, (_, path) in sources.items()}
        for digest in self._ask(pipe, {"op": "have", "files": sizes}, "missing")["files"]:
            name, path = sources[digest]
            self._put(pipe, name, path, digest, progress)

        content = {**request, "protocol": PROTOCOL}
        asked = {"op": "run", "verb": verb, "agent": agent, "request": content, "files": digests}
        lines: list[str] = []
        answer = self._ask(pipe, asked, "line", "ended")
        while answer["op"] == "line":
            line = b"".join(pipe.data(min(answer["bytes"], remote.MAX_LINE_BYTES))).decode(
                "utf-8", "replace"
            )
            step = read_progress(line)
            if step is None:
                lines = [*lines, printable(line)][-remote.LOG_LINES :]
            elif progress is not None:
                progress(step)
            answer = self._ask(pipe, None, "line", "ended")
        for name, (size, digest) in dict(answer["files"]).items():
            if is_plain_name(name):
                self._get(pipe, answered / name, size, digest)
        log = [*lines, *map(printable, map(str, answer["log"]))][-remote.LOG_LINES :]
        return int(answer["code"]), log

    def _put(
        self,
        pipe: Pipe,
        name: str,
        path: Path,
        digest: str,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Send a file."""
        total, done, start = path.stat().st_size, 0, time.monotonic()
        pipe.send({"op": "put", "sha256": digest, "bytes": total})
        with path.open("rb") as file:
            while done < total:
                chunk = file.read(min(remote.CHUNK_BYTES, total - done))
                if not chunk:
                    raise BadArtifact(f"{path} was cut while it was sent: start again")
                pipe.write(chunk)
                done += len(chunk)
                if progress is not None:
                    left = (time.monotonic() - start) / done * (total - done)
                    progress(Progress(f"send {name}, KiB", done >> 10, total >> 10, left))
        self._ask(pipe, None, "stored")

    def _get(self, pipe: Pipe, path: Path, size: int, digest: str) -> None:
        """Receive a file of the answer."""
        told = self._ask(pipe, {"op": "get", "sha256": digest}, "file")
        with path.open("wb") as file:
            for chunk in pipe.data(told["bytes"]):
                file.write(chunk)
        if (told["bytes"], sha256_of(path)) != (size, digest):
            raise BadArtifact(f"{path.name} came from {self.name} otherwise than it was sent")

    def _ask(self, pipe: Pipe, message: Mapping[str, Any] | None, *wanted: str) -> dict[str, Any]:
        """Send a message, if there is one, and return the answer, which is one of `wanted`."""
        if message is not None:
            pipe.send(message)
        answer = pipe.receive()
        if answer["op"] == "fault":
            raise ERRORS[answer["kind"]](f"{self.name}: {printable(answer['message'])}")
        if answer["op"] not in wanted:
            raise ValueError(f"an answer {answer['op']!r}, which was not asked for")
        return answer

    # --- the connection ---------------------------------------------------------------------------

    @contextmanager
    def _connected(self, verb: str) -> Iterator[Pipe]:
        """Yield the connection; one that may have anything unread in it is not used again."""
        if self._link is not None and self._link.process.poll() is not None:
            self._leave()  # it ended between two calls, which may be hours apart
        if self._link is None:
            self._connect()
        assert self._link is not None  # noqa: S101 - told to the type checker
        try:
            yield self._link.pipe
        except Gone as error:
            words = self._link.last_words()
            self._leave()
            raise DeviceLost(
                f"{verb} on {self.name}: the connection ended{_quote(words)}. Look whether the "
                "device is on and reachable, then run the same command again: what was finished "
                "is not done again"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._leave()
            raise BadArtifact(
                f"{verb} on {self.name}: it does not keep to the protocol: {printable(str(error))}"
            ) from error
        except BaseException:
            self._leave()
            raise

    def _connect(self) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the link
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell here; checked host and user
                ssh_command(self.address),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                # Ctrl-C is for this process: it tells the far end before it cuts the connection.
                start_new_session=True,
            )
        except OSError as error:
            said.close()
            raise NotPossibleHere(
                f"{self.name}: there is no OpenSSH client here ({error.strerror}): install "
                "openssh-client"
            ) from error
        assert process.stdin is not None  # noqa: S101 - told to the type checker; it was given PIPE
        assert process.stdout is not None  # noqa: S101
        pipe = Pipe(process.stdout.fileno(), process.stdin.fileno())
        self._link = _Link(process, pipe, said)
        with self._first_contact(self._link):
            pipe.write(repr(inspect.getsource(remote)).encode() + b"\n")
            _skip_to_greeting(pipe)
            pipe.waiting = lambda: pipe.send({"op": "still"})
            opening = {"place": self.address.folder, "python": self.address.python}
            self._ask(pipe, {"op": "open", **opening, "keep": self.keep}, "opened")

    @contextmanager
    def _first_contact(self, link: _Link) -> Iterator[None]:
        try:
            yield
        except Gone as error:
            with suppress(subprocess.TimeoutExpired):
                link.process.wait(CLOSING_S)
            words = link.last_words()
            self._link = None
            raise _why_not_connected(self, link.close(), words) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._leave()
            raise NotPossibleHere(
                f"{self.name}: what answers there is no Python of ours: {printable(str(error))}"
            ) from error
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()


@contextmanager
def open_device(text: str, keep: bool = False) -> Iterator[SshDevice]:
    """Yield the device that `--device` names, and leave it at the end."""
    with SshDevice(text, find_address(text), keep) as device:
        yield device


def ssh_command(address: SshAddress) -> list[str]:
    """Return the command line of `ssh`."""
    options = [part for name, value in OPTIONS.items() for part in ("-o", f"{name}={value}")]
    if address.user is not None:
        options += ["-l", address.user]
    if address.port is not None:
        options += ["-p", str(address.port)]
    return ["ssh", "-T", *options, "--", address.host, FAR_COMMAND]


def _skip_to_greeting(pipe: Pipe) -> None:
    """Read past what the startup files of a shell print."""
    before = 0
    while pipe.line(MAX_GREETING_BYTES) != remote.GREETING.strip():
        before += 1
        if before > 1000:
            raise ValueError("it prints and prints, and does not start")


def _quote(words: str) -> str:
    """Return the last line that ssh printed, in brackets."""
    lines = [line for line in map(printable, words.splitlines()) if line]
    return f" (ssh: {lines[-1]})" if lines else ""


def _why_not_connected(device: SshDevice, code: int, words: str) -> EdgexError:
    """Return the error for a connection that was never made, from what ssh printed."""
    address, name = device.address, device.name
    by_hand = ["ssh"]
    if address.port is not None:
        by_hand += ["-p", str(address.port)]
    by_hand.append(f"{address.user}@{address.host}" if address.user else address.host)
    hand = " ".join(by_hand)
    if "HOST IDENTIFICATION HAS CHANGED" in words:
        return BadArtifact(
            f"{name}: its host key is not the one that is known here, so another machine may be "
            "answering. If the device was set up anew, remove the old key with `ssh-keygen -R`, "
            f"then check the new fingerprint on the device and connect once by hand: `{hand}`"
        )
    if "Host key verification failed" in words or "host key is known" in words:
        return NotPossibleHere(
            f"{name}: its host key is not known here. Read its fingerprint on the device with "
            "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`, compare it and connect once by "
            f"hand: `{hand}`"
        )
    if "Permission denied" in words:
        return NotPossibleHere(
            f"{name}: it does not let this user in without a password{_quote(words)}: put your "
            f"public key there, `ssh-copy-id {hand[4:]}`, or name another user"
        )
    if 0 < code < 255:  # the command's own code; 255 is one of ssh
        return NotPossibleHere(
            f"{name}: python3 does not start there{_quote(words)}: install Python 3.10 or later"
        )
    return NotPossibleHere(
        f"{name}: cannot be reached{_quote(words)}: check that it is on, its name and port, and "
        f"that this works: `{hand}`"
    )
