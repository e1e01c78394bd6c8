"""SIGKILL at any moment, then the same command again: the same artifacts, and nothing left over."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from kill_runs import Ended, leftovers, orphans, results, run_for, short_recipe

KILLS = 20
SEED = 20261122


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    (folder / "tmp").mkdir()
    short_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> tuple[dict[str, Any], Ended]:
    """What a run gives that nobody kills, and how it went."""
    ended = run_for(home / "recipe.yaml", home / "whole", None, home / "tmp", home)
    assert ended.code == 0, ended.err
    assert leftovers(home / "whole") == set()
    return results(home / "whole"), ended


@pytest.mark.timeout(600)
def test_killed_at_twenty_random_moments_it_ends_with_the_same_artifacts(
    home: Path, undisturbed: tuple[dict[str, Any], Ended]
) -> None:
    """Chains of kills, each going on from what the one before left, until a run gets through."""
    expected, whole = undisturbed
    chance = random.Random(SEED)
    recipe, temporary, out = home / "recipe.yaml", home / "tmp", home / "out"
    kills = finished = 0
    while kills < KILLS or not finished:
        # Up to a quarter of a whole run: far enough to finish some stage, too short for them all.
        limit = chance.uniform(0.1, whole.seconds / 4) if kills < KILLS else None
        ended = run_for(recipe, out, limit, temporary, home)
        assert orphans(temporary) == []
        if ended.code == 0:
            assert results(out) == expected
            assert leftovers(out) == set()
            finished += 1
            if kills < KILLS:
                shutil.rmtree(out)
        else:
            assert ended.code == -9, ended.err
            kills += 1


def test_nothing_is_left_in_the_temporary_folder(
    home: Path, undisturbed: tuple[dict[str, Any], Ended]
) -> None:
    # The caches of torch, and of NNCF's telemetry client (what it would send is switched off).
    names = {path.name for path in (home / "tmp").iterdir()}
    assert {name for name in names if not name.startswith("torchinductor_")} <= {".ses"}


def test_an_agent_does_not_outlive_the_host_that_is_killed(
    home: Path, undisturbed: tuple[dict[str, Any], Ended], tmp_path: Path
) -> None:
    """While it measures: the moment is chosen by what runs, not by the clock."""
    text = (home / "recipe.yaml").read_text().replace("duration_ms: 1\n", "duration_ms: 60000\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    (tmp_path / "tmp").mkdir()
    shutil.copytree(home / "whole", tmp_path / "out", symlinks=True)
    seconds = 2.0
    while True:
        ended = run_for(recipe, tmp_path / "out", seconds, tmp_path / "tmp", home)
        assert ended.code == -9, ended.err
        if "evaluate  cpu-x86-openvino-int8-b1: done before" in ended.err:
            break
        seconds *= 1.5
        assert seconds < 60, ended.err
    assert orphans(tmp_path / "tmp") == []
