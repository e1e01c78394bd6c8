"""What a network takes at other widths, from measured times of its steps at some of them.

Times of steps do not add up to that of the network, which keeps other things in its caches and has
what surrounds its layers only once. So their sum says what share is saved, and `gain` how much of
it the network was measured to save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from edgexception.prune.plan import Group, LayerShape, Structure, Widths
from edgexception.prune.steps import Step

_BETWEEN = ((0.2, (0.25, 0.5, 0.75)), (0.03, (0.5,)), (0.0, ()))
"""Of a step's share of the network's multiply-accumulates: the widths to measure between the least
and the widest, as shares of the width."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Grid(_Data):
    """The widths that a step is measured at."""

    step: Step
    inputs: tuple[int, ...]
    """Ascending."""
    outputs: tuple[int, ...]


class Table(Grid):
    """A step's times."""

    ms: tuple[tuple[float, ...], ...]
    """By input width and output width, of one step."""

    def at(self, inputs: int, outputs: int) -> float:
        """Return its time in ms, interpolated; a wider step never takes less."""
        columns = [np.interp(outputs, self.outputs, row) for row in self._rising]
        return float(np.interp(inputs, self.inputs, columns))

    @functools.cached_property
    def _rising(self) -> NDArray[np.float64]:
        times = np.maximum.accumulate(np.array(self.ms), axis=0)
        return np.maximum.accumulate(times, axis=1)


class LatencyTable(_Data):
    """Times of all steps of a network on one engine of a target."""

    engine: str
    """Target, runtime, precision and batch size."""
    threads: int
    steps: dict[str, int]
    """By the layer that each begins with: its place in `tables`."""
    tables: tuple[Table, ...]

    def price(self) -> Callable[[LayerShape, Widths], float]:
        """Return what a layer takes in ms at some widths, with all that follows it."""

        @functools.cache
        def at(place: int, inputs: int, outputs: int) -> float:
            return self.tables[place].at(inputs, outputs)

        def price(layer: LayerShape, widths: Widths) -> float:
            place = self.steps.get(layer.name)
            return 0.0 if place is None else at(place, widths[layer.inputs], widths[layer.outputs])

        return price


def grids_of(structure: Structure, steps: dict[str, Step], align: int) -> dict[str, Grid]:
    """Return the widths at which the step of each layer is measured."""
    groups = {group.name: group for group in structure.groups}
    layers = {layer.name: layer for layer in structure.layers}
    whole = sum(layer.macs(structure.widths) for layer in structure.layers)
    weight: dict[tuple[Step, str, str], float] = {}
    alike: dict[str, tuple[Step, str, str]] = {}
    for name, step in steps.items():
        # Steps that are alike, of groups that are alike, are one.
        layer = layers[name]
        read, written = (_form(groups[end], align) for end in (layer.inputs, layer.outputs))
        alike[name] = step, read, written
        share = layer.macs(structure.widths) / whole
        weight[alike[name]] = weight.get(alike[name], 0.0) + share
    return {
        name: Grid(
            step=steps[name],
            inputs=_levels(groups[layers[name].inputs], align, weight[alike[name]]),
            outputs=_levels(groups[layers[name].outputs], align, weight[alike[name]]),
        )
        for name in steps
    }


def _form(group: Group, align: int) -> str:
    return f"{group.width} by {group.step(align)}, fixed: {group.fixed}"


def _levels(group: Group, align: int, weight: float) -> tuple[int, ...]:
    if group.fixed:
        return (group.width,)
    step = group.step(align)
    shares = next(shares for least, shares in _BETWEEN if weight >= least)
    # From a width that is no multiple to the next one that is, a kernel may gain much.
    below = group.width // step * step if shares else group.width
    between = {round(share * group.width / step) * step for share in shares}
    return tuple(sorted({min(step, group.width), group.width, below, *between} - {0}))
