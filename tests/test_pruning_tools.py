"""torch-pruning's network is compared as one of our class: it must compute what theirs does."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from narrow import SMALL, random_network

pytest.importorskip("torch_pruning")
sys.path.append(str(Path(__file__).parent / "benchmarks"))
import pruning_tools

from edgexception.recipe_file import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes/fashion-mnist-pruned.yaml"


def test_torch_prunings_network_computes_the_same_as_one_of_ours() -> None:
    network = random_network(SMALL)
    theirs = pruning_tools._at_ratio(network, (36, 36), 0.5, 4)
    ours = pruning_tools.of_our_class(theirs)
    assert ours.architecture.tail[-1] == SMALL.tail[-1] // 2
    x = torch.randn(2, 3, 36, 36)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


def test_the_largest_network_within_the_budget_is_taken() -> None:
    network = random_network(SMALL)
    whole = pruning_tools.macs_of(network, (36, 36))
    found = pruning_tools.magnitude_pruned(network, (36, 36), 0.5, 1)
    assert 0.4 * whole < pruning_tools.macs_of(found, (36, 36)) <= 0.5 * whole
    with pytest.raises(RuntimeError, match=r"more than 0.001 of the MACs"):
        pruning_tools.magnitude_pruned(network, (36, 36), 0.001, 1)


def test_a_shorter_recovery_is_all_that_differs_at_another_budget() -> None:
    recipe = load_recipe(RECIPE)
    found = pruning_tools.at_budget(recipe, 0.3, 7, 99)
    assert found.prune is not None
    assert (found.prune.macs, found.prune.recovery.steps) == (0.3, 7)
    assert found.prune.recovery.source.count == 99
    assert found.model_copy(update={"prune": recipe.prune}) == recipe


def test_rows() -> None:
    labels = np.arange(100) % 10
    right = np.eye(10, dtype=np.float32)[labels]
    wrong = right.copy()
    wrong[:3] = np.roll(wrong[:3], 1, axis=1)
    assert pruning_tools.accuracy_cells(right, wrong, labels).startswith("97.00% | -3.00 (-8.4")
    rounds = [np.full(50, 2_000_000), np.full(50, 2_000_000)]
    halved = [times // 2 for times in rounds]
    assert pruning_tools.latency_cells(halved, rounds) == "1.00 | 0.500 (0.500-0.500)"
