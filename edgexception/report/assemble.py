"""From what a run found to its record: every engine that was asked for becomes a row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgexception import __version__
from edgexception.ability import is_out_of_reach
from edgexception.agent.runtimes import Batches
from edgexception.artifacts import Artifact
from edgexception.bench.accuracy import accuracy, fidelity
from edgexception.bench.conditions import Conditions
from edgexception.bench.executed import executed
from edgexception.bench.kernel_times import slower_blocks, spent
from edgexception.bench.paired import paired
from edgexception.bench.statistics import (
    LatencySummary,
    Times,
    ratio_of_medians,
)
from edgexception.calibration_size import too_few
from edgexception.device import BuildRecord, ProbeRecord, Profile, RuntimeFacts, Timing
from edgexception.imageset import ImageSet
from edgexception.recipe import Recipe, TensorRtSpec
from edgexception.report.dla import dla_planned
from edgexception.report.gates import judge
from edgexception.report.measures import Fidelity, Gain, Listing, Machine, Slower, Spent, TimedUnder
from edgexception.report.network import Network
from edgexception.report.record import (
    BadImageLine,
    Calibration,
    Exceptions,
    Parity,
    Pruning,
    Report,
    Row,
    Sensitivity,
    StageLine,
    Types,
)
from edgexception.targets import Form, Precision, find_target, form_of, is_int8

if TYPE_CHECKING:
    from edgexception.export.dla import DlaPlan

SQNR_FLOOR_DB = -200.0
"""What stands for minus infinity: the float network's logits are all zero, and others are not."""


@dataclass(frozen=True)
class Place:
    """One engine that a recipe asks for, and what it is built from."""

    target: str
    runtime: str
    dialect: str
    precision: Precision
    batch: int
    threads: int
    tensorrt: TensorRtSpec | None = None
    batches: Batches | None = None
    """Least, best and greatest batch of a dynamic engine, which each of its batches shares."""

    @property
    def tensorrt_options(self) -> dict[str, Any] | None:
        """What TensorRT is told, as a request has it; None for other runtimes."""
        if self.tensorrt is None:
            return None
        options = self.tensorrt.model_dump(exclude={"workspace_mib"})
        size = self.tensorrt.workspace_mib
        workspace = None if size is None else size << 20
        return {**options, "workspace_bytes": workspace, "precision": self.precision}

    @property
    def key(self) -> str:
        """The name of the engine at this batch in reports."""
        shared = "" if self.batches is None else f"-of-{self.batches[0]}-{self.batches[2]}"
        return f"{self.target}-{self.runtime}-{self.precision}-b{self.batch}{shared}"

    @property
    def engine_key(self) -> str:
        """The name of the engine's file."""
        if self.batches is None:
            return self.key
        least, _, greatest = self.batches
        return f"{self.target}-{self.runtime}-{self.precision}-b{least}-{greatest}"

    @property
    def best_batch(self) -> int:
        """The batch that the engine is built for; a dynamic one takes others, too."""
        return self.batch if self.batches is None else self.batches[1]

    @property
    def fastest_key(self) -> str:
        """The name that the fastest runtime's engine has, too."""
        return f"{self.target}-fastest-{self.precision}-b{self.batch}"

    @property
    def sm(self) -> int | None:
        """Compute capability times 10 of the NVIDIA GPU that it is built for."""
        return find_target(self.target).sm

    @property
    def form(self) -> Form:
        """The ONNX form that it is built from."""
        return form_of(self.precision, self.dialect)


@dataclass
class Measured:
    """What was measured of one engine: logits beside the float network's, and raw times in ns."""

    logits: NDArray[np.float32] | None = None
    reference: NDArray[np.float32] | None = None
    rounds: list[Times] | None = None
    conditions: Conditions | None = None
    profile: Profile | None = None
    timing: Timing | None = None
    """How the times were taken; only those that were taken alike are compared."""


@dataclass(frozen=True)
class Findings:
    """Everything that a report is assembled from."""

    recipe: Recipe
    machine: ProbeRecord
    device: str
    card: Network
    labelled: ImageSet | None
    evaluation: ImageSet | None
    calibration: ImageSet | None
    pruning: Pruning | None
    plan: Path | None
    parity: Mapping[tuple[Form, str | None], Artifact]
    """By ONNX form, and runtime or None where nothing here reads the form."""
    parity_from: str
    parity_faults: Mapping[tuple[Form, str | None], str]
    places: tuple[Place, ...]
    exports: Mapping[Form, Artifact]
    dla: Mapping[Place, DlaPlan]
    """Of engines that are asked to run on a DLA."""
    engines: Mapping[Place, Artifact]
    measured: Mapping[Place, Measured]
    faults: Mapping[Place, str]
    skips: Mapping[Place, str]
    """Of engines that are not run, because this machine cannot."""
    away: tuple[str, ProbeRecord] | None
    """The device that a kit was run on, for the targets that are out of reach here."""
    stages: tuple[StageLine, ...]
    sensitivity: Path | None
    judged: bool
    """Whether the run went on to where gates are judged."""


