"""Equalization: planted outlier channels are brought down, and the logits stay."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from narrow import random_images, run_torch, small_graph, sqnr_db
from torch import fx

from edgexception.model.graph import INPUT, layers, to_graph_input
from edgexception.quantize.choice import choose
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.equalize import (
    LARGEST_FACTOR,
    Channels,
    Move,
    Profile,
    _rounding,
    apply_moves,
    plan_edges,
    propose,
)
from edgexception.quantize.groups import ChannelGroup, channel_groups, rescale

PIXELS = random_images(16, (40, 40), seed=11)
FOLDS = [list(to_graph_input(torch.from_numpy(half)).split(4)) for half in (PIXELS[:8], PIXELS[8:])]
OUTLIER = "block3_sepconv1_depthwise"
CHANNEL = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def group_of(graph: fx.GraphModule, tensor: str) -> ChannelGroup:
    (group,) = (g for g in channel_groups(graph) if tensor in g.tensors)
    return group


def planted() -> fx.GraphModule:
    """A network with the same logits as `small_graph`, and one channel 64 times as loud."""
    graph = small_graph()
    factors = torch.ones(8, dtype=torch.float64)
    factors[CHANNEL] = 64
    rescale(graph, group_of(graph, OUTLIER), factors)
    return graph


def profiles_of(graph: fx.GraphModule) -> list[Profile]:
    return [Profile.of(graph, fold) for fold in FOLDS]


@pytest.fixture(scope="module")
def proposed() -> tuple[fx.GraphModule, list[Profile], list[Move]]:
    graph = planted()
    profiles = profiles_of(graph)
    return graph, profiles, propose(graph, Profile.merged(profiles))


def test_an_outlier_channel_is_proposed_to_be_brought_down(
    proposed: tuple[fx.GraphModule, list[Profile], list[Move]],
) -> None:
    _, _, moves = proposed
    (move,) = (move for move in moves if OUTLIER in move.group.tensors)
    others = np.delete(move.factors.numpy(), CHANNEL)
    assert float(move.factors[CHANNEL]) < others.min() / 8
    for move in moves:
        assert (move.factors > 0).all()
        assert float(move.factors.max() / move.factors.min()) <= LARGEST_FACTOR * 1.001
        assert move.shift is None or move.group.shiftable


def test_moving_the_outlier_wins_decibels(
    proposed: tuple[fx.GraphModule, list[Profile], list[Move]],
) -> None:
    graph, profiles, moves = proposed
    plain = choose(graph, [], [[], []], profiles, FOLDS, False)
    trials = [propose(graph, profile) for profile in profiles]
    choice = choose(graph, moves, trials, profiles, FOLDS, False)
    assert OUTLIER in {move.group.tensors[0] for move in choice.moves}
    gain = 10 * np.log10(plain.noise[OUTLIER] / choice.noise[OUTLIER])
    assert gain > 6


def test_moves_leave_the_logits_and_the_graph(
    proposed: tuple[fx.GraphModule, list[Profile], list[Move]],
) -> None:
    graph, _, moves = proposed
    before = {name: layer.weight.clone() for name, layer in layers(graph).items()}
    moved = apply_moves(graph, moves)
    assert sqnr_db(run_torch(graph, PIXELS), run_torch(moved, PIXELS)) > 100
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(graph).items())
    assert not torch.equal(layers(moved)[OUTLIER].weight, before[OUTLIER])


def test_the_range_after_a_move_is_that_of_the_moved_graph(
    proposed: tuple[fx.GraphModule, list[Profile], list[Move]],
) -> None:
    graph, profiles, moves = proposed
    whole = Profile.merged(profiles)
    moved = Profile.merged(profiles_of(apply_moves(graph, moves)))
    by_tensor = {tensor: move for move in moves for tensor in move.group.tensors}
    assert by_tensor.keys() & set(plan_edges(graph))
    for edge in plan_edges(graph):
        expected = whole.range(edge, by_tensor.get(edge))
        assert moved.range(edge) == pytest.approx(expected, rel=1e-3, abs=1e-4), edge


def test_an_even_group_stays() -> None:
    """Channels that are equally loud and around zero have nothing to gain."""
    graph = small_graph()
    group = group_of(graph, OUTLIER)
    found = Profile.merged(profiles_of(graph)).channels(OUTLIER)
    middle, half = (found.low + found.high) / 2, (found.high - found.low) / 2
    rescale(graph, group, 1 / half, middle)
    moves = propose(graph, Profile.merged(profiles_of(graph)))
    assert OUTLIER not in {move.group.tensors[0] for move in moves}


def test_channels_off_their_middle_are_centred() -> None:
    """A constant per channel takes most of the grid; only a shift can give it back."""
    graph = small_graph()
    shift = torch.linspace(-40, 40, 8, dtype=torch.float64)
    rescale(graph, group_of(graph, OUTLIER), torch.ones(8), shift)
    profiles = profiles_of(graph)
    moves = propose(graph, Profile.merged(profiles))
    (move,) = (move for move in moves if OUTLIER in move.group.tensors)
    assert move.shift is not None
    away = shift.abs() > 10
    assert torch.equal(move.shift[away].sign(), -shift[away].sign())
    assert (move.shift.abs() > 0.4 * shift.abs())[away].all()
    plain, centred = (choose(graph, m, [m, m], profiles, FOLDS, False) for m in ([], [move]))
    assert centred.moves == [move]
    assert 10 * np.log10(plain.noise[OUTLIER] / centred.noise[OUTLIER]) > 3


def test_profiles_of_halves_merge_to_that_of_the_whole() -> None:
    graph = small_graph()
    merged = Profile.merged(profiles_of(graph))
    whole = Profile.of(graph, [*FOLDS[0], *FOLDS[1]])
    assert merged.extremes.keys() == whole.extremes.keys() == merged.sums.keys()
    for name, extremes in whole.extremes.items():
        assert extremes.shape[:2] == (2, len(PIXELS))
        assert torch.equal(merged.extremes[name], extremes)
        # The slopes have other probes.
        torch.testing.assert_close(merged.sums[name][:2], whole.sums[name][:2])


def test_a_profile_is_what_the_tensors_were() -> None:
    graph = small_graph()
    profile = Profile.of(graph, FOLDS[0])
    logits = torch.from_numpy(run_torch(graph, PIXELS[:8]))
    found = profile.channels("predictions")
    torch.testing.assert_close(profile.extremes["predictions"], torch.stack((logits, logits)))
    torch.testing.assert_close(found.mean.float(), logits.mean(0))
    torch.testing.assert_close(found.power.float(), logits.square().mean(0))
    assert found.slope.tolist() == [1.0] * 5  # the logits' slope is the probe itself


def test_room_is_given_where_values_vary_but_not_below_a_relu() -> None:
    graph = small_graph()
    profile = Profile.merged(profiles_of(graph))
    rectified = profile.channels("block2_sepconv2_act")
    assert (rectified.low == 0).all()
    assert profile.range("block2_sepconv2_act")[0] == 0
    high = profile.extremes[OUTLIER][1].double()
    mixed = profile.channels(OUTLIER)
    assert (mixed.low < 0).any()
    varies = (high.amax(0) > 0) & (high.mean(0) > 0)
    assert (mixed.high > high.mean(0))[varies].all()
    assert (mixed.low <= 0).all()
    assert (mixed.high >= 0).all()


def test_plan_edges_are_those_of_a_plan_but_the_photo() -> None:
    graph = small_graph()
    assert set(plan_edges(graph)) == {*input_edges(graph), *output_edges(graph)} - {INPUT}
    assert len(plan_edges(graph)) == len(set(plan_edges(graph)))


def test_moves_are_the_same_when_made_again() -> None:
    graph = planted()
    first, second = (propose(copy.deepcopy(graph), profiles_of(graph)[0]) for _ in range(2))
    assert [move.how for move in first] == [move.how for move in second]


def test_the_predicted_rounding_is_that_of_the_moved_back_tensor() -> None:
    """Of channels reaching 8 and 1, the first halved: the step is 4/127, and doubles moved back."""
    high, slope = torch.tensor([8.0, 1.0]), torch.tensor([1.0, 3.0])
    found = Channels(-high, high, torch.zeros(2), torch.ones(2), slope)
    predicted = _rounding(found, torch.tensor([0.5, 1.0]), None)
    assert predicted == pytest.approx((4 / 127) ** 2 / 12 * (1 / 0.25 + 3), rel=1e-5)
