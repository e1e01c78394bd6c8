"""The SSH transport against a real sshd: what arrives, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import edgex
from sshd import ASKED, LONG, ODD, SHORT, Sshd, at, free_port, make_key, run_on

from edgexception.agent.remote import KEPT, PREFIX, sha256_of
from edgexception.device import Progress, local_device, open_device
from edgexception.device.archive import agent_archive
from edgexception.errors import BadArtifact, DeviceLost, NotPossibleHere, UsageError

# --- what works -----------------------------------------------------------------------------------


def test_an_engine_built_and_run_over_ssh_gives_the_logits_of_a_local_run(
    sshd: Sshd, tiny_onnx: Path, built: Path, tmp_path: Path
) -> None:
    (sshd.home / ".bashrc").write_text("echo welcome; echo; echo to $HOME\n")
    steps: list[Progress] = []
    with open_device(sshd.url) as device:
        there = device.call(
            "build", {**ASKED, "model": "m"}, {"m": tiny_onnx}, tmp_path / "built", steps.append
        )
        sent = {step.what for step in steps}
        assert {"send m, KiB", "send the agent, KiB", "build onnxruntime"} <= sent
        steps.clear()
        answers = [
            run_on(one, tmp_path / "built", tmp_path / name, SHORT, steps.append)
            for one, name in ((device, "there"), (local_device(), "here"))
        ]
        assert {step.what for step in steps if "send" in step.what} == {"send images.npy, KiB"}
        run_on(device, tmp_path / "built", tmp_path / "again", None, steps.append)
        assert sum("images.npy" in step.what for step in steps) == 1, "sent once"
    (sshd.home / ".bashrc").unlink()
    assert there["engine_bytes"] == (tmp_path / "built/engine.onnx").stat().st_size
    assert answers[0].keys() == answers[1].keys()
    remote, local = (tmp_path / name for name in ("there", "here"))
    assert sorted(os.listdir(remote)) == sorted(os.listdir(local))
    logits = [np.load(folder / "logits.npy") for folder in (remote, local)]
    assert logits[0].tobytes() == logits[1].tobytes()
    assert len(np.load(remote / "times_ns.npy")) >= 5


def test_the_far_folder_is_private_and_goes_with_the_connection(
    sshd: Sshd, built: Path, tmp_path: Path
) -> None:
    modes: list[int] = []

    def look(_: Progress) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in sshd.home.rglob("*"))

    with at(sshd) as device:
        run_on(device, built, tmp_path / "out", SHORT, look)
        assert [name.startswith(PREFIX) for name in sshd.left()] == [True]
    assert modes
    assert not [mode for mode in modes if mode & 0o077]
    assert sshd.left() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "out"]


def test_bench_over_ssh_reports_what_a_local_bench_does(
    sshd: Sshd, world: Path, tmp_path: Path
) -> None:
    reports = []
    flags = ("--target", "cpu-x86", "--runtime", "onnxruntime", "--precision", "fp32", "--json")
    for there in ((), ("--device", sshd.url)):
        out = tmp_path / f"out{len(reports)}"
        done = edgex("bench", world / "net.safetensors", *flags, "--evaluation", world / "test",
                     "--out", out, *there)  # fmt: skip
        assert done.code == 0, done.err
        reports.append(json.loads(done.out))
    local, remote = reports
    assert _shape(local) == _shape(remote)
    assert (local["machine"].pop("device"), remote["machine"].pop("device")) == ("local", sshd.url)
    assert local["machine"] == remote["machine"]
    logits = [next((tmp_path / f"out{n}/store").rglob("run/logits.npy")) for n in (0, 1)]
    assert logits[0].read_bytes() == logits[1].read_bytes()


def _shape(value: object) -> object:
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    return [_shape(value[0])] if isinstance(value, list) and value else None


def test_targets_are_listed_for_a_device(sshd: Sshd) -> None:
    done = edgex("targets", "--device", sshd.url, "--json")
    assert done.code == 0, done.err
    rows = {row["target"]: row["runtimes"] for row in json.loads(done.out)}
    assert rows["cpu-x86"]["onnxruntime"]["here"]
    sshd.known_hosts.write_text("")
    done = edgex("targets", "--device", sshd.url)
    assert (done.code, done.out) == (3, "")
    assert "host key is not known" in done.err


def test_what_is_kept_is_not_sent_again_unless_it_was_changed(
    sshd: Sshd, built: Path, tmp_path: Path
) -> None:
    sent: list[list[str]] = []
    for number in range(3):
        steps: list[Progress] = []
        with open_device(sshd.url, keep=True) as device:
            run_on(device, built, tmp_path / str(number), None, steps.append)
        sent.append(sorted(step.what for step in steps if "send" in step.what))
        if number == 1:
            images = sshd.home / KEPT / sha256_of(tmp_path / "images.npy")
            images.write_bytes(images.read_bytes()[:-1] + b"?")
    assert len(sent[0]) == 4
    assert sent[1] == []
    assert len(sent[2]) == 1
    assert sshd.left() == [KEPT]
    for path in (sshd.home / KEPT).iterdir():
        path.unlink()
    (sshd.home / KEPT).chmod(0o755)
    with (
        pytest.raises(BadArtifact, match="not a private folder"),
        open_device(sshd.url, keep=True) as device,
    ):
        device.call("probe", {}, {}, tmp_path / "out")
    (sshd.home / KEPT).rmdir()


def test_names_and_paths_mean_nothing_to_a_shell(
    sshd: Sshd, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ODD
    place.mkdir()
    python = place / f"python {ODD}"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "config/edgex").mkdir(parents=True)
    (tmp_path / "config/edgex/devices.yaml").write_text(
        f'devices:\n  "orin; touch pwned":\n    host: 127.0.0.1\n    port: {sshd.port}\n'
        f'    folder: "{place}"\n    python: "{python}"\n'
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    with open_device("orin; touch pwned") as device:
        run_on(device, built, place / "out $(touch pwned)", None)
        assert len(list(place.glob(PREFIX + "*"))) == 1
    assert not list(place.glob(PREFIX + "*"))
    with pytest.raises(UsageError, match="has no device 'orin'; known: orin; touch pwned"):
        open_device("orin").__enter__()


def test_a_second_client_at_once(sshd: Sshd, built: Path, tmp_path: Path) -> None:
    answers = []

    def meanwhile(step: Progress) -> None:
        if not answers and step.what == "timing":
            with at(sshd) as other:
                answers.append(run_on(other, built, tmp_path / "second", SHORT))
            assert len(sshd.left()) == 1, "the second took away its own folder alone"

    with at(sshd) as device:
        run_on(device, built, tmp_path / "first", {**LONG, "warmup_ms": 1500, "duration_ms": 1},
               meanwhile)  # fmt: skip
    assert len(answers) == 1


def test_the_agent_is_one_small_file_of_always_the_same_bytes() -> None:
    content = agent_archive()
    assert len(content) < 1 << 20
    agent_archive.cache_clear()
    assert agent_archive() == content


# --- who is not let in, or not there --------------------------------------------------------------


def test_an_unknown_host_key_is_refused_whatever_ssh_config_says(
    sshd: Sshd, tmp_path: Path
) -> None:
    assert "StrictHostKeyChecking no" in (sshd.folder / "ssh_config").read_text()
    sshd.known_hosts.write_text("")
    with (
        pytest.raises(NotPossibleHere, match=r"host key is not known.*ssh-keygen -lf.*ssh -p"),
        at(sshd) as device,
    ):
        device.call("probe", {}, {}, tmp_path / "out")
    assert sshd.known_hosts.read_text() == "", "nor is it learned"
    assert list(tmp_path.iterdir()) == []


def test_a_changed_host_key_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    sshd.known_hosts.write_text("")
    if not (sshd.folder / "other").exists():
        make_key(sshd.folder / "other")
    sshd.know(sshd.port, "other")
    with (
        pytest.raises(BadArtifact, match=r"another machine may be answering.*ssh-keygen -R"),
        at(sshd) as device,
    ):
        device.call("probe", {}, {}, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user": "nobody_here"}, "without a password.*ssh-copy-id -p .* nobody_here@127.0.0.1"),
        ({"host": "no-such-host.invalid"}, "cannot be reached.*no-such-host"),
        ({"port": free_port()}, r"cannot be reached \(ssh: .*refused\)"),
        ({"python": "/no/such python"}, "/no/such python is not a Python that starts"),
        ({"folder": "/no/such folder"}, "/no/such folder.*No such file"),
    ],
)
def test_a_device_that_cannot_be_had_is_named_with_the_remedy(
    sshd: Sshd, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(NotPossibleHere, match=says) as caught, at(sshd, **changes) as device:
        device.call("probe", {}, {}, tmp_path / "out")
    assert str(caught.value).startswith("orin: ")
    assert not isinstance(caught.value, DeviceLost)


def test_without_a_client_there_is_no_device(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotPossibleHere, match="install openssh-client"), at(sshd) as device:
        device.call("probe", {}, {}, tmp_path / "out")