def report_of(found: Findings) -> Report:
    """Return the record of a run."""
    rows = mark_fastest(tuple(_row(found, place) for place in found.places))
    effect = None if found.pruning is None else found.pruning.effect
    return Report(
        edgexception=__version__,
        recipe=found.recipe.model_dump(mode="json", exclude_none=True),
        network=found.card,
        machine=_machine(found.device, found.machine),
        versions=_versions(found.machine),
        pruning=found.pruning,
        calibration=_calibration(found),
        evaluation_photos=None if found.labelled is None else len(found.labelled),
        evaluation_images=None if found.evaluation is None else len(found.evaluation),
        bad_images=tuple(_bad_images(found)),
        types=tuple(_types(found)),
        parity=tuple(_parity(found)),
        rows=rows,
        gates=judge(found.recipe.gates, rows, effect) if found.judged else (),
        stages=found.stages,
        sensitivity=(
            None
            if found.sensitivity is None
            else Sensitivity.model_validate_json(found.sensitivity.read_bytes())
        ),
    )


def _machine(device: str, machine: ProbeRecord) -> Machine:
    return Machine(
        device=device,
        arch=machine.arch,
        system=machine.system,
        python=machine.python,
        board=machine.board,
        power_mode=machine.power_mode,
        cpu=machine.cpu.model,
        cores=machine.cpu.usable_cores,
        vnni=machine.cpu.vnni,
        memory_bytes=machine.memory.total_bytes,
    )


def _versions(machine: ProbeRecord) -> dict[str, str]:
    found = {name: facts.version for name, facts in machine.runtimes.items() if facts.version}
    for name in ("torch", "nncf", "onnx"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**({"numpy": machine.numpy} if machine.numpy else {}), **found}


def _calibration(found: Findings) -> Calibration | None:
    if found.plan is None or found.calibration is None:
        return None
    plan = json.loads(found.plan.read_bytes())
    origin = plan["provenance"]
    bits = {weight["bits"] for weight in plan["weights"].values()}
    return Calibration(
        images=len(found.calibration),
        photos=found.calibration.photo_count,
        warning=too_few(origin["ranges"], found.calibration.photo_count),
        digest=origin["calibration_digest"],
        method=origin["method"],
        activations=origin["activations"],
        ranges=origin["ranges"],
        bias_correction=origin["bias_correction"],
        rounding=origin["rounding"],
        weight_bits=min(bits),
        exceptions=(
            Exceptions(layers=plan["precision"], chosen=origin["precision"])
            if plan["precision"] or origin["precision"]
            else None
        ),
    )


def _types(found: Findings) -> Iterator[Types]:
    for form, artifact in found.exports.items():
        if form.half:
            types = json.loads(artifact.file("types.json").read_bytes())
            yield Types(form=form.name, fp16=len(types["fp16"]), fp32=types["fp32"])


def _bad_images(found: Findings) -> Iterator[BadImageLine]:
    for name, images in (("calibration", found.calibration), ("evaluation", found.labelled)):
        for bad in images.bad if images else ():
            yield BadImageLine(set=name, name=bad.name, reason=bad.reason)


def _parity(found: Findings) -> Iterator[Parity]:
    for (form, _), artifact in found.parity.items():
        rows = json.loads(artifact.file("parity.json").read_bytes())
        yield Parity(form=form.name, images_from=found.parity_from, **rows)
    for (form, runtime), reason in found.parity_faults.items():
        yield Parity(form=form.name, runtime=runtime, failed=reason)
    compared = {form for form, _ in (*found.parity, *found.parity_faults)}
    for form in found.exports:
        if form not in compared:
            reason = "no photos were given to compare on"
            yield Parity(form=form.name, skipped=reason)


# --- rows -----------------------------------------------------------------------------------------


def build_record(built: Artifact) -> BuildRecord:
    """Return what the device said of an engine when it built it."""
    return BuildRecord.model_validate_json(built.file("build.json").read_bytes())


