"""The stages that time a network for pruning: its steps at other widths, and pruned against whole.

The engines are built and run on the device as those of a report are. Their weights in INT8 have
nominal ranges, since nobody reads their logits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgexception.artifacts import Artifact, atomic_write, canonical_json
from edgexception.bench.protocol import Engine, build_engine, measure_latency
from edgexception.bench.statistics import LatencySummary, Times, ratio_of_medians
from edgexception.device import Progress
from edgexception.model_stages import load_model
from edgexception.recipe import BenchSpec
from edgexception.report.assemble import Place
from edgexception.report.record import LatencyCheck
from edgexception.workshop import Workshop, versions, write_json

if TYPE_CHECKING:
    from torch import fx

    from edgexception.preprocess import Preprocess
    from edgexception.prune.latency import Grid, Table

STEPS = BenchSpec(warmup_ms=20, duration_ms=80, min_iterations=5, rounds=1)
"""How the engine of a step is timed. Steps are many, and their sum is corrected in the end."""
NETWORKS = BenchSpec(warmup_ms=500, duration_ms=1500, min_iterations=30, rounds=5)
"""How two networks are timed against each other."""


def list_steps(shop: Workshop, model: Artifact) -> Artifact:
    """Write down what the latency of a network follows from, which is not its weights."""

    def write(folder: Path) -> None:
        from edgexception.prune.steps import steps_of
        from edgexception.prune.structure import structure_of

        trained = load_model(model)
        shape = trained.network.architecture, trained.preprocess.input_size
        steps = {name: step.model_dump() for name, step in steps_of(*shape).items()}
        facts = {"structure": structure_of(*shape).model_dump(), "steps": steps}
        (folder / "steps.json").write_text(canonical_json(facts) + "\n")

    inputs = {"model": model.digest, "versions": versions("torch")}
    return shop.once("latency-steps", "widths and sizes", inputs, write)


def time_steps(shop: Workshop, listed: Artifact, align: int, place: Place) -> Artifact:
    """Time a network's steps at some widths: `latency.json`.

    Each is kept as soon as it is timed, so that a later run of the stage goes on from there.
    """

    def write(folder: Path) -> None:
        import json

        from edgexception.prune.latency import LatencyTable, grids_of
        from edgexception.prune.plan import Structure
        from edgexception.prune.steps import Step

        facts = json.loads(listed.file("steps.json").read_bytes())
        steps = {name: Step.model_validate(step) for name, step in facts["steps"].items()}
        grids = grids_of(Structure.model_validate(facts["structure"]), steps, align)
        different = list(dict.fromkeys(grids.values()))
        tables = []
        for number, grid in enumerate(different):
            shop.progress(Progress("steps of the network", number, len(different), None))
            tables.append(_timed(shop, grid, place))
        table = LatencyTable(
            engine=place.key,
            threads=place.threads,
            steps={name: different.index(grid) for name, grid in grids.items()},
            tables=tuple(tables),
        )
        write_json(folder / "latency.json", table.model_dump(mode="json"))

    inputs = {
        "steps": listed.digest,
        "align": align,
        "bench": STEPS.model_dump(),
        **_identity(shop, place),
    }
    return shop.once("latency-table", place.key, inputs, write)


def _identity(shop: Workshop, place: Place) -> dict[str, Any]:
    """Return what the times of an engine depend on beside its network."""
    return {
        "engine": place.key,
        "threads": place.threads,
        "machine": shop.identity(place.runtime),
        "versions": versions("torch", "onnx"),
    }


def _timed(shop: Workshop, grid: Grid, place: Place) -> Table:
    """Return the median times of a step at the widths of a grid."""
    from edgexception.preprocess import Preprocess
    from edgexception.prune.latency import Table
    from edgexception.prune.steps import COPIES, step_graph

    name = hashlib.sha256(grid.model_dump_json().encode()).hexdigest()
    known = shop.unfinished / f"{name}.json"
    if known.is_file():
        return Table.model_validate_json(known.read_bytes())
    # A step's size may be below the least of a photo.
    own = Preprocess(input_size=(32, 32)).model_copy(update={"input_size": grid.step.size})
    with shop.store.scratch() as work:
        engines = {
            (a, b): _built(shop, step_graph(grid.step, a, b), own, place, work / f"{a}-{b}")
            for a in grid.inputs
            for b in grid.outputs
        }
        times = measure_latency(list(engines.values()), STEPS, shop.device, work / "rounds")
    ms = {
        widths: float(np.median(np.concatenate(times[engine.key]))) / 1e6 / COPIES
        for widths, engine in engines.items()
    }
    rows = tuple(tuple(ms[a, b] for b in grid.outputs) for a in grid.inputs)
    table = Table(**dict(grid), ms=rows)
    known.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(known, table.model_dump_json())
    return table


def _built(
    shop: Workshop, graph: fx.GraphModule, preprocess: Preprocess, place: Place, folder: Path
) -> Engine:
    """Build an engine of a graph on the device, in a folder of its own."""
    from edgexception.export.lint import check_typed
    from edgexception.export.onnx_graph import to_onnx
    from edgexception.quantize.dialects import DIALECTS
    from edgexception.quantize.half import type_graph
    from edgexception.quantize.nominal import nominal_plan
    from edgexception.targets import load_dialects

    form = place.form
    plan = nominal_plan(graph, load_dialects()[form.dialect].activations[0]) if form.int8 else None
    # No tensor is near the ends of float16, whatever images would show of the network's own.
    peaks = {node.name: 1.0 for node in graph.graph.nodes}
    proto = to_onnx(
        graph,
        preprocess,
        None,
        plan=plan,
        dialect=None if plan is None else DIALECTS[form.dialect],
        types=type_graph(graph, plan, "fp16" if form.half else "fp32", peaks),
        batch=place.batch,
    )
    folder.mkdir(parents=True)
    model = folder / "model.onnx"
    model.write_bytes(proto.SerializeToString(deterministic=True))
    if form.dialect == "tensorrt":
        check_typed(model, place.sm)
    told = {"sm": place.sm, "tensorrt": place.tensorrt_options}
    record = build_engine(
        place.runtime,
        model,
        place.batch,
        place.threads,
        shop.device,
        folder / "engine",
        more=told,
    )
    return Engine(
        folder.name,
        place.runtime,
        folder / "engine" / record["engine"],
        place.batch,
        place.threads,
        place.tensorrt_options,
    )


def time_plan(shop: Workshop, model: Artifact, planned: Artifact, place: Place) -> LatencyCheck:
    """Measure the network as a plan leaves it against the whole one, in turns."""

    def write(folder: Path) -> None:
        from edgexception.model.graph import inference_graph
        from edgexception.prune.apply import pruned
        from edgexception.prune.plan import load_prune_plan

        trained = load_model(model)
        smaller = pruned(trained.network, load_prune_plan(planned.file("prune.json")))
        networks = {"whole": trained.network, "pruned": smaller}
        with shop.store.scratch() as work:
            engines = []
            for name, network in networks.items():
                graph = inference_graph(network, trained.preprocess)
                engines.append(_built(shop, graph, trained.preprocess, place, work / name))
            times = measure_latency(engines, NETWORKS, shop.device, work / "rounds", shop.progress)
        for name, rounds in times.items():
            np.savez(folder / f"{name}_ns.npz", *rounds)

    inputs = {
        "model": model.digest,
        "plan": planned.digest,
        "bench": NETWORKS.model_dump(),
        **_identity(shop, place),
    }
    artifact = shop.once("latency-check", place.key, inputs, write)
    whole, smaller = (_rounds(artifact.file(f"{name}_ns.npz")) for name in ("whole", "pruned"))
    summaries = [LatencySummary.of(rounds) for rounds in (whole, smaller)]
    return LatencyCheck(
        share=ratio_of_medians(smaller, whole),
        median_ms=(summaries[0].median_ms, summaries[1].median_ms),
        noisy=any(summary.noisy for summary in summaries),
    )


def _rounds(path: Path) -> list[Times]:
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[f"arr_{number}"] for number in range(len(arrays.files))]
