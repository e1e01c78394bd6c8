"""A build is refused before it begins where there is no room for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgexception.agent import machine, room
from edgexception.agent.protocol import AgentError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(bytes(10 << 20))
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(("free_mib", "fits"), [(104, True), (103, False)])
def test_two_engines_and_what_is_left_to_others_must_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, fits: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_mib << 20))
    if fits:
        room.check_disk(model.parent, [model, model])
        return
    with pytest.raises(AgentError, match="104 MiB of disk space are needed and 103 are") as caught:
        room.check_disk(model.parent, [model, model])
    assert caught.value.kind == "out-of-resources"


@pytest.mark.parametrize(
    ("runtime", "free_mib", "fits"),
    [
        ("tensorrt", 772, True),
        ("tensorrt", 771, False),
        ("tensorrt", None, True),
        ("onnxruntime", 1, True),
    ],
)
def test_tensorrt_must_find_the_least_memory_that_it_takes(
    model: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, free_mib: int | None, fits: bool
) -> None:
    free = None if free_mib is None else free_mib << 20
    monkeypatch.setattr(machine, "facts", lambda: {"memory": {"available_bytes": free}})
    if fits:
        room.check_memory(runtime, model)
        return
    with pytest.raises(AgentError, match=r"needs 772 MiB of memory .* 771 are available") as caught:
        room.check_memory(runtime, model)
    assert caught.value.kind == "out-of-resources"
