"""Which moves of channels are kept, and how wide each tensor's grid is: chosen by measured effect.

Rounding noise asks for a narrow grid, rare photos with large values for a wide one, and which of
the two hurts the logits more differs from tensor to tensor. On the full network the range of least
squared error is 15 dB worse than the plain extremes for some tensors, since it clips what a few
images need, and 6 dB better for others. So each tensor's effect on the logits is measured for
several widths around what was seen, before and after the move of its channels, in two folds: the
images of one give the ranges, and those of the other judge them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgexception.model.graph import layers
from edgexception.quantize.edges import input_edges
from edgexception.quantize.effect import Change, Values, effects
from edgexception.quantize.equalize import Move, Profile, plan_edges
from edgexception.quantize.groups import is_depthwise
from edgexception.quantize.ranges import grid_of_range

SHARES = (1.3, 1.15, 1.0, 0.85, 0.7, 0.55)
"""Tried ranges over the one that calibration saw."""
LEAST_GAIN = 0.05
"""Share of its group's measured error that a move must remove to be kept."""


@dataclass(frozen=True)
class Choice:
    """What was measured best."""

    moves: list[Move]
    ranges: dict[str, tuple[float, float]]
    """(low, high) of every edge of the plan but the photo, in the moved graph."""
    shares: dict[str, float]
    """Which of SHARES each range is."""
    noise: dict[str, float]
    """Noise-to-signal ratio of the logits that rounding the edge causes alone."""


def choose(
    graph: fx.GraphModule,
    moves: Sequence[Move],
    trials: Sequence[Sequence[Move]],
    profiles: Sequence[Profile],
    folds: Sequence[Iterable[torch.Tensor]],
    symmetric: bool,
) -> Choice:
    """Judge moves and ranges; `profiles` are those of the `folds`, two of each.

    `trials` are the moves that each profile proposes alone, and they are judged in place of
    `moves`, which were made from all images: factors fit the photos that they come from. Of 16
    photos (narrow network of recipes/digits.yaml, Fashion-MNIST), moves that were judged on photos
    they came from cost 10 dB on unseen ones; these cost nothing.
    """
    totals: dict[str, npt.NDArray[np.float64]] = {}
    for profile, proposed, judges in zip(profiles, trials, reversed(folds), strict=True):
        tried = _for_the_same_groups(moves, proposed)
        movable = {tensor: move for move in tried for tensor in move.group.tensors}
        changes = {
            edge: [
                change
                for move in _before_and_after(movable, edge)
                for change in _roundings(edge, profile, move, symmetric)
            ]
            for edge in plan_edges(graph)
        }
        for reader, pair in _weight_changes(graph, tried):
            changes.setdefault(reader, []).extend(pair)
        for name, found in effects(graph, judges, changes).items():
            totals[name] = totals[name] + found / 2 if name in totals else found / 2
    kept = [move for move in moves if _helps(graph, move, totals)]
    moved = {tensor: move for move in kept for tensor in move.group.tensors}
    whole = Profile.merged(profiles)
    ranges, shares, noise = {}, {}, {}
    for edge in plan_edges(graph):
        found = _part(totals[edge], after=edge in moved)
        best = int(np.argmin(found))
        shares[edge], noise[edge] = SHARES[best], float(found[best])
        low, high = whole.range(edge, moved.get(edge))
        ranges[edge] = (low * shares[edge], high * shares[edge])
    return Choice(kept, ranges, shares, noise)


def _for_the_same_groups(moves: Sequence[Move], proposed: Sequence[Move]) -> list[Move]:
    """Return what was proposed for the groups of `moves`: where nothing, a move without effect."""
    found = {move.group.tensors[0]: move for move in proposed}
    return [
        found.get(move.group.tensors[0])
        or dataclasses.replace(move, factors=torch.ones_like(move.factors), shift=None)
        for move in moves
    ]


def _before_and_after(movable: Mapping[str, Move], edge: str) -> tuple[Move | None, ...]:
    return (None, movable[edge]) if edge in movable else (None,)


def _part(found: npt.NDArray[np.float64], *, after: bool) -> npt.NDArray[np.float64]:
    return found[len(SHARES) : 2 * len(SHARES)] if after else found[: len(SHARES)]


def _helps(
    graph: fx.GraphModule, move: Move, totals: Mapping[str, npt.NDArray[np.float64]]
) -> bool:
    """Compare a group's error, tensors and readers' weights, before and after its move."""
    edges = [tensor for tensor in move.group.tensors if tensor in input_edges(graph)]
    before, after = (
        sum(float(_part(totals[edge], after=moved).min()) for edge in edges)
        + sum(float(totals[reader][-1 if moved else -2]) for reader in _mixing(graph, move))
        for moved in (False, True)
    )
    return after < (1 - LEAST_GAIN) * before


def _mixing(graph: fx.GraphModule, move: Move) -> list[str]:
    """Return the readers whose weights pay for unequal columns."""
    return [name for name in move.group.readers if not is_depthwise(layers(graph)[name])]


def _roundings(edge: str, profile: Profile, move: Move | None, symmetric: bool) -> list[Change]:
    """Return the rounding error of a tensor for each share of its range."""
    low, high = profile.range(edge, move)
    factors = torch.ones(1) if move is None else move.factors
    shift = torch.zeros(1) if move is None or move.shift is None else move.shift
    changes = []
    for share in SHARES:
        scale, zero = grid_of_range(low * share, high * share, symmetric)
        steps = (scale / factors).float()
        zeros = (zero - shift / steps).float()
        changes.append(_rounding(edge, steps, zeros, (-128, 127) if symmetric else (0, 255)))
    return changes


def _rounding(
    edge: str, steps: torch.Tensor, zeros: torch.Tensor, levels: tuple[int, int]
) -> Change:
    """Round with the step and zero of each channel; torch's own fake quantization takes 8 times as
    long.
    """

    def change(values: Values) -> torch.Tensor:
        x = values[edge]
        step, zero = (v.view(-1, *[1] * (x.ndim - 2)) for v in (steps, zeros))
        exact = x / step + zero
        return exact.round().clamp_(*levels).sub_(exact).mul_(step)

    return change


def _weight_changes(
    graph: fx.GraphModule, moves: Sequence[Move]
) -> Iterable[tuple[str, list[Change]]]:
    """Yield the output error of every mixing reader from its rounded weights, before and after."""
    sources = {name: edge for edge, readers in input_edges(graph).items() for name in readers}
    for move in moves:
        for name in _mixing(graph, move):
            layer = layers(graph)[name]
            columns = move.factors.float().view(1, -1, *[1] * (layer.weight.ndim - 2))
            errors = [_rounding_error(layer.weight.detach(), f) for f in (1.0, columns)]
            yield name, [_output_change(layer, sources[name], error) for error in errors]


def _rounding_error(weight: torch.Tensor, columns: torch.Tensor | float) -> torch.Tensor:
    moved = weight / columns
    steps = moved.abs().flatten(1).amax(dim=1).clamp_min(1e-30) / 127
    steps = steps.view(-1, *[1] * (weight.ndim - 1))
    return (torch.round(moved / steps) * steps - moved) * columns


def _output_change(layer: nn.Conv2d | nn.Linear, source: str, error: torch.Tensor) -> Change:
    def change(values: Values) -> torch.Tensor:
        x = values[source]
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(x, error)
        changed: torch.Tensor = layer._conv_forward(x, error, None)
        return changed

    return change
