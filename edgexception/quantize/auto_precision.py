"""The fewest layers in float that keep a quantized network within a bound of the float one.

Greedy, with the real network measured at each step: units (see `sensitivity`) are ranked by the
noise of the roundings that an exception takes away, over what it costs; they are added best first
until the bound holds; then each is taken out again, the least useful first, and stays out where the
bound holds without it. That is no proof of the smallest set: noises add up only nearly, and on
runtimes whose layers write integers two neighbours in float save an edge that neither saves alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx

from edgexception.errors import BadArtifact, GateFailed, UsageError
from edgexception.imageset import ImageSet, first_images
from edgexception.model.graph import to_graph_input
from edgexception.quantize.dialects import DIALECTS, Dialect, check_plan, has_half
from edgexception.quantize.plan import (
    Change,
    ExceptionStep,
    FloatPrecision,
    Nearness,
    PrecisionChoice,
    QuantPlan,
)
from edgexception.quantize.precision import units_of, with_float_layers, with_precision
from edgexception.quantize.sensitivity import gains
from edgexception.quantize.simulate import simulate
from edgexception.recipe import AutoPrecision

RANKING_IMAGES = 32
"""How many calibration images rank the units; the bound is measured on all of them."""
BATCH = 8
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class _Network:
    """What is chosen for: the plan in INT8, and what exceptions go back to."""

    graph: fx.GraphModule
    trained: fx.GraphModule
    plan: QuantPlan
    dialects: tuple[Dialect, ...]
    images: ImageSet
    progress: Progress | None


def dialects_for(plan: QuantPlan, asked: Sequence[str]) -> tuple[Dialect, ...]:
    """Return the dialects that are asked for; for none, all those that can say the plan."""
    if asked:
        return tuple(DIALECTS[name] for name in dict.fromkeys(asked))
    able = []
    for dialect in DIALECTS.values():
        try:
            check_plan(plan, dialect)
        except UsageError:
            continue
        able.append(dialect)
    return tuple(able)


def choose_precision(
    graph: fx.GraphModule,
    trained: fx.GraphModule,
    plan: QuantPlan,
    spec: AutoPrecision,
    images: ImageSet,
    dialects: tuple[Dialect, ...],
    progress: Progress | None = None,
) -> QuantPlan:
    """Return the all-INT8 `plan` of `graph` with exceptions such that the bounds of `spec` hold.

    `trained` has the weights and biases that layers in float have. Images are the calibration's.
    Raises GateFailed naming the best that was reached when `exceptions_max` are not enough.
    """
    network = _Network(graph, trained, plan, dialects, images, progress)
    precision: FloatPrecision = "fp16" if all(has_half(d) for d in dialects) else "fp32"
    before, worst = _measure(network, {}, "all INT8")
    steps: list[ExceptionStep] = []
    chosen: list[str] = []
    after = before
    if not _holds(spec, before):
        chosen, after = _grow(network, spec, _ranked(network, spec, worst), precision, steps)
        chosen, after = _shrink(network, spec, chosen, after, precision, steps)
    choice = PrecisionChoice(
        bounds=_bounds(spec),
        dialects=tuple(dialect.name for dialect in dialects),
        images=len(images),
        before=before,
        after=after,
        steps=tuple(steps),
    )
    mixed = with_precision(graph, plan, _of(graph, chosen, precision))
    provenance = plan.provenance.model_copy(update={"precision": choice})
    return mixed.model_copy(update={"provenance": provenance})


def _ranked(network: _Network, spec: AutoPrecision, dialect: Dialect) -> list[str]:
    """Return the units, the one first that takes away most noise for its cost."""
    few = first_images(network.images, RANKING_IMAGES)
    noise, macs = gains(network.graph, network.plan, dialect, few, network.progress)
    cost = dict.fromkeys(noise, 1.0)
    if spec.times is not None:
        cost = _measured_costs(units_of(network.graph), spec.times)
    elif spec.weigh == "macs":
        cost = {unit: float(count) for unit, count in macs.items()}
    return sorted(noise, key=lambda unit: noise[unit] / cost[unit], reverse=True)


def _grow(
    network: _Network,
    spec: AutoPrecision,
    units: Sequence[str],
    precision: FloatPrecision,
    steps: list[ExceptionStep],
) -> tuple[list[str], Nearness]:
    # The last unit would leave nothing in INT8.
    for count in range(1, min(spec.exceptions_max, len(units) - 1) + 1):
        chosen = list(units[:count])
        found, _ = _measure(network, _of(network.graph, chosen, precision), f"{count} exceptions")
        steps.append(_step(chosen[-1], "added", found))
        if _holds(spec, found):
            return chosen, found
    raise GateFailed(_out_of_reach(spec, steps))


def _shrink(
    network: _Network,
    spec: AutoPrecision,
    chosen: list[str],
    found: Nearness,
    precision: FloatPrecision,
    steps: list[ExceptionStep],
) -> tuple[list[str], Nearness]:
    """Take out what the bound holds without. It did not hold before the last one was added."""
    for unit in chosen[-2::-1]:
        fewer = [other for other in chosen if other != unit]
        without, _ = _measure(network, _of(network.graph, fewer, precision), f"without {unit}")
        holds = _holds(spec, without)
        steps.append(_step(unit, "removed" if holds else "kept", without))
        if holds:
            chosen, found = fewer, without
    return chosen, found


def _of(
    graph: fx.GraphModule, units: Sequence[str], precision: FloatPrecision
) -> dict[str, FloatPrecision]:
    return {
        name: precision
        for unit, names in units_of(graph).items()
        if unit in units
        for name in names
    }


def _step(unit: str, change: Change, found: Nearness) -> ExceptionStep:
    return ExceptionStep(unit=unit, change=change, measured=found)


# --- bounds and costs -----------------------------------------------------------------------------


def _bounds(spec: AutoPrecision) -> dict[str, float]:
    bounds = {"sqnr_db_min": spec.sqnr_db_min, "agreement_min": spec.agreement_min}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _holds(spec: AutoPrecision, found: Nearness) -> bool:
    if spec.sqnr_db_min is not None and _or_infinity(found.sqnr_db) < spec.sqnr_db_min:
        return False
    if spec.agreement_min is not None:
        if found.agreement is None:
            raise UsageError(
                "quantize.precision.auto.agreement_min: the network has one output and decides "
                "nothing; write sqnr_db_min"
            )
        return found.agreement >= spec.agreement_min
    return True


def _out_of_reach(spec: AutoPrecision, steps: Sequence[ExceptionStep]) -> str:
    best = max(
        steps,
        key=lambda step: (
            (step.measured.sqnr_db if spec.sqnr_db_min is not None else step.measured.agreement)
            or 0.0
        ),
    )
    taken = [step.unit for step in steps[: steps.index(best) + 1]]
    bounds = ", ".join(f"{name} {bound:g}" for name, bound in _bounds(spec).items())
    reached = [f"{best.measured.sqnr_db:.1f} dB"] if best.measured.sqnr_db is not None else []
    if best.measured.agreement is not None:
        reached.append(f"agreement {best.measured.agreement:.4f}")
    return (
        f"quantize.precision.auto: {bounds} cannot be reached with {len(steps)} exceptions; the "
        f"best is {', '.join(reached)} with {', '.join(taken)} in float. Lower the bound, raise "
        "exceptions_max, or calibrate better"
    )


def _measured_costs(units: Mapping[str, Sequence[str]], path: Path) -> dict[str, float]:
    times = load_times(path)
    lacking = [name for names in units.values() for name in names if name not in times]
    if lacking:
        raise BadArtifact(
            f"{path}: has no time of layer {lacking[0]} ({len(lacking)} layers lack one); name "
            "every layer"
        )
    return {unit: sum(times[name] for name in names) for unit, names in units.items()}


def load_times(path: Path) -> dict[str, float]:
    """Read a table of costs, layer -> ms; raise BadArtifact naming what is wrong in it."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtifact(
            f"{path}: is not a JSON table of layer times ({error}); write "
            '{"layer name": milliseconds, ...}'
        ) from error
    if not isinstance(table, dict):
        raise BadArtifact(f'{path}: must be {{"layer name": milliseconds, ...}}')
    for name, value in table.items():
        if not isinstance(value, (int, float)) or not 0.0 < value < 1e9:
            raise BadArtifact(f"{path}: {name}: {value!r} is no time; write milliseconds above 0")
    return {name: float(value) for name, value in table.items()}


