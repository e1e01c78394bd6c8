"""The stages right of the ONNX seam, which a device does: engines, their logits and their times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.artifacts import Artifact
from edgexception.bench.protocol import Engine, measure_latency, run_images
from edgexception.recipe import BenchSpec
from edgexception.workshop import Workshop, write_json


def build(
    shop: Workshop, exported: Artifact, runtime: str, batch: int, threads: int, what: str
) -> Artifact:
    """Build one engine on the device: the engine file and `build.json`."""

    def write(folder: Path) -> None:
        record = call_build(shop, exported, runtime, batch, threads, folder)
        write_json(folder / "build.json", record)

    inputs = {
        "exported": exported.digest,
        "batch": batch,
        "threads": threads,
        "machine": shop.identity(runtime),
    }
    return shop.once("build", what, inputs, write)


def call_build(
    shop: Workshop, exported: Artifact, runtime: str, batch: int, threads: int, out: Path
) -> dict[str, Any]:
    """Let the device build an engine into the folder `out`; return its build record."""
    request = {"runtime": runtime, "model": "model.onnx", "batch": batch, "threads": threads}
    files = {"model.onnx": exported.file("model.onnx")}
    return shop.device.call("build", request, files, out, shop.progress)


def evaluate(
    shop: Workshop, engine: Engine, built: Artifact, images: Artifact
) -> NDArray[np.float32]:
    """Return the logits that the device computes on a `reference` artifact's images."""

    def write(folder: Path) -> None:
        logits = run_images(
            engine, images.file("images.npy"), shop.device, folder / "run", shop.progress
        )
        np.save(folder / "logits.npy", logits)

    inputs = {
        "engine": built.digest,
        "images": images.digest,
        "threads": engine.threads,
        "machine": shop.identity(engine.runtime),
    }
    artifact = shop.once("evaluate", engine.key, inputs, write)
    found: NDArray[np.float32] = np.load(artifact.file("logits.npy"), allow_pickle=False)
    return found


def bench(
    shop: Workshop, engines: Sequence[tuple[Engine, Artifact]], spec: BenchSpec
) -> dict[str, list[NDArray[np.int64]]]:
    """Measure all engines in turns; return every raw time in ns, by engine and round."""

    def write(folder: Path) -> None:
        times = measure_latency(
            [engine for engine, _ in engines], spec, shop.device, folder / "rounds", shop.progress
        )
        for number, (engine, _) in enumerate(engines):
            for turn, values in enumerate(times[engine.key]):
                np.save(folder / f"times-{number}-{turn}.npy", values)

    inputs = {
        "engines": [
            [engine.key, built.digest, engine.batch, engine.threads] for engine, built in engines
        ],
        "spec": spec.model_dump(),
        "machines": [shop.identity(runtime) for runtime in sorted({e.runtime for e, _ in engines})],
    }
    artifact = shop.once("bench", f"{len(engines)} engines", inputs, write)
    return {
        engine.key: [
            np.load(artifact.file(f"times-{number}-{turn}.npy"), allow_pickle=False)
            for turn in range(spec.rounds)
        ]
        for number, (engine, _) in enumerate(engines)
    }
