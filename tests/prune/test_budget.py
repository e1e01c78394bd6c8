"""The widths that a budget leaves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import preprocess_of, small_graph
from onnx import numpy_helper

from edgexception.architecture import Architecture
from edgexception.errors import UsageError
from edgexception.export.onnx_graph import to_onnx
from edgexception.prune.budget import Scores, solve
from edgexception.prune.plan import Structure, changes
from edgexception.prune.structure import structure_of
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.nominal import nominal_plan

NARROW = Architecture(
    stem=(12, 12), entry=((12, 12),), middle=((12, 12),), exit=(12,), tail=(12,), head=(5,)
)
STRUCTURE = structure_of(NARROW, (40, 40))
SEGMENTED = structure_of(
    NARROW.model_copy(update={"entry": ((24, 24),), "middle": ((12, 24),), "segments": 3}), (40, 40)
)
FREE = [group for group in STRUCTURE.groups if not group.fixed]


def scores_of(structure: Structure, seed: int) -> Scores:
    generator = np.random.default_rng(seed)
    return {group.name: generator.uniform(0.1, 2.0, group.width) ** 3 for group in structure.groups}


def share(structure: Structure, kept: dict[str, tuple[int, ...]], budget: str) -> float:
    pairs = [getattr(change, budget) for change in changes(structure, kept)]
    return sum(after for _, after in pairs) / sum(before for before, _ in pairs)


def loss(scores: Scores, kept: dict[str, tuple[int, ...]]) -> float:
    return sum(
        scores[name].sum() * math.log(scores[name].sum() / scores[name][list(channels)].sum())
        for name, channels in kept.items()
    )


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from((STRUCTURE, SEGMENTED)),
    st.integers(0, 9),
    st.sampled_from(("global", "local")),
    st.sampled_from((1, 2, 4)),
    st.dictionaries(st.sampled_from(("macs", "parameters")), st.floats(0.7, 0.99), min_size=1),
)
def test_budgets_hold_and_widths_are_aligned(
    structure: Structure, seed: int, ranking: Any, align: int, budgets: dict[str, float]
) -> None:
    scores = scores_of(structure, seed)
    kept = solve(structure, scores, ranking, align, budgets)
    for budget, most in budgets.items():
        assert share(structure, kept, budget) <= most
    for group in structure.groups:
        channels = kept.get(group.name, tuple(range(group.width)))
        assert len(channels) == group.width or len(channels) % align == 0
        assert not (group.fixed and group.name in kept)
        inside = np.array(channels) // (group.width // group.segments)
        assert len(set(np.bincount(inside, minlength=group.segments))) == 1
        if group.segments == 1 and group.name in kept:
            gone = sorted(set(range(group.width)) - set(channels))
            assert scores[group.name][gone].max() <= scores[group.name][list(channels)].min()


@pytest.mark.parametrize("seed", range(4))
def test_global_ranking_loses_hardly_more_than_the_best_of_all_widths(seed: int) -> None:
    scores = scores_of(STRUCTURE, seed)
    found = solve(STRUCTURE, scores, "global", 4, {"macs": 0.5})
    best = math.inf
    for widths in itertools.product((4, 8, 12), repeat=len(FREE)):
        kept = {
            group.name: tuple(np.argsort(-scores[group.name])[:width].tolist())
            for group, width in zip(FREE, widths, strict=True)
        }
        if share(STRUCTURE, kept, "macs") <= 0.5:
            best = min(best, loss(scores, kept))
    assert loss(scores, found) <= 1.1 * best
    # and no group could get its channels back
    for name in found:
        wider = {other: channels for other, channels in found.items() if other != name}
        assert share(STRUCTURE, wider, "macs") > 0.5


def test_local_ranking_keeps_one_share_of_every_group() -> None:
    kept = solve(STRUCTURE, scores_of(STRUCTURE, 0), "local", 1, {"macs": 0.5})
    assert set(kept) == {group.name for group in FREE}
    assert len({len(channels) for channels in kept.values()}) == 1
    wider = {name: tuple(range(len(channels) + 1)) for name, channels in kept.items()}
    assert share(STRUCTURE, wider, "macs") > 0.5, "a larger share holds the budget, too"


def test_a_width_that_is_not_cut_stays_as_it_is() -> None:
    kept = solve(STRUCTURE, scores_of(STRUCTURE, 0), "global", 8, {"macs": 0.9})
    assert kept
    assert all(len(channels) == 8 for channels in kept.values()), "12 is left alone or becomes 8"


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_a_budget_that_cannot_be_met_names_the_nearest(ranking: Any, budget: str) -> None:
    scores = scores_of(STRUCTURE, 0)
    with pytest.raises(UsageError, match=f"prune.{budget}: 0.01 .* nearest possible value is") as e:
        solve(STRUCTURE, scores, ranking, 4, {budget: 0.01})
    nearest = float(str(e.value).split("nearest possible value is ")[1].split(",")[0])
    kept = solve(STRUCTURE, scores, ranking, 4, {budget: nearest})
    assert {len(channels) for channels in kept.values()} == {4}
    with pytest.raises(UsageError):
        solve(STRUCTURE, scores, ranking, 4, {budget: nearest - 0.0002})


def test_an_alignment_larger_than_a_group_names_the_nearest() -> None:
    for structure, refused, nearest in ((STRUCTURE, 16, 12), (SEGMENTED, 8, 6)):
        scores = scores_of(structure, 0)
        with pytest.raises(UsageError, match=f"prune.align: {refused} .* value is {nearest}$"):
            solve(structure, scores, "global", refused, {"macs": 0.9})
        solve(structure, scores, "global", 4, {"macs": 0.9})


def test_channels_without_importance_go_first() -> None:
    scores = {name: np.ones_like(values) for name, values in scores_of(STRUCTURE, 0).items()}
    zero = {FREE[1].name: [0, 3, 5, 11], FREE[4].name: [1, 2]}
    for name, channels in zero.items():
        scores[name][channels] = 0.0
    without = {name: tuple(sorted(set(range(12)) - set(c))) for name, c in zero.items()}
    budget = share(STRUCTURE, without, "macs")
    assert solve(STRUCTURE, scores, "global", 1, {"macs": budget + 1e-9}) == without


@pytest.mark.parametrize("int8", [False, True])
def test_a_size_is_that_of_the_exported_weights(int8: bool) -> None:
    graph = small_graph(NARROW)
    plan = nominal_plan(graph, "symmetric") if int8 else None
    proto = to_onnx(
        graph,
        preprocess_of((40, 40)),
        None,
        plan=plan,
        dialect=DIALECTS["tensorrt"] if int8 else None,
    )
    tensors = [t for t in proto.graph.initializer if "weight" in t.name or "bias" in t.name]
    written = sum(
        numpy_helper.to_array(t).nbytes for t in tensors if not t.name.endswith("zero_point")
    )
    found = sum(la.bytes_as(STRUCTURE.widths, int8=int8) for la in STRUCTURE.layers)
    assert found == written
