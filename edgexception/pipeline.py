"""The story of a run: a recipe's stages, in order, from a checkpoint to a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from edgexception.artifacts import Artifact, Store, atomic_write
from edgexception.bench.protocol import Engine
from edgexception.bench.statistics import Times
from edgexception.data import open_calibration, open_evaluation
from edgexception.device import BuildRecord, Device, ProbeRecord, Progress, local_device
from edgexception.engine_stages import bench, build, evaluate
from edgexception.errors import EdgexError, NotPossibleHere, OutOfResources, UsageError
from edgexception.imageset import ImageSet
from edgexception.recipe import BenchSpec, CheckpointModel, Recipe, TargetSpec
from edgexception.recipe_checks import check_recipe
from edgexception.recipe_file import dump_recipe
from edgexception.report.assemble import Findings, Measured, Place, report_of
from edgexception.report.record import Network, Report, StageLine
from edgexception.report.render import to_markdown
from edgexception.sources import list_source
from edgexception.stages import (
    export,
    find_checkpoint,
    import_model,
    quantize,
    reference,
    verify,
)
from edgexception.targets import find_runtime, find_target
from edgexception.workshop import Workshop

Last = Literal["import", "quantize", "export", "build", "bench"]
LAST: tuple[Last, ...] = ("import", "quantize", "export", "build", "bench")

PARITY_IMAGES = 32
"""How many images every exported graph is compared on."""


@dataclass(frozen=True)
class Listener:
    """Who is told of finished stages, and of progress inside one."""

    stage: Callable[[StageLine], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None


class Outcome(NamedTuple):
    """What a run found, and the error of the first engine that failed, if one did."""

    report: Report
    fault: EdgexError | None


@dataclass
class _Run:
    """What a run has so far; each step below adds to it."""

    recipe: Recipe
    shop: Workshop
    places: tuple[Place, ...]
    model: Artifact
    card: Network
    labelled: ImageSet | None = None
    evaluation: ImageSet | None = None
    calibration: ImageSet | None = None
    quantized: Artifact | None = None
    exports: dict[str, Artifact] = field(default_factory=dict)
    parity: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    parity_from: str = ""
    parity_faults: dict[tuple[str, str], EdgexError] = field(default_factory=dict)
    engines: dict[Place, Artifact] = field(default_factory=dict)
    measured: dict[Place, Measured] = field(default_factory=dict)
    faults: dict[Place, EdgexError] = field(default_factory=dict)


def run(
    recipe: Recipe, out: Path, last: Last = "bench", listener: Listener | None = None
) -> Outcome:
    """Run a recipe's stages up to `last` and return what was found.

    Results are kept in `out`/store and linked from `out` by name; `recipe.yaml`, `report.json` and
    `report.md` are written at the end. Nothing that was done before for the same content is done
    again. Where a single engine fails, the others still run, the report says so, and its error is
    returned beside it. Raises the EdgexError of whatever else cannot be done.
    """
    check_recipe(recipe)
    _check_sources(recipe, last)
    listener = listener or Listener()
    with _output(out) as store:
        device = local_device()
        shop = Workshop(store, device, _probe(device, store), listener.stage, listener.progress)
        places = tuple(_places(recipe, shop.machine)) if _reaches(last, "export") else ()
        state = _Run(recipe, shop, places, *import_model(shop, recipe.model))
        if _reaches(last, "quantize"):
            _open_photos(state)
            _quantize(state)
        if _reaches(last, "export"):
            _export(state)
            _verify(state)
        if _reaches(last, "build"):
            _build(state)
        if _reaches(last, "bench"):
            _measure(state)
        report = report_of(_findings(state, judged=_reaches(last, "bench")))
        _publish(out, state, report)
    return Outcome(report, next(iter(state.faults.values()), None))


def _reaches(last: Last, stage: Last) -> bool:
    return LAST.index(last) >= LAST.index(stage)


# --- before anything is done ----------------------------------------------------------------------


def _check_sources(recipe: Recipe, last: Last) -> None:
    """Refuse files and folders that are not there before a network is trained for an hour."""
    sources = []
    if isinstance(recipe.model, CheckpointModel):
        find_checkpoint(recipe.model.path)
    else:
        sources.append(recipe.model.source)
    if _reaches(last, "quantize"):
        sources += [spec.source for spec in (recipe.calibration, recipe.evaluation) if spec]
    for source in sources:
        list_source(source)


def _output(out: Path) -> Store:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be the output folder ({error.strerror}); name another one with --out"
        ) from error
    return Store(out / "store")


def _probe(device: Device, store: Store) -> ProbeRecord:
    with store.scratch() as folder:
        return ProbeRecord.model_validate(device.call("probe", {}, {}, folder / "answer"))


def _places(recipe: Recipe, machine: ProbeRecord) -> Iterator[Place]:
    """Yield every engine that the recipe asks for, after checking that this machine can have it."""
    batches = recipe.bench.batch_sizes if recipe.bench else (recipe.export.batch or 1,)
    for spec in recipe.targets:
        _check_target(spec, machine)
        threads = spec.threads or machine.cpu.usable_cores
        for runtime in spec.runtimes:
            dialect = find_runtime(spec.target, runtime).dialect
            for precision in spec.precisions:
                for batch in batches:
                    yield Place(spec.target, runtime, dialect, precision, batch, threads)


def _check_target(spec: TargetSpec, machine: ProbeRecord) -> None:
    target = find_target(spec.target)
    if target.arch != machine.arch:
        raise NotPossibleHere(
            f"target {spec.target} is {target.arch}, and this machine is {machine.arch}: run the "
            "recipe on such a machine"
        )
    for runtime in spec.runtimes:
        facts = machine.runtimes.get(runtime)
        if facts is None or facts.missing is not None:
            reason = facts.missing if facts else "this version has no adapter for it"
            raise NotPossibleHere(
                f"target {spec.target}: runtime {runtime} cannot be used here: {reason}. "
                f"Install it with `pip install 'edgexception[{runtime}]'`, or take it out"
            )


# --- the steps ------------------------------------------------------------------------------------


def _open_photos(state: _Run) -> None:
    recipe, preprocess = state.recipe, state.card.preprocess
    if recipe.evaluation is not None:
        state.labelled, state.evaluation = open_evaluation(
            recipe.evaluation, preprocess, state.card.classes
        )
        _check_classes(state.labelled, state.card)
    if recipe.calibration is not None:
        state.calibration = open_calibration(
            recipe.calibration, preprocess, evaluation=state.labelled
        )


def _check_classes(labelled: ImageSet, card: Network) -> None:
    """Refuse the folders of an evaluation as the network's classes when their number is another."""
    if labelled.labels is not None and len(labelled.classes or ()) != card.outputs:
        raise UsageError(
            f"the evaluation has {len(labelled.classes or ())} classes and the network "
            f"{card.outputs} outputs: list the class names in the order of the outputs as "
            "model.classes (--classes)"
        )


