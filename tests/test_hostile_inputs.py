"""Whatever a file holds: exit code 2 or 4, one paragraph, nothing half-written, no hang."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Result, edgex, edgex_process, write_recipe
from hostile import hostile_checkpoints
from hostile_data import hostile_calibration_manifests, hostile_images, hostile_manifests
from hostile_recipes import hostile_recipes

from edgexception import pipeline
from edgexception.artifacts import Store
from edgexception.device import local_device

SEED = int(os.environ.get("EDGEX_HOSTILE_SEED", "20261122"))
COUNTED: set[tuple[str, str]] = set()
"""(kind, what) of every case that was refused as it should be."""


@pytest.fixture(scope="module", autouse=True)
def one_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ask the machine once: what it is, is not what is tested here, and asking takes a second."""
    with Store(tmp_path_factory.mktemp("probe")) as store:
        facts = pipeline._probe(local_device(), store, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_probe", lambda *_: facts)
        yield


def refused(kind: str, what: str, done: Result, code: int) -> str:
    """Check a refusal and return its message without the prefix."""
    case = f"{kind}, {what}: {done.err[-600:]}"
    assert done.code == code, case
    assert done.out == "", case
    assert "Traceback" not in done.err, case
    message = done.err[done.err.index("edgex: ") + len("edgex: ") :]
    assert message.endswith("\n"), case
    lines = message[:-1].split("\n")
    if kind != "recipe":
        assert len(lines) == 1, case
    assert all(20 < len(line) < 1500 for line in lines), case
    assert all(char.isprintable() for line in lines for char in line), case
    COUNTED.add((kind, what))
    return message


def contents(folder: Path) -> set[str]:
    """Return every file below a folder but the store's lock."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names - {"store/.lock"}


REPORTS = {"report.json", "report.md"}
"""What a refused run takes away: the report of the run before is not its own."""

NO_CHECKPOINT = {"fifo", "dangling symlink"}
"""Cases where no file is there to be read, which is the caller's fault."""


def test_checkpoints(tmp_path: Path) -> None:
    for number, (what, path) in enumerate(hostile_checkpoints(tmp_path, SEED)):
        if number % 2 and what not in NO_CHECKPOINT:
            continue  # tests/model has all of them; here it is the command that is tested
        usage = what in NO_CHECKPOINT or what.startswith("folder") or what == "unknown suffix"
        started = time.monotonic()
        done = edgex("import", path, "-o", tmp_path / "out")
        refused("checkpoint", what, done, 2 if usage else 4)
        assert path.name in done.err
        assert time.monotonic() - started < 20, what
    assert contents(tmp_path / "out") == set()


def test_photos(world: Path, tmp_path: Path) -> None:
    """Each alone in a folder, to calibrate on, and beside good ones, to evaluate on."""
    out = tmp_path / "out"
    network = world / "net.safetensors"
    assert edgex("import", network, "-o", out).code == 0
    before = contents(out)
    for number, (what, path) in enumerate(list(hostile_images(tmp_path / "all", SEED))):
        folder = tmp_path / f"photos{number}" / "cup"
        folder.mkdir(parents=True)
        path.rename(folder / path.name)
        done = edgex("quantize", network, "--calibration", folder, "--images", 1, "-o", out)
        message = refused("photo", what, done, 4)
        assert path.name in message
        if number % 4 == 0:
            (folder / "good.png").write_bytes((world / "photos/0.png").read_bytes())
            flags = (
                "--calibration",
                world / "photos",
                "--images",
                4,
                "--evaluation",
                folder.parent,
            )
            done = edgex("quantize", network, *flags, "-o", out)
            refused("photo to evaluate on", what, done, 4)
    assert contents(out) == before - REPORTS


def test_manifests(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    network = world / "net.safetensors"
    usage = {"only a header", "another kind of file"}
    for what, path in hostile_manifests(tmp_path / "manifests", SEED):
        flags = ("--calibration", path, "--images", 1)
        done = edgex("quantize", network, *flags, "-o", out)
        message = refused("manifest", f"{what} {path.suffix}", done, 2 if what in usage else 4)
        assert path.name in message
    assert not out.exists(), "refused before anything is done"


def test_calibration_manifests(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    network = world / "net.safetensors"
    assert edgex("import", network, "-o", out).code == 0
    before = contents(out)
    for what, path in hostile_calibration_manifests(tmp_path / "manifests", SEED):
        source = {"kind": "photos", "path": str(world / "photos")}
        sections = {
            "name": "hostile",
            "model": {"kind": "checkpoint", "path": str(network)},
            "calibration": {"source": source, "images": 1, "manifest": str(path)},
            "quantize": {"method": "ptq"},
        }
        done = edgex("quantize", write_recipe(tmp_path / "r.yaml", sections), "-o", out)
        assert path.name in refused("calibration manifest", what, done, 4)
    assert contents(out) == before - REPORTS


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for what, data in hostile_recipes(SEED):
        path.write_bytes(data)
        done = edgex("run", path, "-o", tmp_path / "out")
        lines = refused("recipe", what, done, 2)[:-1].split("\n")
        assert all(re.match(rf"{re.escape(str(path))}(:\d+)?: ", line) for line in lines), lines
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("pipe.yaml", "folder.yaml", "loop.yaml"):
        results: list[Result] = []
        path = tmp_path / name
        thread = threading.Thread(target=lambda p=path, r=results: r.append(edgex("check", p)))
        thread.daemon = True
        thread.start()
        thread.join(20)
        assert results, f"{name}: hangs"
        refused("recipe", name, results[0], 2)


def test_real_processes_end_like_this_one(world: Path, tmp_path: Path) -> None:
    """Ten of the cases through the real console script."""
    (tmp_path / "c").mkdir()
    cases = list(hostile_checkpoints(tmp_path / "c", SEED + 1))[::60]
    for what, path in cases:
        done = edgex_process("import", path, "-o", tmp_path / "out")
        refused("checkpoint", what, done, 2 if path.is_dir() else 4)
    for what, path in list(hostile_manifests(tmp_path / "m", SEED + 1))[::20]:
        flags = ("--calibration", path, "--images", 1)
        done = edgex_process("quantize", world / "net.safetensors", *flags, "-o", tmp_path / "out")
        refused("manifest", what, done, 4)
    recipe = tmp_path / "recipe.yaml"
    for what, data in list(hostile_recipes(SEED + 1))[::40]:
        recipe.write_bytes(data)
        refused("recipe", what, edgex_process("run", recipe, "-o", tmp_path / "out"), 2)
    assert contents(tmp_path / "out") == set()


def test_that_was_enough() -> None:
    if len({kind for kind, _ in COUNTED}) < 6:
        pytest.skip("counts what the tests above did, and not all of them ran")
    assert len(COUNTED) >= 300, len(COUNTED)
