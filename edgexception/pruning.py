"""The step of a run that prunes: a plan, the smaller network, what it learns back, what it lost."""

from __future__ import annotations

from edgexception.model_stages import card_of
from edgexception.prune_stages import apply_pruning, plan_pruning, pruning_effect, recover_pruned
from edgexception.run_images import images_to_learn
from edgexception.run_state import RunState


def prune(state: RunState, *, plan_only: bool, compare: bool) -> None:
    """Plan, and unless the plan is all that was asked for, go on with the pruned network.

    `compare` runs both networks on the evaluation images, which can take long.
    """
    spec = state.recipe.prune
    if spec is None:
        return
    state.pruning = plan_pruning(state.shop, state.model, spec, state.calibration)
    if plan_only:
        return
    whole = state.model
    state.model = apply_pruning(state.shop, whole, state.pruning)
    if spec.recovery is not None:
        images = images_to_learn(state, spec.recovery, "prune.recovery") or state.calibration
        if images is not None:
            networks = (whole, state.model)
            state.model = recover_pruned(state.shop, networks, state.pruning, spec.recovery, images)
    state.card = card_of(state.model)
    if state.evaluation is not None and compare:
        labels = None if state.labelled is None else state.labelled.labels
        networks = (whole, state.model)
        state.pruning_effect = pruning_effect(state.shop, networks, state.evaluation, labels)
