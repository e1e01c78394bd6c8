"""What a report says of pruning: the plan without its channel numbers, and what it did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.bench.accuracy import accuracy
from edgexception.bench.paired import paired
from edgexception.prune.plan import LayerChange, load_prune_plan
from edgexception.report.assemble import compare
from edgexception.report.record import Fidelity, Paired, Pruning, PruningEffect, Share

Logits = NDArray[np.float32]


def pruning_of(plan: Path, effect: PruningEffect | None) -> Pruning:
    """Return the record of a plan, and of what it did where that was measured."""
    found = load_prune_plan(plan)
    return Pruning(
        importance=found.importance,
        ranking=found.ranking,
        align=found.align,
        budgets=found.budgets,
        images=found.images,
        macs=found.macs,
        parameters=found.parameters,
        layers=found.layers,
        effect=effect,
    )


def effect_of(
    before: Logits, after: Logits, labels: NDArray[np.integer[Any]] | None
) -> PruningEffect:
    """Compare the pruned network's logits with the unpruned one's, both in torch."""
    facts: dict[str, Any] = {"fidelity": Fidelity.model_validate(compare(before, after))}
    if labels is not None:
        count = len(labels)
        first, second = (accuracy(logits[:count], labels).top1 for logits in (before, after))
        facts["top1"] = (Share.model_validate(first), Share.model_validate(second))
        decisions = paired(before[:count], after[:count], labels)
        facts["paired"] = Paired.model_validate(decisions)
    return PruningEffect(**facts)


def pruning_lines(found: Pruning | None) -> Iterator[str]:
    """Say in a few lines what was asked for, what is left, and what it cost."""
    if found is None:
        return
    asked = " and ".join(f"{share:g} of the {name}" for name, share in found.budgets.items())
    images = f" on {found.images} images" if found.images else ""
    yield (
        f"pruned to {asked}: {_left(found.macs)} of the multiply-accumulates and "
        f"{_left(found.parameters)} of the parameters are left; {found.ranking} ranking by "
        f"{found.importance}{images}, widths in multiples of {found.align}"
    )
    if found.effect is None:
        return
    near = found.effect.fidelity
    decibels = "equal" if near.sqnr_db is None else f"{near.sqnr_db:.1f} dB"
    share = near.agreement
    agreement = f", agreement {share.successes}/{share.trials}" if share else ""
    yield f"against the unpruned network in torch: SQNR {decibels}{agreement}"
    if found.effect.top1 and found.effect.paired:
        before, after = found.effect.top1
        d = found.effect.paired
        points = ", ".join(f"{100 * value:+.2f}" for value in (d.low, d.high))
        yield (
            f"top-1 {before.value:.2%} before and {after.value:.2%} after "
            f"({100 * d.difference:+.2f} points, 95% {points}; {d.lost} lost, {d.gained} gained "
            f"of {d.images})"
        )


def cut_layers(found: Pruning) -> list[LayerChange]:
    """Return the layers whose widths change."""
    return [
        la for la in found.layers if la.inputs[0] != la.inputs[1] or la.outputs[0] != la.outputs[1]
    ]


def _left(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{after / before:.1%}"
