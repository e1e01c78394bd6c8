"""The step of a run that prunes: a plan, the smaller network, what it learns back, what it lost."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgexception.ability import why_not_run
from edgexception.artifacts import Artifact
from edgexception.device import ProbeRecord
from edgexception.engine_stages import check_target
from edgexception.errors import MeasurementInvalid, NotPossibleHere, UsageError
from edgexception.latency_stages import list_steps, time_plan, time_steps
from edgexception.model_stages import card_of
from edgexception.prune.plan import load_prune_plan
from edgexception.prune_stages import (
    Timed,
    apply_pruning,
    join_plans,
    plan_pruning,
    pruning_effect,
    recover_pruned,
    weigh_channels,
)
from edgexception.recipe import Recipe, TargetSpec
from edgexception.recipe_prune import PruneSpec
from edgexception.report.assemble import Place
from edgexception.report.record import LatencyCheck, PruningLatency
from edgexception.run_images import images_to_learn
from edgexception.run_state import RunState
from edgexception.targets import align_of, find_runtime, find_target

ALIGN = 8
"""Where neither the recipe nor a target says more: 32 bytes of float32, AVX2's vector."""
MET = 0.05
"""How far from a latency budget a measured network may be."""
NEAR = 0.02
"""How far from it a plan may be without being corrected."""
PLANS = 4
"""That are measured at most."""


def prune(state: RunState, warn: Callable[[str], None], *, plan_only: bool, compare: bool) -> None:
    """Plan, and unless the plan is all that was asked for, go on with the pruned network.

    `compare` runs both networks on the evaluation images, which can take long.
    """
    spec = state.recipe.prune
    if spec is None:
        return
    whole, shop, rounds = state.model, state.shop, spec.recovery.rounds if spec.recovery else 1
    if rounds > 1:
        _plan(state, spec, warn)  # a budget that cannot be met is refused before any training
    state.pruning = None
    for number in range(1, rounds + 1):
        own = _round(spec, number, state.pruning) if rounds > 1 else spec
        plan = _plan(state, own, warn)
        state.pruning = plan if state.pruning is None else join_plans(shop, state.pruning, plan)
        if plan_only and number == rounds:
            return
        state.model = apply_pruning(shop, state.model, plan, state.pruning if number > 1 else None)
        if own.recovery is not None:
            images = images_to_learn(state, own.recovery, "prune.recovery") or state.calibration
            if images is not None:
                networks = (whole, state.model)
                state.model = recover_pruned(shop, networks, state.pruning, own.recovery, images)
    state.card = card_of(state.model)
    if state.evaluation is not None and compare:
        labels = None if state.labelled is None else state.labelled.labels
        networks = (whole, state.model)
        state.pruning_effect = pruning_effect(state.shop, networks, state.evaluation, labels)


def widths_of(recipe: Recipe, spec: PruneSpec) -> int:
    """Return what cut widths are multiples of: the recipe's word, else that of its targets."""
    if spec.align is not None:
        return spec.align
    if spec.target is not None:
        own = (spec.runtime,) if spec.runtime else find_target(spec.target).runtimes
        return align_of(spec.target, own)
    aligns = [align_of(target.target, target.runtime_names) for target in recipe.targets]
    return math.lcm(*aligns) if aligns else ALIGN


def place_of(spec: PruneSpec, machine: ProbeRecord) -> Place:
    """Return the engine whose latency counts. Raises NotPossibleHere where it cannot run here."""
    if spec.target is None:
        raise UsageError("prune.target: name the device whose latency counts, such as cpu-x86")
    runtime = spec.runtime or next(iter(find_target(spec.target).runtimes))
    precision = spec.precision or "fp32"
    asked = TargetSpec(target=spec.target, runtimes=(runtime,), precisions=(precision,))
    check_target(asked, machine)
    if reason := why_not_run(spec.target, runtime, machine):
        raise NotPossibleHere(
            f"prune.latency: {spec.target} with {runtime} cannot be measured here: {reason}; name "
            "the device with --device, or give a budget of macs"
        )
    dialect = find_runtime(spec.target, runtime).dialect
    threads = spec.threads or machine.cpu.usable_cores
    return Place(spec.target, runtime, dialect, precision, 1, threads)


def _round(spec: PruneSpec, number: int, so_far: Artifact | None) -> PruneSpec:
    """Return what one of several rounds is asked for, of the network that those before left."""
    recovery = spec.recovery
    assert recovery is not None  # noqa: S101 - rounds are of the recovery
    left = {} if so_far is None else load_prune_plan(so_far.file("prune.json")).left
    rounds, steps = recovery.rounds, recovery.steps
    steps = steps * number // rounds - steps * (number - 1) // rounds
    asked = {name: budget ** (number / rounds) for name, budget in spec.budgets.items()}
    budgets = {name: min(1.0, share / left.get(name, 1.0)) for name, share in asked.items()}
    return spec.model_copy(
        update={
            **budgets,
            "sparsity": spec.sparsity if number == rounds else None,
            "recovery": recovery.model_copy(update={"steps": steps}),
        }
    )


def _plan(state: RunState, spec: PruneSpec, warn: Callable[[str], None]) -> Artifact:
    recipe, shop, model = state.recipe, state.shop, state.model
    place = None if spec.latency is None else place_of(spec, shop.machine)
    align = widths_of(recipe, spec)
    images = state.calibration if spec.looks_at_images else None
    weighed = weigh_channels(shop, model, spec.importance, images) if spec.budgets else None

    def planned(timed: Timed | None) -> Artifact:
        count, int8 = None if images is None else len(images), recipe.quantize is not None
        return plan_pruning(shop, model, spec, align, weighed, timed, images=count, int8=int8)

    if place is None or spec.latency is None:
        return planned(None)
    state.latency_table = time_steps(shop, list_steps(shop, model), align, place)
    timed = Timed(state.latency_table)
    tried: list[tuple[Artifact, LatencyCheck]] = []
    while True:
        plan = planned(timed)
        check = time_plan(shop, model, plan, place)
        tried.append((plan, check))
        if abs(check.share.value / spec.latency - 1) <= NEAR or len(tried) == PLANS:
            break
        timed = Timed(timed.table, _gain(plan, check))
    budget = spec.latency
    nearest, check = min(tried, key=lambda one: abs(one[1].share.value - budget))
    met = abs(check.share.value / budget - 1) <= MET
    found = load_prune_plan(nearest.file("prune.json")).latency
    state.pruning_latency = PruningLatency(
        **dict(found or ()), check=check, plans=len(tried), met=met
    )
    if not met:
        warn(
            f"prune.latency: {spec.latency:g} was asked for, and the nearest of {len(tried)} plans "
            f"measures {check.share.value:.3f}; other work on this machine disturbs times, and "
            "another `align` gives other widths"
        )
    return nearest


def _gain(plan: Artifact, check: LatencyCheck) -> float:
    """Return how much of what the steps' times save the network was measured to save."""
    latency = load_prune_plan(plan.file("prune.json")).latency
    assert latency is not None  # noqa: S101 - it was planned for
    by_steps = (1.0 - latency.predicted) / latency.gain
    gain = (1.0 - check.share.value) / by_steps
    if gain <= 0.0:
        raise MeasurementInvalid(
            f"prune.latency: the pruned network is measured no faster ({check.share.value:.3f} of "
            f"the unpruned one's latency), where its steps take {1 - by_steps:.3f}; measure on a "
            "machine that does nothing else, or give a budget of macs"
        )
    return gain
