"""Two processes train what one trains, and when one fails, both end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import ROOT, Result
from safetensors.torch import load_file
from two_processes import main

SCRIPT = ROOT / "tests/two_processes.py"


def torchrun(*command: object) -> Result:
    """Run a command as two processes of this machine."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    places = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="names the loopback interface of Linux")
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """Batches of 6 and 7 images: the shares differ, and BatchNorm sees them whole."""
    main(tmp_path / "one", 8, "nothing")
    together = torchrun(SCRIPT, tmp_path / "two", 8, "nothing")
    assert together.code == 0, together.err
    assert together.out == ""
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-5)
    for name, value in one.items():
        error = (two[name].double() - value.double()).norm()
        assert error <= 1e-3 * value.double().norm() + 1e-6, name
    assert any(not torch.equal(two[name], one[name]) for name in one), "two did not take part"


@pytest.mark.skipif(sys.platform != "linux", reason="names the loopback interface of Linux")
def test_a_process_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    ended = torchrun(SCRIPT, tmp_path / "out", 8, "disk")
    assert ended.code != 0
    assert "the disk of rank 1 is gone" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names the loopback interface of Linux")
def test_the_command_runs_once(tmp_path: Path) -> None:
    """Whatever it does: here it fails before anything is trained, with one message."""
    ended = torchrun("-m", "edgexception", "run", tmp_path / "no-such.yaml", "--json")
    assert ended.code != 0
    assert ended.out == ""
    assert ended.err.count("edgex: ") == 1, ended.err
    assert "no-such.yaml" in ended.err


def test_more_processes_than_images_a_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgexception.train.processes.size", lambda: 9)
    with pytest.raises(Exception, match=r"batch_size 8 .* fewer than the 9 processes: start fewer"):
        main(Path("nowhere"), 8, "nothing")
