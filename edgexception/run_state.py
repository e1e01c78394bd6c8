"""What a run has so far, what of it goes into the report, and what is left in the output folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgexception.ability import is_out_of_reach
from edgexception.agent.manifest import FILE as MANIFEST
from edgexception.artifacts import Artifact
from edgexception.bench.protocol import Engine
from edgexception.device import ProbeRecord
from edgexception.engine_stages import engine_at
from edgexception.errors import EdgexError, NotPossibleHere
from edgexception.imageset import ImageSet
from edgexception.output import fill_output
from edgexception.recipe import Recipe
from edgexception.recipe_file import dump_recipe
from edgexception.report.assemble import Findings, Measured, Place, build_record
from edgexception.report.network import Network
from edgexception.report.pruning import pruning_of
from edgexception.report.record import PruningEffect, PruningLatency, Report
from edgexception.report.render import to_markdown
from edgexception.targets import Form
from edgexception.workshop import Workshop

if TYPE_CHECKING:
    from edgexception.export.dla import DlaPlan


@dataclass
class RunState:
    """What a run has so far; each step of the pipeline adds to it."""

    recipe: Recipe
    shop: Workshop
    places: tuple[Place, ...]
    model: Artifact
    card: Network
    labelled: ImageSet | None = None
    evaluation: ImageSet | None = None
    calibration: ImageSet | None = None
    pruning: Artifact | None = None
    """The plan; where it is applied, `model` is the pruned network."""
    pruning_effect: PruningEffect | None = None
    pruning_latency: PruningLatency | None = None
    latency_table: Artifact | None = None
    """Times of the network's steps, where the budget is one of latency."""
    quantized: Artifact | None = None
    sensitivity: Artifact | None = None
    exports: dict[Form, Artifact] = field(default_factory=dict)
    parity: dict[tuple[Form, str | None], Artifact] = field(default_factory=dict)
    parity_from: str = ""
    parity_faults: dict[tuple[Form, str | None], EdgexError] = field(default_factory=dict)
    dla: dict[Place, DlaPlan] = field(default_factory=dict)
    """Of engines that are asked to run on a DLA."""
    engines: dict[Place, Artifact] = field(default_factory=dict)
    measured: dict[Place, Measured] = field(default_factory=dict)
    faults: dict[Place, EdgexError] = field(default_factory=dict)
    skips: dict[Place, str] = field(default_factory=dict)
    """Engines that are not run, because this machine cannot."""
    away: Workshop | None = None
    """Where a kit was run, for the targets that are out of reach; its results answer there."""
    waiting: dict[Place, str] = field(default_factory=dict)
    """Engines that a kit builds, and has not built yet."""

    def is_away(self, place: Place) -> bool:
        """Whether an engine is for a kit: it cannot be built by the machine of `shop`."""
        return is_out_of_reach(place.target, self.shop.machine)

    def shop_of(self, place: Place) -> Workshop | None:
        """Return where an engine is built and run; None while a kit waits for that."""
        return self.away if self.is_away(place) else self.shop

    def machine_of(self, place: Place) -> ProbeRecord:
        """Return the machine that builds and runs an engine."""
        return (self.shop_of(place) or self.shop).machine

    @property
    def unmeasured(self) -> EdgexError | None:
        """The error of who wants measurements where engines still wait."""
        return next((NotPossibleHere(f"{p.key}: {why}") for p, why in self.waiting.items()), None)

    @property
    def fault(self) -> EdgexError | None:
        """The error of the first engine that failed, else of the first that could not be run."""
        skips = (NotPossibleHere(f"{place.key}: {why}") for place, why in self.skips.items())
        return next(iter((*self.faults.values(), *skips)), None)


def engine_of(place: Place, built: Artifact) -> Engine:
    """Return an engine as it is measured."""
    return engine_at(place, built.file(build_record(built).engine))


def findings(state: RunState, *, judged: bool) -> Findings:
    """Return what the report is assembled from."""
    return Findings(
        recipe=state.recipe,
        machine=state.shop.machine,
        device=state.shop.device.name,
        card=state.card,
        labelled=state.labelled,
        evaluation=state.evaluation,
        calibration=state.calibration,
        pruning=None
        if state.pruning is None
        else pruning_of(
            state.pruning.file("prune.json"), state.pruning_effect, state.pruning_latency
        ),
        plan=None if state.quantized is None else state.quantized.file("plan.json"),
        parity=state.parity,
        parity_from=state.parity_from,
        parity_faults={key: str(error) for key, error in state.parity_faults.items()},
        places=state.places,
        exports=state.exports,
        dla=state.dla,
        engines=state.engines,
        measured=state.measured,
        faults={place: str(error) for place, error in state.faults.items()},
        skips={**state.skips, **state.waiting},
        away=None if state.away is None else (state.away.device.name, state.away.machine),
        stages=tuple(state.shop.done),
        sensitivity=None
        if state.sensitivity is None
        else state.sensitivity.file("sensitivity.json"),
        judged=judged,
    )


def publish(out: Path, state: RunState, report: Report) -> None:
    """Link results by name from the output folder, and write the recipe and the report."""
    links = {"model.safetensors": state.model.file("model.safetensors")}
    if state.pruning is not None:
        links["prune.json"] = state.pruning.file("prune.json")
    if state.latency_table is not None:
        links["latency.json"] = state.latency_table.file("latency.json")
    if state.quantized is not None:
        for name in ("plan.json", "calibration.json"):
            links[name] = state.quantized.file(name)
    if state.sensitivity is not None:
        links["sensitivity.json"] = state.sensitivity.file("sensitivity.json")
    links |= {f"onnx/{form.name}.onnx": a.file("model.onnx") for form, a in state.exports.items()}
    links |= {
        f"onnx/{form.name}.on-{runtime or 'nothing'}.parity.json": artifact.file("parity.json")
        for (form, runtime), artifact in state.parity.items()
    }
    for place, row in zip(state.places, report.rows, strict=True):
        if place not in state.engines or place in state.faults:
            continue
        built = state.engines[place]
        engine = engine_of(place, built)
        own = place.engine_key
        for name in (own, place.fastest_key) if row.fastest else (own,):
            links[f"engines/{name}{engine.path.suffix}"] = engine.path
            links[f"engines/{name}.json"] = built.file(MANIFEST)
            links[f"engines/{name}.build.json"] = built.file("build.json")
    texts = {
        "recipe.yaml": dump_recipe(state.recipe),
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.md": to_markdown(report),
    }
    fill_output(out, state.shop.store, links, texts)
