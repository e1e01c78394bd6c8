"""Equalization: rescale and shift channels so that one grid per tensor serves them all.

A grid per tensor gives every channel the step of the loudest one. Where the channels can be moved
freely (see `groups`), each may use more of the grid. Two things are lost on the way: columns of
unequal size cost weight precision, and a channel that was quiet in calibration and is amplified
clips on the first photo where it is loud. So a group's factors are proposed by predicted effect on
the logits, weights included, from ranges with room for photos that were not seen; and what is
proposed is kept only where it measurably helps (`ptq`), on photos that its ranges come not from.

The prediction, with G_c the mean power of the logits' slope at channel c over images, probes and
positions, D the step of the tensor's grid and s_c the factors: rounding a tensor costs
D^2 / 12 sum_c G_c / s_c^2, and rounding row o of a reader's weights with step d_o costs
d_o^2 / 12 G_o sum_c s_c^2 E x_c^2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from edgexception.model.graph import INPUT, layers
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.effect import linearised
from edgexception.quantize.groups import ChannelGroup, channel_groups, is_depthwise, rescale

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Exponents of factor = (tensor's range / channel's range) ** strength; 1 makes all equal."""
CAPS = (0.75, 0.9, 0.98)
"""Shares of the channels that keep their size while the louder ones are brought down to theirs."""
LARGEST_FACTOR = 16.0
"""Bound on how far one channel is scaled against another."""
LEAST_GAIN = 0.1
"""Share of its predicted error that a group must lose, or its channels stay as they are."""
SPREAD = 2.0
"""Standard deviations over images that are added to a channel's mean extreme. The plain maximum of
a few images follows the loudest of them, and unseen ones go beyond it."""


@dataclass(frozen=True)
class Channels:
    """What calibration says of the channels of a tensor, each (channels,) in float64."""

    low: torch.Tensor
    high: torch.Tensor
    """Range to expect: mean of the images' extremes, plus their spread."""
    mean: torch.Tensor
    power: torch.Tensor
    """Mean of x^2 over images and positions."""
    slope: torch.Tensor
    """Sum over positions of the squared slopes of the logits, mean over images and probes."""


@dataclass(frozen=True)
class Move:
    """What is done to one group."""

    group: ChannelGroup
    how: str
    """For reports: "strength 0.5" or "cap 0.9", and "centred" if the channels are shifted, too."""
    factors: torch.Tensor
    shift: torch.Tensor | None
    predicted: float
    """Noise-to-signal ratio of the logits, up to a constant, that the group is left with."""


@dataclass(frozen=True)
class Profile:
    """What calibration images say of every channel of some tensors, by tensor."""

    extremes: dict[str, torch.Tensor]
    """Least and greatest value in every image: (2, images, channels)."""
    sums: dict[str, torch.Tensor]
    """Sums over images of x, x^2 (means over positions) and of the squared slopes (summed over
    positions): (3, channels) in float64."""

    @staticmethod
    def of(graph: fx.GraphModule, batches: Iterable[torch.Tensor], seed: int = 0) -> Profile:
        """Run the float graph over `batches`; tensors are the edges of a plan and layer outputs."""
        names = list(dict.fromkeys((*plan_edges(graph), *layers(graph))))
        generator = torch.Generator().manual_seed(seed)
        extremes: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            values, slopes, _ = linearised(graph, batch, names, generator, probes=1)
            for name in names:
                x = values[name]
                x = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
                g = slopes[name].view(x.shape)
                extremes[name].append(torch.stack(torch.aminmax(x, dim=2)))
                means = (x.mean(dim=2).sum(0), x.square().mean(dim=2).sum(0))
                found = torch.stack((*means, g.square().sum(dim=(0, 2)))).double()
                sums[name] = sums[name] + found if name in sums else found
        return Profile({name: torch.cat(parts, dim=1) for name, parts in extremes.items()}, sums)

    @staticmethod
    def merged(parts: Sequence[Profile]) -> Profile:
        """Return the profile of all parts' images."""
        names = parts[0].extremes
        return Profile(
            {name: torch.cat([part.extremes[name] for part in parts], dim=1) for name in names},
            {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in names},
        )

    def channels(self, name: str) -> Channels:
        """Return a tensor's channels."""
        low, high = self.extremes[name].double()
        spread = [SPREAD * v.std(dim=0) if len(v) > 1 else 0.0 for v in (low, high)]
        return Channels(
            # A tensor that never goes below zero (a ReLU's output) is given no room there.
            low.mean(0) - spread[0] if bool((low < 0).any()) else torch.zeros_like(low[0]),
            high.mean(0) + spread[1] if bool((high > 0).any()) else torch.zeros_like(high[0]),
            *(self.sums[name] / len(low)),
        )

    def range(self, name: str, move: Move | None = None) -> tuple[float, float]:
        """Return the (low, high) that a tensor reached, with zero, before or after a move."""
        low, high = (self.extremes[name][0].amin(0), self.extremes[name][1].amax(0))
        if move is not None:
            middle = 0.0 if move.shift is None else move.shift
            low, high = (low - middle) * move.factors, (high - middle) * move.factors
        return min(float(low.min()), 0.0), max(float(high.max()), 0.0)


