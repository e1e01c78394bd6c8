"""A state file is believed only if it is exactly what this training would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from edgexception.errors import BadArtifact
from edgexception.train.state import Keeper, State

EXPECTED = {"network/a": torch.arange(6.0).view(2, 3), "network/n": torch.tensor(3)}


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path / "training")


def test_what_was_saved_is_loaded(keeper: Keeper) -> None:
    assert keeper.load(EXPECTED, 10) is None
    keeper.save(State(4, EXPECTED))
    found = keeper.load(EXPECTED, 10)
    assert found is not None
    assert found.steps == 4
    assert all(torch.equal(found.tensors[name], EXPECTED[name]) for name in EXPECTED)
    assert [path.name for path in keeper.folder.iterdir()] == ["training.safetensors"]


def test_it_is_due_after_a_while(tmp_path: Path) -> None:
    assert Keeper(tmp_path, every_s=0.0).due()
    assert not Keeper(tmp_path, every_s=1000.0).due()


@pytest.mark.parametrize(
    ("tensors", "steps", "reason"),
    [
        ({}, "4", "other tensors"),
        ({"network/b": torch.zeros(1)}, "4", "other tensors"),
        ({"network/a": torch.zeros(2, 2)}, "4", "has the shape"),
        ({"network/a": torch.zeros(2, 3, dtype=torch.float16)}, "4", "has the type"),
        ({"network/a": torch.zeros(2, 3)}, "10", "10 steps of 10"),
        ({"network/a": torch.zeros(2, 3)}, "0", "0 steps of 10"),
        ({"network/a": torch.zeros(2, 3)}, "-1", "how many steps"),
        ({"network/a": torch.zeros(2, 3)}, "9" * 5000, "how many steps"),
        ({"network/a": torch.zeros(2, 3)}, "\u0664", "how many steps"),
        ({"network/a": torch.zeros(2, 3)}, None, "how many steps"),
    ],
)
def test_another_state_is_refused(
    keeper: Keeper, tensors: dict[str, torch.Tensor], steps: str | None, reason: str
) -> None:
    keeper.folder.mkdir()
    content = {**EXPECTED, **tensors} if tensors else {}
    if "network/b" in tensors:
        content.pop("network/n")
    save_file(content, keeper.path, metadata=None if steps is None else {"steps": steps})
    with pytest.raises(BadArtifact, match=reason) as error:
        keeper.load(EXPECTED, 10)
    assert "remove this file" in str(error.value)


def test_a_link_is_not_followed(keeper: Keeper, tmp_path: Path) -> None:
    keeper.save(State(4, EXPECTED))
    keeper.path.rename(tmp_path / "elsewhere")
    keeper.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadArtifact, match="is a link"):
        keeper.load(EXPECTED, 10)


GOOD = save(EXPECTED, metadata={"steps": "4"})


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damage_is_refused_or_harmless(keeper: Keeper, data: st.DataObject) -> None:
    """A pickle, an empty file, one cut short or with bytes changed: never another exception."""
    cut = st.integers(0, len(GOOD)).map(lambda end: GOOD[:end])
    changed = st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda c: GOOD[: c[0]] + c[1] + GOOD[c[0] + len(c[1]) :]
    )
    keeper.folder.mkdir(exist_ok=True)
    keeper.path.write_bytes(data.draw(cut | changed | st.binary(max_size=40)))
    try:
        found = keeper.load(EXPECTED, 10)
    except BadArtifact:
        return
    assert found is not None
    assert 0 < found.steps < 10
    assert {n: t.shape for n, t in found.tensors.items()} == {
        n: t.shape for n, t in EXPECTED.items()
    }
