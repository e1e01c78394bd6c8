"""The choice of moves and ranges: by measured effect, on photos that they were not made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from narrow import random_images, run_torch, small_graph
from torch import fx

from edgexception.model.graph import layers, to_graph_input
from edgexception.quantize.choice import SHARES, Choice, _helps, choose
from edgexception.quantize.equalize import Move, Profile, apply_moves, plan_edges
from edgexception.quantize.groups import channel_groups

PIXELS = random_images(16, (40, 40), seed=13)
FOLDS = [list(to_graph_input(torch.from_numpy(half)).split(4)) for half in (PIXELS[:8], PIXELS[8:])]
TENSOR = "block3_sepconv1_depthwise"
CHANNEL = 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def chosen(graph: fx.GraphModule, *moves: Move, symmetric: bool = False) -> Choice:
    profiles = [Profile.of(graph, fold) for fold in FOLDS]
    return choose(graph, moves, [moves, moves], profiles, FOLDS, symmetric)


def one_channel(graph: fx.GraphModule, factor: float) -> Move:
    (group,) = (group for group in channel_groups(graph) if TENSOR in group.tensors)
    factors = torch.ones(8, dtype=torch.float64)
    factors[CHANNEL] = factor
    return Move(group, f"x{factor:g}", factors, None, 0.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_large_values_that_the_logits_do_not_see_are_clipped(symmetric: bool) -> None:
    """The loudest channel is multiplied by zeros: its range is of no use to the others."""
    graph = small_graph()
    before = chosen(graph, symmetric=symmetric)
    with torch.no_grad():
        layers(graph)[TENSOR].weight[CHANNEL] *= 8
        layers(graph)["block3_sepconv1_pointwise"].weight[:, CHANNEL] = 0
    after = chosen(graph, symmetric=symmetric)
    assert before.shares[TENSOR] > 0.8
    assert after.shares[TENSOR] == min(SHARES)


def test_large_values_that_matter_are_kept() -> None:
    graph = apply_moves(small_graph(), [one_channel(small_graph(), 8.0)])
    assert chosen(graph).shares[TENSOR] > min(SHARES)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_move_is_kept_only_where_it_helps(symmetric: bool) -> None:
    graph = small_graph()
    bad = one_channel(graph, 64.0)
    plain = chosen(graph, symmetric=symmetric)
    dropped = chosen(graph, bad, symmetric=symmetric)
    assert dropped.moves == []
    assert dropped.ranges == plain.ranges
    outlier = apply_moves(graph, [bad])
    good = one_channel(outlier, 1 / 64)
    kept = chosen(outlier, good, symmetric=symmetric)
    assert kept.moves == [good]
    assert kept.ranges[TENSOR] == pytest.approx(plain.ranges[TENSOR], rel=1e-3)
    assert kept.noise[TENSOR] == pytest.approx(plain.noise[TENSOR], rel=0.05)


def test_a_move_stands_for_what_each_half_proposes_alone() -> None:
    """A move that all photos propose is dropped if those of one half alone would not help."""
    outlier = apply_moves(small_graph(), [one_channel(small_graph(), 64.0)])
    good, bad = one_channel(outlier, 1 / 64), one_channel(outlier, 64.0)
    profiles = [Profile.of(outlier, fold) for fold in FOLDS]
    for trials, kept in (
        ([[good], [good]], [good]),
        ([[good], []], [good]),
        ([[], []], []),
        ([[good], [bad]], []),
    ):
        assert choose(outlier, [good], trials, profiles, FOLDS, False).moves == kept


def test_a_move_that_ruins_its_readers_weights_is_dropped() -> None:
    """The tensor gains, but a reader's rows then have one large column each."""
    graph = small_graph()
    outlier = apply_moves(graph, [one_channel(graph, 1 / 4)])
    with torch.no_grad():  # a quiet channel to which the logits are deaf, whatever its grid
        layers(outlier)["block3_sepconv1_pointwise"].weight[:, CHANNEL] *= 1e-3
    move = one_channel(outlier, 1e-5)
    assert chosen(outlier, move).moves == []


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_edge_gets_a_range_around_zero(symmetric: bool) -> None:
    graph = small_graph()
    choice = chosen(graph, symmetric=symmetric)
    profile = Profile.merged([Profile.of(graph, fold) for fold in FOLDS])
    assert list(choice.ranges) == list(choice.shares) == list(choice.noise) == plan_edges(graph)
    for edge, (low, high) in choice.ranges.items():
        assert low <= 0 <= high
        assert choice.shares[edge] in SHARES
        assert (low, high) == pytest.approx([choice.shares[edge] * v for v in profile.range(edge)])
        assert choice.noise[edge] > 0


def test_the_other_half_judges() -> None:
    """Faint photos give narrow ranges that look right on faint photos, and clip all others."""
    graph = small_graph()
    faint = (PIXELS[:8].astype(np.float32) * 0.1 + 110).astype(np.uint8)
    folds = [[to_graph_input(torch.from_numpy(half))] for half in (faint, PIXELS[8:])]
    profiles = [Profile.of(graph, fold) for fold in folds]
    crossed = choose(graph, [], [[], []], profiles, folds, False)
    own = choose(graph, [], [[], []], profiles[::-1], folds, False)
    assert crossed.noise[TENSOR] > 3 * own.noise[TENSOR]
    assert crossed.shares[TENSOR] == max(SHARES)  # not wide enough yet for the other half
    assert crossed.ranges[TENSOR] == pytest.approx(
        [max(SHARES) / own.shares[TENSOR] * end for end in own.ranges[TENSOR]]
    )


def test_noise_is_what_rounding_the_edge_alone_costs() -> None:
    graph = small_graph()
    choice = chosen(graph)
    low, high = choice.ranges[TENSOR]
    step = (high - low) / 255

    class Rounded(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name == TENSOR:
                assert isinstance(value, torch.Tensor)
                return (value / step).round() * step
            return value

    with torch.inference_mode():
        rounded = Rounded(graph).run(to_graph_input(torch.from_numpy(PIXELS))).numpy()
    exact = run_torch(graph, PIXELS)
    measured = float(((rounded - exact) ** 2).sum() / (exact**2).sum())
    assert choice.noise[TENSOR] == pytest.approx(measured, rel=0.6)


def test_nothing_is_changed() -> None:
    graph = small_graph()
    before = {name: layer.weight.clone() for name, layer in layers(graph).items()}
    chosen(graph, one_channel(graph, 2.0))
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(graph).items())


@pytest.mark.parametrize(("after", "kept"), [(0.5, True), (5.0, False)])
def test_a_move_also_answers_for_its_readers_weights(after: float, kept: bool) -> None:
    """The tensor's error halves; the reader's weights lose less than that, or more."""
    graph = small_graph()
    tensor = np.array([4.0] * len(SHARES) + [2.0] * len(SHARES))
    totals = {TENSOR: tensor, "block3_sepconv1_pointwise": np.array([0.5, after])}
    assert _helps(graph, one_channel(graph, 2.0), totals) == kept
