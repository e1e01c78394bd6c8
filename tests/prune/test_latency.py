"""Times of steps: which widths are measured, what lies between them, and what a budget leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgexception.architecture import Architecture
from edgexception.errors import UsageError
from edgexception.prune.budget import Price, share_left, solve
from edgexception.prune.latency import LatencyTable, Table, grids_of
from edgexception.prune.steps import Step, steps_of
from edgexception.prune.structure import structure_of

NARROW = Architecture(
    stem=(12, 12), entry=((12, 12),), middle=((12, 12),), exit=(12,), tail=(12,), head=(5,)
)
STRUCTURE = structure_of(NARROW, (40, 40))
STEP = Step(kernel=1, stride=1, padding=0, size=(9, 9), then=())


def table_of(align: int = 4) -> LatencyTable:
    """Return times of a device on which a step takes 1 us, and 1 ns a product of its widths."""
    grids = grids_of(STRUCTURE, steps_of(NARROW, (40, 40)), align)
    different = list(dict.fromkeys(grids.values()))
    return LatencyTable(
        engine="fake",
        threads=1,
        steps={name: different.index(grid) for name, grid in grids.items()},
        tables=tuple(
            Table(
                **dict(grid),
                ms=tuple(tuple(1e-3 + 1e-6 * a * b for b in grid.outputs) for a in grid.inputs),
            )
            for grid in different
        ),
    )


def test_between_measured_widths_times_are_interpolated_and_never_fall() -> None:
    table = Table(step=STEP, inputs=(8, 16), outputs=(8, 24, 32), ms=((1, 3, 2.5), (2, 4, 5)))
    assert table.at(8, 16) == 2.0
    assert table.at(12, 16) == 2.5
    assert table.at(8, 32) == 3.0, "a wider step is not faster, whatever noise was measured"
    assert table.at(16, 32) == 5.0


@pytest.mark.parametrize("align", [8, 16, 32])
def test_the_widths_of_the_paper_that_are_measured(align: int) -> None:
    structure = structure_of(Architecture(), (299, 299))
    grids = grids_of(structure, steps_of(Architecture(), (299, 299)), align)
    middle = grids["block7_sepconv2_pointwise"]
    below = 728 // align * align
    assert middle.inputs == middle.outputs
    assert middle.inputs[0] == align
    assert middle.inputs[-1] == 728
    assert below in middle.inputs
    assert len(middle.inputs) >= 5, "most of the time is there, so its widths are looked at closely"
    assert all(width % align == 0 for width in middle.inputs[:-1])
    assert grids["block1_conv1"].inputs == (3,)
    assert grids["predictions"].outputs == (1000,)
    assert len({*grids.values()}) < len(grids), "equal steps are measured once"


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.2])
def test_a_latency_budget_holds_with_the_gain_that_was_measured(gain: float) -> None:
    price = Price(table_of().price(), gain)
    generator = np.random.default_rng(0)
    scores = {g.name: generator.uniform(0.1, 1.0, g.width) for g in STRUCTURE.groups}
    kept = solve(STRUCTURE, scores, "global", 4, {"latency": 0.95}, {"latency": price})
    assert kept
    assert share_left(STRUCTURE, kept, price) <= 0.95
    by_steps = share_left(STRUCTURE, kept, Price(price.of))
    assert share_left(STRUCTURE, kept, price) == pytest.approx(1 - gain * (1 - by_steps))


def test_a_latency_that_no_widths_reach_names_the_nearest() -> None:
    price = Price(table_of().price())
    scores = {group.name: np.ones(group.width) for group in STRUCTURE.groups}
    with pytest.raises(UsageError, match=r"prune.latency: 0.01 .* nearest possible value is") as e:
        solve(STRUCTURE, scores, "global", 4, {"latency": 0.01}, {"latency": price})
    nearest = float(str(e.value).split("nearest possible value is ")[1].split(",")[0])
    kept = solve(STRUCTURE, scores, "global", 4, {"latency": nearest}, {"latency": price})
    assert {len(channels) for channels in kept.values()} == {4}


def test_a_group_whose_width_changes_no_time_is_not_cut_for_it() -> None:
    flat = {"block1_conv1", "block1_conv2"}
    price = Price(
        lambda layer, w: 1.0 if layer.name in flat else w[layer.inputs] * w[layer.outputs]
    )
    scores = {group.name: np.ones(group.width) for group in STRUCTURE.groups}
    kept = solve(STRUCTURE, scores, "global", 4, {"latency": 0.6}, {"latency": price})
    assert share_left(STRUCTURE, kept, price) <= 0.6
    assert "block1_conv1" not in kept
    assert math.isclose(share_left(STRUCTURE, {}, price), 1.0)
