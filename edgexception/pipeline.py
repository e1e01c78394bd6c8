"""The story of a run: a recipe's stages, in order, from a checkpoint to a report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from edgexception.artifacts import Artifact, Store, atomic_write
from edgexception.bench.protocol import Engine
from edgexception.data import open_calibration, open_evaluation
from edgexception.device import BuildRecord, Device, ProbeRecord, Progress, local_device
from edgexception.errors import EdgexError, NotPossibleHere, OutOfResources, UsageError
from edgexception.imageset import ImageSet
from edgexception.recipe import Recipe, TargetSpec
from edgexception.recipe_checks import check_recipe
from edgexception.recipe_file import dump_recipe
from edgexception.report.assemble import Findings, Measured, Place, report_of
from edgexception.report.record import Network, Report, StageLine
from edgexception.report.render import to_markdown
from edgexception.stages import (
    Workshop,
    bench,
    build,
    evaluate,
    export,
    import_model,
    quantize,
    reference,
    verify,
)
from edgexception.targets import find_runtime, find_target

Last = Literal["import", "quantize", "export", "build", "bench"]
LAST: tuple[Last, ...] = ("import", "quantize", "export", "build", "bench")

PARITY_IMAGES = 32
"""How many images every exported graph is compared on."""


@dataclass(frozen=True)
class Listener:
    """Who is told of finished stages, and of progress inside one."""

    stage: Callable[[StageLine], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None


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
    engines: dict[Place, Artifact] = field(default_factory=dict)
    measured: dict[Place, Measured] = field(default_factory=dict)
    faults: dict[Place, EdgexError] = field(default_factory=dict)


def run(
    recipe: Recipe, out: Path, last: Last = "bench", listener: Listener | None = None
) -> Report:
    """Run a recipe's stages up to `last` and return what was found.

    Results are kept in `out`/store and linked from `out` by name; `recipe.yaml`, `report.json` and
    `report.md` are written at the end. Nothing that was done before for the same content is done
    again. Raises the EdgexError of whatever cannot be done; where a single engine fails, the others
    still run and the report is written before its error is raised.
    """
    check_recipe(recipe)
    listener = listener or Listener()
    with _output(out) as store:
        device = local_device()
        shop = Workshop(store, device, _probe(device, out), listener.stage, listener.progress)
        places = tuple(_places(recipe, shop.machine)) if _reaches(last, "export") else ()
        state = _Run(recipe, shop, places, *import_model(shop, recipe.model))
        _open_photos(state, last)
        if _reaches(last, "quantize"):
            _quantize(state)
        if _reaches(last, "export"):
            _export(state)
            _verify(state)
        if _reaches(last, "build"):
            _build(state)
        if _reaches(last, "bench"):
            _measure(state)
        report = report_of(_findings(state))
        _publish(out, state, report)
    for fault in state.faults.values():
        raise fault
    return report


def _reaches(last: Last, stage: Last) -> bool:
    return LAST.index(last) >= LAST.index(stage)


# --- before anything is done ----------------------------------------------------------------------


def _output(out: Path) -> Store:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be the output folder: {error.strerror}") from error
    return Store(out / "store")


def _probe(device: Device, out: Path) -> ProbeRecord:
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=out) as folder:
        return ProbeRecord.model_validate(device.call("probe", {}, {}, Path(folder) / "answer"))


def _places(recipe: Recipe, machine: ProbeRecord) -> Iterator[Place]:
    """Yield every engine that the recipe asks for, after checking that this machine can have it."""
    batches = recipe.bench.batch_sizes if recipe.bench else (1,)
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


def _open_photos(state: _Run, last: Last) -> None:
    recipe, preprocess = state.recipe, state.card.preprocess
    if recipe.evaluation is not None and _reaches(last, "quantize"):
        state.labelled, state.evaluation = open_evaluation(
            recipe.evaluation, preprocess, state.card.classes
        )
    if recipe.calibration is not None and _reaches(last, "quantize"):
        state.calibration = open_calibration(
            recipe.calibration, preprocess, evaluation=state.labelled
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
        if key not in state.parity:
            quantized = None if place.precision == "fp32" else state.quantized
            state.parity[key] = verify(
                state.shop,
                state.model,
                quantized,
                state.exports[place.form],
                answers,
                place.runtime,
                place.dialect,
            )


def _build(state: _Run) -> None:
    for place in state.places:
        with _fault_noted(state, place):
            state.engines[place] = build(
                state.shop,
                state.exports[place.form],
                place.runtime,
                place.batch,
                place.threads,
                place.key,
            )


def _measure(state: _Run) -> None:
    answers = None
    if state.evaluation is not None and state.engines:
        answers = reference(state.shop, state.model, state.evaluation, "for evaluation")
        floats = np.load(answers.file("logits.npy"), allow_pickle=False)
        for place, built in state.engines.items():
            with _fault_noted(state, place):
                logits = evaluate(state.shop, _engine(place, built), built, answers)
                state.measured[place] = Measured(logits=logits, reference=floats)
    working = {p: built for p, built in state.engines.items() if p not in state.faults}
    if state.recipe.bench is not None and working:
        engines = [(_engine(place, built), built) for place, built in working.items()]
        times = bench(state.shop, engines, state.recipe.bench)
        for place in working:
            measured = state.measured.setdefault(place, Measured())
            measured.rounds = times[place.key]


@contextmanager
def _fault_noted(state: _Run, place: Place) -> Iterator[None]:
    """Note the error of one engine and go on with the next; a full disk or memory ends the run."""
    try:
        yield
    except OutOfResources:
        raise
    except EdgexError as error:
        state.faults[place] = error


def _engine(place: Place, built: Artifact) -> Engine:
    record = BuildRecord.model_validate_json(built.file("build.json").read_bytes())
    return Engine(place.key, place.runtime, built.file(record.engine), place.batch, place.threads)


# --- what is left behind --------------------------------------------------------------------------


def _findings(state: _Run) -> Findings:
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
        places=state.places,
        exports=state.exports,
        engines=state.engines,
        measured=state.measured,
        faults={place: str(error) for place, error in state.faults.items()},
        stages=tuple(state.shop.done),
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
    for name, path in links.items():
        _link(out / name, path)
    atomic_write(out / "recipe.yaml", dump_recipe(state.recipe))
    atomic_write(out / "report.json", report.model_dump_json(indent=1) + "\n")
    atomic_write(out / "report.md", to_markdown(report))


def _link(name: Path, path: Path) -> None:
    """Make `name` a relative link to `path`, replacing what an earlier run left, in one step."""
    name.parent.mkdir(exist_ok=True)
    new = name.with_name(f".{name.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(path, name.parent))
    new.replace(name)
