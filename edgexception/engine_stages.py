"""Right of the ONNX seam, which a device does: what it can have, engines, logits and times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgexception.ability import is_out_of_reach, why_not_built
from edgexception.artifacts import Artifact
from edgexception.bench.conditions import Conditions, conditions, read_samples
from edgexception.bench.protocol import Engine, build_engine, measure_latency, run_images
from edgexception.bench.statistics import Times
from edgexception.device import Device, ProbeRecord, Profile, Progress, Timing
from edgexception.errors import NotPossibleHere
from edgexception.recipe import BenchSpec, Recipe, TargetSpec
from edgexception.report.assemble import Place
from edgexception.targets import extra_of, find_runtime, find_target
from edgexception.workshop import Workshop, write_json


def build(shop: Workshop, exported: Artifact, place: Place) -> Artifact:
    """Build one engine on the device: the engine file and `build.json`.

    What TensorRT would take and compute otherwise, or refuse late, is refused before.
    """

    def write(folder: Path) -> None:
        check_graph(exported, place)
        model = exported.file("model.onnx")
        record = ask_build(place, model, shop.device, folder, shop.progress)
        write_json(folder / "build.json", record)

    inputs = {
        "exported": exported.digest,
        "dialect": place.dialect,
        "batch": place.batch,
        "threads": place.threads,
        "sm": place.sm,
        "tensorrt": place.tensorrt_options,
        "machine": shop.identity(place.runtime),
    }
    return shop.once("build", place.key, inputs, write)


def check_graph(exported: Artifact, place: Place) -> None:
    """Raise the EdgexError of a graph that TensorRT would not compute as it is meant."""
    if place.dialect == "tensorrt":
        from edgexception.export.lint import check_typed

        check_typed(exported.file("model.onnx"), place.sm)


def ask_build(
    place: Place,
    model: Path,
    device: Device,
    folder: Path,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Let a device build one engine in a folder; return its record."""
    more = {"sm": place.sm, "tensorrt": place.tensorrt_options}
    return build_engine(
        place.runtime, model, place.batch, place.threads, device, folder, progress, more
    )


def engine_at(place: Place, path: Path) -> Engine:
    """Return an engine as it is measured."""
    return Engine(
        place.key, place.runtime, path, place.batch, place.threads, place.tensorrt_options
    )


def evaluate(
    shop: Workshop, engine: Engine, built: Artifact, images: Artifact
) -> NDArray[np.float32]:
    """Return the logits that the device computes on a `reference` artifact's images."""

    def write(folder: Path) -> None:
        pixels = images.file("images.npy")
        run_images(engine, pixels, shop.device, folder / "run", shop.progress)

    inputs = {
        "engine": built.digest,
        "images": images.digest,
        "threads": engine.threads,
        "machine": shop.identity(engine.runtime),
    }
    artifact = shop.once("evaluate", engine.key, inputs, write)
    found: NDArray[np.float32] = np.load(artifact.file("run/logits.npy"), allow_pickle=False)
    return found


class Timed(NamedTuple):
    """What `bench` finds of one engine."""

    rounds: list[Times]
    """Every raw time of each round, in ns."""
    conditions: Conditions
    profile: Profile | None
    """None where the runtime does not tell."""
    timing: Timing | None
    """How a program of the runtime's took the times; None is the agent's clock."""


def bench(
    shop: Workshop, engines: Sequence[tuple[Engine, Artifact]], spec: BenchSpec
) -> dict[str, Timed]:
    """Measure all engines in turns; return what was found of each by its key."""

    def write(folder: Path) -> None:
        measured = [engine for engine, _ in engines]
        measure_latency(measured, spec, shop.device, folder / "rounds", shop.progress, shop.power)

    inputs = {
        "engines": [
            [engine.key, built.digest, engine.batch, engine.threads] for engine, built in engines
        ],
        "spec": spec.model_dump(),
        "power": shop.power,
        "machines": [shop.identity(runtime) for runtime in sorted({e.runtime for e, _ in engines})],
    }
    artifact = shop.once("bench", f"{len(engines)} engines", inputs, write)
    found = {}
    for number, (engine, _) in enumerate(engines, start=1):
        turns = [f"rounds/round-{r}-engine-{number}" for r in range(1, spec.rounds + 1)]
        times = [np.load(artifact.file(f"{turn}/times_ns.npy")) for turn in turns]
        samples = [read_samples(artifact.file(f"{turn}/telemetry.json")) for turn in turns]
        first, last = (
            json.loads(artifact.file(f"{turn}/record.json").read_bytes())
            for turn in (turns[0], turns[-1])
        )
        told = conditions(samples, times, engine.batch, first["power_mode"])
        profile, way = last.get("profile"), last.get("timing")
        found[engine.key] = Timed(
            times,
            told,
            profile and Profile.model_validate(profile),
            way and Timing.model_validate(way),
        )
    return found


def measured_by_kit(recipe: Recipe, machine: ProbeRecord) -> Recipe:
    """Return the recipe with a `bench` section where a target is out of reach.

    Its kit is run once, so it measures what it builds.
    """
    away = any(is_out_of_reach(spec.target, machine) for spec in recipe.targets)
    return recipe.model_copy(update={"bench": recipe.bench or BenchSpec()}) if away else recipe


def places_of(recipe: Recipe, machine: ProbeRecord, kits: bool = False) -> Iterator[Place]:
    """Yield every engine that the recipe asks for, after checking that this machine can have it.

    With `kits` those that are out of reach are not checked: their devices do that.
    """
    batches = recipe.bench.batch_sizes if recipe.bench else (recipe.export.batch or 1,)
    for spec in recipe.targets:
        if kits and is_out_of_reach(spec.target, machine):
            threads = spec.threads or find_target(spec.target).integer("cpu_cores") or 1
        else:
            check_target(spec, machine)
            threads = spec.threads or machine.cpu.usable_cores
        for runtime in spec.runtime_names:
            dialect = find_runtime(spec.target, runtime).dialect
            for precision in spec.precisions:
                for batch in batches:
                    told = spec.tensorrt if runtime == "tensorrt" else None
                    yield Place(spec.target, runtime, dialect, precision, batch, threads, told)


def check_target(spec: TargetSpec, machine: ProbeRecord) -> None:
    """Raise NotPossibleHere for a target, or a runtime of it, that cannot be built for here."""
    target = find_target(spec.target)
    cross = all(find_runtime(spec.target, name).cross_built for name in spec.runtime_names)
    if target.arch != machine.arch and not cross:
        raise NotPossibleHere(
            f"target {spec.target} is {target.arch}, and this machine is {machine.arch}: run the "
            "recipe on such a machine, or name one with --device"
        )
    for runtime in spec.runtime_names:
        if reason := why_not_built(spec.target, runtime, machine):
            extra = extra_of(runtime)
            install = f"Install it with `pip install 'edgexception[{extra}]'`, or list" * bool(
                extra
            )
            raise NotPossibleHere(
                f"target {spec.target}: runtime {runtime} cannot be used here: {reason}. "
                f"{install or 'List'} the others alone"
            )
