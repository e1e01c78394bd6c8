"""Keys of results, and that a stored result is what was published, or refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgexception.artifacts import (
    Artifact,
    Store,
    atomic_write,
    canonical_json,
    sha256_file,
    stage_key,
)
from edgexception.errors import BadArtifact, EdgexError

Tree = Mapping[str, bytes]
NAMES = st.text("abcXYZ019._- é", min_size=1, max_size=8).filter(lambda name: name.strip(".") != "")
FILES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=300), max_size=5
).filter(
    # A name cannot be a file and a folder at once, and the manifest's own name is taken.
    lambda tree: (
        "manifest.json" not in tree
        and not any(other.startswith(f"{name}/") for name in tree for other in tree)
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


def quick(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def fill(folder: Path, tree: Tree) -> None:
    for name, data in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def publish(store: Store, tree: Tree, inputs: Mapping[str, object] | None = None) -> Artifact:
    inputs = inputs or {"seed": 1}
    key = stage_key("stage", inputs, "code")
    return store.publish("stage", key, inputs, "code", lambda folder: fill(folder, tree))


# --- keys


@quick(200)
@given(value=JSON)
def test_canonical_json_is_json_and_loses_nothing(value: object) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@quick(100)
@given(value=st.dictionaries(st.text(), JSON, min_size=2, max_size=5))
def test_the_order_of_keys_has_no_say(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_json(backwards) == canonical_json(value)


def test_equal_values_have_equal_texts() -> None:
    assert canonical_json({"a": 1.0, "b": (1, 2)}) == '{"a":1,"b":[1,2]}'
    assert canonical_json(-0.0) == canonical_json(0) == "0"
    assert canonical_json(0.1) == "0.1"
    assert canonical_json(True) != canonical_json(1)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"model": {"path": Path("a.keras")}}, r"value.model.path: \w*Path 'a.keras' has no place"),
        ([math.nan], r"value\[0\]: nan is not finite"),
        ({"a": math.inf}, "value.a: inf is not finite"),
        ({1: 2}, "the key 1 is not text"),
        ({"a": b"x"}, "value.a: bytes"),
        ({"a": {1, 2}}, "value.a: set"),
    ],
)
def test_what_has_no_place_in_a_key(value: object, word: str) -> None:
    with pytest.raises(EdgexError, match=word):
        canonical_json(value)


def test_a_key_depends_on_stage_inputs_and_code() -> None:
    key = stage_key("quantize", {"a": 1}, "code")
    assert len(key) == 64
    assert key == stage_key("quantize", {"a": 1.0}, "code")
    others = {
        stage_key("export", {"a": 1}, "code"),
        stage_key("quantize", {"a": 2}, "code"),
        stage_key("quantize", {"a": 1}, "other code"),
    }
    assert len(others | {key}) == 4


# --- what comes back


@quick(40)
@given(tree=FILES, inputs=st.dictionaries(st.text(), JSON, max_size=3))
def test_a_published_tree_comes_back_whole(tree: Tree, inputs: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as root, Store(Path(root)) as store:
        published = publish(store, tree, inputs)
        opened = store.get("stage", published.key)
        assert opened == published
        assert {name: published.file(name).read_bytes() for name in published.files} == tree
        for name, record in published.files.items():
            assert record.sha256 == sha256_file(published.file(name))
            assert record.bytes == len(tree[name])


def test_the_digest_depends_on_the_files_alone(store: Store) -> None:
    first = publish(store, {"a": b"1"}, {"seed": 1})
    assert publish(store, {"a": b"1"}, {"seed": 2}).digest == first.digest
    assert publish(store, {"a": b"2"}, {"seed": 3}).digest != first.digest
    assert publish(store, {"b": b"1"}, {"seed": 4}).digest != first.digest


def test_nothing_is_published_twice(store: Store) -> None:
    inputs = {"seed": 1}
    key = stage_key("stage", inputs, "code")
    assert store.get("stage", key) is None
    first = publish(store, {"a": b"1"}, inputs)

    def never(folder: Path) -> None:
        raise AssertionError(folder)

    assert store.publish("stage", key, inputs, "code", never) == first


def test_files_are_read_only_and_folders_can_be_removed(store: Store) -> None:
    artifact = publish(store, {"a/b": b"1"})
    for path in (artifact.file("a/b"), artifact.folder / "manifest.json"):
        assert path.stat().st_mode & 0o777 == 0o444
    shutil.rmtree(artifact.folder)
    assert store.get("stage", artifact.key) is None


def test_a_file_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(BadArtifact, match=r"no file 'b.onnx', only a.onnx"):
        publish(store, {"a.onnx": b""}).file("b.onnx")


def test_a_writer_that_fails_publishes_nothing(store: Store) -> None:
    def write(folder: Path) -> None:
        fill(folder, {"a": b"1"})
        raise KeyboardInterrupt

    key = stage_key("stage", {"seed": 1}, "code")
    with pytest.raises(KeyboardInterrupt):
        store.publish("stage", key, {"seed": 1}, "code", write)
    assert store.get("stage", key) is None
    assert not any((store.root / ".partial").iterdir())


def test_a_writer_cannot_publish_links_or_a_manifest(store: Store, tmp_path: Path) -> None:
    key = stage_key("stage", {"seed": 1}, "code")
    (tmp_path / "secret").write_text("x")
    for write, word in (
        (lambda folder: (folder / "a").symlink_to(tmp_path / "secret"), "link or device"),
        (lambda folder: os.mkfifo(folder / "a"), "link or device"),
        (lambda folder: fill(folder, {"manifest.json": b"{}"}), "store's own file"),
    ):
        with pytest.raises(EdgexError, match=word):
            store.publish("stage", key, {"seed": 1}, "code", write)
        assert store.get("stage", key) is None


def test_misuse_is_our_bug(store: Store) -> None:
    with pytest.raises(EdgexError, match="not that of what it is"):
        store.publish("stage", "0" * 64, {}, "code", lambda _: None)
    for stage, key in (("../x", "0" * 64), ("stage", "../x"), ("stage", "0" * 63)):
        with pytest.raises(EdgexError, match="not a stage name and a sha256"):
            store.get(stage, key)
    store.close()
    with pytest.raises(EdgexError, match="closed"):
        publish(store, {})


# --- damage

TREE = {"model.onnx": b"weights" * 10, "sub/log.txt": b"ok\n", "empty": b""}


def refused(store: Store, artifact: Artifact) -> str:
    with pytest.raises(BadArtifact) as error:
        store.get("stage", artifact.key)
    message = str(error.value)
    assert f"remove the folder {artifact.folder} to rebuild it" in message
    # Damage is not silently built over either.
    with pytest.raises(BadArtifact):
        store.publish("stage", artifact.key, {"seed": 1}, "code", lambda _: None)
    return message


@quick(150)
@given(data=st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root, Store(Path(root)) as store:
        artifact = publish(store, TREE)
        name = data.draw(st.sampled_from(["manifest.json", "model.onnx", "sub/log.txt"]))
        path = artifact.folder / name
        content = bytearray(path.read_bytes())
        path.chmod(0o644)
        if data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content)
        elif data.draw(st.booleans()):
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            path.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)))
        assert str(path) in refused(store, artifact)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "sub/log.txt", "empty"])
def test_a_missing_file_is_found(store: Store, name: str) -> None:
    artifact = publish(store, TREE)
    (artifact.folder / name).unlink()
    assert str(artifact.folder / name) in refused(store, artifact)


@pytest.mark.parametrize("name", ["added", "sub/added", "new/added"])
def test_an_added_file_is_found(store: Store, name: str) -> None:
    artifact = publish(store, TREE)
    fill(artifact.folder, {name: b""})
    assert "was not published here" in refused(store, artifact)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "."])
def test_a_link_to_the_same_bytes_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    artifact = publish(store, TREE)
    path = artifact.folder / name if name != "." else artifact.folder
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    refused(store, artifact)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"9" * 100_000,
        b'{"code": "", "inputs": {}, "files": {}}',
        b'{"code": "", "inputs": NaN, "files": {}}',
        b'{"code": "", "inputs": {}, "files": [["../../x", 1]]}',
        b'{"code": [], "inputs": [], "files": 3}',
        b"\xff\xfe",
    ],
)
def test_a_hostile_manifest_is_refused(store: Store, manifest: bytes) -> None:
    artifact = publish(store, TREE)
    path = artifact.folder / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(manifest)
    refused(store, artifact)


def test_a_result_of_another_key_is_refused(store: Store) -> None:
    first, second = publish(store, TREE), publish(store, TREE, {"seed": 2})
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)
    assert "manifest.json" in refused(store, first)


# --- single files


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    atomic_write(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.md"]


def test_sha256_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = bytes(range(256)) * 5000
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


# --- what a long stage goes on from


def test_what_is_unfinished_outlives_the_process_and_goes_with_the_result(tmp_path: Path) -> None:
    keys = [stage_key("stage", {"seed": seed}, "code") for seed in (1, 2)]
    with Store(tmp_path / "store") as store:
        place = store.unfinished("stage", keys[0])
        assert not place.exists()
        fill(place, {"state": b"half"})
        fill(store.unfinished("other", keys[0]), {"state": b"of another stage"})
    with Store(tmp_path / "store") as store:
        assert (store.unfinished("stage", keys[0]) / "state").read_bytes() == b"half"
        publish(store, {"whole": b""})
        assert not place.exists()
        assert (store.unfinished("other", keys[0]) / "state").exists()
        fill(store.unfinished("other", keys[1]), {})
        assert not (tmp_path / "store/.unfinished/stage").exists()


def test_of_one_stage_one_unfinished_result_is_kept(store: Store) -> None:
    first, second = (stage_key("stage", {"seed": seed}, "code") for seed in (1, 2))
    fill(store.unfinished("stage", first), {"state": b""})
    assert not store.unfinished("stage", second).exists()
    assert not store.unfinished("stage", first).exists()
