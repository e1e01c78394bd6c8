"""Right of the ONNX seam, which a device does: what it can have, engines, logits and times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgexception.ability import is_out_of_reach, why_not_built
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import TIMED, TIMING_CACHE
from edgexception.agent.tensorrt_options import parse_version, read_options
from edgexception.artifacts import Artifact, atomic_write, canonical_json
from edgexception.bench.conditions import Conditions, conditions, read_samples
from edgexception.bench.protocol import Engine, build_engine, measure_latency, run_images
from edgexception.bench.statistics import Times
from edgexception.device import Device, ProbeRecord, Profile, Progress, RecordedDevice, Timing
from edgexception.device.answers import ERRORS
from edgexception.errors import BadArtifact, NotPossibleHere, UsageError
from edgexception.recipe import BenchSpec, Recipe, TargetSpec, TensorRtSpec
from edgexception.report.assemble import Place
from edgexception.resolver import version_for
from edgexception.targets import extra_of, find_runtime, find_target
from edgexception.workshop import Workshop, write_json

if TYPE_CHECKING:
    from edgexception.export.dla import DlaPlan


def build(shop: Workshop, exported: Artifact, place: Place) -> Artifact:
    """Build one engine on the device: the engine file and `build.json`.

    What TensorRT would take and compute otherwise, or refuse late, is refused before. What it timed
    is kept for later builds; it is no part of the key, since each build adds to it, and with it an
    engine computes the same.
    """

    def write(folder: Path) -> None:
        check_graph(exported, place)
        model, cache = exported.file("model.onnx"), timing_cache_of(shop, place)
        known = cache if cache is not None and cache.is_file() else None
        record = ask_build(place, model, shop.device, folder, shop.progress, known)
        write_json(folder / "build.json", record)
        if cache is not None:
            if not (folder / TIMING_CACHE).is_file():
                left = f"{shop.device.name} left no {TIMING_CACHE} beside the engine"
                raise BadArtifact(f"{place.engine_key}: {left}")
            cache.parent.mkdir(exist_ok=True)
            atomic_write(cache, (folder / TIMING_CACHE).read_bytes())

    inputs = {
        "exported": exported.digest,
        "dialect": place.dialect,
        "batch": place.best_batch,
        "batches": place.batches,
        "threads": place.threads,
        "sm": place.sm,
        "tensorrt": place.tensorrt_options,
        "machine": shop.identity(place.runtime),
    }
    return shop.once("build", place.engine_key, inputs, write)


def timing_cache_of(shop: Workshop, place: Place) -> Path | None:
    """Return where the times of kernels are kept that fit this device; None where there are none.

    Such times are those of one GPU, CUDA and version of TensorRT ("Optimizing Builder Performance",
    TensorRT 10.16): here of one target on one device, whose whole identity is in the file's name. A
    kit is no device that could be asked again.
    """
    if place.runtime not in TIMED or isinstance(shop.device, RecordedDevice):
        return None
    facts = shop.identity(place.runtime)
    digest = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
    name = f"{place.target}-{place.runtime}-{facts['version']}-{digest[:16]}.cache"
    return shop.store.root / ".timing" / name


def check_graph(exported: Artifact, place: Place) -> None:
    """Raise the EdgexError of a graph that TensorRT would not compute as it is meant."""
    if place.dialect == "tensorrt":
        from edgexception.export.lint import check_typed

        check_typed(exported.file("model.onnx"), place.sm)


def plan_dla(exported: Artifact, place: Place) -> DlaPlan | None:
    """Return which layers of an engine the DLA can run; None where it is not asked to run there.

    Raises UsageError where it can run none.
    """
    options = read_options(place.tensorrt_options)
    if options is None or options.dla_core is None:
        return None
    from edgexception.export.dla import plan_dla as plan_graph

    plan = plan_graph(exported.file("model.onnx"))
    if not any(layer.precision for layer in plan.layers):
        raise UsageError(
            f"{place.key}: the DLA can run none of its {len(plan.layers)} layers (of the first: "
            f"{plan.layers[0].why}): leave out dla_core"
        )
    return plan


def check_dla_version(plan: DlaPlan, place: Place, machine: ProbeRecord) -> None:
    """Raise UsageError where a machine's TensorRT would compute float32 layers in FP16.

    NotPossibleHere where its version is not known.
    """
    float32 = [layer.name for layer in plan.layers if layer.float32]
    options = read_options(place.tensorrt_options)
    if not float32 or options is None:
        return
    version = version_for(place.target, options, machine)
    try:
        weak = parse_version(version) < (11,)
    except AgentError as error:
        raise ERRORS[error.kind](f"{place.key}: {error}") from error
    if weak:
        raise UsageError(
            f"{place.key}: {len(float32)} layers are float32 because they may overflow FP16 (the "
            f"first is {float32[0]}), and TensorRT {version} would compute them in FP16: for a DLA "
            "its networks are weakly typed; leave out dla_core, or take TensorRT 11.4.1"
        )


def ask_build(
    place: Place,
    model: Path,
    device: Device,
    folder: Path,
    progress: Callable[[Progress], None] | None = None,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Let a device build one engine in a folder; return its record."""
    more = {
        "sm": place.sm,
        "tensorrt": place.tensorrt_options,
        "batches": place.batches,
        "timing_cache": timing_cache,
    }
    return build_engine(
        place.runtime, model, place.best_batch, place.threads, device, folder, progress, more
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
        "batch": engine.batch,
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
        bounds = (1, batches[0], max(batches)) if spec.dynamic_batch else None
        if kits and is_out_of_reach(spec.target, machine):
            threads = spec.threads or find_target(spec.target).integer("cpu_cores") or 1
        else:
            check_target(spec, machine)
            threads = spec.threads or machine.cpu.usable_cores
        for runtime in spec.runtime_names:
            dialect = find_runtime(spec.target, runtime).dialect
            for precision in spec.precisions:
                for batch in batches:
                    told = _told(recipe, spec) if runtime == "tensorrt" else None
                    yield Place(
                        spec.target, runtime, dialect, precision, batch, threads, told, bounds
                    )


def _told(recipe: Recipe, spec: TargetSpec) -> TensorRtSpec | None:
    """Return what TensorRT is told: what the recipe says, and of weights that it makes sparse."""
    if recipe.prune is None or recipe.prune.sparsity is None:
        return spec.tensorrt
    return (spec.tensorrt or TensorRtSpec()).model_copy(update={"sparse_weights": True})


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
