"""Our INT8 beside ONNX Runtime's own static quantization: same network, photos, runtime and run.

    python tests/benchmarks/static_peer.py [RECIPE] [--out FOLDER]

Runs the recipe (what was done before is not done again), quantizes its exported float network with
`onnxruntime.quantization.quantize_static` on the same calibration images, in each of that tool's
calibration methods, and prints one table: logit SQNR and agreement on the evaluation images as ONNX
Runtime executes the graphs, and latency of all engines measured in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgexception.bench.accuracy import fidelity
from edgexception.bench.protocol import Engine, measure_latency, run_images
from edgexception.bench.statistics import LatencySummary, ratio_of_medians
from edgexception.data import open_calibration, open_evaluation
from edgexception.device import local_device
from edgexception.imageset import ImageSet
from edgexception.pipeline import run
from edgexception.recipe import BenchSpec
from edgexception.recipe_file import load_recipe

METHODS = (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile)
RUNTIME = "onnxruntime"


class Reader(CalibrationDataReader):
    """Calibration images one by one, as the exported graph takes them."""

    def __init__(self, images: ImageSet) -> None:
        self.batches: Iterator[np.ndarray] = images.batches(1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, or None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def peers(
    float_onnx: Path, images: ImageSet, vnni: bool, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Quantize with every method; without VNNI with that tool's 7-bit weights, as it advises."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(float_onnx, prepared)
    for method in METHODS:
        path = folder / f"peer-{method.name}.onnx"
        quantize_static(
            prepared,
            path,
            Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not vnni,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
        yield f"quantize_static {method.name}", path


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/kitchenware.yaml"))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    out = arguments.out or Path("build") / recipe.name
    report = run(recipe, out).report
    preprocess, classes = report.network.preprocess, report.network.classes
    _, evaluation = open_evaluation(recipe.evaluation, preprocess, classes)
    calibration = open_calibration(recipe.calibration, preprocess, evaluation=None)
    device, threads = local_device(), report.machine.cores
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        evaluation.write_npy(folder / "images.npy")
        graphs = {
            "float": out / "onnx/fp32.onnx",
            "edgexception": out / "onnx/int8-onnxruntime.onnx",
            **dict(peers(out / "onnx/fp32.onnx", calibration, report.machine.vnni, folder)),
        }
        engines = []
        for number, (name, graph) in enumerate(graphs.items()):
            built = folder / f"engine-{number}"
            request = {"runtime": RUNTIME, "model": "model.onnx", "batch": 1, "threads": threads}
            record = device.call("build", request, {"model.onnx": graph.resolve()}, built)
            engines.append(Engine(name, RUNTIME, built / record["engine"], 1, threads))
        logits = {
            engine.key: run_images(engine, folder / "images.npy", device, folder / f"run-{n}")
            for n, engine in enumerate(engines)
        }
        times = measure_latency(engines, recipe.bench or BenchSpec(), device, folder / "rounds")
    print(f"{report.machine.cpu}, {threads} threads, VNNI {report.machine.vnni}; {report.versions}")
    print(f"{len(calibration)} calibration and {len(evaluation)} evaluation images")
    print("| network | logit SQNR | agreement | median ms | faster than float |")
    print("|---|--:|--:|--:|--:|")
    for name in graphs:
        found = fidelity(logits["float"], logits[name])
        speed = LatencySummary.of(times[name])
        faster = ratio_of_medians(times["float"], times[name])
        print(
            f"| {name} | {found.sqnr_db:.1f} dB | {found.agreement.successes}/"
            f"{found.agreement.trials} | {speed.median_ms:.2f} | {faster.value:.2f}x |"
        )


if __name__ == "__main__":
    main()
