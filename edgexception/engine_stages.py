"""Right of the ONNX seam, which a device does: what it can have, engines, logits and times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgexception.ability import why_not_built
from edgexception.artifacts import Artifact
from edgexception.bench.conditions import Conditions, conditions, read_samples
from edgexception.bench.protocol import Engine, build_engine, measure_latency, run_images
from edgexception.device import ProbeRecord
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
        model = exported.file("model.onnx")
        if place.dialect == "tensorrt":
            from edgexception.export.lint import check_typed

            check_typed(model, place.sm)
        record = build_engine(
            place.runtime,
            model,
            place.batch,
            place.threads,
            shop.device,
            folder,
            shop.progress,
            {"sm": place.sm, "tensorrt": place.tensorrt_options},
        )
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


def bench(
    shop: Workshop, engines: Sequence[tuple[Engine, Artifact]], spec: BenchSpec
) -> dict[str, tuple[list[NDArray[np.int64]], Conditions]]:
    """Measure all engines in turns; return every raw time in ns by round, and the conditions."""

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
        record = json.loads(artifact.file(f"{turns[0]}/record.json").read_bytes())
        told = conditions(samples, times, engine.batch, record["power_mode"])
        found[engine.key] = (times, told)
    return found


def places_of(recipe: Recipe, machine: ProbeRecord) -> Iterator[Place]:
    """Yield every engine that the recipe asks for, after checking that this machine can have it."""
    batches = recipe.bench.batch_sizes if recipe.bench else (recipe.export.batch or 1,)
    for spec in recipe.targets:
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
    if target.arch != machine.arch:
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