def _quantize(state: _Run) -> None:
    recipe = state.recipe
    if recipe.quantize is not None and recipe.calibration is not None and state.calibration:
        state.quantized = quantize(
            state.shop, state.model, recipe.quantize, recipe.calibration, state.calibration
        )


def _export(state: _Run) -> None:
    """Export float always, and INT8 in every dialect that a target or the recipe asks for."""
    batch = state.recipe.export.batch
    state.exports["fp32"] = export(state.shop, state.model, None, "", batch)
    if state.quantized is None:
        return
    wanted = [place.dialect for place in state.places if place.precision == "int8"]
    for dialect in dict.fromkeys((*wanted, *state.recipe.export.dialects)):
        state.exports[f"int8-{dialect}"] = export(
            state.shop, state.model, state.quantized, dialect, batch
        )


def _verify(state: _Run) -> None:
    """Compare every exported graph on the first evaluation images, else on calibration images."""
    if state.evaluation is not None:
        images, state.parity_from = state.evaluation, "evaluation"
    elif state.calibration is not None:
        images, state.parity_from = state.calibration, "calibration"
    else:
        return
    first = ImageSet(images.samples[:PARITY_IMAGES], None, images.preprocess, ())
    answers = reference(state.shop, state.model, first, "for parity")
    for place in state.places:
        key = (place.form, place.runtime)
        if key not in state.parity and key not in state.parity_faults:
            with _fault_noted(state.parity_faults, key):
                state.parity[key] = _verified(state, place, answers)
        if key in state.parity_faults:
            state.faults[place] = state.parity_faults[key]


def _verified(state: _Run, place: Place, answers: Artifact) -> Artifact:
    return verify(
        state.shop,
        state.model,
        None if place.precision == "fp32" else state.quantized,
        state.exports[place.form],
        answers,
        place,
        state.recipe.export.batch or 1,
    )