def plan_edges(graph: fx.GraphModule) -> list[str]:
    """Return every tensor that a plan quantizes, but the photo."""
    return [*(edge for edge in input_edges(graph) if edge != INPUT), *output_edges(graph)]


def propose(graph: fx.GraphModule, found: Profile) -> list[Move]:
    """Return the best predicted move of every group that has one, in the order of the graph."""
    channels = {name: found.channels(name) for name in found.extremes}
    moves = []
    for group in channel_groups(graph):
        tensors = [tensor for tensor in group.tensors if tensor in input_edges(graph)]
        tried = [
            move
            for centred in ((False, True) if group.shiftable else (False,))
            for move in _tried(graph, group, {t: channels[t] for t in tensors}, channels, centred)
        ]
        best = min(tried, key=lambda move: move.predicted)
        if best.predicted < (1 - LEAST_GAIN) * tried[0].predicted:
            moves.append(best)
    return moves


def apply_moves(graph: fx.GraphModule, moves: Iterable[Move]) -> fx.GraphModule:
    """Return a graph with the same logits whose channels have been moved."""
    result = copy.deepcopy(graph)
    for move in moves:
        rescale(result, move.group, move.factors, move.shift)
    return result


def _tried(
    graph: fx.GraphModule,
    group: ChannelGroup,
    tensors: dict[str, Channels],
    channels: dict[str, Channels],
    centred: bool,
) -> Iterator[Move]:
    """Yield every way to move a group's channels, first the one without factors."""
    shift = None
    loudness = []
    for found in tensors.values():
        size = torch.maximum(-found.low, found.high)
        if centred:
            shift = (found.low + found.high) / 2
            size = (found.high - found.low) / 2
        loudness.append(size / size.max().clamp_min(1e-30))
    loud = torch.stack(loudness).amax(dim=0).clamp_min(1 / LARGEST_FACTOR)
    mixing = list(_mixing(graph, group, tensors, channels))
    ways = {"centred" if centred else "as it is": torch.ones_like(loud)}
    suffix = ", centred" if centred else ""
    ways |= {f"strength {s:g}{suffix}": loud**-s for s in STRENGTHS}
    ways |= {
        f"cap {cap:g}{suffix}": (torch.quantile(loud, cap) / loud).clamp(max=1.0) for cap in CAPS
    }
    for how, factors in ways.items():
        predicted = sum(_rounding(found, factors, shift) for found in tensors.values())
        predicted += sum(_weight_rounding(reader, factors, shift) for reader in mixing)
        yield Move(group, how, factors, shift, predicted)


def _rounding(found: Channels, factors: torch.Tensor, shift: torch.Tensor | None) -> float:
    middle = 0.0 if shift is None else shift
    size = torch.maximum(found.high - middle, middle - found.low) * factors
    step = size.max() / 127
    return float(step**2 / 12 * (found.slope / factors**2).sum())


@dataclass(frozen=True)
class _Reader:
    """A layer that sums over a group's channels, and pays for unequal ones with its precision."""

    source: Channels
    output: Channels
    largest: torch.Tensor
    """Largest |weight| over the taps, (out, in) in float64."""
    taps: int


def _mixing(
    graph: fx.GraphModule,
    group: ChannelGroup,
    tensors: dict[str, Channels],
    channels: dict[str, Channels],
) -> Iterator[_Reader]:
    """Yield a group's readers; depthwise ones have scales per channel, which take factors along."""
    weighted = layers(graph)
    sources = {name: edge for edge, readers in input_edges(graph).items() for name in readers}
    for name in group.readers:
        if not is_depthwise(weighted[name]):
            weight = (
                weighted[name].weight.detach().flatten(1).view(*weighted[name].weight.shape[:2], -1)
            )
            yield _Reader(
                tensors[sources[name]],
                channels[name],
                weight.abs().amax(dim=2).double(),
                weight.shape[2],
            )


def _weight_rounding(reader: _Reader, factors: torch.Tensor, shift: torch.Tensor | None) -> float:
    found = reader.source
    # Around its shift a channel's power is the smaller: E (x - m)^2 = E x^2 - 2 m E x + m^2.
    power = found.power if shift is None else found.power - 2 * shift * found.mean + shift**2
    steps = (reader.largest / factors).amax(dim=1) / 127
    noise = (steps**2 / 12 * reader.output.slope).sum()
    return float(noise * reader.taps * (factors**2 * power).sum())
