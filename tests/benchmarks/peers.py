"""Our INT8 beside ONNX Runtime's, NNCF's and ModelOpt's: one network, one set of photos, one run.

    python tests/benchmarks/peers.py [RECIPE ...] [--images N] [--input-size N]
                                     [--calibration-images N] [--also RECIPE] [--skip-modelopt]

Exports a recipe's float network and our INT8 of it, lets every tool quantize the same float graph
on the same calibration images, and prints two tables for each recipe:

a. as TensorRT takes it: int8 activations around zero, one scale a tensor, float biases. All graphs
   are executed in float32 arithmetic (peer_tools.py says how), so that no kernel that saturates
   flatters anyone.
b. as executed by ONNX Runtime and OpenVINO on this processor, with uint8 activations where a tool
   has them, and with latency at batch 1: engines take turns, round by round.

`--images` takes the first N evaluation images only, `--input-size` another size of the network's
input than the recipe's, `--calibration-images` fewer of those for every tool (ONNX Runtime keeps
all activations of all images in memory: 30 GB of 135 at 299x299), `--also` puts the `quantize`
section of one more recipe into table a (QAT beside PTQ). ModelOpt is installed into build/modelopt
when it is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from peer_tools import (
    MODELOPT,
    Peer,
    logits_in_float,
    modelopt_peers,
    nncf_peers,
    onnxruntime_peers,
    openvino_engine,
    quantized_convolutions,
)

from edgexception.bench.accuracy import fidelity
from edgexception.bench.paired import paired
from edgexception.bench.protocol import Engine, build_engine, measure_latency, run_images
from edgexception.bench.statistics import LatencySummary, Times, ratio_of_medians
from edgexception.data import open_calibration, open_evaluation
from edgexception.device import local_device
from edgexception.imageset import ImageSet
from edgexception.pipeline import run
from edgexception.preprocess import PreprocessChanges
from edgexception.recipe import BenchSpec, ExportSpec, Gates, PtqSpec, Recipe
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report

HOME = Path("build/modelopt")


class Images(NamedTuple):
    """What every network sees, and what it should say."""

    calibration: ImageSet
    npy: Path
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    """Of the first images: photos have labels, crops of them have none."""


def calibrated_on(recipe: Recipe, images: int | None) -> Recipe:
    """Return the recipe with another number of calibration images."""
    if images is None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"images": images})
    return recipe.model_copy(update={"calibration": calibration})


def at_size(recipe: Recipe, side: int | None) -> Recipe:
    """Return the recipe with another input size, under a name that says so."""
    if side is None:
        return recipe
    changes = (recipe.model.preprocess or PreprocessChanges()).model_copy(
        update={"input_size": (side, side)}
    )
    model = recipe.model.model_copy(update={"preprocess": changes})
    return recipe.model_copy(update={"name": f"{recipe.name}-{side}", "model": model})


def exported(recipe: Recipe, spec: PtqSpec, out: Path, activations: str) -> tuple[Report, Path]:
    """Export float and our INT8, and return the folder of graphs; TensorRT's is symmetric."""
    symmetric = activations == "symmetric"
    changes = {
        "prune": None,  # the tools quantize the network as it was trained
        "quantize": spec.model_copy(update={"activations": activations}),
        "export": ExportSpec(dialects=("tensorrt",) if symmetric else ()),
        "targets": () if symmetric else recipe.targets,
        "bench": None,
        "gates": Gates(),
    }
    report = run(recipe.model_copy(update=changes), out, "export").report
    return report, out / "onnx"


def open_images(recipe: Recipe, report: Report, most: int | None, folder: Path) -> Images:
    """Open both sets of a recipe and write the evaluation's images down."""
    preprocess, classes = report.network.preprocess, report.network.classes
    labelled, evaluation = open_evaluation(recipe.evaluation, preprocess, classes)
    calibration = open_calibration(recipe.calibration, preprocess, evaluation=labelled)
    if most is not None:
        evaluation = replace(evaluation, samples=evaluation.samples[:most])
        labelled = replace(labelled, samples=labelled.samples[:most])
    evaluation.write_npy(folder / "images.npy")
    pixels = np.load(folder / "images.npy", mmap_mode="r")
    return Images(calibration, folder / "images.npy", pixels, labelled.labels)


# --- tables ---------------------------------------------------------------------------------------

COLUMNS = "top-1 | lost/gained (p) | changed | SQNR | MB"


def judged(
    floats: NDArray[np.float32], found: NDArray[np.float32], labels: NDArray[np.int64], graph: Path
) -> str:
    """Return the cells of COLUMNS for a network's logits."""
    count = len(labels)
    pair = paired(floats[:count], found[:count], labels)
    near = fidelity(floats, found)
    right = int((found[:count].argmax(axis=1) == labels).sum())
    changed = near.agreement.trials - near.agreement.successes
    size = graph.stat().st_size
    if graph.suffix == ".xml":
        size += graph.with_suffix(".bin").stat().st_size
    return (
        f"{right / count:.2%} | {pair.lost}/{pair.gained} ({pair.p_value:.2g}) | "
        f"{changed} of {near.agreement.trials} | {near.sqnr_db:.1f} dB | {size / 1e6:.1f}"
    )