def _row(found: Findings, place: Place) -> Row:
    built = found.engines.get(place)
    measured = found.measured.get(place, Measured())
    fault = found.faults.get(place)
    facts: dict[str, Any] = {"status": "skipped", "reason": "the run ended before this stage"}
    if built is not None:
        record = build_record(built)
        facts = {"status": "built", "engine_bytes": record.engine_bytes, "layers": record.layers}
        # A listing is of one batch.
        listing = _listing(record) if place.batch == place.best_batch else None
        facts |= {"executed": executed(record), "listing": listing}
        facts["onnx_bytes"] = found.exports[place.form].files["model.onnx"].bytes
    if place in found.dla:
        told = built and build_record(built).settings.get("not_on_dla")
        facts["dla"] = dla_planned(found.dla[place], told)
    if measured.logits is not None or measured.rounds is not None:
        facts["status"] = "measured"
    if fault is not None:
        facts |= {"status": "failed", "reason": fault}
    elif place in found.skips:
        facts |= {"status": "skipped", "reason": found.skips[place]}
    else:
        facts |= _quality(found, place, measured) | _speed(found, place, measured)
    device, machine = found.device, found.machine
    elsewhere = is_out_of_reach(place.target, machine)
    if elsewhere and found.away is not None:
        device, machine = found.away
        facts["machine"] = _machine(device, machine)
    known = found.away is not None or not elsewhere
    there = machine.runtimes[place.runtime] if known else RuntimeFacts()
    return Row(
        target=place.target,
        runtime=place.runtime,
        runtime_version=there.version,
        program=there.program,
        precision=place.precision,
        batch=place.batch,
        batches=place.batches,
        threads=place.threads,
        **facts,
    )


def _listing(record: BuildRecord) -> Listing | None:
    found = record.inspection
    if found is None:
        return None
    int8 = [kernel for kernel in found.kernels if kernel.read and kernel.read[0].type == "Int8"]
    return Listing(
        kernels=len(found.kernels),
        read_bytes=found.read_bytes,
        written_bytes=found.written_bytes,
        weights_bytes=record.weights_bytes,
        zeros_bytes=record.zeros_bytes,
        int8_kernels=len(int8),
        int8_widened=sum(kernel.written[0].type != "Int8" for kernel in int8),
    )


def mark_fastest(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows, those of the fastest of several runtimes marked that were timed alike."""
    contests: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        if row.latency is not None:
            contest = (row.target, row.precision, row.batch, str(row.timing))
            contests.setdefault(contest, []).append(row)
    won = [min(contest, key=_median_ms) for contest in contests.values() if len(contest) > 1]
    return tuple(
        row.model_copy(update={"fastest": True}) if any(row is w for w in won) else row
        for row in rows
    )


def _median_ms(row: Row) -> float:
    return row.latency.median_ms if row.latency else np.inf


def _quality(found: Findings, place: Place, measured: Measured) -> dict[str, Any]:
    if measured.logits is None or measured.reference is None:
        return {}
    facts: dict[str, Any] = {
        "fidelity": Fidelity.model_validate(compare(measured.reference, measured.logits))
    }
    labels = None if found.labelled is None else found.labelled.labels
    if labels is not None:
        judged = accuracy(measured.logits[: len(labels)], labels)
        facts["top1"] = judged.top1
        facts["top5"] = judged.top5
        if place.precision != "fp32":
            count = len(labels)
            facts["paired"] = paired(measured.reference[:count], measured.logits[:count], labels)
    return facts


def _speed(found: Findings, place: Place, measured: Measured) -> dict[str, Any]:
    if measured.rounds is None:
        return {}
    latency = LatencySummary.of(measured.rounds)
    facts: dict[str, Any] = {
        "latency": latency,
        "images_per_second": None if measured.timing else place.batch / latency.median_ms * 1000,
        "conditions": measured.conditions and TimedUnder.model_validate(measured.conditions),
        "timing": measured.timing,
    }
    if measured.profile is not None:
        facts["spent"] = Spent.model_validate(spent(measured.profile))
    slow = found.measured.get(replace(place, precision="fp32"), Measured())
    if slow.rounds is not None and slow.timing == measured.timing and place.precision != "fp32":
        facts["speedup"] = ratio_of_medians(slow.rounds, measured.rounds)
    if is_int8(place.precision):
        facts["gain"] = _gain(found, place, measured)
    return facts


def _gain(found: Findings, place: Place, int8: Measured) -> Gain | None:
    """Compare an INT8 engine with the fastest float engine of its place; None where none is."""
    floats = {
        other: times.rounds
        for other, times in found.measured.items()
        if times.rounds is not None
        and times.timing == int8.timing
        and not is_int8(other.precision)
        and other == replace(place, precision=other.precision)
    }
    if not floats or int8.rounds is None:
        return None
    best = min(floats, key=lambda other: LatencySummary.of(floats[other]).median_ms)
    ratio = ratio_of_medians(floats[best], int8.rounds)
    profiles = (int8.profile, found.measured[best].profile)
    slower = None
    if profiles[0] is not None and profiles[1] is not None:
        blocks = slower_blocks(spent(profiles[0]), spent(profiles[1]))
        slower = tuple(Slower.model_validate(block) for block in blocks)
    return Gain(over=best.precision, ratio=ratio, slower=slower)


def compare(expected: NDArray[Any], found: NDArray[Any]) -> dict[str, Any]:
    """Return a `Fidelity` as plain data: JSON has no infinity, which the SQNR can be."""
    row = asdict(fidelity(expected, found))
    row["sqnr_db"] = None if row["sqnr_db"] == np.inf else max(row["sqnr_db"], SQNR_FLOOR_DB)
    return row
