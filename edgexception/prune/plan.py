"""The `PrunePlan`: which channels of a network stay, as plain data.

Channels go in groups: a channel of a group is one row of every layer that writes it and one column
of every layer that reads it. What a layer costs follows from the widths of two groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgexception.artifacts import canonical_json
from edgexception.plan_file import read_plan

Importance = Literal["magnitude", "batchnorm", "activation", "taylor"]
Ranking = Literal["global", "local"]
Widths = Mapping[str, int]
"""Channels of every group, by its name."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Group(_Data):
    """Tensors and layers that share their channels, by the names of the graph, in its order."""

    name: str
    """The first layer that writes these channels; of the photo's, the input."""
    width: int
    writers: tuple[str, ...]
    """Layers that mix channels and whose outputs these are."""
    readers: tuple[str, ...]
    """Layers that mix channels and whose inputs these are."""
    nodes: tuple[str, ...]
    """All tensors of the group."""
    segments: int = 1
    """Equal parts, of which each must keep as many channels as the others."""
    fixed: bool = False
    """The photo's channels and the network's outputs, which stay."""

    def step(self, align: int) -> int:
        """Return what a width that is cut is a multiple of."""
        return math.lcm(align, self.segments)


class LayerShape(_Data):
    """What the cost of a layer follows from."""

    name: str
    inputs: str
    """Group of its input channels."""
    outputs: str
    positions: int
    """Height x width of its output."""
    taps: int
    """Height x width of its kernel."""
    segments: int | None = 1
    """Parts between which it does not mix channels; None is depthwise, one a channel."""
    vectors: int
    """Parameters per output channel beside the weights: its bias, its BatchNorm's two."""

    def weights(self, widths: Widths) -> int:
        """Return the number of its weights."""
        inputs = widths[self.inputs]
        return self.taps * (inputs // (self.segments or inputs)) * widths[self.outputs]

    def macs(self, widths: Widths) -> int:
        """Return its multiply-accumulates for one image."""
        return self.positions * self.weights(widths)

    def parameters(self, widths: Widths) -> int:
        """Return its parameters, those of its BatchNorm included."""
        return self.weights(widths) + self.vectors * widths[self.outputs]

    def bytes_as(self, widths: Widths, *, int8: bool) -> int:
        """Return the bytes of its weights and bias as exported, and of the scales of int8."""
        weights, outputs = self.weights(widths), widths[self.outputs]
        bias = 4 * outputs if self.vectors else 0
        return bias + (weights + 4 * outputs if int8 else 4 * weights)


class Structure(_Data):
    """What pruning needs to know of a network; its weights have no part in it."""

    groups: tuple[Group, ...]
    layers: tuple[LayerShape, ...]

    @property
    def widths(self) -> dict[str, int]:
        """Channels of every group."""
        return {group.name: group.width for group in self.groups}


class LayerChange(_Data):
    """One layer before and after."""

    layer: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    macs: tuple[int, int]
    parameters: tuple[int, int]


_COSTS = ("inputs", "outputs", "macs", "parameters")
Kept = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class PlannedLatency(_Data):
    """What a plan was made for, where the budget is a measured latency."""

    engine: str
    """Target, runtime, precision and batch size."""
    threads: int
    gain: float
    """How much of what the steps' times save the network was taken to save."""
    predicted: float
    """Share of the network's latency that is left, by those."""


class PrunePlan(_Data):
    """What of a network stays, what that costs, and how it was chosen."""

    schema_version: Literal[1] = 1
    kept: dict[str, Kept]
    """Of every group that is cut, by its name: the channels that stay, ascending."""
    layers: tuple[LayerChange, ...]
    importance: Importance
    ranking: Ranking
    align: int
    budgets: dict[str, float]
    """Shares of what the network costs that were asked for, by the name of that cost."""
    left: dict[str, float] = {}
    """What is left of those, 1 at most."""
    rounds: int = 1
    """In how many the channels went."""
    images: int | None
    """Calibration images that the importance was measured on; None where it needs none."""
    latency: PlannedLatency | None = None
    sparse: tuple[str, ...] = ()
    """Layers of which two of every four weights become zero."""

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for one image before and after."""
        return _summed([layer.macs for layer in self.layers])

    @property
    def parameters(self) -> tuple[int, int]:
        """Trainable parameters before and after."""
        return _summed([layer.parameters for layer in self.layers])

    @model_validator(mode="after")
    def _ascending(self) -> PrunePlan:
        for name, kept in self.kept.items():
            if any(a >= b for a, b in itertools.pairwise(kept)):
                raise ValueError(f"the channels that {name} keeps are not in ascending order")
        return self

    def then(self, later: PrunePlan) -> PrunePlan:
        """Return one plan of the whole network for this one and one of the network it leaves."""
        again = {
            name: tuple(self.kept[name][channel] for channel in kept)
            for name, kept in later.kept.items()
            if name in self.kept
        }
        return PrunePlan(
            **{
                **dict(later),
                "kept": self.kept | later.kept | again,
                "layers": tuple(map(_joined, self.layers, later.layers)),
                "budgets": {n: self.left[n] * share for n, share in later.budgets.items()},
                "left": {name: self.left[name] * share for name, share in later.left.items()},
                "rounds": self.rounds + later.rounds,
            }
        )

    def to_json(self) -> str:
        """Return the plan as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


def _summed(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def _joined(first: LayerChange, second: LayerChange) -> LayerChange:
    ends = {n: (getattr(first, n)[0], getattr(second, n)[1]) for n in _COSTS}
    return LayerChange(layer=first.layer, **ends)


def changes(structure: Structure, kept: Mapping[str, tuple[int, ...]]) -> tuple[LayerChange, ...]:
    """Return every layer before and after groups keep those channels."""
    before = structure.widths
    after = before | {name: len(channels) for name, channels in kept.items()}
    return tuple(
        LayerChange(
            layer=layer.name,
            inputs=(before[layer.inputs], after[layer.inputs]),
            outputs=(before[layer.outputs], after[layer.outputs]),
            macs=(layer.macs(before), layer.macs(after)),
            parameters=(layer.parameters(before), layer.parameters(after)),
        )
        for layer in structure.layers
    )


def load_prune_plan(path: Path) -> PrunePlan:
    """Read a plan file; raise BadArtifact naming the field when it is not one."""
    return read_plan(path, PrunePlan, "a pruning plan", "edgex prune")
