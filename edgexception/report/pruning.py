"""What a report says of pruning: the plan without its channel numbers, and what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.bench.accuracy import accuracy
from edgexception.bench.paired import paired
from edgexception.prune.plan import load_prune_plan
from edgexception.report.assemble import compare
from edgexception.report.measures import Fidelity
from edgexception.report.record import Pruning, PruningEffect, PruningLatency

Logits = NDArray[np.float32]


def pruning_of(
    plan: Path, effect: PruningEffect | None, latency: PruningLatency | None = None
) -> Pruning:
    """Return the record of a plan, and of what it did where that was measured."""
    found = load_prune_plan(plan)
    return Pruning(
        importance=found.importance,
        ranking=found.ranking,
        align=found.align,
        budgets=found.budgets,
        rounds=found.rounds,
        images=found.images,
        macs=found.macs,
        parameters=found.parameters,
        layers=found.layers,
        sparse=found.sparse,
        latency=latency,
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
        facts["top1"] = (first, second)
        facts["paired"] = paired(before[:count], after[:count], labels)
    return PruningEffect(**facts)
