"""The story of a run: a recipe's stages, in order, from a checkpoint to a report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from edgexception.ability import Reader, why_not_measured, why_not_run
from edgexception.artifacts import Store
from edgexception.calibration_size import too_few
from edgexception.device import (
    Device,
    ProbeRecord,
    Progress,
    RecordedDevice,
    local_device,
    open_device,
)
from edgexception.engine_stages import measured_by_kit, places_of
from edgexception.errors import EdgexError, UsageError
from edgexception.imageset import first_images
from edgexception.measuring import build_all, fault_noted, leave_kit, measure_all
from edgexception.model_stages import find_checkpoint, import_model
from edgexception.output import open_output
from edgexception.prune.plan import load_prune_plan
from edgexception.pruning import prune
from edgexception.qat_stage import train_quantized
from edgexception.recipe import (
    CheckpointModel,
    PtqSpec,
    QatSpec,
    Recipe,
    TrainedHereModel,
)
from edgexception.recipe_checks import check_recipe, dialects_of
from edgexception.report.assemble import report_of
from edgexception.report.record import Report, StageLine
from edgexception.resolver import settle
from edgexception.run_images import images_to_learn, open_images
from edgexception.run_state import RunState, findings, publish
from edgexception.sources import list_source
from edgexception.stages import (
    export,
    quantize,
    reference,
    sensitivity,
    verify,
)
from edgexception.targets import Form, find_dialect, find_target, load_targets
from edgexception.workshop import Workshop

Last = Literal[
    "import", "prune-plan", "prune", "quantize", "sensitivity", "export", "build", "bench"
]
LAST: tuple[Last, ...] = get_args(Last)

NOT_READ = "no runtime on this machine reads it"

PARITY_IMAGES = 32
"""How many images every exported graph is compared on."""

SENSITIVITY_IMAGES = 32
"""How many calibration images the sensitivity is measured on."""


@dataclass(frozen=True)
class Listener:
    """Who is told of finished stages, of progress, of what may go wrong, and of what was chosen."""

    stage: Callable[[StageLine], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None
    warning: Callable[[str], None] = lambda _: None
    notice: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Where:
    """The device that builds and runs; None is this machine."""

    device: str | None = None
    keep: bool = False
    """Whether what was sent there stays, for the next run."""
    power_mode: str | None = None
    lock_clocks: bool = False
    """What a Jetson is changed to while it is timed, and back from after."""
    results: Path | None = None
    """What a kit left on the device of the targets that are out of reach."""

    @property
    def power(self) -> dict[str, Any] | None:
        """The changes as a request has them; None where there are none."""
        if self.power_mode is None and not self.lock_clocks:
            return None
        return {"mode": self.power_mode, "lock_clocks": self.lock_clocks}


HERE = Where()


class Outcome(NamedTuple):
    """What a run found, and the error of the first engine that failed or could not be run."""

    report: Report
    fault: EdgexError | None


def run(
    recipe: Recipe,
    out: Path,
    last: Last = "bench",
    listener: Listener | None = None,
    where: Where = HERE,
) -> Outcome:
    """Run a recipe's stages up to `last` and return what was found.

    Results are kept in `out`/store and linked from `out` by name; `recipe.yaml`, `report.json` and
    `report.md` are written at the end. Nothing that was done before for the same content is done
    again. Where a single engine fails, the others still run, the report says so, and its error is
    returned beside it. Raises the EdgexError of whatever else cannot be done.
    """
    check_recipe(recipe)
    _check_sources(recipe, last, out)
    listener = listener or Listener()
    with _device(where) as device, open_output(out) as store:
        machine = _probe(device, store, where.power)
        shop = Workshop(store, device, machine, listener.stage, listener.progress, where.power)
        recipe = _settled(recipe, shop, where, listener)
        kits = where.device is None
        places = tuple(places_of(recipe, shop.machine, kits)) if _reaches(last, "export") else ()
        state = RunState(recipe, shop, places, *import_model(shop, recipe.model, recipe.evaluation))
        if where.results is not None:
            state.away = _away(where.results, shop)
        if _reaches(last, "prune-plan"):
            open_images(state)
            compare = last in ("prune", "bench")
            prune(state, listener.warning, plan_only=last == "prune-plan", compare=compare)
        if _reaches(last, "quantize"):
            _quantize(state, listener)
        if last == "sensitivity":  # nothing else needs it
            _sensitivity(state)
        if _reaches(last, "export"):
            _export(state)
            _verify(state)
        if _reaches(last, "build"):
            build_all(state)
        if _reaches(last, "bench"):
            measure_all(state)
        report = report_of(findings(state, judged=_reaches(last, "bench")))
        publish(out, state, report)
        if state.waiting and _reaches(last, "build"):
            listener.notice(leave_kit(state, out))
    return Outcome(report, state.fault if last == "build" else state.fault or state.unmeasured)


def _reaches(last: Last, stage: Last) -> bool:
    return LAST.index(last) >= LAST.index(stage)


# --- before anything is done ----------------------------------------------------------------------


def _check_sources(recipe: Recipe, last: Last, out: Path) -> None:
    """Refuse what cannot work before a network is trained for an hour."""
    int8 = dialects_of(recipe)
    if last == "export" and recipe.quantize and not int8:
        raise UsageError(
            "the network is quantized, but nothing says for which runtime to write it: add "
            "--dialect (or `export.dialects`) onnxruntime, openvino or tensorrt, or a target"
        )
    sources = []
    if not isinstance(recipe.model, TrainedHereModel):
        find_checkpoint(recipe.model.path)
    if not isinstance(recipe.model, CheckpointModel):
        sources.append(recipe.model.source)
    if _reaches(last, "prune-plan"):
        learners = (recipe.quantize, recipe.prune and recipe.prune.recovery)
        named = [getattr(spec, "source", None) for spec in learners]
        sources += [source for source in named if source is not None]
        sources += [spec.source for spec in (recipe.calibration, recipe.evaluation) if spec]
    for source in sources:
        folder = getattr(source, "path", None)
        if (
            folder is not None
            and folder.is_dir()
            and out.resolve().is_relative_to(folder.resolve())
        ):
            raise UsageError(f"{out}: lies among the photos of {folder}; choose another --out")
        list_source(source)


def _device(where: Where) -> AbstractContextManager[Device]:
    if where.device is None:
        return nullcontext(local_device())
    return open_device(where.device, where.keep)


def _settled(recipe: Recipe, shop: Workshop, where: Where, listener: Listener) -> Recipe:
    """Return the recipe for the devices that are meant, and say what was chosen."""
    recipe, said = settle(recipe, shop.machine)
    if where.device is None:
        recipe = measured_by_kit(recipe, shop.machine)
    check_recipe(recipe)
    for text in said:
        listener.notice(text)
    return recipe


def _away(results: Path, shop: Workshop) -> Workshop:
    """Return where the engines of a kit were built: the device that its results answer for."""
    device = RecordedDevice(results)
    machine = _probe(device, shop.store, None)
    return Workshop(shop.store, device, machine, shop.tell, shop.progress, done=shop.done)


def _probe(device: Device, store: Store, power: dict[str, Any] | None) -> ProbeRecord:
    with store.scratch() as folder:
        return ProbeRecord.model_validate(
            device.call("probe", {"power": power}, {}, folder / "answer")
        )


# --- the steps ------------------------------------------------------------------------------------


def _quantize(state: RunState, listener: Listener) -> None:
    recipe, spec = state.recipe, state.recipe.quantize
    if spec is None or recipe.calibration is None or state.calibration is None:
        return
    few = too_few(spec.ranges, state.calibration.photo_count)
    if few is not None:
        listener.warning(few)
    state.quantized = quantize(
        state.shop,
        state.model,
        spec.ptq if isinstance(spec, QatSpec) else spec,
        recipe.calibration,
        state.calibration,
        _weight_bits(spec, recipe, state.shop.machine),
        dialects_of(recipe),
    )
    if isinstance(spec, QatSpec):
        images = images_to_learn(state, spec, "quantize") or state.calibration
        # Layers of ONNX Runtime write integers; those of the others only read them.
        dialect = "onnxruntime" if "onnxruntime" in dialects_of(recipe) else "tensorrt"
        state.quantized = train_quantized(
            state.shop, state.model, state.quantized, spec, images, dialect
        )


def _sensitivity(state: RunState) -> None:
    """Measure in the first dialect that is asked for, else in one whose layers write floats."""
    if state.quantized is not None and state.calibration is not None:
        few = first_images(state.calibration, SENSITIVITY_IMAGES)
        dialect = (*dialects_of(state.recipe), "openvino")[0]
        state.sensitivity = sensitivity(state.shop, state.model, state.quantized, few, dialect)


def _weight_bits(spec: PtqSpec, recipe: Recipe, machine: ProbeRecord) -> int:
    """Return 7 where `auto` meets a runtime that saturates on this x86 processor, else 8."""
    if spec.weight_bits != "auto":
        return spec.weight_bits
    saturates = any(
        find_dialect(target.target, runtime).saturates_without_vnni
        for target in recipe.targets
        if find_target(target.target).arch == "x86_64"
        for runtime in target.runtime_names
    )
    return 7 if saturates and not machine.cpu.vnni else 8


def _export(state: RunState) -> None:
    """Export float32 always, and every form that a target or the recipe asks for."""
    spec = state.recipe.export
    plan = None if state.pruning is None else load_prune_plan(state.pruning.file("prune.json"))
    sparse = () if plan is None else plan.sparse
    asked = [Form(precision, name) for name in spec.dialects for precision in spec.precisions]
    for form in dict.fromkeys((Form("fp32"), *(p.form for p in state.places), *asked)):
        state.exports[form] = export(
            state.shop,
            state.model,
            state.quantized if form.int8 else None,
            form,
            spec.batch,
            state.calibration,
            sparse,
        )


def _verify(state: RunState) -> None:
    """Compare every exported graph on the first evaluation images, else on calibration images."""
    if state.evaluation is not None:
        images, state.parity_from = state.evaluation, "evaluation"
    elif state.calibration is not None:
        images, state.parity_from = state.calibration, "calibration"
    else:
        return
    first = first_images(images, PARITY_IMAGES)
    answers = reference(state.shop, state.model, first, "for parity")
    for form, exported in state.exports.items():
        for reader in _readers(state, form):
            with fault_noted(state.parity_faults, (form, reader.runtime)):
                state.parity[form, reader.runtime] = verify(
                    state.shop,
                    state.model,
                    state.quantized if form.int8 else None,
                    exported,
                    answers,
                    form,
                    reader,
                    state.recipe.export.batch or 1,
                )
    for place in state.places:
        if (place.form, place.runtime) in state.parity_faults:
            state.faults[place] = state.parity_faults[place.form, place.runtime]


def _readers(state: RunState, form: Form) -> list[Reader]:
    """Return what a form is compared on: the targets' runtimes, and one that runs here at least."""
    machine, wanted = state.shop.machine, dict[str | None, str | None]()
    for place in state.places:
        if place.form == form and wanted.get(place.runtime, "not asked yet"):
            wanted[place.runtime] = why_not_measured(place.target, place.runtime, machine)
    able = [
        runtime
        for name, target in load_targets().items()
        for runtime, row in target.runtimes.items()
        if form.dialect in ("", row.dialect) and not why_not_run(name, runtime, machine)
    ]
    if able and all(wanted.values()):
        wanted[able[0]] = None
    return [Reader(*item) for item in (wanted or {None: NOT_READ}).items()]