# --- measuring ------------------------------------------------------------------------------------


def _measure(
    network: _Network, exceptions: Mapping[str, FloatPrecision], what: str
) -> tuple[Nearness, Dialect]:
    """Return how near the network is on the worst dialect, and that dialect."""
    graph = with_float_layers(network.graph, network.trained, exceptions)
    plan = with_precision(network.graph, network.plan, exceptions)
    found = []
    for dialect in network.dialects:
        quantized = simulate(graph, plan, dialect)
        found.append(_nearness(network, quantized, f"{what}, {dialect.name}"))
    worst = max(range(len(found)), key=lambda index: -_or_infinity(found[index].sqnr_db))
    shares = [near.agreement for near in found if near.agreement is not None]
    nearness = Nearness(sqnr_db=found[worst].sqnr_db, agreement=min(shares) if shares else None)
    return nearness, network.dialects[worst]


def _or_infinity(sqnr_db: float | None) -> float:
    return float("inf") if sqnr_db is None else sqnr_db


def _nearness(network: _Network, quantized: fx.GraphModule, what: str) -> Nearness:
    power = noise = 0.0
    same = outputs = 0
    start, done, total = time.monotonic(), 0, (len(network.images) + BATCH - 1) // BATCH
    with torch.inference_mode():
        for batch in network.images.batches(BATCH):
            pixels = to_graph_input(torch.from_numpy(batch))
            expected, found = network.trained(pixels), quantized(pixels)
            power += float(expected.double().square().sum())
            noise += float((found - expected).double().square().sum())
            same += int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
            outputs, done = expected.shape[1], done + 1
            if network.progress is not None:
                left = (time.monotonic() - start) / done * (total - done)
                network.progress(f"precision: {what}", done, total, left)
    return Nearness(
        sqnr_db=None if noise == 0.0 else float(10 * np.log10(max(power, 1e-30) / noise)),
        agreement=None if outputs < 2 else same / len(network.images),
    )
