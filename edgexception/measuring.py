"""The end of a run: engines built and measured, here, on a device, or by a kit elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from edgexception.ability import why_not_measured
from edgexception.artifacts import Artifact
from edgexception.bench.executed import check_placement
from edgexception.device import RecordedDevice
from edgexception.engine_stages import (
    Timed,
    bench,
    build,
    check_dla_version,
    check_graph,
    evaluate,
    plan_dla,
)
from edgexception.errors import BadArtifact, DeviceLost, EdgexError, OutOfResources
from edgexception.kit import Kit, kit_folder, plan_kit, write_kit
from edgexception.recipe import BenchSpec
from edgexception.report.assemble import Measured, Place, build_record
from edgexception.report.dla import dla_line, dla_planned
from edgexception.run_state import RunState, engine_of
from edgexception.stages import reference
from edgexception.targets import find_target
from edgexception.workshop import Workshop


def build_all(state: RunState) -> None:
    """Build every engine whose graph is sound; those for a kit wait, or are among its results."""
    for place in state.places:
        exported = state.exports[place.form]
        with fault_noted(state.faults, place):
            if state.is_away(place):
                check_graph(exported, place)
            plan = plan_dla(exported, place)
            if plan is not None:
                # A kit is the same before and after its results are here: those are judged below.
                check_dla_version(plan, place, state.shop.machine)
                state.dla[place] = plan
    kit = _kit(state)
    if kit is not None and state.away is not None:
        _check_results(kit, state.away)
        for place, plan in state.dla.items():
            if state.is_away(place):
                with fault_noted(state.faults, place):
                    check_dla_version(plan, place, state.away.machine)
    for place in state.places:
        if state.shop_of(place) is None:
            state.waiting[place] = (
                "no engine exists yet: it is built on its device, with the kit beside this report"
            )
        elif place not in state.faults:
            _build_one(state, place)


def _build_one(state: RunState, place: Place) -> None:
    """Build the engine of a place, unless another place shares it and was first."""
    first = next(p for p in state.places if p.engine_key == place.engine_key)
    if first in state.faults:
        state.faults[place] = state.faults[first]
    elif first in state.engines:
        state.engines[place] = state.engines[first]
    else:
        with fault_noted(state.faults, place):
            shop = state.shop_of(place) or state.shop
            state.engines[place] = build(shop, state.exports[place.form], place)
            check_placement(build_record(state.engines[place]), place.engine_key)


def _kit(state: RunState) -> Kit | None:
    """Return the kit for the engines that cannot be built from here; None where there are none."""
    places = [p for p in state.places if state.is_away(p) and p not in state.faults]
    if not places:
        return None
    images = None
    if state.evaluation is not None:
        images = reference(state.shop, state.model, state.evaluation, "for evaluation")
    size = state.card.preprocess.input_size
    recipe = state.recipe
    on_dla = [(p.key, dla_line(dla_planned(state.dla[p]))) for p in places if p in state.dla]
    notes = [f"`{key}`: {line}" for key, line in on_dla]
    return plan_kit(recipe.name, places, state.exports, images, recipe.bench, size, notes)


def leave_kit(state: RunState, out: Path) -> str:
    """Write the kit into the output folder; return what is to be said of it."""
    kit = _kit(state)
    if kit is None:
        return ""
    folder = kit_folder(out, state.recipe.name, kit.target)
    with state.shop.store.scratch() as work:
        write_kit(kit, folder, work)
    return (
        f"no engine exists yet for {kit.target}: it is built on the device. {folder} has all that "
        f"is needed: copy it there, run `sh run.sh` in it, and bring its folder `results` back "
        f"with `edgex import-results RESULTS --out {out}`"
    )


def _check_results(kit: Kit, away: Workshop) -> None:
    """Refuse results that are not those of this run's kit, or from another kind of machine."""
    device, arch = away.device, find_target(kit.target).arch
    if isinstance(device, RecordedDevice) and device.results.kit != kit.digest:
        raise BadArtifact(
            f"{device.folder}: these are the results of another kit: the recipe, the network or "
            "the version of edgex is another since; run the new kit on the device"
        )
    if away.machine.arch != arch:
        raise BadArtifact(
            f"{kit.target} is {arch}, and the kit was run on {away.machine.arch}: run it on the "
            "device that it is for"
        )


def measure_all(state: RunState) -> None:
    """Measure accuracy and latency of every engine that can be run."""
    if state.evaluation is not None or state.recipe.bench is not None:
        for place in state.engines:
            machine = state.machine_of(place)
            if reason := why_not_measured(place.target, place.runtime, machine):
                state.skips[place] = reason
    if state.evaluation is not None and _to_run(state):
        answers = reference(state.shop, state.model, state.evaluation, "for evaluation")
        floats = np.load(answers.file("logits.npy"), allow_pickle=False)
        for place, built in _to_run(state).items():
            with fault_noted(state.faults, place):
                shop = state.shop_of(place) or state.shop
                logits = evaluate(shop, engine_of(place, built), built, answers)
                state.measured[place] = Measured(logits=logits, reference=floats)
    if state.recipe.bench is not None:
        for device in filter(None, (state.shop, state.away)):
            for place, timed in _latency(state, device, state.recipe.bench).items():
                measured = state.measured.setdefault(place, Measured())
                measured.rounds, measured.conditions, measured.profile, measured.timing = timed


def _to_run(state: RunState) -> dict[Place, Artifact]:
    """Return the engines that can be run and have not failed."""
    left_out = (*state.faults, *state.skips)
    return {place: built for place, built in state.engines.items() if place not in left_out}


def _latency(state: RunState, shop: Workshop, spec: BenchSpec) -> dict[Place, Timed]:
    """Measure every engine of a device that works; after one fails the others start again."""
    while True:
        working = {p: built for p, built in _to_run(state).items() if state.shop_of(p) is shop}
        if not working:
            return {}
        try:
            engines = [(engine_of(place, built), built) for place, built in working.items()]
            found = bench(shop, engines, spec)
        except (OutOfResources, DeviceLost):
            raise
        except EdgexError as error:
            failed = [place for place in working if place.key == error.engine]
            if not failed:
                raise
            state.faults[failed[0]] = error
        else:
            return {place: found[place.key] for place in working}


Key = TypeVar("Key")


@contextmanager
def fault_noted(faults: dict[Key, EdgexError], key: Key) -> Iterator[None]:
    """Note the error of one engine and go on with the next; a full or lost device ends the run."""
    try:
        yield
    except (OutOfResources, DeviceLost):
        raise
    except EdgexError as error:
        faults[key] = error
