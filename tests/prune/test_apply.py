"""Smaller networks of the family with copied weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import SMALL, deeper_architectures, preprocess_of, random_network
from safetensors import safe_open
from safetensors.torch import save_file

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact
from edgexception.model.checkpoint import TrainedModel, load_checkpoint, save_checkpoint
from edgexception.model.cost import macs_of
from edgexception.model.graph import inference_graph
from edgexception.model.xception import Xception
from edgexception.prune.apply import pruned
from edgexception.prune.plan import PrunePlan, changes, load_prune_plan
from edgexception.prune.structure import structure_of

SIZE = (36, 36)
FLOAT_TOLERANCE = 1e-5
"""Of the largest logit. The same products are summed, without those with zero, but in blocks of
other sizes: each of some 20 sums in a row is off by a few roundings of 6e-8."""


def plan_of(architecture: Architecture, kept: dict[str, tuple[int, ...]]) -> PrunePlan:
    return PrunePlan(
        kept=kept,
        layers=changes(structure_of(architecture, SIZE), kept),
        importance="magnitude",
        ranking="global",
        align=1,
        budgets={},
        images=None,
    )


def some_kept(architecture: Architecture, seed: int) -> dict[str, tuple[int, ...]]:
    """Choose channels of every group at random, as many in each segment."""
    generator = np.random.default_rng(seed)
    kept = {}
    for group in structure_of(architecture, SIZE).groups:
        if group.fixed:
            continue
        parts = np.arange(group.width).reshape(group.segments, -1)
        count = generator.integers(1, parts.shape[1] + 1)
        if count < parts.shape[1]:
            chosen = [generator.permutation(part)[:count] for part in parts]
            kept[group.name] = tuple(int(channel) for channel in np.sort(np.concatenate(chosen)))
    return kept


def silence(network: Xception, kept: dict[str, tuple[int, ...]]) -> None:
    """Make every channel that goes exactly zero: all that writes it, and its BatchNorm."""
    for group in structure_of(network.architecture, SIZE).groups:
        if group.name not in kept:
            continue
        gone = sorted(set(range(group.width)) - set(kept[group.name]))
        for name, module in network.named_modules():
            if name.replace(".", "_") not in group.nodes:
                continue
            for key in ("weight", "bias"):
                if getattr(module, key, None) is not None:
                    getattr(module, key).data[gone] = 0.0


@settings(max_examples=20, deadline=None)
@given(deeper_architectures(), st.integers(0, 99))
def test_channels_that_are_zero_change_no_logit(architecture: Architecture, seed: int) -> None:
    network = random_network(architecture)
    kept = some_kept(architecture, seed)
    silence(network, kept)
    smaller = pruned(network, plan_of(architecture, kept))
    x = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected, found = network(x), smaller(x)
    assert (found - expected).abs().max() <= FLOAT_TOLERANCE * expected.abs().max()


@settings(max_examples=6, deadline=None)
@given(deeper_architectures(), st.integers(0, 99))
def test_a_plan_tells_what_the_smaller_network_costs(architecture: Architecture, seed: int) -> None:
    plan = plan_of(architecture, some_kept(architecture, seed))
    smaller = pruned(Xception(architecture), plan)
    assert type(smaller) is Xception
    assert plan.parameters == (architecture.parameters, smaller.architecture.parameters)
    assert sum(p.numel() for p in smaller.parameters()) == plan.parameters[1]
    preprocess = preprocess_of(SIZE)
    assert plan.macs[1] == macs_of(inference_graph(smaller, preprocess), preprocess)


@settings(max_examples=6, deadline=None)
@given(deeper_architectures(), st.integers(0, 99))
def test_one_plan_for_two_in_a_row(architecture: Architecture, seed: int) -> None:
    network = random_network(architecture)
    first = plan_of(architecture, some_kept(architecture, seed))
    between = pruned(network, first)
    second = plan_of(between.architecture, some_kept(between.architecture, seed + 1))
    first, second = (
        plan.model_copy(update={"budgets": {"macs": share}, "left": {"macs": left}})
        for plan, share, left in ((first, 0.5, 0.4), (second, 0.75, 0.6))
    )
    expected, joined = pruned(between, second), first.then(second)
    found = pruned(network, joined)
    assert found.architecture == expected.architecture
    state = found.state_dict()
    assert all(torch.equal(v, state[name]) for name, v in expected.state_dict().items())
    assert joined.layers == changes(structure_of(architecture, SIZE), joined.kept)
    assert joined.rounds == 2
    # Of the whole network: the second was asked to leave 0.75 of the 0.4 that there were.
    assert joined.budgets["macs"] == pytest.approx(0.3)
    assert joined.left["macs"] == pytest.approx(0.24)


def test_a_channel_that_is_not_zero_changes_the_logits() -> None:
    network = random_network(SMALL)
    kept = {"block5_sepconv1_pointwise": tuple(range(15))}
    x = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        expected, found = network(x), pruned(network, plan_of(SMALL, kept))(x)
    assert (found - expected).abs().max() > 100 * FLOAT_TOLERANCE * expected.abs().max()


def test_the_network_itself_stays_and_shares_nothing() -> None:
    network = random_network(SMALL)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    smaller = pruned(network, plan_of(SMALL, {"block1_conv1": (0, 2)}))
    with torch.no_grad():
        for value in smaller.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert smaller.architecture.stem == (2, 8)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"block9_conv": (0,)}, "block9_conv, which is no channel group"),
        ({"block1_conv1": (1, 4)}, "keeps channel 4 of block1_conv1, which has 4"),
    ],
)
def test_a_plan_of_another_network_is_refused(
    kept: dict[str, tuple[int, ...]], reason: str
) -> None:
    plan = plan_of(SMALL, {}).model_copy(update={"kept": kept})
    with pytest.raises(BadArtifact, match=reason):
        pruned(Xception(SMALL), plan)


def test_a_plan_reads_back_and_an_edited_one_is_refused(tmp_path: Path) -> None:
    plan = plan_of(SMALL, {"block1_conv1": (0, 2)})
    path = tmp_path / "prune.json"
    path.write_text(plan.to_json())
    assert load_prune_plan(path) == plan
    path.write_text(plan.to_json().replace("[0,2]", "[2,0]"))
    with pytest.raises(BadArtifact, match="not in ascending order"):
        load_prune_plan(path)
    with pytest.raises(BadArtifact, match="not a pruning plan"):
        load_prune_plan(tmp_path / "none.json")


def test_a_pruned_checkpoint_with_edited_widths_is_refused(tmp_path: Path) -> None:
    smaller = pruned(random_network(SMALL), plan_of(SMALL, {"block1_conv1": (0, 2)}))
    path = tmp_path / "pruned.safetensors"
    save_checkpoint(TrainedModel(smaller, None, preprocess_of(SIZE), {"format": "x"}), path)
    assert load_checkpoint(path).network.architecture.stem == (2, 8)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    own = json.loads(metadata["edgexception"])
    own["architecture"]["stem"] = [3, 8]
    save_file(tensors, path, {"edgexception": json.dumps(own)})
    with pytest.raises(BadArtifact, match=r"block1_conv1.weight.*\(2, 3, 3, 3\).*\(3, 3, 3, 3\)"):
        load_checkpoint(path)
