"""Which channels stay within a budget: the widths that lose the least, in steps of an alignment.

What a group loses with the channels that it gives up is its importance times the logarithm of the
share that stays. To first order that is the importance removed; and no group can be emptied, for
what passes through a network passes through every group of it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgexception.errors import UsageError
from edgexception.prune.plan import Group, LayerShape, Ranking, Structure, Widths

Scores = Mapping[str, NDArray[np.float64]]
"""Importance of every channel of every group, by the name of the group; 0 or more."""
Kept = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Price:
    """What a layer costs at some widths, in any unit."""

    of: Callable[[LayerShape, Widths], float]
    gain: float = 1.0
    """How much of the share that the layers' sum saves the network is known to save."""


PRICES: Mapping[str, Price] = {
    "macs": Price(LayerShape.macs),
    "parameters": Price(LayerShape.parameters),
}


def solve(
    structure: Structure,
    scores: Scores,
    ranking: Ranking,
    align: int,
    budgets: Mapping[str, float],
    prices: Mapping[str, Price] = PRICES,
) -> Kept:
    """Return what every group that is cut keeps: the most important channels, ascending.

    `budgets` are shares of what the network costs by the price of that name. A width that is cut
    becomes a multiple of `align`. local: every group keeps the same share, rounded down. global:
    what a group keeps follows from its importance and from what its channels cost.

    Raises UsageError for an alignment larger than a group, and for a budget that no widths meet;
    both name the nearest value that is possible.
    """
    groups = [group for group in structure.groups if not group.fixed]
    _check_align(groups, align)
    problem = _Problem(structure, budgets, prices)
    least = problem.widths | {group.name: min(group.step(align), group.width) for group in groups}
    _check_budgets(problem, least, align)
    search = _same_share if ranking == "local" else _least_loss
    widths = search(problem, groups, scores, align)
    return {
        group.name: tuple(sorted(_best_first(group, scores[group.name])[: widths[group.name]]))
        for group in groups
        if widths[group.name] < group.width
    }


def share_left(structure: Structure, kept: Kept, price: Price) -> float:
    """Return the share of a cost that is left when groups keep those channels."""
    widths = structure.widths | {name: len(channels) for name, channels in kept.items()}
    return _Problem(structure, {"": 1.0}, {"": price}).shares(widths)[""]