def table_as_plans(graphs: Mapping[str, Path], images: Images, threads: int) -> None:
    """Print table a; the first graph is the float network."""
    print("\n**a. TensorRT's rules, executed in float32 arithmetic**\n", flush=True)
    print(f"| network | INT8 convolutions | {COLUMNS} |\n|---|--:|--:|--:|--:|--:|--:|")
    floats: NDArray[np.float32] | None = None
    for name, graph in graphs.items():
        found = logits_in_float(graph, images.pixels, threads)
        floats = found if floats is None else floats
        cells = judged(floats, found, images.labels, graph)
        print(f"| {name} | {quantized_convolutions(graph)} | {cells} |", flush=True)


def table_as_executed(
    graphs: Mapping[tuple[str, str], Path],
    images: Images,
    spec: BenchSpec,
    threads: int,
    folder: Path,
) -> None:
    """Print table b, of graphs by name and runtime; a runtime's first graph is its float one."""
    device = local_device()
    engines: dict[tuple[str, str], Engine] = {}
    for number, ((name, runtime), graph) in enumerate(graphs.items()):
        built = folder / f"engine-{number}"
        if graph.suffix == ".xml":
            path = openvino_engine(graph, threads, built)
        else:
            record = build_engine(runtime, graph.resolve(), 1, threads, device, built)
            path = built / record["engine"]
        engines[name, runtime] = Engine(f"{name}, {runtime}", runtime, path, 1, threads)
    logits = {
        key: run_images(engine, images.npy, device, folder / f"run-{number}")
        for number, (key, engine) in enumerate(engines.items())
    }
    times = measure_latency(list(engines.values()), spec, device, folder / "rounds")
    print("\n**b. as executed here**\n")
    print(f"| network | runtime | {COLUMNS} | median ms | than its float |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    floats: dict[str, tuple[str, str]] = {}
    for key, engine in engines.items():
        name, runtime = key
        slow: list[Times] = times[engines[floats.setdefault(runtime, key)].key]
        fast = times[engine.key]
        cells = judged(logits[floats[runtime]], logits[key], images.labels, graphs[key])
        print(
            f"| {name} | {runtime} | {cells} | {LatencySummary.of(fast).median_ms:.2f} | "
            f"{ratio_of_medians(slow, fast).value:.2f}x |"
        )


# --- one recipe -----------------------------------------------------------------------------------


def compare(recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> None:
    """Print both tables of a recipe."""
    out = Path("build/peers") / recipe.name
    specs = [recipe.quantize, *(load_recipe(path).quantize for path in arguments.also)]
    plans: dict[str, Path] = {}
    executed: dict[tuple[str, str], Path] = {}
    for spec in specs:
        name = f"edgexception {spec.method.upper()}"
        report, onnx = exported(recipe, spec, out, "symmetric")
        source = (onnx / "fp32.onnx").resolve()
        plans[name] = (onnx / "int8-tensorrt.onnx").resolve()
        if spec is not recipe.quantize:
            continue
        report, onnx = exported(recipe, spec, out, "asymmetric")
        for runtime in ("onnxruntime", "openvino"):
            executed[name, runtime] = (onnx / f"int8-{runtime}.onnx").resolve()
    # A copy: nothing that another tool does to its input may reach the store.
    source = shutil.copyfile(source, folder / "fp32.onnx")
    images = open_images(recipe, report, arguments.images, folder)
    machine = report.machine
    reason = "not asked for"
    with contextlib.redirect_stdout(sys.stderr):  # the tools tell of their progress there
        calibration = images.calibration
        peers = dict(onnxruntime_peers(source, calibration, folder, symmetric=True))
        peers |= dict(nncf_peers(source, calibration, folder, symmetric=True))
        if not arguments.skip_modelopt:
            try:
                peers |= dict(modelopt_peers(source, calibration, folder, HOME))
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                reason = str(error)
        bits = 8 if machine.vnni else 7
        unsigned = [
            *onnxruntime_peers(source, calibration, folder, symmetric=False, weight_bits=bits),
            *nncf_peers(source, calibration, folder, symmetric=False),
        ]
    print(f"\n### {recipe.name}\n")
    print(
        f"{machine.cpu}, {machine.cores} threads, {'VNNI' if machine.vnni else 'no VNNI'}; "
        f"{_versions(report)}. {len(images.calibration)} calibration images, "
        f"{len(images.pixels)} evaluation images, {len(images.labels)} of them labelled."
    )
    table_as_plans({"float": source, **plans, **peers}, images, machine.cores)
    if not any(name.startswith("ModelOpt") for name in peers):
        print(f"\nModelOpt: skipped, {reason}")
    floats = {("float", runtime): source for runtime in ("onnxruntime", "openvino")}
    others = {(peer.name, _runtime(peer)): peer.graph for peer in unsigned}
    spec = recipe.bench or BenchSpec()
    table_as_executed({**floats, **executed, **others}, images, spec, machine.cores, folder)


def _runtime(peer: Peer) -> str:
    return "openvino" if peer.graph.suffix == ".xml" else "onnxruntime"


def _versions(report: Report) -> str:
    names = ("onnxruntime", "openvino", "nncf", "torch")
    return ", ".join([*(f"{name} {version(name)}" for name in names), MODELOPT[0]])


def main() -> None:
    """Print the tables of every recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", type=Path, default=[Path("recipes/kitchenware.yaml")])
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--input-size", type=int, default=None)
    parser.add_argument("--calibration-images", type=int, default=None)
    parser.add_argument("--also", action="append", type=Path, default=[])
    parser.add_argument("--skip-modelopt", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            recipe = at_size(load_recipe(path), arguments.input_size)
            recipe = calibrated_on(recipe, arguments.calibration_images)
            compare(recipe, arguments, Path(scratch))


if __name__ == "__main__":
    main()