def _build(state: _Run) -> None:
    for place in state.places:
        if place not in state.faults:
            with _fault_noted(state.faults, place):
                state.engines[place] = build(
                    state.shop,
                    state.exports[place.form],
                    place.runtime,
                    place.batch,
                    place.threads,
                    place.key,
                )


def _measure(state: _Run) -> None:
    if state.evaluation is not None and state.engines:
        answers = reference(state.shop, state.model, state.evaluation, "for evaluation")
        floats = np.load(answers.file("logits.npy"), allow_pickle=False)
        for place, built in state.engines.items():
            with _fault_noted(state.faults, place):
                logits = evaluate(state.shop, _engine(place, built), built, answers)
                state.measured[place] = Measured(logits=logits, reference=floats)
    if state.recipe.bench is not None:
        for place, rounds in _latency(state, state.recipe.bench).items():
            state.measured.setdefault(place, Measured()).rounds = rounds


def _latency(state: _Run, spec: BenchSpec) -> dict[Place, list[Times]]:
    """Measure every engine that works; one that fails is taken out and the others start again."""
    while True:
        working = {p: built for p, built in state.engines.items() if p not in state.faults}
        if not working:
            return {}
        try:
            engines = [(_engine(place, built), built) for place, built in working.items()]
            times = bench(state.shop, engines, spec)
        except OutOfResources:
            raise
        except EdgexError as error:
            failed = [place for place in working if place.key == error.engine]
            if not failed:
                raise
            state.faults[failed[0]] = error
        else:
            return {place: times[place.key] for place in working}


Key = TypeVar("Key")


@contextmanager
def _fault_noted(faults: dict[Key, EdgexError], key: Key) -> Iterator[None]:
    """Note the error of one engine and go on with the next; a full disk or memory ends the run."""
    try:
        yield
    except OutOfResources:
        raise
    except EdgexError as error:
        faults[key] = error


def _engine(place: Place, built: Artifact) -> Engine:
    record = BuildRecord.model_validate_json(built.file("build.json").read_bytes())
    return Engine(place.key, place.runtime, built.file(record.engine), place.batch, place.threads)


# --- what is left behind --------------------------------------------------------------------------


def _findings(state: _Run, *, judged: bool) -> Findings:
    return Findings(
        recipe=state.recipe,
        machine=state.shop.machine,
        device=state.shop.device.name,
        card=state.card,
        labelled=state.labelled,
        evaluation=state.evaluation,
        calibration=state.calibration,
        plan=None if state.quantized is None else state.quantized.file("plan.json"),
        parity=state.parity,
        parity_from=state.parity_from,
        parity_faults={key: str(error) for key, error in state.parity_faults.items()},
        places=state.places,
        exports=state.exports,
        engines=state.engines,
        measured=state.measured,
        faults={place: str(error) for place, error in state.faults.items()},
        stages=tuple(state.shop.done),
        judged=judged,
    )


def _publish(out: Path, state: _Run, report: Report) -> None:
    """Link results by name from the output folder, and write the recipe and the report."""
    links = {"model.safetensors": state.model.file("model.safetensors")}
    if state.quantized is not None:
        for name in ("plan.json", "calibration.json"):
            links[name] = state.quantized.file(name)
    links |= {f"onnx/{form}.onnx": a.file("model.onnx") for form, a in state.exports.items()}
    links |= {
        f"onnx/{form}.on-{runtime}.parity.json": artifact.file("parity.json")
        for (form, runtime), artifact in state.parity.items()
    }
    for place, built in state.engines.items():
        engine = _engine(place, built)
        links[f"engines/{place.key}{engine.path.suffix}"] = engine.path
        links[f"engines/{place.key}.build.json"] = built.file("build.json")
    texts = {
        "recipe.yaml": dump_recipe(state.recipe),
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.md": to_markdown(report),
    }
    with state.shop.store.scratch() as work:
        _replace_links(out, links, work)
        for name, text in texts.items():
            atomic_write(work / name, text)
            (work / name).replace(out / name)


def _replace_links(out: Path, links: Mapping[str, Path], work: Path) -> None:
    """Put each link in place in one step, and remove those that an earlier run left."""
    for folder in (out, out / "onnx", out / "engines"):
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if old.is_symlink() and old.relative_to(out).as_posix() not in links:
                old.unlink()
    for name, path in links.items():
        (work / "link").symlink_to(os.path.relpath(path, (out / name).parent))
        (work / "link").replace(out / name)