class _Problem:
    """The network's cost at any widths, as shares of what it costs now."""

    def __init__(
        self, structure: Structure, budgets: Mapping[str, float], prices: Mapping[str, Price]
    ) -> None:
        self.widths = structure.widths
        self.layers = structure.layers
        self.budgets = budgets
        self.prices = prices
        self.whole = {name: self._cost(name, self.layers, self.widths) for name in budgets}
        self.touching = {
            group.name: [la for la in self.layers if group.name in (la.inputs, la.outputs)]
            for group in structure.groups
        }

    def shares(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {
            name: 1.0
            - self.prices[name].gain
            * (1.0 - self._cost(name, self.layers, widths) / self.whole[name])
            for name in self.budgets
        }

    def exceeded(self, shares: Mapping[str, float]) -> list[str]:
        return [name for name, budget in self.budgets.items() if shares[name] > budget]

    def changed(self, widths: Mapping[str, int], group: str, width: int) -> dict[str, float]:
        """Return how much the shares fall when a group gets another width."""
        layers, other = self.touching[group], {**widths, group: width}
        return {
            name: self.prices[name].gain
            * (self._cost(name, layers, widths) - self._cost(name, layers, other))
            / self.whole[name]
            for name in self.budgets
        }

    def _cost(self, budget: str, layers: Iterable[LayerShape], widths: Mapping[str, int]) -> float:
        price = self.prices[budget].of
        return sum(price(layer, widths) for layer in layers)


def _check_align(groups: list[Group], align: int) -> None:
    group = min(groups, key=lambda group: group.width - group.step(align))
    if group.step(align) <= group.width:
        return
    nearest = next(a for a in range(align, 0, -1) if all(g.step(a) <= g.width for g in groups))
    parts = f" in {group.segments} segments" if group.segments > 1 else ""
    raise UsageError(
        f"prune.align: {align} is too large for {group.name}, which has {group.width} "
        f"channels{parts}; the nearest possible value is {nearest}"
    )


def _check_budgets(problem: _Problem, least: Mapping[str, int], align: int) -> None:
    shares = problem.shares(least)
    for name in problem.exceeded(shares):
        nearest = math.ceil(shares[name] * 10_000) / 10_000
        raise UsageError(
            f"prune.{name}: {problem.budgets[name]:g} of the network's {name} cannot be reached: "
            f"with every width at its least, a multiple of {align}, {shares[name]:.4f} are left; "
            f"the nearest possible value is {nearest:g}"
            + (", and a smaller prune.align leaves less" if align > 1 else "")
        )


def _best_first(group: Group, scores: NDArray[np.float64]) -> list[int]:
    """Return a group's channels, the most important first, those of its segments in turns."""
    parts = np.arange(group.width).reshape(group.segments, -1)
    ranked = [part[np.argsort(-scores[part], kind="stable")] for part in parts]
    return [int(channel) for turn in zip(*ranked, strict=True) for channel in turn]


def _same_share(
    problem: _Problem, groups: list[Group], scores: Scores, align: int
) -> dict[str, int]:
    """Return the widths of the largest share of all groups that holds the budgets."""

    def widths_at(share: float) -> dict[str, int]:
        cut = {}
        for group in groups:
            step = group.step(align)
            # Shares are quotients of widths, and their products must not end below a multiple.
            multiple = math.floor(share * group.width / step + 1e-9) * step
            cut[group.name] = group.width if share == 1.0 else max(step, multiple)
        return {**problem.widths, **cut}

    shares = sorted(
        {k / group.width for group in groups for k in _steps(group, align)} | {1.0}, reverse=True
    )
    # The first, going down, that holds; the smallest does, for every group has its least width.
    first = bisect.bisect_left(
        shares, True, key=lambda share: not problem.exceeded(problem.shares(widths_at(share)))
    )
    return widths_at(shares[min(first, len(shares) - 1)])


def _steps(group: Group, align: int) -> range:
    return range(group.step(align), group.width, group.step(align))


@dataclass(frozen=True)
class _Ladder:
    """The widths that a group can have, ascending, and what each loses."""

    rungs: list[int]
    losses: list[float]


def _ladder(group: Group, scores: NDArray[np.float64], align: int) -> _Ladder:
    rungs = [*_steps(group, align), group.width]
    kept = np.cumsum(scores[_best_first(group, scores)])
    total = float(kept[-1])
    losses = [total * math.log(total / kept[w - 1]) if total > 0 else 0.0 for w in rungs]
    return _Ladder(rungs, losses)


def _least_loss(
    problem: _Problem, groups: list[Group], scores: Scores, align: int
) -> dict[str, int]:
    """Return widths that hold the budgets and lose little.

    Step by step, the group goes down one rung that loses least for what it saves of the budgets
    that do not hold yet. Where the last step saved more than was needed, groups go up again. Then
    one group more goes down and others up, as long as that loses less: no single exchange is left
    that would.
    """
    ladders = {group.name: _ladder(group, scores[group.name], align) for group in groups}
    found = _Choice(problem, ladders, {n: len(la.rungs) - 1 for n, la in ladders.items()})
    while exceeded := problem.exceeded(found.shares()):
        lower = [name for name, at in found.at.items() if at > 0]
        best = min(lower, key=lambda name: found.rate(name, -1, exceeded))
        found.at[best] -= 1
    found.fill()
    while better := next((c for c in found.exchanges() if c.loss < found.loss * (1 - 1e-9)), None):
        found = better
    return found.widths


class _Choice:
    """A rung for every group."""

    def __init__(
        self, problem: _Problem, ladders: Mapping[str, _Ladder], at: dict[str, int]
    ) -> None:
        self.problem = problem
        self.ladders = ladders
        self.at = at

    @property
    def widths(self) -> dict[str, int]:
        cut = {name: self.ladders[name].rungs[at] for name, at in self.at.items()}
        return {**self.problem.widths, **cut}

    @property
    def loss(self) -> float:
        return sum(self.ladders[name].losses[at] for name, at in self.at.items())

    def shares(self) -> dict[str, float]:
        return self.problem.shares(self.widths)

    def saved(self, name: str, step: int) -> dict[str, float]:
        """Return by how much the shares fall when a group goes some rungs up, or down if < 0."""
        width = self.ladders[name].rungs[self.at[name] + step]
        return self.problem.changed(self.widths, name, width)

    def rate(self, name: str, step: int, budgets: Iterable[str]) -> float:
        """Return the loss of such a step over what it saves of some budgets."""
        losses, at = self.ladders[name].losses, self.at[name]
        saved = self.saved(name, step)
        share = sum(saved[budget] / self.problem.budgets[budget] for budget in budgets)
        lost = losses[at + step] - losses[at]
        # Measured times may stay the same: then down is for nothing, and up is free.
        return lost / share if share else math.inf

    def fill(self, but: str | None = None) -> None:
        """Let groups go up as long as the budgets hold, first those that gain most for the cost."""
        shares = self.shares()

        def fits(name: str) -> bool:
            if name == but or self.at[name] + 1 == len(self.ladders[name].rungs):
                return False
            saved = self.saved(name, 1)
            return not self.problem.exceeded({b: shares[b] - saved[b] for b in shares})

        while higher := [name for name in self.at if fits(name)]:
            best = max(higher, key=lambda name: self.rate(name, 1, self.problem.budgets))
            self.at[best] += 1
            shares = self.shares()

    def exchanges(self) -> Iterator[_Choice]:
        """Yield what comes of letting one group go down and others up."""
        for name, at in self.at.items():
            if at > 0:
                other = _Choice(self.problem, self.ladders, {**self.at, name: at - 1})
                other.fill(but=name)
                yield other
