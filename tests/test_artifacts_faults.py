"""The store when its process is killed, its disk is full or someone else is using it."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgexception.artifacts import Store, atomic_write, stage_key
from edgexception.errors import OutOfResources, UsageError

CHILD = """
import os, signal, sys
from pathlib import Path
from edgexception.artifacts import Store, stage_key

root, start, last, kill_at = Path(sys.argv[1]), *map(int, sys.argv[2:5])

def write(seed):
    def fill(folder):
        (folder / "sub").mkdir()
        for index in range(3):
            (folder / "sub" / f"{index}.bin").write_bytes(bytes([seed % 256]) * 5000 * index)
    return fill

steps = 0
def step(event, arguments):
    global steps
    if event in ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.scandir"):
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

if kill_at:
    sys.addaudithook(step)
with Store(root) as store:
    print("ready", flush=True)
    for seed in range(start, last):
        inputs = {"seed": seed}
        store.publish("stage", stage_key("stage", inputs, "code"), inputs, "code", write(seed))
"""


def child(root: Path, start: int, last: int, kill_at: int = 0) -> subprocess.Popen[str]:
    arguments = [str(root), str(start), str(last), str(kill_at)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def visible(root: Path) -> set[str]:
    """Open the store as a next run would, verify all that is in it and return the keys."""
    with Store(root) as store:
        assert not (root / ".partial").exists() or not any((root / ".partial").iterdir())
        keys = {path.name for path in (root / "stage").glob("*")}
        for key in keys:
            artifact = store.get("stage", key)
            assert artifact is not None
            assert len(artifact.files) == 3
    return keys


def test_killed_at_every_step_it_leaves_all_or_nothing(tmp_path: Path) -> None:
    key = stage_key("stage", {"seed": 0}, "code")
    outcomes = []
    for step in range(1, 100):
        root = tmp_path / str(step)
        process = child(root, 0, 1, kill_at=step)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        keys = visible(root) if root.exists() else set()
        assert keys <= {key}
        outcomes.append(bool(keys))
        # The next run ends with the same result, whatever was left.
        with Store(root) as store:
            store.publish("stage", key, {"seed": 0}, "code", lambda folder: _write(folder, seed=0))
        assert visible(root) == {key}
    else:
        pytest.fail("the child never survived")
    assert outcomes == sorted(outcomes), "once visible, a result stays"
    assert True in outcomes
    assert outcomes.count(False) >= 15


def _write(folder: Path, seed: int) -> None:
    (folder / "sub").mkdir()
    for index in range(3):
        (folder / "sub" / f"{index}.bin").write_bytes(bytes([seed]) * 5000 * index)


def test_killed_at_random_moments_it_stays_consistent(tmp_path: Path) -> None:
    chance = random.Random(2)
    done: set[str] = set()
    for round_ in range(20):
        process = child(tmp_path, round_ * 10_000, (round_ + 1) * 10_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.12))
        process.kill()
        process.communicate(timeout=60)
        keys = visible(tmp_path)
        assert done <= keys, "a published result disappeared"
        done = keys
    assert len(done) > 10


def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
    with Store(tmp_path):
        process = child(tmp_path, 0, 1)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"UsageError: {tmp_path}: is in use by another edgex (process {os.getpid()})" in (
            errors.replace("edgexception.errors.", "")
        )
    assert visible(tmp_path) == set()


def test_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    process = child(tmp_path, 0, 10_000_000)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(UsageError, match=f"process {process.pid}"):
        Store(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert visible(tmp_path) is not None


def test_the_lock_is_not_inherited_by_programs_that_a_stage_starts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        store.close()
        Store(tmp_path).close()
    finally:
        sleeper.kill()
        sleeper.wait()


# --- a full disk


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs; RLIMIT_FSIZE stands in for it below")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_out_of_resources_and_leaves_nothing(tiny_disk: Path) -> None:
    inputs = {"seed": 1}
    key = stage_key("stage", inputs, "code")
    with Store(tiny_disk / "store") as store:
        with pytest.raises(OutOfResources, match="No space left") as error:
            store.publish(
                "stage", key, inputs, "code", lambda folder: _big(folder / "weights", 1 << 20)
            )
        assert str(tiny_disk) in str(error.value)
        with pytest.raises(OutOfResources, match=r"report.md"):
            atomic_write(tiny_disk / "report.md", b"x" * (1 << 20))
        assert store.get("stage", key) is None
        # What was half-written was removed, so that what fits can be published now.
        store.publish(
            "stage", key, inputs, "code", lambda folder: _big(folder / "weights", 1 << 12)
        )
    assert not (tiny_disk / "report.md").exists()


def _big(path: Path, size: int) -> None:
    path.write_bytes(b"x" * size)


def test_a_file_size_limit_is_out_of_resources(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    inputs = {"seed": 1}
    with Store(tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(OutOfResources, match="too large"):
                store.publish(
                    "stage",
                    stage_key("stage", inputs, "code"),
                    inputs,
                    "code",
                    lambda f: _big(f / "w", 1 << 20),
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert visible(tmp_path) == set()


def test_an_error_of_the_writer_itself_passes_unchanged(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "absent").read_bytes()

    with Store(tmp_path) as store, pytest.raises(FileNotFoundError):
        store.publish("stage", stage_key("stage", {}, "code"), {}, "code", write)


# --- places that cannot be used


def test_a_place_that_is_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot be used"):
            Store(root)
    with pytest.raises(UsageError, match="cannot be used"):
        atomic_write(tmp_path / "file" / "report.md", "")
    with pytest.raises(UsageError, match="cannot be used"):
        atomic_write(tmp_path / "absent" / "report.md", "")


def test_links_in_place_of_the_stores_own_files_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("years of work")
    root = tmp_path / "store"
    root.mkdir()
    (root / ".partial").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match="cannot be used"):
        Store(root)
    (root / ".partial").unlink()
    (root / ".lock").unlink()
    (root / ".lock").symlink_to(tmp_path / "precious" / "thesis")
    with pytest.raises(UsageError, match="cannot be used"):
        Store(root)
    assert (tmp_path / "precious" / "thesis").read_text() == "years of work"


def test_a_folder_without_rights_is_a_usage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    user = os.geteuid()
    try:
        if user == 0:  # root may write everywhere
            os.seteuid(65534)
        with pytest.raises(UsageError, match="Permission denied"):
            Store(tmp_path / "store")
    finally:
        os.seteuid(user)
